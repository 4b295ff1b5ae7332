"""A small classifier of pictures. It recognises what a sample shows, and Fréchet distances use its features."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from storage.text import read_json


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.GELU())


class Judge(nn.Module):
    """Classifier of pictures `(B, channels, side, side)` in [0, 1]. Each picture is independent of its batch.

    Args:
        width: channels of the first two convolutions of the trunk; the third has twice as many.
        num_features: length of the feature vector before the last layer.
        num_classes: number of labels.
        channels: channels of a picture; 1 is grey.
        side: height and width of a picture, in pixels.
        stem: channels of the convolutions before the trunk; each halves the side.

    Attributes:
        grid: side of the last maps of the trunk.

    Raises:
        ValueError: the side cannot be halved so many times.
    """

    def __init__(
        self,
        width: int = 32,
        num_features: int = 64,
        num_classes: int = 10,
        channels: int = 1,
        side: int = 8,
        stem: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"width": width, "num_features": num_features, "num_classes": num_classes}
        if (channels, side, *stem) != (1, 8):  # the config of a digits judge keeps its old form
            self.config |= {"channels": channels, "side": side, "stem": list(stem)}
        self.num_features, self.channels, self.side = num_features, channels, side
        halvings = len(stem) + 2
        self.grid = side // 2**halvings
        if side < 1 or side % 2**halvings:
            raise ValueError(f"a side of {side} pixels cannot be halved {halvings} times")
        inputs = (channels, *stem)
        self.stem = nn.Sequential(*(block(a, b, stride=2) for a, b in pairwise(inputs)))
        self.trunk = nn.Sequential(
            block(inputs[-1], width), block(width, width), nn.AvgPool2d(2), block(width, 2 * width), nn.AvgPool2d(2)
        )
        self.features = nn.Linear(2 * width * self.grid**2, num_features)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the features `(B, num_features)`."""
        return self.embed(self.maps(pixels))

    def maps(self, pixels: Tensor) -> Tensor:
        """Returns the last maps of the trunk, `(B, 2·width, grid, grid)`."""
        return self.trunk(self.stem(2 * pixels - 1))

    def embed(self, maps: Tensor) -> Tensor:
        """Returns the features `(B, num_features)` of the maps that `maps` returns."""
        return nn.functional.gelu(self.features(rearrange(maps, "b c h w -> b (c h w)")))

    def logits(self, pixels: Tensor) -> Tensor:
        """Returns the logits `(B, num_classes)`."""
        return self.head(self(pixels))

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> Tensor:
        """Returns the most likely labels `(B,)`, int64."""
        return self.logits(pixels).argmax(dim=-1)

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`, and creates it if necessary."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        (folder / "model.safetensors").write_bytes(save(self.state_dict()))

    @classmethod
    def load(cls, folder: str | Path) -> "Judge":
        """Loads what `save` wrote. FileNotFoundError or ValueError in one line if a file is missing or damaged."""
        config_file, weights_file = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        for file in (config_file, weights_file):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: a judge's folder holds config.json and model.safetensors")
        try:
            judge = cls(**read_json(config_file))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{config_file} is no judge's config.json: {error}") from error
        try:
            weights = load_file(weights_file)
        except SafetensorError as error:
            raise ValueError(f"{weights_file} is damaged or no safetensors file: {error}") from error
        expected = {name: list(value.shape) for name, value in judge.state_dict().items()}
        found = {name: list(value.shape) for name, value in weights.items()}
        if expected != found:
            wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            raise ValueError(
                f"{weights_file} does not fit {config_file.name}: {wrong[0]} should be "
                f"{expected.get(wrong[0], 'absent')} but is {found.get(wrong[0], 'absent')} ({len(wrong)} such tensors)"
            )
        judge.load_state_dict(weights)
        return judge.eval()
