"""Guidance wraps a model and is itself a model; what is known wraps a denoiser. So no sampler knows of either."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flow.objective import Estimate, Model
from flow.sampler import Denoiser

ALWAYS = (0.0, 1.0)


class Weak(NamedTuple):
    """A worse model to move away from: autoguidance (Karras et al. 2024, eq. 3), adds scale·(y_cond − y_weak).

    With a network that skips some of its own blocks this is the skip-layer guidance of Stable Diffusion 3.5 medium.
    """

    model: Model
    scale: float  # 0 is none
    interval: tuple[float, float] = ALWAYS


class ClassifierFree:
    """Classifier-free guidance y = y_null + scale·(y_cond − y_null), on every channel (Ho & Salimans 2022, eq. 6).

    Args:
        model: the model to guide.
        null: what to move away from: the null condition or a negative prompt's. A named tuple of the condition's own
            type, whose tensors have its batch size or 1. It has the condition's parts, no more and no fewer.
        scale: 1 + w of the paper: 0 gives the null branch, 1 the conditional one, more goes beyond it; for all
            pictures, or (B, 1, …) for each.
        rescale: φ, the share in which y is given back the conditional branch's standard deviation, picture by picture,
            against over-exposure (Lin et al. 2024, eqs. 15–16); 0 is none.
        interval: guides where interval[0] ≤ t ≤ interval[1] and is the plain model elsewhere, at half the cost
            (Kynkäänniemi et al. 2024). All times of a call must be alike.
        channels: how many of y's channels are guided, from the first; the rest, a learned variance, are the conditional
            branch's. None means all.
        weak: a worse model of the same condition to move away from, too.
    """

    def __init__(
        self,
        model: Model,
        null: Any,
        scale: float | Tensor,
        rescale: float = 0.0,
        interval: tuple[float, float] = ALWAYS,
        channels: int | None = None,
        weak: Weak | None = None,
    ) -> None:
        self.model, self.null, self.scale, self.rescale, self.interval = model, null, scale, rescale, interval
        self.channels, self.weak = channels, weak
        self.stacked: tuple[Any, Any] = (None, None)  # the last condition, and it with the null condition

    def __call__(self, z: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        ends = () if end is None else (end,)
        if _within(self.interval, t):
            if self.stacked[0] is not condition:  # once for all steps of a walk
                both = (_stack(n, c) for n, c in zip(self.null, condition, strict=True))
                self.stacked = condition, type(condition)(*both)
            twice = (torch.cat([end, end]) for end in ends)
            y_null, y_cond = self.model(torch.cat([z, z]), torch.cat([t, t]), self.stacked[1], *twice).chunk(2)
            guided = y_null + self.scale * (y_cond - y_null)
        else:
            guided = y_cond = self.model(z, t, condition, *ends)
        if self.weak and _within(self.weak.interval, t):
            guided = guided + self.weak.scale * (y_cond - self.weak.model(z, t, condition, *ends))
        y, plain, rest = guided[:, : self.channels], y_cond[:, : self.channels], y_cond[:, self.channels :]
        if self.rescale and guided is not y_cond:
            std_cond, std = (x.flatten(1).std(1).reshape(-1, *(1,) * (x.ndim - 1)) for x in (plain, y))
            y = self.rescale * (std_cond / std) * y + (1 - self.rescale) * y
        return y if self.channels is None else torch.cat([y, rest], 1)


def known(denoise: Denoiser, x0: Tensor, noise: Tensor, mask: Tensor) -> Denoiser:
    """A denoiser that knows part of the answer, for inpainting: where the mask is 0, picture and noise are given.

    By Euler's method z is there a(s)·x0 + b(s)·noise after each step, the known part at its own noise level: the latent
    blending of Avrahami et al. 2022, algorithm 1, with one noise instead of a fresh one each time.

    Args:
        denoise: estimates the rest.
        x0: the known picture, (B, C, H, W).
        noise: what z started from there, (B, C, H, W).
        mask: 1 where the picture is to be made, 0 where it is known, broadcast to (B, C, H, W).
    """

    def knowing(z: Tensor, t: Tensor, *end: Tensor) -> Estimate:
        estimate = denoise(z, t, *end)
        return estimate._replace(
            x0=torch.where(mask > 0, estimate.x0, x0), noise=torch.where(mask > 0, estimate.noise, noise)
        )

    return knowing


def _within(interval: tuple[float, float], t: Tensor) -> bool:
    return interval == ALWAYS or bool(interval[0] <= t[0] <= interval[1])


def _stack(null: Tensor | None, condition: Tensor | None) -> Tensor | None:
    if null is None or condition is None:
        if null is not condition:
            raise ValueError("the null condition and the condition must have the same fields")
        return None
    return torch.cat([null.expand_as(condition), condition])
