"""An exponential moving average of the weights."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn


class EMA(Callback):
    """Averages a network's weights in float32 after every optimizer step; swapped in while validating.

    θ̄ ← d·θ̄ + (1 − d)·θ with d = min(decay, (1 + k)/(10 + k)) after k steps, so that the start is soon forgotten.
    Parameters that do not learn are left alone.

    Args:
        network: whose parameters to average.
        decay: between 0 and 1; 0.999 remembers about the last 1,000 steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {decay}")
        self.network, self.decay = network, decay
        self.average: dict[str, Tensor] = {}
        self.steps = 0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.average:
            self.average = {name: p.detach().float().clone() for name, p in self._learning().items()}
        self._to_device()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.steps < trainer.global_step:  # no step while gradients accumulate
            self.steps += 1
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            weights = [p.detach().float() for p in self._learning().values()]
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._to_device()
        self._swap()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._learning().items():
            raw = parameter.detach().float().clone()
            parameter.copy_(self.average[name])
            self.average[name] = raw

    def _learning(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def _to_device(self) -> None:
        parameters = self._learning()
        self.average = {name: average.to(parameters[name].device) for name, average in self.average.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["average"].keys() != self._learning().keys():
            raise ValueError("the checkpoint's average belongs to another network")
        self.steps, self.average = state["steps"], state["average"]
