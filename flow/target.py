"""Targets: what the network predicts, and the solve that turns its prediction into picture and noise.

In every parametrisation the network estimates a row y = p·x0 + q·ε. Together with z = a·x0 + b·ε this is a 2×2 linear
system, so one formula serves every combination of path and target.
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
    """The noise: y = ε (Ho et al. 2020, eq. 14). Cannot be solved where a = 0.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> Epsilon().row(RectifiedFlow(), torch.tensor(0.25))  # y = 0·x0 + 1·ε
        (tensor(0.), tensor(1.))
    """

    def row(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


class X0(Target):
    """The picture: y = x0. Cannot be solved where b = 0.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> X0().row(RectifiedFlow(), torch.tensor(0.25))  # y = 1·x0 + 0·ε
        (tensor(1.), tensor(0.))
    """

    def row(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


class V(Target):
    """v-prediction: y = a·ε − b·x0 (Salimans & Ho 2022, appendix D).

    Example:
        >>> from flow.path import RectifiedFlow
        >>> V().row(RectifiedFlow(), torch.tensor(0.25))  # y = −b·x0 + a·ε
        (tensor(-0.2500), tensor(0.7500))
    """

    def row(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = path(t)
        return -b, a


class Velocity(Target):
    """The path's time derivative: y = ȧ·x0 + ḃ·ε, which is ε − x0 on the straight line (Esser et al. 2024, eq. 5).

    Example:
        >>> from flow.path import RectifiedFlow
        >>> Velocity().row(RectifiedFlow(), torch.tensor(0.25))  # y = ε − x0, at every t
        (tensor(-1.), tensor(1.))
    """

    def row(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return path.rate(t)


class Preconditioned(Target):
    """EDM's F, the output of the network inside c_skip and c_out (Karras et al. 2022, eq. 7), on any path.

    With σ = b/a, y = (σ/σ_d·x0 − σ_d·ε) / √(σ² + σ_d²). Never singular.

    Args:
        sigma_data: σ_d, the standard deviation of the data.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> path, t = RectifiedFlow(), torch.tensor([0.0, 0.5, 1.0])
        >>> Preconditioned(sigma_data=0.5).row(path, t)  # y = −ε at the data and x0/σ_d at the noise
        (tensor([0.0000, 1.7889, 2.0000]), tensor([-1.0000, -0.4472, -0.0000]))
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
    """a·q − b·p, of t's shape: zero where z and y do not determine picture and noise.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> determinant(RectifiedFlow(), Epsilon(), torch.tensor([0.0, 0.5, 1.0]))  # a: 0 at the noise
        tensor([1.0000, 0.5000, 0.0000])
    """
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

    Example:
        >>> from flow.path import RectifiedFlow
        >>> x0, noise, t = torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([0.25])
        >>> solve(RectifiedFlow(), Velocity(), z=0.75 * x0 + 0.25 * noise, y=noise - x0, t=t)
        (tensor([2.]), tensor([-1.]))
    """
    a, b, p, q = (expand_as(c, z) for c in (*path(t), *target.row(path, t)))
    det = a * q - b * p
    return (q * z - b * y) / det, (a * y - p * z) / det


def velocity(path: Path, target: Target, z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """ε − x0 from a point and the network's output there, (B, …): dw/dτ on every path (see `flow.sampler`).

    Arguments as of `solve`, whose difference it is: ((a + b)·y − (p + q)·z) / det.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> x0, noise, t = torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([0.25])
        >>> velocity(RectifiedFlow(), X0(), z=0.75 * x0 + 0.25 * noise, y=x0, t=t)
        tensor([-3.])
    """
    a, b, p, q = (expand_as(c, z) for c in (*path(t), *target.row(path, t)))
    return ((a + b) * y - (p + q) * z) / (a * q - b * p)


def prediction(path: Path, target: Target, z: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The network's output at a point, (B, …), from v = ε − x0 there: the inverse of `velocity`."""
    a, b, p, q = (expand_as(c, z) for c in (*path(t), *target.row(path, t)))
    return ((a * q - b * p) * v + (p + q) * z) / (a + b)
