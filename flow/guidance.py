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
    """

    def __init__(self, model: Model, null: Any, scale: float) -> None:
        self.model, self.null, self.scale = model, null, scale

    def __call__(self, z: Tensor, t: Tensor, condition: Any) -> Tensor:
        both = type(condition)(*(_stack(n, c) for n, c in zip(self.null, condition, strict=True)))
        y_null, y_cond = self.model(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return y_null + self.scale * (y_cond - y_null)


def _stack(null: Tensor | None, condition: Tensor | None) -> Tensor | None:
    if null is None or condition is None:
        if null is not condition:
            raise ValueError("the null condition and the condition must have the same fields")
        return None
    return torch.cat([null.expand_as(condition), condition])
