"""Embeddings: pictures to tokens and back, positions, times."""

import math

import torch
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

TIME_SCALE = 1000.0  # as in the released networks
SPAN_SCALE = 10.0  # for t − end; small, since fast features add noise to the derivative by time


def patchify(z: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) to one token per patch, (B, H/p · W/p, C·p·p), rows first."""
    return rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """(B, height · width, p·p·C) back to (B, C, height·p, width·p). Height and width count patches.

    Output tokens hold their channels last, as in the released checkpoints; input tokens hold them first.
    """
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=patch, q=patch)


def sincos_2d(side: int, dim: int, spacing: float = 1.0) -> Tensor:
    """Fixed 2-D sine-cosine positions of a side×side grid of patches: (side, side, dim) float32, indexed [row, column].

    The first half of the channels encodes the column, the second the row; each half is [sin, cos] over dim/4
    frequencies from 1 to 1/10000 (Vaswani et al. 2017, §3.5; in two dimensions as in MAE, He et al. 2021).

    Args:
        side: patches per side.
        dim: a multiple of 4.
        spacing: distance between neighbouring patches, in radians of the fastest frequency.
    """
    frequency = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.outer(torch.arange(side, dtype=torch.float64) * spacing, frequency)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, dim/2)
    column, row = axis.expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([column, row], dim=-1).float()


def crop_centre(table: Tensor, height: int, width: int) -> Tensor:
    """The middle height×width of a position table (S, S, dim), as (height · width, dim).

    Raises:
        ValueError: if the table is smaller than the picture.
    """
    side = len(table)
    if height > side or width > side:
        raise ValueError(f"{height}×{width} patches do not fit the positional table of {side}×{side}: draw smaller")
    top, left = (side - height) // 2, (side - width) // 2
    return table[top : top + height, left : left + width].flatten(0, 1)


def timestep_features(t: Tensor, dim: int = 256, scale: float = TIME_SCALE) -> Tensor:
    """[cos, sin] of scale·t at dim/2 frequencies from 1 to 1/10000: t (B,) in [0, 1] to (B, dim) float32.

    The network's unit of time is [0, 1]; the factor 1000, which released checkpoints expect, is here and nowhere else.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = (scale * t.float())[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class VectorEmbedding(Mlp):
    """A vector (B, in) to the network's width (B, width), through one SiLU layer. For times and pooled text."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__(in_features, width, width, act_layer=nn.SiLU)
