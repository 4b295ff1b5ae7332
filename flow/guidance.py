"""Guidance wraps a model and is itself a model. Inpainting and refiners wrap denoisers. Samplers know of none."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flow.objective import Estimate, Model
from flow.path import Path
from flow.sampler import Denoiser
from flow.target import Target, prediction, velocity

ALWAYS, NEVER = (0.0, 1.0), (2.0, 2.0)
BEFORE_NOISE = 0.98  # the largest share of noise, b/(a + b), at which a gradient guides

Score = Callable[[Tensor, Tensor], Tensor]  # (z (B, …), t ()) → ln p of what is asked for at z, (B,)


class Weak(NamedTuple):
    """The weaker model of autoguidance, which adds scale·(y_cond − y_weak) (Karras et al. 2024, eq. 3).

    If it is the same network without some blocks, this is the skip-layer guidance of Stable Diffusion 3.5 medium.
    """

    model: Model
    scale: float  # 0 turns it off
    interval: tuple[float, float] = ALWAYS


class Guider(ABC):
    """Another way than y_null + scale·(y_cond − y_null) to make one output of two branches, for one walk.

    It works on v = ε̂ − x̂0, the velocity in w = z/(a + b) at τ = b/(a + b), in which every path is the straight line
    (`flow.sampler`). So it means the same for every path and target. What it does to a picture depends on this picture
    alone.

    Args:
        path: of the model.
        target: of the model.
        times: of the walk, (steps + 1,), on the host.
    """

    zero_steps: int = 0  # steps at the beginning of the walk in which the velocity is zero
    momentum: float = 0.0  # factor of what earlier times of the walk leave behind

    def __init__(self, path: Path, target: Target, times: Tensor) -> None:
        self.path, self.target, self.times = path, target, times

    def __call__(self, z: Tensor, t: Tensor, y_null: Tensor, y_cond: Tensor, scale: float | Tensor) -> Tensor:
        """The output at (z, t), (B, …), for t (). Channels that z lacks, a learned variance, are those of y_cond."""
        (a, b), channels = self.path(t), z.shape[1]
        null, cond = (velocity(self.path, self.target, z, y[:, :channels].to(z.dtype), t) for y in (y_null, y_cond))
        v = self.join(z / (a + b), t, null, cond, scale)
        return torch.cat([prediction(self.path, self.target, z, v, t), y_cond[:, channels:].to(z.dtype)], 1)

    @abstractmethod
    def join(self, w: Tensor, t: Tensor, null: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
        """The velocity (B, …) at w of those of the two branches."""

    def rests(self, t: Tensor) -> bool:
        """Whether the velocity is zero at t, so that no branch is needed."""
        return self.zero_steps > 0 and bool(t > self.times[self.zero_steps])

    def at_rest(self, z: Tensor, t: Tensor) -> Tensor:
        """The output of velocity zero at (z, t)."""
        return prediction(self.path, self.target, z, torch.zeros_like(z), t)


class Projected(Guider):
    """Adaptive projected guidance, APG (Sadat et al. 2024): x̂0 = x̂0_cond + (scale − 1)·(d⊥ + η·d∥).

    d is x̂0_cond − x̂0_null plus β times the d of the time before, shortened to the norm r. d∥ is its part along
    x̂0_cond, which saturates colours. η = 1 without momentum and threshold is plain guidance.

    The time before is the last other time at which this object was called. Where a sampler calls the model at one time
    again, as Heun's method does, the first call counts.

    Args:
        path: of the model.
        target: of the model.
        times: of the walk, (steps + 1,), on the host.
        eta: η, the weight of the parallel part, 0 to 1.
        threshold: r, the largest norm of a picture's d, over all its numbers; inf means no limit.
        momentum: β, above −1 and below 1. Negative values push away from where guidance pushed before.

    Raises:
        ValueError: an option is out of its range.

    Example:
        At z = 0 and t = 1, x̂0_cond is −v_cond, so only the second of two numbers is guided.

        >>> from flow.path import RectifiedFlow
        >>> from flow.target import Velocity
        >>> guider = Projected(RectifiedFlow(), Velocity(), times=torch.tensor([1.0, 0.0]))
        >>> guider(torch.zeros(1, 2), torch.tensor(1.0), torch.tensor([[0.0, -1.0]]), torch.tensor([[1.0, 0.0]]), 3.0)
        tensor([[1., 2.]])
    """

    def __init__(
        self,
        path: Path,
        target: Target,
        times: Tensor,
        *,
        eta: float = 0.0,
        threshold: float = math.inf,
        momentum: float = 0.0,
    ) -> None:
        super().__init__(path, target, times)
        if not 0 <= eta <= 1 or not threshold > 0 or not -1 < momentum < 1:
            raise ValueError("guider apg needs 0 <= eta <= 1, threshold > 0 and -1 < momentum < 1, "
                             f"got {eta:g}, {threshold:g} and {momentum:g}")  # fmt: skip
        self.eta, self.threshold, self.momentum = eta, threshold, momentum
        self.time = math.nan  # of the latest call
        self.earlier: Tensor | float = 0.0  # d of the time before
        self.latest: Tensor | float = 0.0  # d of that time

    def join(self, w: Tensor, t: Tensor, null: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
        a, b = self.path(t)
        tau = b / (a + b)
        x0, v = w - tau * cond, cond - null  # d = −τ·v
        if self.momentum:
            v = v - self._carried(t, -tau * v) / tau
        v = v * (self.threshold / (tau * v.flatten(1).norm(dim=1))).clamp(max=1).reshape(-1, *(1,) * (v.ndim - 1))
        return cond + (scale - 1) * (v - (1 - self.eta) * _along(v, x0))

    def _carried(self, t: Tensor, difference: Tensor) -> Tensor | float:
        """β times the d of the time before; keeps the d of this time for later ones."""
        if self.time != float(t):
            self.time, self.earlier = float(t), self.latest
            self.latest = difference + self.momentum * self.earlier
        return self.momentum * self.earlier


class ZeroStar(Guider):
    """CFG-Zero* (Fan et al. 2025): v = s*·v_null + scale·(v_cond − s*·v_null), and v = 0 in the first steps.

    s* = ⟨v_cond, v_null⟩/‖v_null‖² brings s*·v_null nearest to v_cond. v is zero at all times before the end of the
    first `zero_steps` steps, which so cost nothing. Heun's method also looks at the end of a step, so it takes half of
    the last of them.

    Args:
        path: of the model.
        target: of the model.
        times: of the walk, (steps + 1,), on the host.
        zero_steps: number of steps without velocity; the authors take 4 % of all.

    Raises:
        ValueError: the walk has not more steps.

    Example:
        With s* = 1/2 the null branch is (1, 0), from which 3·(0, 1) lead away.

        >>> from flow.path import RectifiedFlow
        >>> from flow.target import Velocity
        >>> guider = ZeroStar(RectifiedFlow(), Velocity(), times=torch.tensor([1.0, 0.5, 0.0]))
        >>> guider(torch.zeros(1, 2), torch.tensor(0.5), torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]]), 3.0)
        tensor([[1., 3.]])
    """

    def __init__(self, path: Path, target: Target, times: Tensor, *, zero_steps: int = 1) -> None:
        super().__init__(path, target, times)
        if not 0 <= zero_steps < len(times) - 1:
            raise ValueError(f"guider zero-star needs zero_steps from 0 to below the {len(times) - 1} steps of the "
                             f"walk, got {zero_steps}")  # fmt: skip
        self.zero_steps = zero_steps

    def join(self, w: Tensor, t: Tensor, null: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
        null = _along(cond, null)
        return null + scale * (cond - null)


class ClassifierFree:
    """Classifier-free guidance y = y_null + scale·(y_cond − y_null), on every channel (Ho & Salimans 2022, eq. 6).

    Args:
        model: the model to guide.
        null: the null condition, or that of a negative prompt. A named tuple of the condition's type with the same
            fields; its tensors have the condition's batch size or 1. None will do if the interval is `NEVER`.
        scale: 1 + w of the paper: 0 gives the null branch, 1 the conditional branch, larger values extrapolate. One
            number for all pictures, or (B, 1, …) for each.
        rescale: φ. Each picture of y is moved by this share toward the standard deviation of the conditional branch,
            against over-exposure (Lin et al. 2024, eqs. 15–16); 0 turns it off.
        interval: for `at`: guidance is on where interval[0] ≤ t ≤ interval[1]; elsewhere the plain model runs, at half
            the cost (Kynkäänniemi et al. 2024).
        channels: guides the first `channels` channels of y; the others, a learned variance, come from the conditional
            branch. None means all.
        weak: a weaker model of the same condition, for autoguidance.
        guider: joins the two branches in the place of the formula; none means the formula. It needs `at`, and one
            object guides one walk.
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
        guider: Guider | None = None,
    ) -> None:
        self.model, self.null, self.scale, self.rescale, self.interval = model, null, scale, rescale, interval
        self.channels, self.weak, self.guider = channels, weak, guider
        self.stacked: tuple[Any, Any] = (None, None)  # the last condition; null and condition in one batch

    def at(self, t: Tensor) -> Model:
        """The model for time t (), on the host. A part that is off at this time costs nothing."""
        weakened, guided = self.weak is not None and _within(self.weak.interval, t), _within(self.interval, t)
        if guided and self.guider and self.guider.rests(t):
            return partial(self._at_rest, self.guider, t)
        return partial(self, guided=guided, weakened=weakened, time=t)

    def __call__(
        self,
        z: Tensor,
        t: Tensor,
        condition: Any,
        end: Tensor | None = None,
        guided: bool = True,
        weakened: bool = True,
        time: Tensor | None = None,
    ) -> Tensor:
        """y at (z, t), (B, …), with both parts of the guidance unless one is turned off. A guider needs `time` ()."""
        ends = () if end is None else (end,)
        if guided:
            if self.stacked[0] is not condition:  # built once for all steps
                both = (_stack(n, c) for n, c in zip(self.null, condition, strict=True))
                self.stacked = condition, type(condition)(*both)
            ends_twice = (torch.cat([end, end]) for end in ends)
            y_null, y_cond = self.model(torch.cat([z, z]), torch.cat([t, t]), self.stacked[1], *ends_twice).chunk(2)
            if self.guider:
                assert time is not None
                y = self.guider(z, time, y_null, y_cond, self.scale)
            else:
                y = y_null + self.scale * (y_cond - y_null)
        else:
            y = y_cond = self.model(z, t, condition, *ends)
        if self.weak and weakened:
            y = y + self.weak.scale * (y_cond - self.weak.model(z, t, condition, *ends))
        moved = y is not y_cond
        y, plain, rest = y[:, : self.channels], y_cond[:, : self.channels], y_cond[:, self.channels :]
        if self.rescale and moved:
            std_cond, std = (x.flatten(1).std(1).reshape(-1, *(1,) * (x.ndim - 1)) for x in (plain, y))
            y = self.rescale * (std_cond / std) * y + (1 - self.rescale) * y
        return y if self.channels is None else torch.cat([y, rest], 1)

    def _at_rest(self, guider: Guider, time: Tensor, z: Tensor, t: Tensor, condition: Any) -> Tensor:
        """y at (z, t) where the guider rests. Only a learned variance needs the model."""
        y = guider.at_rest(z, time)
        return y if self.channels is None else torch.cat([y, self.model(z, t, condition)[:, self.channels :]], 1)


