"""The objective: path + target + density + weight, as one loss for training and validation and one denoiser.

Three objectives that learn something else stand beside it, each with the same three methods `times`, `loss` and
`denoise`: `flow.variance.LearnedVariance`, `flow.meanflow.MeanFlow` and `flow.stepmap.StepMap`.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flow.density import Density, LogitNormal, shift
from flow.describe import describe
from flow.path import Path, RectifiedFlow, expand_as
from flow.penalty import Penalty
from flow.target import Target, Velocity, solve
from flow.weight import Weight

Model = Callable[..., Tensor]  # (z (B, …), t (B,), condition) → y (B, …); of two times, with end (B,) as well
Field = Callable[[Tensor, Tensor, Any, Tensor], Tensor]  # (z, t, condition, the pair's own y) → y (B, …)


class Estimate(NamedTuple):
    """What a model's output at z says."""

    x0: Tensor  # the picture, (B, …)
    noise: Tensor  # ε, (B, …)
    variance: Tensor | None = None  # the output that says where between β̃ and β the step's variance lies, (B, …)


class Objective:
    """What the network learns, and how its output is read.

    Args:
        path: how picture and noise mix at t.
        target: what the network predicts.
        density: where in t training looks.
        weight: an extra factor on the loss at t; none means 1.
        shift: α of the resolution shift, applied to the drawn t here and to the sampler's time grid, once each.
        shift_area: height × width of the latents that `shift` is for; others have α·√(area / shift_area) (Esser et al.
            2024, §5.3.2). None: one α for all.
        penalty: of each picture's error; none is its mean square.

    Attributes:
        outputs: channels of the network's output for each channel of the latent.
        two_times: whether the network is also given the time at which a step ends.
        extra_passes: forward passes of the network for each picture, besides the usual one.

    Example:
        A model that knows the answer has no loss:

        >>> import torch
        >>> objective = Objective()  # rectified flow, velocity, logit-normal(0, 1)
        >>> x0, noise = torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)
        >>> t, _ = objective.times(torch.full((3, 4), 0.5), area=64)
        >>> t
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
        >>> objective.loss(lambda z, t, condition: noise - x0, x0, noise, t, None)
        tensor([0., 0., 0., 0.])
    """

    outputs: ClassVar[int] = 1
    two_times: ClassVar[bool] = False
    extra_passes: float = 0.0

    def __init__(
        self,
        path: Path | None = None,
        target: Target | None = None,
        density: Density | None = None,
        weight: Weight | None = None,
        shift: float = 1.0,
        shift_area: int | None = None,
        penalty: Penalty | None = None,
    ) -> None:
        for name, value in (("shift", shift), ("shift_area", shift_area)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        self.path = path or RectifiedFlow()
        self.target = target or Velocity()
        self.density = density or LogitNormal()
        self.weight, self.penalty = weight, penalty
        self.shift, self.shift_area = shift, shift_area
        half = torch.tensor([0.5])
        self.target.row(self.path, half)  # a target or weight that the path does not have should fail now
        if weight:
            weight(self.path, self.target, half)

    def alpha(self, area: int) -> float:
        """α of the resolution shift for latents of `area` = height × width, in training as in sampling."""
        return self.shift if self.shift_area is None else self.shift * math.sqrt(area / self.shift_area)

    def time(self, u: Tensor, area: int) -> Tensor:
        """Training times for uniform u, (B,) float32, for latents of `area` = height × width."""
        return self.path.cell(shift(self.density(u), self.alpha(area))).float()

    def cell(self, t: Tensor, area: int) -> Tensor:
        """The nearest time to t that training may draw, for validation: t itself on a continuous path."""
        return self.path.cell(t)

    def times(self, u: Tensor, area: int) -> tuple[Tensor, Tensor | None]:
        """Training times (B,) for uniform u (3, B), and where the intervals from them end; none here has an end."""
        return self.time(u[0], area), None

    def loss(
        self,
        model: Model,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        condition: Any,
        end: Tensor | None = None,
        field: Field | None = None,
    ) -> Tensor:
        """w(t)·ρ(mean((model(z_t, t) − y)²)) for each picture, z_t = a·x0 + b·ε and y = p·x0 + q·ε.

        Everything around the network is float32, under any autocast: bfloat16 would round t by up to 4/1000.

        Args:
            model: the network, or what wraps it.
            x0: pictures or latents, (B, …).
            noise: standard normal, (B, …); with other pairs of noise and picture this is reflow (Liu et al. 2022).
            t: times in [0, 1], (B,) float32.
            condition: passed on to the model unread.
            end: where the intervals from t end, (B,) float32; none for a model of one time.
            field: gives y in the place of p·x0 + q·ε, such as a teacher's output; no gradient flows through it.

        Returns:
            (B,) float32.
        """
        z, y = self.pair(x0, noise, t, condition, field)
        return self.error(output(model, z, t, condition, end), y, t)

    def pair(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Any, field: Field | None) -> tuple[Tensor, Tensor]:
        """The point z_t on the path and what the network should say there, each (B, …) float32."""
        if t.dtype != torch.float32:
            raise TypeError(f"t must be float32, got {t.dtype}")
        x0, noise = x0.float(), noise.float()
        a, b, p, q = (expand_as(c, x0) for c in (*self.path(t), *self.target.row(self.path, t)))
        z, y = a * x0 + b * noise, p * x0 + q * noise
        if field:
            with torch.no_grad():
                y = field(z, t, condition, y).float()
        return z, y

    def error(self, found: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """w(t)·ρ(mean((found − y)²)), (B,)."""
        loss = (found - y).square().flatten(1).mean(1)
        if self.penalty:
            loss = self.penalty(loss, t)
        if self.weight is not None:
            loss = self.weight(self.path, self.target, t) * loss
        return loss

    def denoise(self, model: Model, z: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Estimate:
        """The model's estimate at z (B, …), t (B,); the model is given t in float32, the solve the t that comes.

        With `end` (B,), an average velocity's: what z would be at t on the straight line that leads to the same place.
        """
        y = output(model, z, t.float(), condition, None if end is None else end.float())
        return Estimate(*solve(self.path, self.target, z, y, t))

    def described(self) -> dict[str, Any]:
        """What a model folder keeps of it: how the output is read and which times are looked at, as a JSON object."""
        return {
            "shift": self.shift,
            "shift_area": self.shift_area,
            "path": describe(self.path),
            "target": describe(self.target),
            "variance": None,
        }


def output(model: Model, z: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
    """What the model says, (B, …) float32; a model of one time is not given an end."""
    return (model(z, t, condition) if end is None else model(z, t, condition, end)).float()


class TimeBins:
    """Mean loss in equal bins of t, summed on the device; only `means` waits for it.

    Args:
        count: number of bins over [0, 1].
    """

    def __init__(self, count: int = 8) -> None:
        self.count = count
        self.sums = torch.zeros(2, count)  # loss, number of images

    def add(self, t: Tensor, loss: Tensor) -> None:
        """Adds a batch of per-image losses (B,) at times t (B,)."""
        self.sums = self.sums.to(loss.device)
        index = (t.detach() * self.count).long().clamp(max=self.count - 1)
        self.sums.index_add_(1, index, torch.stack([loss.detach(), torch.ones_like(loss)]))

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[float]:
        """Mean loss per bin since the last call, NaN for an empty bin. Starts afresh.

        Args:
            reduce: adds up the sums (2, count) of all processes.
        """
        total, number = reduce(self.sums.clone())
        self.sums.zero_()
        return (total / number).tolist()
