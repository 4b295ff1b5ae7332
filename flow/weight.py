"""Weights: factors on the loss at t, whatever density drew t.

Papers state a weight for the target that they train on. A loss on the target y is (det/a)² times the loss on ε, with
det = a·q − b·p of `flow.target.solve`, so one factor carries a weight from ε to any target.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flow.density import Density
from flow.path import Path
from flow.target import Target, determinant


class Weight(ABC):
    """A factor on the loss at t. Independent of how t was drawn: the density has its own say by drawing."""

    @abstractmethod
    def __call__(self, path: Path, target: Target, t: Tensor) -> Tensor:
        """The weight at t, same shape."""


class DensityWeight(Weight):
    """w(t) = π(t): with t drawn uniformly, in expectation the same loss as drawing t from π (Esser et al. 2024, §3.1).

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
    """(a / det)²: turns a weight of the ε-loss into one of the target's loss.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> from flow.target import X0
        >>> from_epsilon(RectifiedFlow(), X0(), torch.tensor(0.25))  # of the x0-loss: SNR = 3²
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
        gamma: γ, where the weight stops to grow toward the data.

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
        gamma: γ, how strongly the data end is played down; 0 changes nothing.

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
    """A w(λ) in the paper's sense, the same loss on any continuous path and target (Esser et al. 2024, eq. 8).

    The factor is w / w_implied, hence 1 where path and target imply w by themselves.
    """

    @abstractmethod
    def of(self, log_snr: Tensor) -> Tensor:
        """w at λ = ln(a²/b²), same shape."""

    def __call__(self, path: Path, target: Target, t: Tensor) -> Tensor:
        a, b = path(t)
        return self.of(2 * torch.log(a / b)) / implied_weight(path, target, t)


class ExponentialWeight(LogSNRWeight):
    """w = e^(−λ/2): rectified flow's velocity and the cosine path's v, up to a constant.

    Example:
        >>> from flow.path import RectifiedFlow
        >>> from flow.target import Velocity
        >>> weight = ExponentialWeight()(RectifiedFlow(), Velocity(), torch.tensor([0.25, 0.5]))
        >>> torch.allclose(weight, torch.ones(2))  # the plain loss has this weight already
        True
    """

    def of(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2)


class SechWeight(LogSNRWeight):
    """w = sech(λ/2): the cosine path's ε, up to a constant (Esser et al. 2024, §3.1).

    Example:
        >>> from flow.path import Cosine
        >>> from flow.target import Epsilon
        >>> weight = SechWeight()(Cosine(), Epsilon(), torch.tensor([0.25, 0.5]))
        >>> torch.allclose(weight[0], weight[1])  # the plain loss has this weight already
        True
    """

    def of(self, log_snr: Tensor) -> Tensor:
        return 1 / torch.cosh(log_snr / 2)


class EDMWeight(LogSNRWeight):
    """w = N(λ; −2P_m, (2P_s)²)·(e^(−λ) + σ_d²): EDM's, up to a constant (Esser et al. 2024, §3.1).

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

    def of(self, log_snr: Tensor) -> Tensor:
        normal = torch.exp(-(((log_snr / 2 + self.mean) / self.std) ** 2) / 2) / (2 * self.std * math.sqrt(2 * math.pi))
        return normal * (torch.exp(-log_snr) + self.sigma_data**2)
