"""The objective joins path, target, density and weight into one loss (for training and validation) and one denoiser.

Three other objectives here learn something else, with the same three methods `times`, `loss` and `denoise`:
 `flow.variance.LearnedVariance`, `flow.meanflow.MeanFlow` and `flow.stepmap.StepMap`.
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

Model = Callable[..., Tensor]  # (z (B, …), t (B,), condition) → y (B, …); with two_times also end (B,)
Field = Callable[[Tensor, Tensor, Any, Tensor], Tensor]  # (z, t, condition, y of the data) → y (B, …)


class Estimate(NamedTuple):
    """Picture and noise that follow from a model's output at z."""

    x0: Tensor  # the picture, (B, …)
    noise: Tensor  # ε, (B, …)
    variance: Tensor | None = None  # output that sets the step's variance between β̃ and β, (B, …)


class Interval(NamedTuple):
    """The ends of the intervals (end, t) over which a model learns the average velocity."""

    end: Tensor  # (B,) float32, at most t
    rows: Tensor  # (n,) numbers of the pictures with end < t

    @classmethod
    def between(cls, end: Tensor, t: Tensor) -> "Interval":
        """The intervals of times (B,) on the host. On a device, looking for `rows` would wait for it.

        Without an interval, `rows` is picture 0: processes that share a model's weights must call it together.
        """
        rows = (end < t).nonzero()[:, 0]
        return cls(end, rows if len(rows) else torch.zeros(1, dtype=torch.long, device=t.device))


class Objective:
    """What the network learns, and how its output becomes picture and noise.

    Args:
        path: how picture and noise mix at t.
        target: what the network predicts.
        density: distribution that training draws t from.
        weight: an extra factor on the loss at t; none means 1.
        shift: α of the resolution shift. It is applied once to the drawn t and once to the sampler's time grid.
        shift_area: height × width of the latents that `shift` is for; other sizes get α·√(area / shift_area) (Esser et
            al. 2024, §5.3.2). None means one α for all.
        penalty: applied to each picture's mean square error; none means no penalty.

    Attributes:
        outputs: channels of the network's output per channel of the latent.
        two_times: whether the network also takes the time at which a step ends.
        discrete: whether latents are codes, and the network's output is their logits.
        extra_passes: forward passes of the network per picture, in addition to the usual one.

    Example:
        A perfect model has zero loss:

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
    discrete: ClassVar[bool] = False
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
        self.target.row(self.path, half)  # fail now if the path cannot have this target or weight
        if weight:
            weight(self.path, self.target, half)

    def alpha(self, area: int) -> float:
        """α of the resolution shift for latents of `area` = height × width, for training and sampling."""
        return self.shift if self.shift_area is None else self.shift * math.sqrt(area / self.shift_area)

    def training_time(self, u: Tensor, area: int) -> Tensor:
        """Training times for uniform u, (B,) float32, for latents of `area` = height × width."""
        return self.path.training_time(shift(self.density(u), self.alpha(area))).float()

    def validation_time(self, t: Tensor, area: int) -> Tensor:
        """The time that validation uses for t, one that training may draw: t itself on a continuous path."""
        return self.path.training_time(t)

    def times(self, u: Tensor, area: int) -> tuple[Tensor, Interval | None]:
        """Training times (B,) for uniform u (3, B), and none, since this objective has no intervals."""
        return self.training_time(u[0], area), None

    def loss(
        self,
        model: Model,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        condition: Any,
        interval: Interval | None = None,
        field: Field | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """w(t)·ρ(mean(m·(model(z_t, t) − y)²)) for each picture, with z_t = a·x0 + b·ε and y = p·x0 + q·ε.

        Everything outside the network is float32 under any autocast, because bfloat16 would round t by up to 2/1000.

        Args:
            model: the network or a wrapper around it.
            x0: pictures or latents, (B, …).
            noise: standard normal, (B, …). If x0 was generated from this noise, this is reflow (Liu et al. 2022).
            t: times in [0, 1], (B,) float32.
            condition: passed to the model unchanged.
            interval: the intervals from their `end` to t; none for a model that takes only t.
            field: computes y instead of p·x0 + q·ε, such as a teacher; no gradient flows through it.
            loss_mask: m, the weight of each place in the mean, (B, 1, H, W); none means 1. The mean is over all places,
                so that a small mask makes a small loss.

        Returns:
            (B,) float32.
        """
        z, y = self.point_and_target(x0, noise, t, condition, field)
        return self.error(output(model, z, t, condition, interval.end if interval else None), y, t, loss_mask)

    def point_and_target(
        self, x0: Tensor, noise: Tensor, t: Tensor, condition: Any, field: Field | None
    ) -> tuple[Tensor, Tensor]:
        """The point z_t on the path and the target y there, each (B, …) float32."""
        if t.dtype != torch.float32:
            raise TypeError(f"t must be float32, got {t.dtype}")
        x0, noise = x0.float(), noise.float()
        a, b, p, q = (expand_as(c, x0) for c in (*self.path(t), *self.target.row(self.path, t)))
        z, y = a * x0 + b * noise, p * x0 + q * noise
        if field:
            with torch.no_grad():
                y = field(z, t, condition, y).float()
        return z, y

    def error(self, output: Tensor, y: Tensor, t: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """w(t)·ρ(mean(m·(output − y)²)), (B,)."""
        loss = mean_of_places((output - y).square(), loss_mask)
        if self.penalty:
            loss = self.penalty(loss, t)
        if self.weight is not None:
            loss = self.weight(self.path, self.target, t) * loss
        return loss

    def denoise(self, model: Model, z: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Estimate:
        """The model's estimate at z (B, …) and time t (), on the host, in z's type.

        The model gets z and t in float32; the solve gets them as they are. With `end` () the output is an average
        velocity; the estimate is that of the straight line to the same end.
        """
        y = output_at(model, z, t, condition, end)
        return Estimate(*solve(self.path, self.target, z, y, t))

    def describe(self) -> dict[str, Any]:
        """The settings that sampling needs, as the JSON object that a model folder stores."""
        return {
            "shift": self.shift,
            "shift_area": self.shift_area,
            "path": describe(self.path),
            "target": describe(self.target),
            "variance": None,
        }


def mean_of_places(losses: Tensor, loss_mask: Tensor | None) -> Tensor:
    """The mean of each picture's losses (B, …), (B,), each loss times the weight of its place, if there are weights."""
    return (losses if loss_mask is None else losses * loss_mask).flatten(1).mean(1)


