"""Codecs whose latents are codes: whole numbers from 0 to vocabulary − 1, kept as floats like all latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor

from data.codec import Codec
from data.latents import CONFIG
from storage.files import commit_json
from storage.modules import read_module, write_module
from storage.text import read_json
from storage.weights import digest
from tokens.vqvae import VQVAE

LATENTS = "latents.json"


def whole(latents: Tensor, vocabulary: int) -> Tensor:
    """Latents as codes, long. ValueError if a number is not a code of this vocabulary."""
    codes = latents.long()
    if not torch.equal(codes.to(latents), latents) or codes.min() < 0 or codes.max() >= vocabulary:
        raise ValueError(f"codes must be whole numbers from 0 to {vocabulary - 1}, the size of this codebook, got "
                         f"{float(latents.min()):g} to {float(latents.max()):g}")  # fmt: skip
    return codes


@final
class Levels(Codec):
    """The codes are the levels of the pixels: a pixel of 3/(levels − 1) has code 3.

    Args:
        levels: how many values a number of a picture can have; 17 for the digits.
        channels: 1 for grey, 3 for colour.
    """

    factor = 1
    shift, scale = 0.0, 1.0

    def __init__(self, levels: int = 256, channels: int = 3) -> None:
        if channels not in (1, 3) or type(levels) is not int or not 2 <= levels <= 256:
            raise ValueError(f"the codec needs 1 or 3 channels and 2 to 256 levels, got {channels} and {levels}")
        self.channels = self.pixel_channels = channels
        self.vocabulary = levels

    def encode(self, pixels: Tensor) -> Tensor:
        """The nearest levels."""
        return (pixels * (self.vocabulary - 1)).round().clamp(0, self.vocabulary - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels; ValueError for numbers that are no codes."""
        return whole(latents, self.vocabulary).float() / (self.vocabulary - 1)

    def save(self, folder: Path) -> None:
        commit_json(folder / CONFIG, {"_class_name": "Levels"} | self._config)

    def index(self) -> list[str]:
        return ["tokens.codec", "Levels"]

    def fingerprint(self) -> dict[str, Any]:
        return {"class": "Levels"} | self._config

    @property
    def _config(self) -> dict[str, Any]:
        return {"levels": self.vocabulary, "channels": self.channels}


@final
class VQ(Codec):
    """A frozen `VQVAE`. Latents are its codes, or for a flow the vectors of these.

    Args:
        path: the folder of the autoencoder (`tools.train_vae --codes`).
        vectors: latents are normalised vectors (B, dim, h, w) instead of codes, of an autoencoder of one level;
            `decode` moves them to the nearest codes first.

    Raises:
        FileNotFoundError, ValueError: in one line, if there is no such autoencoder, or a damaged one.
    """

    def __init__(self, path: str | Path, vectors: bool = False) -> None:
        path = Path(path)
        path = path / "vae" if (path / "vae").is_dir() else path
        self.vqvae = read_module(VQVAE, path).requires_grad_(False)
        self.shift, self.scale, _ = read_latents(path)
        settings = self.vqvae.settings
        if vectors and self.vqvae.levels != 1:
            raise ValueError(f"{path} has two levels, whose vectors have two sizes: leave vectors out")
        self.given = vectors
        self.pixel_channels, self.factor = settings["channels"], self.vqvae.factor
        self.channels = settings["dim"] if vectors else self.vqvae.stack
        self.vocabulary = 0 if vectors else self.vqvae.size

    def to(self, device: torch.device | str) -> Self:
        self.vqvae.to(device)
        return self

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pixels; ValueError if a side is not a multiple of `factor`."""
        if self.given:
            return (self._run(lambda x: self.vqvae.vectors(x), 2 * pixels - 1) - self.shift) * self.scale
        return self._run(lambda x: self.vqvae(x).codes.float(), 2 * pixels - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents, clamped to [0, 1]; ValueError for numbers that are no codes."""
        if self.given:
            pictures = self._run(self.vqvae.decode_vectors, latents / self.scale + self.shift)
        else:
            pictures = self._run(lambda codes: self.vqvae.decode(whole(codes, self.vocabulary)), latents)
        return (pictures / 2 + 0.5).clamp(0, 1)

    def _run(self, network: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        device = self.vqvae.quantizer.codebook.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return network(given.to(device, torch.float32)).float()

    def save(self, folder: Path) -> None:
        write_vqvae(self.vqvae, folder, self.shift, self.scale, self.given)

    def index(self) -> list[str]:
        return ["tokens.codec", "VQ"]

    def fingerprint(self) -> dict[str, Any]:
        config = {"vectors": self.given, **self.vqvae.settings}
        if self.given:
            config |= {"shift_factor": self.shift, "scaling_factor": self.scale}
        return {"class": "VQ", "weights": digest(self.vqvae.state_dict()), "config": config}


def write_vqvae(vqvae: VQVAE, folder: Path, shift: float, scale: float, vectors: bool = False) -> None:
    """Writes an autoencoder of codes as `VQ` reads it.

    Args:
        vqvae: the autoencoder.
        folder: to write into.
        shift: mean of its vectors.
        scale: one over their standard deviation.
        vectors: latents are vectors instead of codes.
    """
    commit_json(folder / LATENTS, {"vectors": vectors, "shift_factor": shift, "scaling_factor": scale})
    write_module(vqvae, vqvae.settings, folder)


def read_latents(folder: Path) -> tuple[float, float, bool]:
    """Shift, scale and `vectors` as `write_vqvae` was given them; ValueError in one line if they are damaged."""
    held = read_json(folder / LATENTS)
    try:
        if type(held["vectors"]) is not bool:
            raise ValueError
        return float(held["shift_factor"]), float(held["scaling_factor"]), held["vectors"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder / LATENTS} must hold shift_factor, scaling_factor and vectors") from None


def load(folder: Path) -> Codec | None:
    """The codec of codes that a folder holds; none if it holds another codec. Errors as `VQ`."""
    config = read_json(folder / CONFIG)
    match config.get("_class_name"):
        case "VQVAE":
            return VQ(folder, read_latents(folder)[2])
        case "Levels":
            try:
                return Levels(config["levels"], config["channels"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{folder / CONFIG} is no whole config of Levels: {error}") from None
        case _:
            return None