def inpaint(denoise: Denoiser, x0: Tensor, noise: Tensor, mask: Tensor) -> Denoiser:
    """A denoiser for inpainting: where the mask is 0, it returns the known picture and noise.

    With Euler's method the known part of z is a(s)·x0 + b(s)·noise after each step, as noisy as the rest of z.
    This is the latent blending of Avrahami et al. 2022, algorithm 1, with one noise instead of a fresh one per step.

    Args:
        denoise: estimates picture and noise where the mask is 1.
        x0: the known picture, (B, C, H, W).
        noise: the noise in z at the start, (B, C, H, W).
        mask: 1 where the picture is generated, 0 where it is known; broadcast to (B, C, H, W).
    """

    def inpainted(z: Tensor, t: Tensor, *end: Tensor) -> Estimate:
        estimate = denoise(z, t, *end)
        return estimate._replace(
            x0=torch.where(mask > 0, estimate.x0, x0), noise=torch.where(mask > 0, estimate.noise, noise)
        )

    return inpainted


def uphill(
    denoise: Denoiser, path: Path, score: Score, scale: float, interval: tuple[float, float] | None = None
) -> Denoiser:
    """A denoiser guided by a gradient g = ∇_z score: x̂0 + (b²/a)·s·g and ε̂ − b·s·g.

    If the score is ln p(c | z), s = 1 gives the estimates for the pictures of c, by Bayes' rule. The second formula is
    that of classifier guidance (Dhariwal & Nichol 2021, algorithm 2); the first keeps a·x̂0 + b·ε̂ = z. So a model's
    output becomes y − (b·det/a)·s·g, whatever its target (`flow.target`), which on rectified flow is v − t/(1 − t)·s·g.

    Args:
        denoise: estimates picture and noise.
        path: of the model.
        score: differentiable by z; each number may depend on its own picture alone.
        scale: s.
        interval: guidance is on where interval[0] ≤ t ≤ interval[1]; none means where b/(a + b) ≤ 0.98. Elsewhere it
            costs nothing.

    Raises:
        ValueError: the interval contains a time without any picture, a = 0, where the step would be infinite.

    Example:
        The data is N(0, 1), and c = 2 a measurement of it with the variance 1. At z = 0.5 and t = 0.5, x0 is
        N(0.5, 0.5) before the measurement and has the mean (0.5/0.5 + 2/1)/(1/0.5 + 1/1) = 1 after it.

        >>> from flow.path import RectifiedFlow
        >>> def denoise(z, t):
        ...     return Estimate(z, z)  # x̂0 and ε̂ at t = 0.5
        >>> z, t = torch.tensor([[0.5]]), torch.tensor(0.5)
        >>> uphill(denoise, RectifiedFlow(), lambda z, t: -(2 - z[:, 0]) ** 2 / 2 / (1 + 0.5), scale=1.0)(z, t).x0
        tensor([[1.]])
    """
    if interval:
        check_interval(path, interval)

    def guided(z: Tensor, t: Tensor, *end: Tensor) -> Estimate:
        estimate = denoise(z, t, *end)
        a, b = path(t)
        if not (_within(interval, t) if interval else b / (a + b) <= BEFORE_NOISE):
            return estimate
        step = scale * torch.func.grad(lambda z: score(z, t).sum())(z)
        return estimate._replace(x0=estimate.x0 + (b**2 / a) * step, noise=estimate.noise - b * step)

    return guided


