"""Averages of the weights, in float32, sharded as the weights are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from engine import posthoc
from engine.strategy import local

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Averages:
    """Which averages of the weights are kept.

    Args:
        decay: of the exponential average that validation, samples and the model folder use; 0.999 remembers about the
            last 1,000 steps.
        more: decays of further exponential averages.
        widths: relative widths σ_rel of power-function averages (Karras et al. 2024b, §3.1), of which
            `train.py average` makes one of any width afterwards; 0.05 and 0.10 are the paper's.
        snapshot_every: steps between two snapshots of the averages with widths; None if there are none.
    """

    decay: float = 0.9999
    more: tuple[float, ...] = ()
    widths: tuple[float, ...] = ()
    snapshot_every: int | None = None

    def __post_init__(self) -> None:
        if not all(0 <= decay < 1 for decay in (self.decay, *self.more)):
            given = ", ".join(map(str, (self.decay, *self.more)))
            raise ValueError(f"ema.decay and ema.more must be at least 0 and below 1, got {given}")
        for width in self.widths:
            posthoc.exponent(width)
        if self.widths and (self.snapshot_every or 0) < 1:
            raise ValueError(f"ema.widths needs ema.snapshot_every: set it to at least 1, got {self.snapshot_every}")
        if (self.snapshot_every or 0) >= 1 and not self.widths:
            raise ValueError("ema.snapshot_every needs ema.widths: name at least one width, or remove snapshot_every")

    def decays(self) -> Mapping[str, Callable[[int], float]]:
        """Average's name → its decay as a function of the step, counted from 1; the main average is first."""
        exponential = {f"decay-{d}": partial(warmup_decay, d) for d in dict.fromkeys((self.decay, *self.more))}
        powers = {f"width-{w}": partial(posthoc.decay, exponent=posthoc.exponent(w)) for w in self.widths}
        return exponential | powers


def warmup_decay(decay: float, step: int) -> float:
    """min(decay, (1 + k)/(10 + k)) after k steps, so that the first weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


class EMA(nn.Module, Generic[N]):
    """Networks whose weights are averages: θ̄ ← d·θ̄ + (1 − d)·θ after every step, for each with its own d.

    Args:
        averages: which averages.
        copies: one network for each average, in their order, on the device of `network` and sharded like it.
        network: the network that is trained. Its frozen parameters are copied once, or shared, and not averaged.
    """

    def __init__(self, averages: Averages, copies: list[N], network: nn.Module) -> None:
        super().__init__()
        self.decays = averages.decays()
        self.copies = nn.ModuleList(copies)
        self.learning = [name for name, p in network.named_parameters() if p.requires_grad]
        self.pairs: list[tuple[list[Tensor], list[Tensor]]] = []  # (average, weights), made at the first update
        held = tensors(network)
        with torch.no_grad():
            for copied in copies:
                for name, tensor in tensors(copied).items():
                    if tensor is not held[name]:
                        local(tensor).copy_(local(held[name]))

    @property
    def main(self) -> N:
        """The network that validation, samples and the model folder use: the first average."""
        return self.copies[0]  # type: ignore[return-value]

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Updates all averages with the weights after step number `step`, counted from 1."""
        if not self.pairs:
            weights, *averages = (dict(one.named_parameters()) for one in (network, *self.copies))
            here = [local(weights[name]) for name in self.learning]
            self.pairs = [([local(average[name]) for name in self.learning], here) for average in averages]
        for decay, (average, now) in zip(self.decays.values(), self.pairs, strict=True):
            torch._foreach_lerp_(average, now, 1 - decay(step))

    def named(self) -> dict[str, Tensor]:
        """All averaged tensors as the checkpoint holds them: "AVERAGE.PARAMETER" → tensor."""
        found: dict[str, Tensor] = {}
        for name, copied in zip(self.decays, self.copies, strict=True):
            state: Mapping[str, Tensor] = copied.state_dict()
            found |= {f"{name}.{parameter}": state[parameter] for parameter in self.learning}
        return found


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, also those that are no part of the state."""
    return dict(network.named_parameters()) | dict(network.named_buffers())


def share_frozen(network: nn.Module, copied: nn.Module) -> None:
    """Gives a skeleton of the network the network's own frozen parts, and empty tensors on its device for the others.

    A part is frozen if it has parameters or buffers and none of them learns: it can have another class there.
    """
    for name, part in network.named_children():
        if not any(p.requires_grad for p in part.parameters()) and tensors(part):
            setattr(copied, name, part)
        else:
            share_frozen(part, copied.get_submodule(name))
    for name, parameter in network.named_parameters(recurse=False):
        empty = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
        setattr(copied, name, empty if parameter.requires_grad else parameter)
    for name, buffer in network.named_buffers(recurse=False):
        setattr(copied, name, buffer)
