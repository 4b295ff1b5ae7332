"""A small classifier of 8 × 8 digits: it says what a sample shows, and its features measure Fréchet distances."""

import json
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.GELU())


class Judge(nn.Module):
    """Classifier of pictures `(B, 1, 8, 8)` in [0, 1]; nothing in it depends on the rest of a batch.

    Args:
        width: channels of the first two convolutions; the later ones have twice as many.
        num_features: length of the feature vector before the last layer.
        num_classes: number of labels.
    """

    def __init__(self, width: int = 32, num_features: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.config = {"width": width, "num_features": num_features, "num_classes": num_classes}
        self.num_features = num_features
        self.trunk = nn.Sequential(
            block(1, width), block(width, width), nn.AvgPool2d(2), block(width, 2 * width), nn.AvgPool2d(2)
        )
        self.features = nn.Linear(2 * width * 2 * 2, num_features)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the features `(B, num_features)`."""
        return self.embed(self.maps(pixels))

    def maps(self, pixels: Tensor) -> Tensor:
        """Returns the maps that end the trunk, `(B, 2·width, 2, 2)`."""
        return self.trunk(2 * pixels - 1)

    def embed(self, maps: Tensor) -> Tensor:
        """Returns the features `(B, num_features)` of such maps."""
        return nn.functional.gelu(self.features(rearrange(maps, "b c h w -> b (c h w)")))

    def logits(self, pixels: Tensor) -> Tensor:
        """Returns the logits `(B, num_classes)`."""
        return self.head(self(pixels))

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> Tensor:
        """Returns the most likely labels `(B,)`, int64."""
        return self.logits(pixels).argmax(dim=-1)

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        (folder / "model.safetensors").write_bytes(save(self.state_dict()))

    @classmethod
    def load(cls, folder: str | Path) -> "Judge":
        """Reads what `save` wrote. FileNotFoundError or ValueError with one line when that is missing or damaged."""
        config_file, weights_file = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        for file in (config_file, weights_file):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: a judge's folder holds config.json and model.safetensors")
        try:
            judge = cls(**json.loads(config_file.read_text()))
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
