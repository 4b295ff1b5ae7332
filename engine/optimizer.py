"""Optimizers beside torch's: Muon, several as one, and the state of any of them by the names of the parameters."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine.checkpoint import rows_of
from engine.strategy import local, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic, so chosen that singular values come near 1 in five steps
OWN = ("params", "lr", "initial_lr")  # of a group: not what a step changes


def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    """A matrix with nearly the same singular vectors and singular values near 1, by Newton–Schulz in bfloat16.

    X ← a·X + (b·G + c·G²)·X with G = X·Xᵀ, from X = update / ‖update‖ on (Jordan et al. 2024, "Muon: an optimizer for
    hidden layers in neural networks").

    Args:
        update: (rows, columns).
        steps: of the iteration.

    Returns:
        bfloat16, of the same shape.
    """
    a, b, c = NEWTON_SCHULZ
    tall = update.shape[0] > update.shape[1]
    x = update.to(torch.bfloat16)
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalised_parts(update: Tensor, parts: int, steps: int) -> Tensor:
    """The same of each of the equal matrices that stand one above the other in an update."""
    return torch.cat([orthogonalised(part, steps) for part in update.chunk(parts)])


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices (Jordan et al. 2024).

    With gradient g and momentum m: m ← μ·m + (1 − μ)·g, u = μ·m + (1 − μ)·g,
    θ ← (1 − lr·decay)·θ − lr·0.2·√max(rows, columns)·orthogonalised(u). The factor makes a step's entries as large
    as AdamW's, so its learning rates and decay fit (Liu et al. 2025, "Muon is scalable for LLM training", §2.2). A
    group's `stacked` is the number of equal matrices that each of its weights holds one above the other: the fused q, k
    and v are three.

    Sharded weights are gathered matrix by matrix; each process orthogonalises its share of them.

    Args:
        params: matrices, alone or in groups.
        lr: learning rate.
        momentum: μ of the momentum, which is Nesterov's.
        weight_decay: decoupled, as AdamW's.
        ns_steps: steps of Newton–Schulz.

    Raises:
        ValueError: a weight is no matrix, or not divisible into `stacked` matrices.
    """

    found_inf: Tensor | None = None  # 1 on the device: this step changes nothing; as torch's fused optimizers have it
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        ns_steps: int = 5,
    ) -> None:
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0 and ns_steps >= 1):
            raise ValueError(
                "Muon needs lr and weight_decay of at least 0, momentum from 0 to below 1 and ns_steps of at least 1, "
                f"got {lr}, {weight_decay}, {momentum} and {ns_steps}"
            )
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": ns_steps, "stacked": 1}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim != 2 or weight.shape[0] % group["stacked"]:
                    raise ValueError(f"Muon takes {group['stacked']} matrices in one, got {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = evaluated(closure)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates = [self._momentum(weight, group["momentum"]) for weight in weights]
            work = partial(orthogonalised_parts, parts=group["stacked"], steps=group["ns_steps"])
            shared = weights and isinstance(weights[0], DTensor)
            updates = divided(updates, work) if shared else list(map(work, updates))
            for weight, update in zip(weights, updates, strict=True):
                here = local(weight)
                rate = group["lr"] * 0.2 * math.sqrt(max(weight.shape[0] // group["stacked"], weight.shape[1]))
                kept = 1 - group["lr"] * group["weight_decay"]
                self._put(here, here * kept - rate * update.to(here.dtype))
        return loss

    def _momentum(self, weight: Tensor, momentum: float) -> Tensor:
        """Adds the gradient to the momentum; the update before it is orthogonalised, sharded as the weight."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer, gradient = state["momentum_buffer"], weight.grad
        self._put(local(buffer), local(buffer).lerp(local(gradient), 1 - momentum))
        return gradient.lerp(buffer, momentum)

    def _put(self, target: Tensor, value: Tensor) -> None:
        """Writes the new values, unless the step is to be skipped; decided on the device."""
        bad = self.found_inf
        target.copy_(value if bad is None else torch.where(bad > 0, target, value))


def divided(tensors: Sequence[Tensor], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """work(whole tensor) of each sharded tensor, one process doing one; this process's rows of the results.

    All processes must call this with the same list. At a time as many tensors are whole as there are processes.
    """
    world, rank, results = dist.get_world_size(), dist.get_rank(), []
    for start in range(0, len(tensors), world):
        some = tensors[start : start + world]
        gathered = [whole(tensor) for tensor in some]
        done = [work(full) if owner == rank else torch.empty_like(full, dtype=torch.bfloat16)
                for owner, full in enumerate(gathered)]  # fmt: skip
        for owner, result in enumerate(done):
            dist.broadcast(result, owner)
        for tensor, result in zip(some, done, strict=True):
            rows = rows_of(tensor)
            results.append(result[rows.first : rows.first + rows.held])
    return results


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """The loss of a closure, which also computes the gradients; none without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Together(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one. It lets each skip the steps that are not finite.

    An optimizer that does not skip by `found_inf` by itself is asked on the host: then each step waits for the device.

    Args:
        parts: the optimizers.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        if not all(isinstance(part, torch.optim.Optimizer) for part in parts):
            raise ValueError("Together joins optimizers and is none by itself: take another")
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})  # the same groups
        for part in parts:
            self.state.update(part.state)
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each."""
        loss = evaluated(closure)
        for part in self.parts:
            if skips(part):
                part.found_inf = self.found_inf  # type: ignore[attr-defined]
                part.step()
            elif self.found_inf is None or not bool(self.found_inf > 0):
                part.step()
        return loss


def skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer skips a step by itself if its `found_inf` is 1. torch's attribute says so."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def optimizer_state(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's tensors of the trained parameters: "PARAMETER.KEY", such as AdamW's step, exp_avg and exp_avg_sq.

    A tensor that consists of others, as the moments of 8-bit optimizers, is given by them: "PARAMETER.KEY.PART".
    An optimizer that has none yet makes them by a step with zero gradients and rates: their values are to be restored.
    """
    if not any(optimizer.state.values()):
        begin(optimizer)
    found: dict[str, Tensor] = {}
    for name, parameter in weights.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
                parts, _ = value.__tensor_flatten__()
                found |= {f"{name}.{key}.{part}": getattr(value, part) for part in parts}
            elif isinstance(value, Tensor):
                found[f"{name}.{key}"] = value
    return found


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Lets an optimizer take a step with zero gradients and rates, which makes all tensors of its state."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    set_rates(optimizer, [0.0] * len(rates))
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    set_rates(optimizer, rates)


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Sets the learning rate of each group, in place where it is a tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_numbers(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """All numbers that a step may change, as JSON: those of the groups but the rates, and those of the parameters."""
    states = {name: written(optimizer.state.get(weight, {})) for name, weight in weights.items()}
    groups = [written({k: v for k, v in group.items() if k not in OWN}) for group in optimizer.param_groups]
    return {"groups": groups, "parameters": {name: state for name, state in states.items() if state}}


def set_optimizer_numbers(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], numbers: Any) -> None:
    """Sets what `optimizer_numbers` gave. Older checkpoints have a list of the groups' numbers instead."""
    numbers = {"groups": numbers, "parameters": {}} if isinstance(numbers, list) else numbers
    for group, values in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update(read(values))
    for name, values in numbers["parameters"].items():
        optimizer.state[weights[name]].update(read(values))


def written(values: Mapping[str, Any]) -> dict[str, float | str]:
    """The numbers among some values. JSON has no infinity: it is a string."""
    numbers = {key: value for key, value in values.items() if isinstance(value, bool | int | float)}
    return {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}


def read(values: Mapping[str, float | str]) -> dict[str, float]:
    """The numbers that `written` gave."""
    return {key: float(value) if isinstance(value, str) else value for key, value in values.items()}
