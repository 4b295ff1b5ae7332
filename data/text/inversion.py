"""Textual inversion: new words for frozen text encoders, whose vectors are learned (Gal et al. 2022).

A word is a file of vectors for each encoder, under the names `clip_l`, `clip_g` and `t5xxl`, which ComfyUI and
diffusers' scripts read, too. While text encoders learn, their slots hold the numbers of tokens in the place of states.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AddedToken, CLIPTokenizer, T5Tokenizer

from storage.weights import open_file, shorten, write_tensors

FOLDER = "embeddings"  # of the words that a training learned, beside its LoRA
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}  # encoder → name in a file
NAME = "mmdit.word"  # in a file's metadata
MOST = 64  # vectors of a word
BASE = 256  # numbers of tokens are written in two digits, which any type of number holds exactly


class NewWord(NamedTuple):
    """A word and its vectors.

    Attributes:
        name: as it stands in a prompt, such as `<toy>`.
        vectors: encoder → (n, width) float32: the word is read as n tokens.
    """

    name: str
    vectors: Mapping[str, Tensor]

    @classmethod
    def read(cls, given: str) -> Self:
        """Reads FILE or FILE:WORD. Without WORD it is the one that the file names, or else the file's name in <>.

        Raises:
            FileNotFoundError, ValueError: in one line, if there is no such file, or it holds no new word.
        """
        file, name = Path(given), ""
        if not file.is_file() and ":" in given:
            before, _, name = given.rpartition(":")
            file = Path(before)
        weights = open_file(file, unwrap=False)
        name = name or weights.metadata.get(NAME, f"<{file.stem}>")
        check_name(name)
        encoders = {key: encoder for encoder, key in KEYS.items()}
        if not weights or (strange := [key for key in weights if key not in encoders]):
            found = f"it holds {shorten(sorted(strange))}" if weights else "it is empty"
            raise ValueError(f"{file} is no new word of Stable Diffusion 3, which has {', '.join(encoders)}: {found}")
        vectors = {encoders[key]: weights[key].float() for key in weights}
        for encoder, own in vectors.items():
            if own.dim() != 2 or not 1 <= len(own) <= MOST or not own.isfinite().all():
                raise ValueError(f"{file}: {KEYS[encoder]} must be 1 to {MOST} finite vectors, got {tuple(own.shape)}")
        return cls(name, vectors)

    def write(self, folder: Path) -> None:
        """Writes the word's file into a folder. OSError on failure."""
        tensors = {KEYS[encoder]: own.detach().float().cpu().contiguous() for encoder, own in self.vectors.items()}
        stem = re.sub(r"[^\w-]", "", self.name)
        write_tensors(tensors, folder / f"{stem}.safetensors", {NAME: self.name})


def check_name(name: str) -> None:
    """ValueError unless a word is some visible ASCII, and can be the name of a file."""
    if not re.fullmatch(r"[!-~]+", name) or not re.search(r"\w", name):
        raise ValueError(f"a new word is letters without a space, such as <toy>, got {name!r}")


class Spelling:
    """How new words are read: a caption has the word, and a tokenizer knows a token for each of its vectors.

    Args:
        words: the new words that an encoder knows.
    """

    def __init__(self, words: Sequence[NewWord], encoder: str) -> None:
        counts = {word.name: len(word.vectors[encoder]) for word in words if encoder in word.vectors}
        self.tokens = {name: [name, *(f"{name}_{i}" for i in range(1, count))] for name, count in counts.items()}
        names = sorted(self.tokens, key=len, reverse=True)  # the longest first, since one may begin another
        self.pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def teach(self, tokenizer: CLIPTokenizer | T5Tokenizer) -> None:
        """Adds the tokens to a tokenizer, in place. ValueError if it has one of the words already."""
        for name, tokens in self.tokens.items():
            known = tokenizer(name, add_special_tokens=False, verbose=False).input_ids
            if len(known) == 1 and known[0] != tokenizer.unk_token_id:
                raise ValueError(f"the word {name} exists already: choose another, such as <my-{name}>")
            added = [AddedToken(token, lstrip=True, rstrip=True, normalized=False) for token in tokens]
            tokenizer.add_tokens(added)

    def __call__(self, caption: str) -> str:
        """The caption with a token for each vector of a word: `<toy>` becomes `<toy> <toy>_1`."""
        return self.pattern.sub(lambda found: " ".join(self.tokens[found[0]]), caption)


class Vocabulary(nn.Module):
    """The table of token vectors of an encoder, and those of new tokens.

    Args:
        table: the encoder's own.
        rows: of the new tokens, (n, width), float32; they learn unless they are frozen.
        first: the number of the first new token. The table may be longer, as T5's is.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor, first: int) -> None:
        super().__init__()
        self.table, self.rows, self.first = table, nn.Parameter(rows), first

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors (…, width) of token numbers."""
        new = ids >= self.first
        fresh = F.embedding((ids - self.first).clamp(min=0), self.rows)
        old = self.table(ids.masked_fill(new, 0))
        return torch.where(new[..., None], fresh.to(old.dtype), old)


def write_numbers(ids: Tensor, slot: Tensor) -> None:
    """Writes token numbers (B, N) below 65,536 into the first two columns of a slot (B, N, width), exactly."""
    slot[..., 0], slot[..., 1] = ids // BASE, ids % BASE


def read_numbers(slot: Tensor) -> Tensor:
    """The token numbers (B, N) that `write_numbers` wrote."""
    return slot[..., 0].long() * BASE + slot[..., 1].long()
