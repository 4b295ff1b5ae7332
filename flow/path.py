"""Paths: how much picture and how much noise is in z at time t.

Every process here is z_t = a(t)·x0 + b(t)·ε with ε ~ N(0, I), t = 0 at the data and t = 1 at the noise
(Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 2).

In the coordinates w = z / (a + b) and τ = b / (a + b) each of them is the same straight line w = (1 − τ)·x0 + τ·ε, so
a deterministic sampler in these coordinates works on every path (see `flow.sampler`).
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def expand_as(coefficient: Tensor, z: Tensor) -> Tensor:
    """A coefficient in z's type, so that it multiplies z (B, …): one for each picture, (B,), as (B, 1, …, 1).

    One for all, (), stays as it is: a number on the host multiplies a tensor on any device.
    """
    coefficient = coefficient.to(z.dtype)
    return coefficient.reshape(-1, *(1,) * (z.ndim - 1)) if coefficient.ndim else coefficient


class Path(ABC):
    """The functions a and b. They take t of any shape in [0, 1] and return coefficients of that shape and type."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at t."""

    @abstractmethod
    def rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(da/dt, db/dt) at t. ValueError on a discrete path, which has none."""

    @abstractmethod
    def time(self, tau: Tensor) -> Tensor:
        """The t at which b / (a + b) = τ. ValueError on a discrete path, which has only some τ."""

    def snap(self, t: Tensor) -> Tensor:
        """The nearest time that the path has: t itself unless the path is discrete."""
        return t

    def training_time(self, t: Tensor) -> Tensor:
        """The time that training uses for t: t itself unless the path is discrete."""
        return t


class RectifiedFlow(Path):
    """The straight line z_t = (1 − t)·x0 + t·ε (Liu et al. 2022; Esser et al. 2024, eq. 13).

    Example:
        >>> RectifiedFlow()(torch.tensor(0.25))  # a = 1 − t and b = t
        (tensor(0.7500), tensor(0.2500))
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, tau: Tensor) -> Tensor:
        return tau


class Cosine(Path):
    """The quarter circle z_t = cos(πt/2)·x0 + sin(πt/2)·ε (Esser et al. 2024, §3.1, after Nichol & Dhariwal 2021).

    Example:
        >>> a, b = Cosine()(torch.tensor(1 / 3))  # cos 30° = √3/2 and sin 30° = ½
        >>> print(f"{a:.4f} {b:.4f}")
        0.8660 0.5000
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)  # a is exactly 0 at t = 1

    def rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self(t)
        return -math.pi / 2 * b, math.pi / 2 * a

    def time(self, tau: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan2(tau, 1 - tau)


class VariancePreserving(Path):
    """The continuous cousin of DDPM's chain: a² = exp(−∫₀ᵗ β), β(t) = β₀ + t·(β₁ − β₀) (Song et al. 2021, eq. 11).

    b = √(1 − a²), or with `sub` its square, "sub-VP" (eq. 12). a(1) is small but not 0. At t = 0 the rate of b is
    infinite, but for sub-VP.

    Args:
        first: β₀ > 0.
        last: β₁ ≥ β₀.
        sub: whether it is sub-VP.

    Example:
        >>> print(f"{VariancePreserving()(torch.tensor(1.0))[0]:.4f}")  # near the last √ᾱ of DDPMLinear, 0.0064
        0.0066
    """

    def __init__(self, first: float = 0.1, last: float = 20.0, sub: bool = False) -> None:
        if not 0 < first <= last:
            raise ValueError(f"VariancePreserving needs 0 < first <= last, got {first} and {last}")
        self.first, self.last, self.sub = first, last, sub

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.first * t + (self.last - self.first) / 2 * t**2
        variance = -torch.expm1(-integral)
        return torch.exp(-integral / 2), variance if self.sub else variance.sqrt()

    def rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self(t)
        beta = self.first + (self.last - self.first) * t
        return -beta / 2 * a, beta * a**2 if self.sub else beta * a**2 / (2 * b)

    def time(self, tau: Tensor) -> Tensor:
        """Beyond t = 1 where τ is larger than at t = 1."""
        ratio = tau / (1 - tau)  # b/a
        integral = 2 * torch.asinh(ratio / 2) if self.sub else torch.log1p(ratio**2)
        rise = self.last - self.first
        return 2 * integral / (self.first + (self.first**2 + 2 * rise * integral).sqrt())


class EDM(Path):
    """z_t = (x0 + σ·ε) / √(σ² + σ_d²) with ln σ = P_m + P_s·Φ⁻¹(t) (Karras et al. 2022, table 1 and eq. 7).

    The division is EDM's c_in, so z has unit variance and is the network's input. A uniform t draws EDM's
    log-normal σ. At t = 0, z = x0 / σ_d; at t = 1, σ is infinite and z = ε.

    Args:
        mean: P_m.
        std: P_s, > 0.
        sigma_data: σ_d, the standard deviation of the data.

    Example:
        >>> a, b = EDM(mean=-1.2)(torch.tensor(0.5))
        >>> print(f"{torch.log(b / a):.4f}")  # the median of ln σ is P_m
        -1.2000
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, sigma_data: float = 0.5) -> None:
        if std <= 0 or sigma_data <= 0:
            raise ValueError(f"EDM needs std > 0 and sigma_data > 0, got {std} and {sigma_data}")
        self.mean, self.std, self.sigma_data = mean, std, sigma_data

    def _log_ratio(self, t: Tensor) -> Tensor:
        """ln(σ / σ_d)."""
        return self.mean - math.log(self.sigma_data) + self.std * torch.special.ndtri(t)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r = 2 * self._log_ratio(t)
        return torch.sigmoid(-r).sqrt() / self.sigma_data, torch.sigmoid(r).sqrt()

    def rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Infinite or NaN at t = 0 and t = 1, where σ is 0 or infinite."""
        a, b = self(t)
        quantile = torch.special.ndtri(t)
        speed = self.std * math.sqrt(2 * math.pi) * torch.exp(quantile**2 / 2)  # d ln σ / dt
        return -a * b**2 * speed, b * (self.sigma_data * a) ** 2 * speed

    def time(self, tau: Tensor) -> Tensor:
        return torch.erfc((self.mean - torch.logit(tau)) / (self.std * math.sqrt(2))) / 2  # ndtr underflows below −8.3


class Discrete(Path):
    """A chain of T noising steps: a = √ᾱ_n and b = √(1 − ᾱ_n) at t = n/T, n = 0 … T (Ho et al. 2020, eq. 4).

    n = 1 is the state after the first step, as in the paper. Code that counts from zero calls it timestep 0.

    Args:
        alphas_cumprod: ᾱ_1 … ᾱ_T, (T,) float64, falling.

    Example:
        >>> path = Discrete(torch.tensor([0.64, 0.36]))  # ᾱ of a chain of two steps
        >>> a, b = path(torch.tensor([0.0, 0.5, 1.0]))
        >>> print(a, b)
        tensor([1.0000, 0.8000, 0.6000]) tensor([0.0000, 0.6000, 0.8000])
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod
        self.steps = len(alphas_cumprod)
        bar = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), alphas_cumprod.double()])
        self.tables = {torch.device("cpu"): torch.stack([bar.sqrt(), (1 - bar).sqrt()])}

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if t.device not in self.tables:
            self.tables[t.device] = self.tables[torch.device("cpu")].to(t.device, non_blocking=True)
        a, b = self.tables[t.device][:, (t * self.steps).round().long()].to(t.dtype)
        return a, b

    def rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError(f"{type(self).__name__} is discrete and has no rate: use Epsilon, X0 or V as target")

    def time(self, tau: Tensor) -> Tensor:
        raise ValueError(f"{type(self).__name__} is discrete and has no times in between: use euler or ddim")

    def snap(self, t: Tensor) -> Tensor:
        return (t * self.steps).round() / self.steps

    def training_time(self, t: Tensor) -> Tensor:
        """n/T with (n − 1)/T < t ≤ n/T, so that a uniform t gives n = 1 … T with equal probability."""
        return (t * self.steps).ceil().clamp(1, self.steps) / self.steps


