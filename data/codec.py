"""The contract of codecs: pixels ↔ normalised latents."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor


class Codec(ABC):
    """Pixels in [0, 1], (B, pixel_channels, H, W), to latents (B, channels, H/factor, W/factor) and back.

    Latents come out normalised, (raw − shift)·scale, close to zero mean and unit variance; `decode` undoes it. Those of
    a codec with a vocabulary are codes, whole numbers from 0 to vocabulary − 1.
    """

    channels: int
    pixel_channels: int
    factor: int
    shift: float
    scale: float
    vocabulary: int = 0
    decodes: bool = True  # whether latents have pixels

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pixels."""

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of pixels; ValueError if the codec is deterministic."""
        raise ValueError(f"{type(self).__name__} has no posterior to draw latents from: take their mean")

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents, clamped to [0, 1]."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the files that `load_codec` reads."""

    @abstractmethod
    def index(self) -> list[str]:
        """Library and class, as in diffusers' `model_index.json`."""

    def original_state(self) -> dict[str, Tensor]:
        """Its tensors as released single files name them; none for a codec that these cannot hold."""
        return {}

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Everything that the latents depend on except the pixels, as JSON."""

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights, if any, to a device, on which it then computes and returns its results."""
        return self
