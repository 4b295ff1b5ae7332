"""Worse pictures to work from: blurred, smaller, and with noise (Saharia et al. 2021; Ho et al. 2021, §4.2)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Degrade:
    """What is done to a picture before it is shown to the network that is to restore it.

    Args:
        factor: height and width become so many times smaller.
        noise: largest noise level, 0 to 1. Each picture gets a level drawn uniformly from 0 to this, and the network
            gets the level as an input. An upscaler of another model's samples needs it; 0 adds no noise.
        blur: standard deviation of a Gaussian blur in pixels, before the picture is made smaller; 0 is none.
    """

    factor: int = 2
    noise: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 <= self.noise <= 1:
            raise ValueError(f"degrade needs factor >= 1 and noise from 0 to 1, got {self.factor} and {self.noise}")
        if not 0 <= self.blur < math.inf:
            raise ValueError(f"degrade.blur must be a number of pixels of at least 0, got {self.blur}")

    def smaller(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1], blurred and averaged over squares, (N, C, H/factor, W/factor).

        Raises:
            ValueError: factor or blur do not fit their size.
        """
        if self.blur:
            pixels = blurred(pixels, self.blur)
        if pixels.shape[-2] % self.factor or pixels.shape[-1] % self.factor:
            size = f"{pixels.shape[-2]}×{pixels.shape[-1]}"
            raise ValueError(f"degrade.factor must divide the {size} pixels of a picture, got {self.factor}")
        return F.avg_pool2d(pixels, self.factor)


def blurred(pixels: Tensor, std: float) -> Tensor:
    """Pixels (N, C, H, W) in [0, 1] after a Gaussian blur, mirrored at the edges, in the 256 levels of a file.

    In exact numbers a blur could be undone.

    Args:
        pixels: the pictures.
        std: standard deviation in pixels.

    Raises:
        ValueError: three standard deviations are more than a side.
    """
    radius, least = math.ceil(3 * std), min(pixels.shape[-2:])
    if radius >= least:
        raise ValueError(f"a blur must be at most {(least - 1) / 3:.3g} pixels for a side of {least}, got {std:g}")
    weights = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * std**2)).to(pixels)
    kernel = (weights / weights.sum()).expand(pixels.shape[1], 1, 1, -1)
    padded = F.pad(pixels, [radius] * 4, mode="reflect")
    for each in (kernel, kernel.mT):
        padded = F.conv2d(padded, each, groups=pixels.shape[1])
    return padded.mul(255).round().div(255)


def enlarged(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels (N, C, h, w) in [0, 1] in another size, by bicubic interpolation."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def noised(latents: Tensor, noise: Tensor, level: Tensor | float) -> Tensor:
    """(1 − level)·latents + level·noise, each (N, C, H, W), the level a number or (N,)."""
    level = torch.as_tensor(level, dtype=latents.dtype, device=latents.device).reshape(-1, 1, 1, 1)
    return (1 - level) * latents + level * noise
