"""Timestep densities: how training draws t (Esser et al. 2024, section 3.1), and the resolution shift.

A density maps a uniform u in (0, 1) to t, so that a stratified u gives a stratified t.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Density(ABC):
    """A distribution of t on (0, 1): a map from a uniform number and a probability density."""

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """t for uniform u, same shape."""

    @abstractmethod
    def pdf(self, t: Tensor) -> Tensor:
        """The probability density at t, same shape."""


class Uniform(Density):
    """t = u.

    Example:
        >>> Uniform()(torch.tensor([0.25, 0.5]))
        tensor([0.2500, 0.5000])
    """

    def __call__(self, u: Tensor) -> Tensor:
        return u

    def pdf(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class LogitNormal(Density):
    """logit(t) ~ N(mean, std²) (Esser et al. 2024, eq. 19).

    Args:
        mean: positive values move mass toward the noise.
        std: width on the logit scale, > 0.

    Example:
        >>> print(f"{LogitNormal(mean=1.0)(torch.tensor(0.5)):.4f}")  # the median is sigmoid(mean)
        0.7311
        >>> print(f"{LogitNormal().pdf(torch.tensor(0.5)):.4f}")  # 4 / √(2π)
        1.5958
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"LogitNormal needs std > 0, got {std}")
        self.mean, self.std = mean, std

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def pdf(self, t: Tensor) -> Tensor:
        gauss = torch.exp(-((torch.logit(t) - self.mean) ** 2) / (2 * self.std**2))
        return gauss / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


class Mode(Density):
    """t = 1 − u − s·(cos²(πu/2) − 1 + u), with heavy tails (Esser et al. 2024, eq. 20).

    Args:
        scale: s, from −1 to 2/(π − 2) ≈ 1.75, where the map is monotonic. Positive values favour t = ½.

    Example:
        >>> t = Mode(scale=1.29)(torch.tensor([0.0, 0.5, 1.0]))  # falls from 1 to 0
        >>> torch.allclose(t, torch.tensor([1.0, 0.5, 0.0]), atol=1e-6)
        True
    """

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"Mode needs -1 <= scale <= {2 / (math.pi - 2):.4f}, got {scale}")
        self.scale = scale

    def __call__(self, u: Tensor) -> Tensor:
        return 1 - u - self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)

    def pdf(self, t: Tensor) -> Tensor:
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(50):  # bisection: u(t) has no closed form, and t falls with u
            u = (low + high) / 2
            low, high = torch.where(self(u) > t, u, low), torch.where(self(u) > t, high, u)
        return 1 / (1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * (low + high) / 2)))


class CosMap(Density):
    """t = 1 − 1/(tan(πu/2) + 1): the cosine schedule's log-SNR on the straight path (Esser et al. 2024, eq. 21).

    Example:
        >>> print(f"{CosMap().pdf(torch.tensor(0.5)):.4f}")  # 4/π
        1.2732
    """

    def __call__(self, u: Tensor) -> Tensor:
        return 1 - 1 / (torch.tan(math.pi * u / 2) + 1)

    def pdf(self, t: Tensor) -> Tensor:
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


class UShaped(Density):
    """Density ∝ exp(at) + exp(a(1 − t)), which favours both ends: for a path that is already straight.

    From 2-rectified flow++ (Lee et al. 2024).

    Args:
        a: > 0; near 0 the density is almost uniform. The paper uses 4.

    Example:
        >>> density = UShaped(a=4.0)
        >>> ends, middle = density.pdf(torch.tensor(0.0)), density.pdf(torch.tensor(0.5))
        >>> print(f"{ends / middle:.4f}")  # cosh(a/2)
        3.7622
    """

    def __init__(self, a: float = 4.0) -> None:
        if a <= 0:
            raise ValueError(f"UShaped needs a > 0, got {a}")
        self.a = a

    def __call__(self, u: Tensor) -> Tensor:
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a

    def pdf(self, t: Tensor) -> Tensor:
        return self.a * torch.cosh(self.a * (t - 0.5)) / (2 * math.sinh(self.a / 2))


class Steps(Density):
    """The times 1/k … 1 at which a sampler of k equal steps calls the model, with equal probability.

    With pairs of noise and the picture made from it, k = 1 learns the one-step map (Liu et al. 2022, §2.2).

    Args:
        k: number of steps.

    Example:
        >>> Steps(k=4)(torch.tensor([0.1, 0.3, 0.6, 0.9]))
        tensor([0.2500, 0.5000, 0.7500, 1.0000])
    """

    def __init__(self, k: int = 1) -> None:
        if k < 1:
            raise ValueError(f"Steps needs k >= 1, got {k}")
        self.k = k

    def __call__(self, u: Tensor) -> Tensor:
        return (u * self.k).floor().clamp(max=self.k - 1).add(1) / self.k

    def pdf(self, t: Tensor) -> Tensor:
        """The probability of each time: 1/k, and 0 in between."""
        in_grid = torch.isclose(t * self.k, (t * self.k).round()) & (t > 0)
        return in_grid.to(t.dtype) / self.k


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers, one in each of `count` equal cells of [0, 1), in random order: (count,) float64.

    Each number alone is uniform; together they cover the interval, which lowers the variance of a batch's mean loss.

    Example:
        >>> u = stratified(4, torch.Generator().manual_seed(0))
        >>> (u.sort().values * 4).floor()  # one number in each quarter
        tensor([0., 1., 2., 3.], dtype=torch.float64)
    """
    cell = torch.randperm(count, generator=generator)
    return (cell + torch.rand(count, dtype=torch.float64, generator=generator)) / count


def shift(t: Tensor, alpha: float) -> Tensor:
    """The resolution shift t' = αt / (1 + (α − 1)t) (Esser et al. 2024, eq. 23).

    Args:
        t: times in [0, 1].
        alpha: √(tokens / base tokens); 1 changes nothing, larger values move times toward the noise.

    Example:
        >>> shift(torch.tensor([0.0, 0.5, 1.0]), alpha=3.0)
        tensor([0.0000, 0.7500, 1.0000])
    """
    shifted = alpha * t / (1 + (alpha - 1) * t)
    return torch.where(t < 1, shifted.clamp(max=1), t)  # rounding moves 1 for some alpha below 0.5
