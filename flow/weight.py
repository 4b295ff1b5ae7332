"""Weights: factors on the loss at t, independent of the density that drew t.

Papers state a weight for the target that they train on. A loss on the target y is (det/a)² times the loss on ε, with
det = a·q − b·p of `flow.target.solve`, so one factor converts a weight on ε to a weight on any target.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flow.density import Density
from flow.path import Path
from flow.target import Target, determinant


class Weight(ABC):
    """A factor on the loss at t, in addition to the density that drew t."""

    @abstractmethod
    def __call__(self, path: Path, target: Target, t: Tensor) -> Tensor:
        """The weight at t, same shape."""


class DensityWeight(Weight):
    """w(t) = π(t). With uniform t the expected loss is the same as with t drawn from π (Esser et al. 2024, §3.1).

    Args:
        density: π.

    Example:
        >>> from flow.density import LogitNormal
        >>> from flow.path import RectifiedFlow
        >>> from flow.target import Velocity
        >>> weight = DensityWeight(LogitNormal())
        >>> print(f"{weight(RectifiedFlow(), Velocity(), torch.tensor(0.5)):.4f}")  # 4 / √(2π)
        1.5958
    """

    def __init__(self, density: Density) -> None:
        self.density = density

    def __call__(self, path: Path, target: Target, t: Tensor) -> Tensor:
        return self.density.pdf(t)


def from_epsilon(path: Path, target: Target, t: Tensor) -> Tensor:
    """(a / det)²: converts a weight on the ε-loss to one on the target's loss.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> from flow.target import X0
        >>> from_epsilon(RectifiedFlow(), X0(), torch.tensor(0.25))  # on the x0-loss: SNR = 3²
        tensor(9.)
    """
    a, _ = path(t)
    return (a / determinant(path, target, t)) ** 2


def log_snr_rate(path: Path, t: Tensor) -> Tensor:
    """−dλ/dt, with λ = ln(a²/b²): positive.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> log_snr_rate(RectifiedFlow(), torch.tensor(0.5))  # 2 / (t·(1 − t))
        tensor(8.)
    """
    (a, b), (da, db) = path(t), path.rate(t)
    return 2 * (db / b - da / a)


def implied_weight(path: Path, target: Target, t: Tensor) -> Tensor:
    """The paper's w_t = (det/a)² / (−λ̇/2): the unweighted loss on a target is ½E[w_t·(−λ̇)·‖ε̂ − ε‖²].

    Esser et al. 2024, eqs. 8–9 and §3.1: t/(1 − t) for rectified flow.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> from flow.target import Velocity
        >>> implied_weight(RectifiedFlow(), Velocity(), torch.tensor(0.75))  # t / (1 − t)
        tensor(3.)
    """
    return 1 / (from_epsilon(path, target, t) * log_snr_rate(path, t) / 2)


class MinSNR(Weight):
    """min(SNR, γ) on the x0-loss, with SNR = a²/b² (Hang et al. 2023, "Min-SNR Weighting", §3.4).

    Args:
        gamma: γ, the largest weight, reached toward the data.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> from flow.target import X0
        >>> MinSNR(gamma=5.0)(RectifiedFlow(), X0(), torch.tensor([0.25, 0.5]))  # SNR = 9 and 1
        tensor([5., 1.])
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"MinSNR needs gamma > 0, got {gamma}")
        self.gamma = gamma

    def __call__(self, path: Path, target: Target, t: Tensor) -> Tensor:
        a, b = path(t)  # on the ε-loss: min(SNR, γ) / SNR
        return (self.gamma * (b / a) ** 2).clamp(max=1) * from_epsilon(path, target, t)


class P2(Weight):
    """1 / (k + SNR)^γ on the ε-loss (Choi et al. 2022, "Perception Prioritized Training", eq. 8).

    Args:
        k: keeps the weight finite at the noise.
        gamma: γ; larger values give less weight near the data, 0 changes nothing.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> from flow.target import Epsilon
        >>> P2(k=1.0, gamma=1.0)(RectifiedFlow(), Epsilon(), torch.tensor([0.25, 0.5]))  # SNR = 9 and 1
        tensor([0.1000, 0.5000])
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        if k <= 0 or gamma < 0:
            raise ValueError(f"P2 needs k > 0 and gamma >= 0, got {k} and {gamma}")
        self.k, self.gamma = k, gamma

    def __call__(self, path: Path, target: Target, t: Tensor) -> Tensor:
        a, b = path(t)
        return (self.k + (a / b) ** 2) ** -self.gamma * from_epsilon(path, target, t)


class LogSNRWeight(Weight):
    """A weight given as w(λ): the same loss on any continuous path and target (Esser et al. 2024, eq. 8).

    The factor is w / w_implied. It is 1 if the plain loss on this path and target already has the weight w.
    """

    @abstractmethod
    def w(self, log_snr: Tensor) -> Tensor:
        """w at λ = ln(a²/b²), same shape."""

    def __call__(self, path: Path, target: Target, t: Tensor) -> Tensor:
        a, b = path(t)
        return self.w(2 * torch.log(a / b)) / implied_weight(path, target, t)


class ExponentialWeight(LogSNRWeight):
    """w = e^(−λ/2), which rectified flow's velocity and the cosine path's v imply, up to a constant.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> from flow.target import Velocity
        >>> weight = ExponentialWeight()(RectifiedFlow(), Velocity(), torch.tensor([0.25, 0.5]))
        >>> torch.allclose(weight, torch.ones(2))  # the plain loss has this weight already
        True
    """

    def w(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2)


class SechWeight(LogSNRWeight):
    """w = sech(λ/2), which the cosine path's ε implies, up to a constant (Esser et al. 2024, §3.1).

    Example:
        >>> from flow.path import Cosine
        >>> from flow.target import Epsilon
        >>> weight = SechWeight()(Cosine(), Epsilon(), torch.tensor([0.25, 0.5]))
        >>> torch.allclose(weight[0], weight[1])  # the plain loss has this weight already
        True
    """

    def w(self, log_snr: Tensor) -> Tensor:
        return 1 / torch.cosh(log_snr / 2)


class EDMWeight(LogSNRWeight):
    """EDM's w = N(λ; −2P_m, (2P_s)²)·(e^(−λ) + σ_d²), up to a constant (Esser et al. 2024, §3.1).

    Args:
        mean: P_m.
        std: P_s, > 0.
        sigma_data: σ_d.

    Example:
        >>> from flow.path import EDM
        >>> from flow.target import Preconditioned
        >>> weight = EDMWeight()(EDM(), Preconditioned(), torch.tensor([0.25, 0.5]))
        >>> torch.allclose(weight[0], weight[1])  # the plain loss has this weight already
        True
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, sigma_data: float = 0.5) -> None:
        if std <= 0 or sigma_data <= 0:
            raise ValueError(f"EDMWeight needs std > 0 and sigma_data > 0, got {std} and {sigma_data}")
        self.mean, self.std, self.sigma_data = mean, std, sigma_data

    def w(self, log_snr: Tensor) -> Tensor:
        normal = torch.exp(-(((log_snr / 2 + self.mean) / self.std) ** 2) / 2) / (2 * self.std * math.sqrt(2 * math.pi))
        return normal * (torch.exp(-log_snr) + self.sigma_data**2)
