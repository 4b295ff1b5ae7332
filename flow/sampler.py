"""Samplers: pure functions of (denoiser, path, start, time grid). No network, no guidance, no text in here."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from flow.density import shift
from flow.path import Path

Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (z (B, …), t (B,)) → (x0, ε), both (B, …)
Callback = Callable[[int, Tensor, Tensor], object]  # (steps done, z, x0)


def linear_grid(steps: int, alpha: float = 1.0) -> Tensor:
    """Times from 1 to 0, equally spaced and then shifted once (see `flow.density.shift`): (steps + 1,) float32."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"shift must be > 0, got {alpha}")
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha).float()


def euler(denoise: Denoiser, path: Path, z: Tensor, grid: Tensor, callback: Callback | None = None) -> Tensor:
    """One evaluation a step: z_s = a(s)·x̂0 + b(s)·ε̂.

    On the straight path this is Euler's method z + (s − t)·v; on a variance-preserving one it is DDIM with η = 0
    (Song et al. 2020, eq. 12).

    Args:
        denoise: estimates (x0, ε).
        path: the path that z lives on.
        z: start at grid[0], (B, …) float32.
        grid: times in walking order, (steps + 1,). The denoiser is given exactly these.
        callback: called after each step with (steps done, z, x̂0).

    Returns:
        z at grid[-1], (B, …).
    """
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        x0, noise = denoise(z, t.expand(len(z)))
        a, b = path(s)
        z = a * x0 + b * noise
        if callback:
            callback(i, z, x0)
    return z
