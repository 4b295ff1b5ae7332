"""Tokenizers for the small CLIP towers and T5 that the tools train."""

import json
from collections.abc import Iterable

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, T5Tokenizer


def train_tokenizer(words: Iterable[str], length: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer with CLIP's layout of the vocabulary, in which each of the words is one token.

    The layout: 256 bytes, 256 bytes at the end of a word, merges, start, end (A. Radford et al., "Learning
    Transferable Visual Models From Natural Language Supervision", 2021, section 2.4).

    Args:
        words: become one token each; other words are split, down to letters.
        length: tokens per caption, start and end included.
    """
    letters = sorted(ByteLevel.alphabet())
    letters += [letter + "</w>" for letter in letters]
    backend = CLIPTokenizer().backend_tokenizer
    # Among equally frequent pairs the trainer prefers low token numbers. It numbers the letters in random order unless
    # they are special tokens.
    trainer = BpeTrainer(vocab_size=10_000, special_tokens=letters, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(sorted(set(words)), trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    entries = [*letters, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={entry: i for i, entry in enumerate(entries)},
        merges=merges,  # type: ignore[arg-type]  # declared as strings, but it takes pairs
        model_max_length=length,
        padding_side="right",
    )


def unigram_tokenizer(words: Iterable[str], length: int) -> T5Tokenizer:
    """A unigram tokenizer as T5's, in which each of the words is one token; other words are split into letters.

    Args:
        words: of lower-case letters.
        length: tokens per caption, the end included.
    """
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0} | dict.fromkeys(letters, -6.0)
    pieces |= {f"▁{word}": -4.0 for word in sorted(set(words))}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=length)
