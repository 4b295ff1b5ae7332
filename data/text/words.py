"""Captions → the numbers of their tokens, for networks that read words themselves."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from data.text.encoder import Slot, Text, TextEncoder, listed
from data.text.tower import digest_of, read_tokenizer, real_tokens, tokenize


@final
class Words(TextEncoder):
    """A tokenizer alone: `tokens` (B, N, 1) are the numbers of a caption's tokens, as floats; `pooled` is (B, 0).

    Args:
        folder: holds `tokenizer/` as CLIP has it, such as a model folder.
        length: N, with start, end and padding; none means the tokenizer's length.

    Attributes:
        vocabulary: how many tokens there are.

    Raises:
        FileNotFoundError, ValueError: in one line, if the tokenizer is missing or damaged, or its length is none.
    """

    tokens_dim, pooled_dim = 1, 0

    def __init__(self, folder: str | os.PathLike[str], length: int | None = None) -> None:
        self.tokenizer = read_tokenizer(CLIPTokenizer, Path(folder) / "tokenizer")
        self.length = length or self.tokenizer.model_max_length
        if not 2 <= self.length <= 4096:
            raise ValueError(f"a caption needs 2 to 4,096 tokens, start and end included, got {self.length}")
        self.tokenizer.model_max_length = self.length
        self.vocabulary = len(self.tokenizer)
        self.slots = (Slot("tokenizer", slice(None), slice(None), slice(None)),)
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        return self

    def encode(self, captions: Sequence[str]) -> Text:
        ids = tokenize(self.tokenizer, listed(captions), self.length, "the network").to(self.device)
        return Text(ids[..., None].float(), torch.zeros(len(ids), 0, device=self.device))

    def mask(self, captions: Sequence[str]) -> Tensor:
        return real_tokens(self.tokenizer, listed(captions), self.length)

    def keep(self, kept: bool) -> None:
        """Does nothing: there is no encoder."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")

    def index(self) -> dict[str, list[str | None]]:
        return {"tokenizer": ["transformers", "CLIPTokenizer"]}

    def fingerprint(self) -> dict[str, Any]:
        return {"class": "Words", "length": self.length, "tokenizer": digest_of(self.tokenizer)}
