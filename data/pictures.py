"""Pictures on disk and side by side."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import to_tensor
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


def load_picture(file: Path, channels: int, height: int | None, width: int | None, unit: int) -> Tensor:
    """A picture from disk, (1, C, height, width) in [0, 1].

    Args:
        file: of any format that Pillow reads, of 8 or 16 bits; a transparent part is black.
        channels: 1 for grey, 3 for colour.
        height: in pixels; the picture is scaled to cover height × width and cropped about its centre. None is its own,
            cropped to a multiple of `unit`.
        width: likewise.
        unit: what height and width are multiples of.

    Raises:
        FileNotFoundError, ValueError: in one line, if there is none, it is damaged or smaller than `unit`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no picture {file}")
    try:
        with Image.open(file) as source:
            opened: Image.Image = source
            if opened.mode.startswith("I"):  # 16 bits, which `convert` would clip
                opened = Image.fromarray((np.asarray(opened) // 257).clip(0, 255).astype(np.uint8))
            if "A" in opened.getbands():  # what is not there is black
                opened = Image.alpha_composite(Image.new("RGBA", opened.size, "black"), opened.convert("RGBA"))
            image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise ValueError(f"{file} is no picture that can be read: {error}") from None
    own = (image.width // unit * unit, image.height // unit * unit)
    if min(own) == 0:
        raise ValueError(f"{file} is smaller than {unit} pixels: {image.width}×{image.height}")
    size = (width or own[0], height or own[1])
    if height or width:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    else:
        left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
        image = image.crop((left, top, left + size[0], top + size[1]))
    return to_tensor(image)[None]
