"""Targets: what the network is asked for, and the one solve that turns its answer into picture and noise.

Whatever the parametrisation, the network estimates a row y = p·x0 + q·ε. Together with z = a·x0 + b·ε that is a
2×2 linear system, so one formula serves every combination of path and target.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flow.path import Path, expand_as


class Target(ABC):
    """A row (p, q) of coefficients, each of t's shape."""

    @abstractmethod
    def row(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) with y = p·x0 + q·ε."""


class Epsilon(Target):
    """The noise: y = ε (Ho et al. 2020, eq. 14). Cannot be solved where a = 0."""

    def row(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


class X0(Target):
    """The picture: y = x0. Cannot be solved where b = 0."""

    def row(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


class V(Target):
    """v-prediction: y = a·ε − b·x0 (Salimans & Ho 2022, appendix D)."""

    def row(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = path(t)
        return -b, a


class Velocity(Target):
    """The path's time derivative: y = ȧ·x0 + ḃ·ε, which is ε − x0 on the straight line (Esser et al. 2024, eq. 5)."""

    def row(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return path.rate(t)


class Preconditioned(Target):
    """EDM's F: what is left to predict after c_skip and c_out (Karras et al. 2022, eq. 7), on any path.

    With σ = b/a, y = (σ/σ_d·x0 − σ_d·ε) / √(σ² + σ_d²). Never singular.

    Args:
        sigma_data: σ_d, the standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"Preconditioned needs sigma_data > 0, got {sigma_data}")
        self.sigma_data = sigma_data

    def row(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = path(t)
        spread = (b**2 + (self.sigma_data * a) ** 2).sqrt()
        return b / (self.sigma_data * spread), -self.sigma_data * a / spread


def determinant(path: Path, target: Target, t: Tensor) -> Tensor:
    """a·q − b·p, of t's shape: zero where z and y do not determine picture and noise."""
    (a, b), (p, q) = path(t), target.row(path, t)
    return a * q - b * p


def solve(path: Path, target: Target, z: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Picture and noise from a point and the network's output there.

    With det = a·q − b·p:  x0 = (q·z − b·y) / det  and  ε = (a·y − p·z) / det.

    Args:
        z: points on the path, (B, …).
        y: network output at (z, t), (B, …).
        t: times, (B,).

    Returns:
        (x0, ε), both (B, …). Infinite or NaN where det = 0 (Epsilon at a = 0, X0 at b = 0).
    """
    a, b, p, q = (expand_as(c, z) for c in (*path(t), *target.row(path, t)))
    det = a * q - b * p
    return (q * z - b * y) / det, (a * y - p * z) / det
