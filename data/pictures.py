"""Pictures on disk and side by side."""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def to_image(picture: Tensor) -> Image.Image:
    """A picture (C, H, W) in [0, 1], C = 1 or 3, as 8-bit grey or RGB, rounded half to even."""
    levels = (picture.detach().cpu() * 255).round().to(torch.uint8)
    return Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.movedim(0, -1).numpy())


def sheet(pictures: Tensor, columns: int, side: int = 64) -> Image.Image:
    """Pictures (N, C, H, W) in [0, 1] in rows of `columns`, each enlarged by whole pixels to about `side`."""
    zoom = max(1, math.ceil(side / max(pictures.shape[-2:])))
    large = pictures.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)
    return to_image(make_grid(large, nrow=columns, padding=4, pad_value=0.5)[: pictures.shape[1]])


def save_png(image: Image.Image, file: Path) -> None:
    """Writes a PNG, making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, format="PNG")
