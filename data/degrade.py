"""Worse pictures to work from: smaller, and with noise (Saharia et al. 2021; Ho et al. 2021, §4.2)."""

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
    """

    factor: int = 2
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 <= self.noise <= 1:
            raise ValueError(f"degrade needs factor >= 1 and noise from 0 to 1, got {self.factor} and {self.noise}")

    def smaller(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) averaged over squares, (N, C, H/factor, W/factor). ValueError if they do not fit."""
        if pixels.shape[-2] % self.factor or pixels.shape[-1] % self.factor:
            size = f"{pixels.shape[-2]}×{pixels.shape[-1]}"
            raise ValueError(f"degrade.factor must divide the {size} pixels of a picture, got {self.factor}")
        return F.avg_pool2d(pixels, self.factor)


def enlarged(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels (N, C, h, w) in [0, 1] in another size, by bicubic interpolation."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def noised(latents: Tensor, noise: Tensor, level: Tensor | float) -> Tensor:
    """(1 − level)·latents + level·noise, each (N, C, H, W), the level a number or (N,)."""
    level = torch.as_tensor(level, dtype=latents.dtype, device=latents.device).reshape(-1, 1, 1, 1)
    return (1 - level) * latents + level * noise
