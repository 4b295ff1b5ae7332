"""Paths: how much picture and how much noise is in z at time t.

Every process here is z_t = a(t)·x0 + b(t)·ε with ε ~ N(0, I), t = 0 at the data and t = 1 at the noise
(Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 2).
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


def expand_as(coefficient: Tensor, z: Tensor) -> Tensor:
    """A per-sample coefficient (B,) as (B, 1, …, 1), so that it multiplies z (B, …)."""
    return coefficient.reshape(coefficient.shape + (1,) * (z.ndim - coefficient.ndim))


class Path(ABC):
    """The pair of functions a and b. Takes t of any shape in [0, 1]; gives coefficients of that shape."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at t."""

    @abstractmethod
    def rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(da/dt, db/dt) at t."""


class RectifiedFlow(Path):
    """The straight line z_t = (1 − t)·x0 + t·ε (Liu et al. 2022; Esser et al. 2024, eq. 13)."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)
