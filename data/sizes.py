"""Size and crop of a picture as a part of the pooled vector (SDXL, Podell et al. 2023, §2.2)."""

import math

import torch
from torch import Tensor

EACH = 256  # features of a number
SIZE_FEATURES = 6 * EACH


def size_features(sizes: Tensor) -> Tensor:
    """Sine and cosine features of sizes in pixels.

    Args:
        sizes: original height and width, top and left of the crop, height and width after it, (B, 6).

    Returns:
        (B, SIZE_FEATURES) float32: for each number [cos, sin] at 128 frequencies from 1 to 1/10000.
    """
    frequency = torch.exp(-math.log(10000) / (EACH // 2) * torch.arange(EACH // 2, device=sizes.device))
    angle = sizes.float()[..., None] * frequency  # b 6 128
    return torch.cat([angle.cos(), angle.sin()], dim=-1).flatten(1)
