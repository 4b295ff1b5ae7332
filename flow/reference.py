"""The ODE solved to a tolerance, as a reference for the other samplers."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flow.path import Path
from flow.sampler import Callback, Denoiser

# Dormand and Prince 1980, the pair of orders 5 and 4. Each stage has its place in the step and its weights of the
# slopes before it; the last stage is the step of order 5, and its slope is the first of the next step.
STAGES = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # order 5 minus order 4


def reference(
    denoise: Denoiser,
    path: Path,
    z: Tensor,
    grid: Tensor,
    callback: Callback | None = None,
    *,
    tolerance: float = 1e-7,
) -> Tensor:
    """Dormand–Prince of order 5 with adaptive steps in (w, τ), on a continuous path (see `flow.sampler`).

    The steps are so small that no picture's root mean square error in one step exceeds tolerance·(1 + |w|). They also
    end at the grid's times. Errors of the steps add up and grow along the walk, by a factor that depends on the model.
    The state is float64, as is the z that the denoiser gets. Each step waits for the device once, to read its error.

    Other arguments and result as in `flow.sampler.euler`.

    Args:
        tolerance: of each step, > 0.

    Raises:
        ValueError: the steps become too small to go on.

    Example:
        >>> from flow.objective import Estimate
        >>> from flow.path import RectifiedFlow
        >>> def denoise(z, t):  # the data is N(0, 1): the exact walk ends where it starts
        ...     return Estimate((1 - t) * z / (t**2 + (1 - t) ** 2), t * z / (t**2 + (1 - t) ** 2))
        >>> z, grid = torch.tensor([-1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> torch.allclose(reference(denoise, RectifiedFlow(), z, grid), z, atol=1e-6)
        True
    """
    a, b = path(grid)
    scale, times = a + b, (b / (a + b)).tolist()

    def slope(tau: float, w: Tensor) -> Tensor:
        t = path.time(torch.tensor(tau, dtype=torch.float64))
        a, b = path(t)
        x0, noise, _ = denoise((a + b) * w, t)
        return noise - x0

    w = z.double() / scale[0]
    for i, (w, last) in enumerate(solutions(slope, w, times, tolerance), start=1):  # noqa: B020
        if callback:
            callback(i, (scale[i] * w).to(z.dtype), (w - times[i] * last).to(z.dtype))
    return (scale[-1] * w).to(z.dtype)


def solutions(
    slope: Callable[[float, Tensor], Tensor], state: Tensor, times: Sequence[float], tolerance: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """The solutions of a differential equation at times[1:], each with its slope there.

    Args:
        slope: (time, state) → the state's derivative.
        state: at times[0], (B, …) float64.
        times: rising or falling.
        tolerance: of each step, > 0: the largest root mean square of error / (1 + |state|) of any row.

    Raises:
        ValueError: the steps become too small to go on.
    """
    if not tolerance > 0:
        raise ValueError(f"reference needs tolerance > 0, got {tolerance}")
    now, *ends = times
    first = slope(now, state)
    size = (ends[-1] - now) / 100
    for end in ends:
        while now != end:
            last = abs(end - now) <= abs(size)
            h = end - now if last else size
            slopes, ahead = [first], state
            for place, weights in STAGES:
                ahead = state + h * sum(c * k for c, k in zip(weights, slopes, strict=True))
                slopes.append(slope(now + place * h, ahead))
            off = h * sum(c * k for c, k in zip(ERROR, slopes, strict=True))
            off = off / (1 + torch.maximum(state.abs(), ahead.abs()))
            error = float(off.square().reshape(len(state), -1).mean(1).max().sqrt()) / tolerance
            if error <= 1:
                now, state, first = end if last else now + h, ahead, slopes[-1]
            if not (last and error <= 1):  # NaN is no small error
                size = h * 0.9 * max(1e-4, min(1e4, error)) ** -0.2
            if now + size == now:
                raise ValueError(
                    f"reference cannot keep tolerance {tolerance:g} at τ = {now:g}: take a larger one, "
                    "or bfloat16 or float32 if the network overflows"
                )
        yield state, first
