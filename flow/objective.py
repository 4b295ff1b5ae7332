"""The objective: path + target + density + weight, as one loss for training and validation and one denoiser."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from flow.density import Density, LogitNormal, shift
from flow.path import Path, RectifiedFlow, expand_as
from flow.target import Target, Velocity, solve

Model = Callable[[Tensor, Tensor, Any], Tensor]  # (z (B, …), t (B,), condition) → y (B, …)


class Weight(ABC):
    """A factor on the loss at t. Independent of how t was drawn: the density has its own say by drawing."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """The weight at t, same shape."""


class DensityWeight(Weight):
    """w(t) = π(t): with t drawn uniformly, in expectation the same loss as drawing t from π (Esser et al. 2024, §3.1).

    Args:
        density: π.
    """

    def __init__(self, density: Density) -> None:
        self.density = density

    def __call__(self, t: Tensor) -> Tensor:
        return self.density.pdf(t)


@final
class Objective:
    """What the network learns, and how its output is read.

    Args:
        path: how picture and noise mix at t.
        target: what the network predicts.
        density: where in t training looks.
        weight: an extra factor on the loss at t; none means 1.
        shift: α of the resolution shift, applied to the drawn t here and to the sampler's time grid, once each.
    """

    def __init__(
        self,
        path: Path | None = None,
        target: Target | None = None,
        density: Density | None = None,
        weight: Weight | None = None,
        shift: float = 1.0,
    ) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be > 0, got {shift}")
        self.path = path or RectifiedFlow()
        self.target = target or Velocity()
        self.density = density or LogitNormal()
        self.weight = weight
        self.shift = shift

    def time(self, u: Tensor) -> Tensor:
        """Training times for uniform u: (B,) float32."""
        return shift(self.density(u), self.shift).float()

    def loss(self, model: Model, x0: Tensor, noise: Tensor, t: Tensor, condition: Any) -> Tensor:
        """w(t)·mean((model(z_t, t) − y)²) for each image.

        Everything around the network is float32, under any autocast: bfloat16 would round t by up to 4/1000.

        Args:
            x0: pictures or latents, (B, …).
            noise: standard normal, (B, …).
            t: times in [0, 1], (B,) float32.
            condition: passed on to the model unread.

        Returns:
            (B,) float32.
        """
        if t.dtype != torch.float32:
            raise TypeError(f"t must be float32, got {t.dtype}")
        x0, noise = x0.float(), noise.float()
        a, b, p, q = (expand_as(c, x0) for c in (*self.path(t), *self.target.row(self.path, t)))
        error = model(a * x0 + b * noise, t, condition).float() - (p * x0 + q * noise)
        loss = error.square().flatten(1).mean(1)
        return loss if self.weight is None else self.weight(t) * loss

    def denoise(self, model: Model, z: Tensor, t: Tensor, condition: Any) -> tuple[Tensor, Tensor]:
        """The model's estimate (x0, ε) at z (B, …), t (B,)."""
        return solve(self.path, self.target, z, model(z, t, condition).float(), t)


class TimeBins:
    """Mean loss in equal bins of t, summed on the device; only `means` waits for it.

    Args:
        count: number of bins over [0, 1].
    """

    def __init__(self, count: int = 8) -> None:
        self.count = count
        self.sums: Tensor | None = None  # (2, count): loss, number of images

    def add(self, t: Tensor, loss: Tensor) -> None:
        """Adds a batch of per-image losses (B,) at times t (B,)."""
        if self.sums is None or self.sums.device != loss.device:
            self.sums = torch.zeros(2, self.count, device=loss.device)
        index = (t.detach() * self.count).long().clamp(max=self.count - 1)
        self.sums.index_add_(1, index, torch.stack([loss.detach(), torch.ones_like(loss)]))

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[float]:
        """Mean loss per bin since the last call, NaN for an empty bin. Starts afresh.

        Args:
            reduce: adds up the sums (2, count) of all processes.
        """
        if self.sums is None:
            return [float("nan")] * self.count
        total, number = reduce(self.sums)
        self.sums = None
        return (total / number).tolist()