def _linspace(first: float, last: float) -> Tensor:
    """1000 numbers on the host, where the tables of a chain begin whatever the default device."""
    return torch.linspace(first, last, 1000, dtype=torch.float64, device="cpu")


def _alphas_cumprod(betas: Tensor) -> Tensor:
    return torch.cumprod(1 - betas, 0)


class DDPMLinear(Discrete):
    """β linear from 1e-4 to 0.02 over 1000 steps (Ho et al. 2020, §4).

    Example:
        >>> print(f"{DDPMLinear()(torch.tensor(1.0))[0]:.6f}")  # √ᾱ_T as in Lin et al. 2024, table 1
        0.006353
    """

    def __init__(self) -> None:
        super().__init__(_alphas_cumprod(_linspace(1e-4, 0.02)))


class LDMLinear(Discrete):
    """√β linear, β from 0.00085 to 0.012 over 1000 steps (Rombach et al. 2022, in their code).

    Example:
        >>> print(f"{LDMLinear()(torch.tensor(1.0))[0]:.6f}")  # √ᾱ_T as in Lin et al. 2024, table 1
        0.068265
    """

    def __init__(self) -> None:
        super().__init__(_alphas_cumprod(_linspace(0.00085**0.5, 0.012**0.5) ** 2))


class ImprovedCosine(Discrete):
    """ᾱ(t) = cos²((t + s)/(1 + s)·π/2), s = 0.008, β at most 0.999, 1000 steps (Nichol & Dhariwal 2021, eq. 17).

    Example:
        >>> print(f"{ImprovedCosine()(torch.tensor(1.0))[0]:.3e}")  # √ᾱ_T as in Lin et al. 2024, table 1
        4.928e-05
    """

    def __init__(self) -> None:
        n = torch.arange(1001, dtype=torch.float64, device="cpu") / 1000
        bar = torch.cos((n + 0.008) / 1.008 * math.pi / 2) ** 2
        super().__init__(_alphas_cumprod((1 - bar[1:] / bar[:-1]).clamp(max=0.999)))


class ZeroTerminalSNR(Discrete):
    """Another chain, rescaled so that its last step is pure noise: √ᾱ ← (√ᾱ − √ᾱ_T)·√ᾱ_1 / (√ᾱ_1 − √ᾱ_T).

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1. At a = 0
    the noise does not determine the picture, so Epsilon cannot be the target.

    Args:
        path: the chain to rescale.

    Example:
        >>> ZeroTerminalSNR(DDPMLinear())(torch.tensor(1.0))  # pure noise at t = 1
        (tensor(0.), tensor(1.))
    """

    def __init__(self, path: Discrete) -> None:
        if not isinstance(path, Discrete):
            raise ValueError(f"ZeroTerminalSNR needs a chain, and {type(path).__name__} is continuous: use LDMLinear")
        self.path = path
        root = path.alphas_cumprod.sqrt()
        super().__init__(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)