def check_interval(path: Path, interval: tuple[float, float]) -> None:
    """ValueError if the interval (from, to) of a gradient ends at a time without any picture on this path."""
    if path(torch.tensor(interval[1], dtype=torch.float64))[0] == 0:
        raise ValueError(f"at t = {interval[1]:g} there is no picture left to guide, and the step would be infinite: "
                         "end the interval before it, such as at 0.98")  # fmt: skip


def of_picture(denoise: Denoiser, reward: Callable[[Tensor], Tensor]) -> Score:
    """The score of a reward of pictures at z: that of x̂0, through the denoiser (Bansal et al. 2023).

    Args:
        denoise: estimates picture and noise, differentiable by z.
        reward: of pictures or latents (B, …), differentiable; (B,).
    """
    return lambda z, t: reward(denoise(z, t).x0)


def refined(denoise: Denoiser, refine: Denoiser, handover: float) -> Denoiser:
    """A denoiser of two, for a base and a refiner (SDXL, Podell et al. 2023, §2.5): the second one below a time.

    The sampler walks one grid and keeps its memory of earlier steps over the handover. No noise is added there.

    Args:
        denoise: estimates picture and noise at t ≥ handover.
        refine: at t < handover.
        handover: the time.
    """

    def either(z: Tensor, t: Tensor, *end: Tensor) -> Estimate:
        return (denoise if t >= handover else refine)(z, t, *end)

    return either


def _along(x: Tensor, y: Tensor) -> Tensor:
    """Each picture's part of x that lies along y, ⟨x, y⟩/‖y‖²·y, (B, …); zero where y is."""
    product, square = ((x * y).flatten(1).sum(1), (y * y).flatten(1).sum(1))
    return (product / square.clamp(min=torch.finfo(y.dtype).tiny)).reshape(-1, *(1,) * (x.ndim - 1)) * y


def _within(interval: tuple[float, float], t: Tensor) -> bool:
    return bool(interval[0] <= t.float() <= interval[1])  # the model's t is float32


def _stack(null: Tensor | None, condition: Tensor | None) -> Tensor | None:
    if null is None or condition is None:
        if null is not condition:
            raise ValueError("the null condition and the condition must have the same fields: set each in both or none")
        return None
    return torch.cat([null.expand_as(condition), condition])