def output(model: Model, z: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
    """The model's output, (B, …) float32. The model gets `end` only if it is given."""
    return (model(z, t, condition) if end is None else model(z, t, condition, end)).float()


def output_at(model: Model, z: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
    """The model's output at one time for all pictures, t () on the host, in z's type.

    The model's times are filled in on z's device, since a copy would wait for it.
    """

    def filled(time: Tensor) -> Tensor:
        return torch.full((len(z),), float(time), dtype=torch.float32, device=z.device)

    return output(model, z.float(), filled(t), condition, None if end is None else filled(end)).to(z.dtype)


class TimeBins:
    """Mean loss in equal bins of t, summed on the device; only `means` synchronises with it.

    Args:
        count: number of bins over [0, 1].
    """

    def __init__(self, count: int = 8) -> None:
        self.count = count
        self.sums = torch.zeros(2, count)  # loss, number of images

    def add(self, t: Tensor, loss: Tensor) -> None:
        """Adds a batch of per-image losses (B,) at times t (B,)."""
        self.sums = self.sums.to(loss.device, non_blocking=True)
        index = (t.detach() * self.count).long().clamp(max=self.count - 1)
        self.sums.index_add_(1, index, torch.stack([loss.detach(), torch.ones_like(loss)]))

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[float]:
        """Mean loss per bin since the last call, NaN for an empty bin. Resets the sums.

        Args:
            reduce: adds the sums (2, count) of all processes.
        """
        total, number = reduce(self.sums.clone())
        self.sums.zero_()
        return (total / number).tolist()
