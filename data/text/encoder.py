"""The contract: captions → one vector per token and one per caption."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from storage.updates import Receiver


class Text(NamedTuple):
    """Encoded captions: one vector per token `(B, N, D)` and one per caption `(B, P)`."""

    tokens: Tensor
    pooled: Tensor


class CutCaptions(UserWarning):
    """Captions that are too long for an encoder. The message is the same for all, so that it is shown once.

    Attributes:
        captions: these.
    """

    def __init__(self, message: str, captions: list[str]) -> None:
        super().__init__(message)
        self.captions = captions


class Slot(NamedTuple):
    """The place of one encoder's results among those of several."""

    name: str  # its subfolder in a model folder
    rows: slice  # of the tokens
    columns: slice  # of a token's vector
    pooled: slice  # of the pooled vector


class TextEncoder(ABC):
    """Encodes captions.

    Attributes:
        tokens_dim: D, length of a token's vector.
        pooled_dim: P, length of a caption's pooled vector.
        slots: the place of each encoder's results; everything outside of them is zero.
        vocabulary: for tokens that are numbers (D = 1), how many there are; 0 for vectors.
        length: N; 0 where captions of one call decide it.
        unread: encoders that a network reads by itself: their slots hold token numbers (`data.text.inversion`).
    """

    tokens_dim: int
    pooled_dim: int
    slots: tuple[Slot, ...]
    vocabulary: int = 0
    length: int = 0
    unread: frozenset[str] = frozenset()

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Text:
        """`tokens (B, N, D)` and `pooled (B, P)` of B ≥ 1 captions; "" is the null condition.

        Captions that are too long are cut, with the warning `CutCaptions`. ValueError for no captions, TypeError for a
        single string.
        """

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the encoders and tokenizers into a model folder, from which the constructor reads them again."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Sets the device on which captions are encoded."""

    @abstractmethod
    def keep(self, kept: bool) -> None:
        """Sets whether encoders stay in memory between calls, as for a whole data set, or are read for each call."""

    @abstractmethod
    def index(self) -> dict[str, list[str | None]]:
        """The entries of diffusers' `model_index.json` for what `save` writes: subfolder → [library, class]."""

    def original_state(self) -> dict[str, Tensor]:
        """The encoders' tensors as released single files name them; none for encoders that these cannot hold."""
        return {}

    def receivers(self) -> list[Receiver]:
        """Who takes updates from LoRA files, absent encoders included; nobody where no tool writes such files."""
        return []

    @abstractmethod
    def mask(self, captions: Sequence[str]) -> Tensor:
        """(B, N) bool: which tokens of `encode` are the captions' own, with start and end; the rest is padding."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Everything that the results depend on except the captions, as JSON: the encoders' content, lengths, type."""


def listed(captions: Sequence[str]) -> list[str]:
    """The captions as a list; errors as `TextEncoder.encode` for no captions or a single string."""
    if isinstance(captions, str):
        raise TypeError(f"encode takes a list of captions, not the single string {captions!r}")
    if not captions:
        raise ValueError("there are no captions to encode: give at least one, which may be empty")
    return list(captions)
