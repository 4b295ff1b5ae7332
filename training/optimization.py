"""The optimizer, its groups of weights, and its learning rate."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.optimizer import Together, skips
from training.schedule import Cosine, Rates, Schedule

Groups = list[dict[str, Any]]
CRITIC = "critic."  # begins the names of the weights of a second network, which learns beside the first
STACKED = {"qkv": 3, "kv": 2}  # names of fused layers, and how many matrices they hold


@dataclass(frozen=True)
class Group:
    """Weights with a learning rate and a decay of their own.

    Args:
        pattern: a regular expression; the weights whose name has a match, such as `^blocks` or `modulation`.
        lr: factor on the learning rate.
        weight_decay: in place of the usual; none keeps that.
    """

    pattern: str
    lr: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"optimization.groups: {self.pattern!r} is no regular expression: {error}") from None
        if not (self.lr >= 0 and (self.weight_decay is None or self.weight_decay >= 0)):
            raise ValueError(
                f"optimization.groups needs lr and weight_decay of at least 0, got {self.lr} and {self.weight_decay}"
            )


@dataclass(frozen=True)
class Optimization:
    """How the weights learn.

    Args:
        lr: the peak learning rate.
        warmup: steps in which the rate rises from zero, linearly.
        weight_decay: weight decay of matrices; biases and gains have none.
        clip: largest norm of the whole gradient.
        max_skipped: the run ends after more skipped steps in a row than this. A step is skipped if its loss or
            gradient is not finite.
        schedule: the learning rate after the warm-up.
        optimizer: any of torch's kind, without its learning rate; none is AdamW.
        matrices: the optimizer of the matrices within the blocks, other than those of the modulation, such as
            engine.optimizer.Muon; none is `optimizer`, as for all other weights.
        groups: weights with a learning rate or decay of their own; the first pattern that fits counts.
    """

    lr: float = 1e-4
    warmup: int = 1000
    weight_decay: float = 0.01
    clip: float = 1.0
    max_skipped: int = 10
    schedule: Schedule | None = None
    optimizer: Callable[[Groups], torch.optim.Optimizer] | None = None
    matrices: Callable[[Groups], torch.optim.Optimizer] | None = None
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        if not (min(self.lr, self.warmup, self.weight_decay, self.max_skipped) >= 0 and self.clip > 0):
            raise ValueError(
                "optimization needs lr, warmup, weight_decay and max_skipped of at least 0 and clip > 0, "
                f"got {self.lr}, {self.warmup}, {self.weight_decay}, {self.max_skipped} and {self.clip}"
            )

    def build(self, weights: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of those weights, by name, that are trained.

        Raises:
            ValueError: a pattern fits no weight, there are no matrices for `matrices`, or an optimizer is unfit.
        """
        named = [(name, weight) for name, weight in weights.items() if weight.requires_grad]
        for group in self.groups:
            if not any(re.search(group.pattern, name) for name, _ in named):
                raise ValueError(f"optimization.groups: no trained weight's name has a match of {group.pattern!r}")
        some = [(name, weight) for name, weight in named if self.matrices and is_matrix(name, weight)]
        if self.matrices and not some:
            raise ValueError("optimization.matrices needs a network whose blocks have matrices: leave it out")
        chosen = {name for name, _ in some}
        rest = [(name, weight) for name, weight in named if name not in chosen]
        adamw = partial(torch.optim.AdamW, fused=True)
        makers = [(self.optimizer or adamw, rest), (self.matrices or adamw, some)]
        parts = [make(list(self._groups(weights))) for make, weights in makers if weights]
        for part in parts:
            if isinstance(part, torch.optim.SparseAdam):
                raise ValueError("SparseAdam learns from sparse gradients, and these are dense: take another optimizer")
            if hasattr(part, "train"):  # a schedule-free optimizer refuses a step outside its training mode
                part.train()
        return parts[0] if len(parts) == 1 and skips(parts[0]) else Together(parts)

    def _groups(self, named: Sequence[tuple[str, Tensor]]) -> Iterator[dict[str, Any]]:
        """The weights in groups of equal rate, decay and number of stacked matrices."""
        found: dict[tuple[float, float, int], list[Tensor]] = {}
        for name, weight in named:
            own = next((group for group in self.groups if re.search(group.pattern, name)), Group(""))
            usual = self.weight_decay if weight.ndim > 1 and not name.endswith(".bias") else 0.0
            decay = usual if own.weight_decay is None else own.weight_decay
            stacked = STACKED.get(name.split(".")[-2], 1) if is_matrix(name, weight) else 1
            found.setdefault((own.lr, decay, stacked), []).append(weight)
        for (factor, decay, stacked), weights in found.items():
            yield {"params": weights, "lr": factor * self.lr, "weight_decay": decay, "stacked": stacked}

    def check(self, weights: Mapping[str, nn.Parameter], steps: int) -> None:
        """ValueError if the weights cannot be trained so, or not for this many steps."""
        self.build(weights)
        if self.warmup >= steps:
            raise ValueError(f"optimization.warmup must be below run.steps {steps}, got {self.warmup}")

    def rate(self, peak: float, k: int, steps: int) -> float:
        """The learning rate of the step after k, of a training of this many steps."""
        if k < self.warmup:
            return k * (peak / self.warmup)
        return peak * (self.schedule or Cosine())(k - self.warmup, steps - self.warmup)

    def same_rates(self, done: int, steps: int, other: int) -> bool:
        """Whether the steps that are done had the rates that they have in a training of another length."""
        return done <= other and all(self.rate(1.0, k, steps) == self.rate(1.0, k, other) for k in range(done))

    def rates(self, optimizer: torch.optim.Optimizer, steps: int) -> Rates:
        """The schedule of all groups for a training of this many steps."""
        return Rates(optimizer, lambda peak, k: self.rate(peak, k, steps))


def is_matrix(name: str, weight: Tensor) -> bool:
    """Whether a weight is a matrix within a block, other than one of the modulation."""
    return weight.ndim == 2 and name.removeprefix(CRITIC).startswith("blocks.") and "modulation" not in name
