"""MeanFlow: the average velocity over an interval, in place of the velocity at its beginning (Geng et al. 2025)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flow.path import expand_as

TwoTimes = Callable[[Tensor, Tensor, Any, Tensor], Tensor]  # (z (B, …), t (B,), condition, end (B,)) → u (B, …)


class MeanFlow:
    """Which intervals (end, t) a network of average velocities learns.

    Args:
        share: of the pictures whose interval has a length; the others learn the velocity at t.
    """

    def __init__(self, share: float = 0.25) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"MeanFlow needs 0 < share <= 1, got {share}")
        self.share = share

    def interval(self, first: Tensor, second: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """(t, end) of two drawn times (B,): the later and the earlier one where u < share, else the first twice."""
        second = torch.where(u < self.share, second, first)
        return torch.maximum(first, second), torch.minimum(first, second)


@torch.no_grad()
def average_velocity(model: TwoTimes, z: Tensor, t: Tensor, end: Tensor, v: Tensor, condition: Any) -> Tensor:
    """What the average velocity u(z, t, end) should be, given the velocity v at (z, t): v − (t − end)·du/dt.

    The MeanFlow identity (Geng et al. 2025). du/dt = v·∂_z u + ∂_t u is the derivative along the path: one
    Jacobian-vector product with the tangent (v, 1) of (z, t), only of the intervals that have a length. No gradient
    flows through it.

    Args:
        model: the network as it is.
        z: points on the path, (B, …).
        t: times, (B,).
        end: where the intervals end, at most t, (B,).
        v: velocities, (B, …).
        condition: passed on to the model; a named tuple of tensors with batch size B, or None.

    Returns:
        (B, …), in v's type.
    """
    rows = (end < t).nonzero()[:, 0]
    if not len(rows):  # the model is asked all the same, since processes that share its weights ask together
        rows = torch.zeros(1, dtype=torch.long, device=t.device)
    part = None if condition is None else type(condition)(*(x if x is None else x[rows] for x in condition))
    at = z[rows], t[rows]
    # Fused attention has no forward derivative.
    with sdpa_kernel(SDPBackend.MATH):
        rate = torch.func.jvp(
            lambda z, t: model(z, t, part, end[rows]), at, (v[rows].to(z.dtype), torch.ones_like(at[1]))
        )[1]
    u = v.clone()
    u[rows] -= expand_as(at[1] - end[rows], v) * rate.to(v.dtype)
    return u
