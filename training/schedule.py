"""Learning-rate schedules: the share of the peak rate at step k of a training, after the warm-up."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch


class Schedule(ABC):
    """A learning rate as a share of its peak."""

    @abstractmethod
    def __call__(self, k: int, steps: int) -> float:
        """The share at step k of so many steps; both are counted from the end of the warm-up."""


class Constant(Schedule):
    """The peak rate to the end. A run can be made longer at any time."""

    def __call__(self, k: int, steps: int) -> float:
        return 1.0


class Cosine(Schedule):
    """Half a cosine from the peak to a floor (Loshchilov & Hutter 2017, eq. 5).

    Args:
        floor: the share of the peak at the end.
    """

    def __init__(self, floor: float = 0.0) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"Cosine's floor must be from 0 to 1, got {floor}")
        self.floor = floor

    def __call__(self, k: int, steps: int) -> float:
        if k >= steps:
            return self.floor
        return self.floor + (1 - self.floor) * (0.5 * (1 + math.cos(math.pi * k / steps)))


class WarmupStableDecay(Schedule):
    """The peak rate, then a cool-down to zero (Hu et al. 2024, "MiniCPM", §4.2).

    Until the cool-down begins, the run can be made longer.

    Args:
        decay: the share of the training that the cool-down takes.
        shape: linear, or sqrt: 1 − √ of the done share of the cool-down (Hägele et al. 2024, §3.1).
    """

    def __init__(self, decay: float = 0.2, shape: Literal["linear", "sqrt"] = "linear") -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"WarmupStableDecay's decay must be above 0 and at most 1, got {decay}")
        self.decay, self.shape = decay, shape

    def __call__(self, k: int, steps: int) -> float:
        length = self.decay * steps
        done = min(max(0.0, (k - (steps - length)) / length), 1.0)
        return 1 - (done if self.shape == "linear" else math.sqrt(done))


class Rates(torch.optim.lr_scheduler.LRScheduler):
    """Sets each group's rate to rate(its peak, k).

    Args:
        optimizer: whose groups have their peaks as `lr`.
        rate: (peak, k) → learning rate of the step after k.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Callable[[float, int], float]) -> None:
        self.rate = rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        return [self.rate(float(peak), self.last_epoch) for peak in self.base_lrs]

    def set(self, k: int) -> None:
        """Sets the rates of the step after k."""
        self.last_epoch = k - 1
        self.step()
