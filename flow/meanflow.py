"""MeanFlow: learns the average velocity over an interval, not the velocity at its start (Geng et al. 2025).

The target at the interval's start is found from the network's own average velocity near it: by a derivative, or by a
finite step (α-Flow, Zhang et al. 2025).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flow.density import Density
from flow.objective import Field, Interval, Model, Objective, output
from flow.path import expand_as
from flow.penalty import Penalty
from flow.weight import Weight


class MeanFlow(Objective):
    """Learns the average velocity of rectified flow over intervals (end, t), with a network that takes both times.

    Args:
        density: distribution that both ends of an interval are drawn from.
        weight: an extra factor on the loss at t; none means 1.
        shift: α of the resolution shift.
        shift_area: height × width of the latents that `shift` is for; none means one α for all.
        penalty: applied to each picture's mean square error; none means no penalty.
        share: fraction of the pictures with end < t; the others have end = t and learn the velocity at t.
        step: part of the interval that a finite step takes along the network's own velocity; 0 takes the derivative.

    Example:
        >>> import torch
        >>> objective = MeanFlow(share=1.0)
        >>> t, interval = objective.times(torch.tensor([[0.1], [0.9], [0.0]]), area=64)
        >>> bool(interval.end < t)
        True
    """

    two_times: ClassVar[bool] = True

    def __init__(
        self,
        density: Density | None = None,
        weight: Weight | None = None,
        shift: float = 1.0,
        shift_area: int | None = None,
        penalty: Penalty | None = None,
        share: float = 0.25,
        step: float = 0.0,
    ) -> None:
        super().__init__(None, None, density, weight, shift, shift_area, penalty)
        if not 0 < share <= 1:
            raise ValueError(f"MeanFlow needs 0 < share <= 1, got {share}")
        if not 0 <= step < 1:
            raise ValueError(f"MeanFlow needs 0 <= step < 1, got {step}")
        self.share, self.step = share, step
        self.extra_passes = 2 * share  # of the derivative; or of the velocity, and of the average after the step

    def times(self, u: Tensor, area: int) -> tuple[Tensor, Interval]:
        """t (B,) and the ends, for uniform u (3, B): two drawn times where u[2] < share, else one time twice."""
        first, second = self.training_time(u[0], area), self.training_time(u[1], area)
        second = torch.where(u[2] < self.share, second, first)
        t = torch.maximum(first, second)
        return t, Interval.between(torch.minimum(first, second), t)

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
        """As `Objective.loss`, for the average velocity from t to the interval's end; none means the velocity at t."""
        z, v = self.point_and_target(x0, noise, t, condition, field)
        if interval is None:
            return self.error(output(model, z, t, condition), v, t, loss_mask)
        if not self.step:
            u = average_velocity(model, z, t, interval, v, condition)
            return self.error(output(model, z, t, condition, interval.end), u, t, loss_mask)
        later = average_after_step(model, z, t, interval, condition, self.step)
        found = output(model, z, t, condition, interval.end)  # learns, so it is the last pass
        u = v.clone()
        u[interval.rows] -= (1 - self.step) / self.step * (found.detach()[interval.rows] - later).to(v.dtype)
        return self.error(found, u, t, loss_mask)


@torch.no_grad()
def average_after_step(model: Model, z: Tensor, t: Tensor, interval: Interval, condition: Any, step: float) -> Tensor:
    """The average velocity u(z', s, end) of the rest of an interval, after a step of its part α = `step` from t to s.

    The step is straight along the network's own velocity: z' = z − (t − s)·u(z, t, t). A way is that of its parts,
    (t − end)·u(z, t, end) = (t − s)·v + (s − end)·u(z', s, end), which u = v − (1 − α)/α·(u(z, t, end) − u(z', s, end))
    solves. The limit α → 0 is the target of `average_velocity` along u(z, t, t).

    Args:
        model: the network with its current weights.
        z: points on the path, (B, …).
        t: times, (B,).
        interval: ends of the intervals, and the pictures that have one.
        condition: passed to the model; a named tuple of tensors with batch size B, or None.
        step: α, 0 < α < 1.

    Returns:
        (n, …) for the n rows of the interval.
    """
    end, rows = interval
    selected, z, t, end = _rows(condition, rows), z[rows], t[rows], end[rows]
    s = t - step * (t - end)
    return model(z - expand_as(t - s, z) * model(z, t, selected, t), s, selected, end)


@torch.no_grad()
def average_velocity(model: Model, z: Tensor, t: Tensor, interval: Interval, v: Tensor, condition: Any) -> Tensor:
    """The target for the average velocity: u(z, t, end) = v − (t − end)·du/dt, with the velocity v at (z, t).

    This is the MeanFlow identity (Geng et al. 2025). du/dt = v·∂_z u + ∂_t u is the derivative along the path: one
    Jacobian-vector product with the tangent (v, 1) of (z, t), computed only where end < t. No gradient flows through
    it.

    Args:
        model: the network with its current weights.
        z: points on the path, (B, …).
        t: times, (B,).
        interval: ends of the intervals, and the pictures that have one.
        v: velocities, (B, …).
        condition: passed to the model; a named tuple of tensors with batch size B, or None.

    Returns:
        (B, …), in v's type.
    """
    end, rows = interval
    selected = _rows(condition, rows)
    point = z[rows], t[rows]
    # Fused attention has no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH):
        rate = torch.func.jvp(
            lambda z, t: model(z, t, selected, end[rows]), point, (v[rows].to(z.dtype), torch.ones_like(point[1]))
        )[1]
    u = v.clone()
    u[rows] -= expand_as(point[1] - end[rows], v) * rate.to(v.dtype)
    return u


def _rows(condition: Any, rows: Tensor) -> Any:
    """Some rows of a condition."""
    return None if condition is None else type(condition)(*(x if x is None else x[rows] for x in condition))
