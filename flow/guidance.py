"""Guidance wraps a model and is itself a model, so no sampler knows of it."""

from typing import Any

import torch
from torch import Tensor

from flow.objective import Model


class ClassifierFree:
    """Classifier-free guidance y = y_null + scale·(y_cond − y_null), on every channel (Ho & Salimans 2022, eq. 6).

    Args:
        model: the model to guide.
        null: what to move away from: the null condition or a negative prompt's. A named tuple of the condition's own
            type, whose tensors have its batch size or 1.
        scale: 1 + w of the paper: 0 gives the null branch, 1 the conditional one, more goes beyond it.
        rescale: φ, the share in which y is given back the conditional branch's standard deviation, picture by picture,
            against over-exposure (Lin et al. 2024, eqs. 15–16); 0 is none.
        interval: guides where interval[0] ≤ t ≤ interval[1] and is the plain model elsewhere, at half the cost
            (Kynkäänniemi et al. 2024). All times of a call must be alike.
        channels: how many of y's channels are guided, from the first; the rest, a learned variance, are the conditional
            branch's. None means all.
    """

    def __init__(
        self,
        model: Model,
        null: Any,
        scale: float,
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
        channels: int | None = None,
    ) -> None:
        self.model, self.null, self.scale, self.rescale, self.interval = model, null, scale, rescale, interval
        self.channels = channels

    def __call__(self, z: Tensor, t: Tensor, condition: Any) -> Tensor:
        if self.interval != (0.0, 1.0) and not self.interval[0] <= t[0] <= self.interval[1]:
            return self.model(z, t, condition)
        both = type(condition)(*(_stack(n, c) for n, c in zip(self.null, condition, strict=True)))
        y_null, y_cond = self.model(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        y_null, y_cond, rest = y_null[:, : self.channels], y_cond[:, : self.channels], y_cond[:, self.channels :]
        y = y_null + self.scale * (y_cond - y_null)
        if self.rescale:
            std_cond, std = (x.flatten(1).std(1).reshape(-1, *(1,) * (x.ndim - 1)) for x in (y_cond, y))
            y = self.rescale * (std_cond / std) * y + (1 - self.rescale) * y
        return y if self.channels is None else torch.cat([y, rest], 1)


def _stack(null: Tensor | None, condition: Tensor | None) -> Tensor | None:
    if null is None or condition is None:
        if null is not condition:
            raise ValueError("the null condition and the condition must have the same fields")
        return None
    return torch.cat([null.expand_as(condition), condition])
