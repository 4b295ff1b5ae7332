"""Hints: a second picture beside each, for a ControlNet or another network with `picture_channels` to work from."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from xxhash import xxh3_64_intdigest

from data.raw.base import Raw
from data.raw.beside import Beside
from data.raw.pictures import PictureError, cover, open_picture


class Hint(ABC):
    """Makes or finds the hint of a picture."""

    @abstractmethod
    def __call__(self, raw: Raw, image: Image.Image) -> Image.Image:
        """The hint of an input, in mode and size of the picture that is encoded.

        Args:
            raw: the input.
            image: its picture, scaled and cropped, "L" or "RGB".

        Raises:
            PictureError: there is none.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """A description, as JSON. It changes if hints change."""


@final
class Edges(Hint):
    """Canny's edges, white on black (Canny 1986), by scikit-image; of a colour picture those of each channel.

    Args:
        sigma: standard deviation of the blur before, in pixels.
        low: of Sobel's gradient of the values, 0 to 255, as in OpenCV; weaker edges are dropped.
        high: each edge is at least so strong somewhere.

    Raises:
        ValueError: unless sigma > 0 and 0 < low <= high.
    """

    def __init__(self, sigma: float = 1.0, low: float = 100.0, high: float = 200.0) -> None:
        if not (sigma > 0 and 0 < low <= high):
            raise ValueError(f"edges need sigma > 0 and 0 < low <= high, got {sigma}, {low} and {high}")
        self.sigma, self.low, self.high = sigma, low, high

    def __call__(self, raw: Raw, image: Image.Image) -> Image.Image:
        from skimage.feature import canny  # takes a second

        channels = np.atleast_3d(np.asarray(image, dtype=np.float64)).transpose(2, 0, 1)
        edges = np.any([canny(one, self.sigma, self.low, self.high, mode="nearest") for one in channels], axis=0)
        return Image.fromarray((edges * np.uint8(255)).astype(np.uint8)).convert(image.mode)

    def describe(self) -> dict[str, Any]:
        return {"kind": "Edges", "sigma": self.sigma, "low": self.low, "high": self.high}


@final
class Blur(Hint):
    """The picture blurred by a Gaussian, as for the blur ControlNet of Stable Diffusion 3.5 large.

    Args:
        radius: standard deviation in pixels, > 0.
    """

    def __init__(self, radius: float = 8.0) -> None:
        if not radius > 0:
            raise ValueError(f"a blur needs a radius > 0, got {radius}")
        self.radius = radius

    def __call__(self, raw: Raw, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(self.radius))

    def describe(self) -> dict[str, Any]:
        return {"kind": "Blur", "radius": self.radius}


@final
class Smaller(Hint):
    """The picture averaged over squares and enlarged again by bicubic interpolation, for super-resolution.

    Args:
        factor: height and width become so many times smaller, at least 2.
    """

    def __init__(self, factor: int = 4) -> None:
        if factor < 2:
            raise ValueError(f"a smaller picture needs a factor of at least 2, got {factor}")
        self.factor = factor

    def __call__(self, raw: Raw, image: Image.Image) -> Image.Image:
        box = (0, 0, image.width / self.factor, image.height / self.factor)  # the last squares may be cut
        return image.reduce(self.factor).resize(image.size, Image.Resampling.BICUBIC, box)

    def describe(self) -> dict[str, Any]:
        return {"kind": "Smaller", "factor": self.factor}


@final
class Hole(Hint):
    """The picture with a grey rectangle, to learn to fill it: inpainting from what surrounds it (Nichol et al. 2021).

    Each picture has its own rectangle, always the same one.

    Args:
        smallest: sides of the rectangle are at least this share of the picture's.
        largest: and at most this share.
        grey: its level, 0 to 255.
        seed: of the rectangles.

    Raises:
        ValueError: unless 0 < smallest <= largest <= 1 and grey is a level.
    """

    def __init__(self, smallest: float = 0.3, largest: float = 0.7, grey: int = 128, seed: int = 0) -> None:
        if not (0 < smallest <= largest <= 1 and 0 <= grey <= 255):
            raise ValueError(f"a hole needs 0 < smallest <= largest <= 1 and a grey of 0 to 255, got {smallest}, "
                             f"{largest} and {grey}")  # fmt: skip
        self.smallest, self.largest, self.grey, self.seed = smallest, largest, grey, seed

    def box(self, name: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the rectangle in a picture of this name and size (width, height)."""
        draw = np.random.default_rng([self.seed, xxh3_64_intdigest(name.encode())])
        sides = [max(1, round(side * draw.uniform(self.smallest, self.largest))) for side in size]
        left, top = (int(draw.integers(side - length + 1)) for side, length in zip(size, sides, strict=True))
        return left, top, left + sides[0], top + sides[1]

    def __call__(self, raw: Raw, image: Image.Image) -> Image.Image:
        shown = image.copy()
        shown.paste(self.grey if image.mode == "L" else (self.grey,) * 3, self.box(raw.id, image.size))
        return shown

    def describe(self) -> dict[str, Any]:
        own = {"smallest": self.smallest, "largest": self.largest, "grey": self.grey, "seed": self.seed}
        return {"kind": "Hole", **own}


@final
class Files(Hint):
    """Pictures in another folder, under the names of the inputs with any ending: depth maps, poses, scribbles.

    Args:
        folder: `FOLDER/a/b.png` is the hint of the input `a/b.jpg`. A hint may have another size than its picture, but
            has the same shape.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: two hints have the same name.
    """

    def __init__(self, folder: Path) -> None:
        self.beside = Beside(folder, "hint")

    def __call__(self, raw: Raw, image: Image.Image) -> Image.Image:
        file = self.beside.of(raw)
        if file is None:
            raise PictureError("no hint", f"{self.beside.folder} has no picture of this name")
        size = (image.height, image.width)
        found = open_picture(file, 1 if image.mode == "L" else 3, needed=size)
        return cover(ImageOps.mirror(found) if raw.mirrored else found, *size, raw.crop)[0]

    def describe(self) -> dict[str, Any]:
        return {"kind": "Files", "files": self.beside.describe()}
