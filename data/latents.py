"""Codecs: pixels ↔ normalised latents."""

import json
from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor

CONFIG = "config.json"


class Codec(ABC):
    """Pixels in [0, 1], (B, pixel_channels, H, W), to latents (B, channels, H/factor, W/factor) and back.

    Latents come out normalised, (raw − shift)·scale, close to zero mean and unit variance; `decode` undoes it.
    """

    channels: int
    pixel_channels: int
    factor: int

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pixels."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents, clamped to [0, 1]."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what `load_codec` needs."""


class Pixels(Codec):
    """The picture is its own latent, but for shift and scale.

    Args:
        channels: 1 for grey, 3 for colour.
        shift: the data's mean.
        scale: one over the data's standard deviation, > 0.
    """

    factor = 1

    def __init__(self, channels: int = 3, shift: float = 0.5, scale: float = 2.0) -> None:
        if channels not in (1, 3):
            raise ValueError(f"the codec's channels must be 1 or 3, got {channels}")
        if not scale > 0:
            raise ValueError(f"the codec's scale must be > 0, got {scale}")
        self.channels = self.pixel_channels = channels
        self.shift, self.scale = shift, scale

    def encode(self, pixels: Tensor) -> Tensor:
        return (pixels - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / self.scale + self.shift).clamp(0, 1)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": "Pixels",
            "channels": self.channels,
            "shift_factor": self.shift,
            "scaling_factor": self.scale,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_codec(folder: Path) -> Codec:
    """The codec that `save` wrote.

    Raises:
        ValueError: if the folder holds no codec that this project knows.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise ValueError(f"no codec config at {folder / CONFIG}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON: {error}") from None
    if not isinstance(config, dict) or config.get("_class_name") != "Pixels":
        raise ValueError(f"{folder / CONFIG} describes no codec that this project knows, which is Pixels")
    try:
        return Pixels(config["channels"], config["shift_factor"], config["scaling_factor"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is no whole config of Pixels: {error}") from None
