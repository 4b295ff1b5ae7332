"""The optimizer and its learning-rate schedule."""

from dataclasses import dataclass

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn


@dataclass(frozen=True)
class Optimization:
    """AdamW with linear warm-up and cosine decay to zero.

    Args:
        lr: the peak learning rate.
        warmup: steps of the warm-up.
        weight_decay: weight decay of matrices; biases and gains have none.
        clip: largest norm of the whole gradient.
        max_skipped: the run ends after more skipped steps in a row than this. A step is skipped if its loss or
            gradient is not finite.
    """

    lr: float = 1e-4
    warmup: int = 1000
    weight_decay: float = 0.01
    clip: float = 1.0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if not (min(self.lr, self.warmup, self.weight_decay, self.max_skipped) >= 0 and self.clip > 0):
            raise ValueError(
                "optimization needs lr, warmup, weight_decay and max_skipped of at least 0 and clip > 0, "
                f"got {self.lr}, {self.warmup}, {self.weight_decay}, {self.max_skipped} and {self.clip}"
            )

    def optimizer(self, network: nn.Module) -> torch.optim.AdamW:
        """AdamW for the trained weights of the network."""
        groups = param_groups_weight_decay(network, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, fused=True)

    def check(self, steps: int) -> None:
        """ValueError if the warm-up is not shorter than a training of this many steps."""
        if self.warmup >= steps:
            raise ValueError(f"optimization.warmup must be below run.steps {steps}, got {self.warmup}")

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> CosineLRScheduler:
        """The schedule for a training of this many steps."""
        return CosineLRScheduler(
            optimizer, steps - self.warmup, warmup_t=self.warmup, warmup_prefix=True, t_in_epochs=False
        )
