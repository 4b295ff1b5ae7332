"""Data whose flow is known: exact denoisers, flow maps and average velocities of Gaussians and mixtures."""

import torch
from torch import Tensor

from flow.objective import Estimate
from flow.path import Path, expand_as
from flow.sampler import Denoiser

MEAN, STD = 0.7, 0.3


def spread(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of z at t."""
    return (1 - t) * MEAN, (((1 - t) * STD) ** 2 + t**2).sqrt()


def flow_map(z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """z at t carried to s."""
    (m_t, std_t), (m_s, std_s) = (tuple(expand_as(x, z) for x in spread(some)) for some in (t, s))
    return m_s + std_s / std_t * (z - m_t)


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """E[ε − x0 | z], the flow map's derivative."""
    mean, std = (expand_as(x, z) for x in spread(t))
    time = expand_as(t, z)
    return -MEAN + (time - (1 - time) * STD**2) / std**2 * (z - mean)


def average(z: Tensor, t: Tensor, condition: None, end: Tensor) -> Tensor:
    """The average velocity from t to end: the chord, and the velocity itself where there is no interval."""
    apart = expand_as(t - end, z)
    chord = (z - flow_map(z, t, end)) / torch.where(apart > 0, apart, 1)
    return torch.where(apart > 0, chord, velocity(z, t))


def some_intervals(count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """(z, t, end), from tiny intervals to the whole, float64."""
    t = torch.cat([torch.ones(2, dtype=torch.float64), torch.rand(count - 2, dtype=torch.float64)])
    end = t * torch.rand(count, dtype=torch.float64)
    end[0], end[3] = 0, t[3] - 1e-4
    mean, std = spread(t)
    z = mean[:, None] + std[:, None] * torch.randn(count, 3, dtype=torch.float64)
    return z, t, end


class Mixture:
    """x0 of one dimension from Gaussians; with one of them, a Gaussian. Knows the posterior means and the flow map."""

    def __init__(self, means: list[float], stds: list[float], shares: list[float]) -> None:
        self.mean, self.std, self.share = (torch.tensor(x, dtype=torch.float64) for x in (means, stds, shares))

    def denoiser(self, path: Path) -> Denoiser:
        def denoise(z: Tensor, t: Tensor) -> Estimate:
            a, b = (expand_as(c, z) for c in path(t))
            variance = (a * self.std) ** 2 + b**2
            off = z - a * self.mean
            share = torch.softmax(self.share.log() - variance.log() / 2 - off**2 / variance / 2, -1)
            x0 = self.mean + a * self.std**2 / variance * off
            return Estimate(*((share * x).sum(-1, keepdim=True) for x in (x0, b / variance * off)))

        return denoise

    def distribution(self, path: Path, t: Tensor, z: Tensor) -> Tensor:
        a, b = path(t)
        std = ((a * self.std) ** 2 + b**2).sqrt()
        return (self.share * torch.special.ndtr((z - a * self.mean) / std)).sum(-1, keepdim=True)

    def flow(self, path: Path, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """z at t carried along the ODE to s: in one dimension paths do not cross, so quantile goes to quantile."""
        target = self.distribution(path, t, z)
        low, high = torch.full_like(z, -20.0), torch.full_like(z, 20.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.distribution(path, s, middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def start(self, path: Path, t: Tensor) -> Tensor:
        """Points where z is likely at t, (9, 1)."""
        a, b = path(t)
        spread = ((a * self.std.max()) ** 2 + b**2).sqrt()
        return a * self.mean.mean() + spread * torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]


GAUSSIAN = Mixture([0.7], [0.3], [1.0])
TWO = Mixture([-0.6, 0.8], [0.3, 0.4], [0.4, 0.6])
