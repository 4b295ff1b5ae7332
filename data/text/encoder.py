"""The contract: captions → one vector per token and one per caption."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Text(NamedTuple):
    """Encoded captions: one vector per token `(B, N, D)` and one per caption `(B, P)`."""

    tokens: Tensor
    pooled: Tensor


class CutCaptions(UserWarning):
    """Captions that are too long for an encoder.

    Attributes:
        count: how many.
    """

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


class Slot(NamedTuple):
    """Where the results of one of several encoders stand."""

    name: str  # its subfolder in a model folder
    rows: slice  # of the tokens
    columns: slice  # of a token's vector
    pooled: slice  # of the pooled vector


class TextEncoder(ABC):
    """Captions to conditions.

    Attributes:
        tokens_dim: D, length of a token's vector.
        pooled_dim: P, length of a caption's pooled vector.
        slots: where each encoder's results stand; what no slot covers is zero.
    """

    tokens_dim: int
    pooled_dim: int
    slots: tuple[Slot, ...]

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Text:
        """Returns `tokens (B, N, D)` and `pooled (B, P)` of B ≥ 1 captions; "" is the null condition.

        Captions that are too long lose their tail, with a warning that says how many did. ValueError for no captions,
        TypeError for one bare string.
        """

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the encoders and tokenizers into a model folder, from which the constructor reads them again."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Sets where captions are encoded."""

    @abstractmethod
    def keep(self, kept: bool) -> None:
        """Whether encoders that are read for each call stay in memory, as for a whole data set; others always do."""

    @abstractmethod
    def index(self) -> dict[str, list[str | None]]:
        """What `save` writes, as in diffusers' `model_index.json`: subfolder → library and class."""

    def original_state(self) -> dict[str, Tensor]:
        """The encoders' tensors as released single files name them; none for encoders that these cannot hold."""
        return {}

    @abstractmethod
    def mask(self, captions: Sequence[str]) -> Tensor:
        """(B, N) bool: which tokens of `encode` are the captions' own, with start and end; the rest is padding."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What the results depend on besides the captions, as JSON: encoders by their content, lengths, type."""


def listed(captions: Sequence[str]) -> list[str]:
    """The captions, unless there are none or they are one string; the errors are those of `TextEncoder.encode`."""
    if isinstance(captions, str):
        raise TypeError(f"encode takes a list of captions, not the single string {captions!r}")
    if not captions:
        raise ValueError("there are no captions to encode: give at least one, which may be empty")
    return list(captions)
