"""The objective: path + target + density + weight, as one loss for training and validation and one denoiser."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor

from flow.density import Density, LogitNormal, Steps, shift
from flow.meanflow import MeanFlow, average_velocity
from flow.path import Discrete, Path, RectifiedFlow, expand_as
from flow.penalty import Penalty
from flow.target import Target, Velocity, solve
from flow.variance import LearnedVariance
from flow.weight import Weight

Model = Callable[..., Tensor]  # (z (B, …), t (B,), condition) → y (B, …); of two times, with end (B,) as well
Field = Callable[[Tensor, Tensor, Any, Tensor], Tensor]  # (z, t, condition, the pair's own y) → y (B, …)


class Estimate(NamedTuple):
    """What a model's output at z says."""

    x0: Tensor  # the picture, (B, …)
    noise: Tensor  # ε, (B, …)
    variance: Tensor | None = None  # the output that says where between β̃ and β the step's variance lies, (B, …)


@final
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
        variance: also learns the reverse step's variance, on a discrete path: the network then has twice the channels.
        penalty: of each picture's error; none is its mean square.
        average: learns the average velocity over intervals of rectified flow, with a network of two times.
    """

    def __init__(
        self,
        path: Path | None = None,
        target: Target | None = None,
        density: Density | None = None,
        weight: Weight | None = None,
        shift: float = 1.0,
        variance: LearnedVariance | None = None,
        shift_area: int | None = None,
        penalty: Penalty | None = None,
        average: MeanFlow | None = None,
    ) -> None:
        for name, value in (("shift", shift), ("shift_area", shift_area)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        self.path = path or RectifiedFlow()
        self.target = target or Velocity()
        self.density = density or LogitNormal()
        self.weight = weight
        self.shift, self.shift_area = shift, shift_area
        self.variance, self.penalty, self.average = variance, penalty, average
        if average and not (isinstance(self.path, RectifiedFlow) and isinstance(self.target, Velocity)):
            raise ValueError("average needs the path RectifiedFlow and the target Velocity")
        if variance and not isinstance(self.path, Discrete):
            raise ValueError(f"a learned variance needs a discrete path, got {type(self.path).__name__}")
        if isinstance(self.density, Steps) and (weight or isinstance(self.path, Discrete)):
            raise ValueError("density Steps looks at t = 1 itself: it needs a continuous path and takes no weight")
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
        """The time that stands for t in validation: t itself, or one of those at which alone it learns."""
        return self.time(t, area) if isinstance(self.density, Steps) else self.path.cell(t)

    def times(self, u: Tensor, area: int) -> tuple[Tensor, Tensor | None]:
        """Training times for uniform u (3, B), and where the intervals from them end if it learns averages."""
        first, second = (self.time(row, area) for row in u[:2])
        return (first, None) if self.average is None else self.average.interval(first, second, u[2])

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
        """w(t)·ρ(mean((model(z_t, t) − y)²)) for each image, plus the learned variance's own loss.

        Three things may be other than usual: which noise x0 comes with (reflow), what y is at z (a teacher's output),
        and over which interval it is averaged (MeanFlow).

        Everything around the network is float32, under any autocast: bfloat16 would round t by up to 4/1000.

        Args:
            x0: pictures or latents, (B, …).
            noise: standard normal, (B, …).
            t: times in [0, 1], (B,) float32.
            condition: passed on to the model unread.
            end: where the intervals from t end, (B,) float32; none for a model of one time.
            field: gives y in the place of the pair's own p·x0 + q·ε; no gradient flows through it.

        Returns:
            (B,) float32.
        """
        if t.dtype != torch.float32:
            raise TypeError(f"t must be float32, got {t.dtype}")
        x0, noise = x0.float(), noise.float()
        a, b, p, q = (expand_as(c, x0) for c in (*self.path(t), *self.target.row(self.path, t)))
        z = a * x0 + b * noise
        truth = p * x0 + q * noise
        if field:
            with torch.no_grad():
                truth = field(z, t, condition, truth).float()
        if end is not None:
            truth = average_velocity(model, z, t, end, truth, condition)
        y, v = self._split(self._output(model, z, t, condition, end))
        loss = (y - truth).square().flatten(1).mean(1)
        if self.penalty:
            loss = self.penalty(loss, t)
        if self.weight is not None:
            loss = self.weight(self.path, self.target, t) * loss
        if self.variance and v is not None:
            estimate, _ = solve(self.path, self.target, z, y, t)
            loss = loss + self.variance.loss(cast(Discrete, self.path), x0, estimate, v, t)
        return loss

    def denoise(self, model: Model, z: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Estimate:
        """The model's estimate at z (B, …), t (B,); the model is given t in float32, the solve the t that comes.

        With `end` (B,), an average velocity's: what z would be at t on the straight line that leads to the same place.
        """
        y, v = self._split(self._output(model, z, t.float(), condition, None if end is None else end.float()))
        return Estimate(*solve(self.path, self.target, z, y, t), v)

    @staticmethod
    def _output(model: Model, z: Tensor, t: Tensor, condition: Any, end: Tensor | None) -> Tensor:
        return (model(z, t, condition) if end is None else model(z, t, condition, end)).float()

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.variance is None:
            return output, None
        y, v = output.chunk(2, dim=1)
        return y, v


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
