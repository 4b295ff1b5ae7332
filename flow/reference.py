"""The ODE solved to a tolerance, as a reference for the other samplers."""

from torch import Tensor
from torchdiffeq import odeint

from flow.path import Path
from flow.sampler import Callback, Denoiser


def reference(
    denoise: Denoiser,
    path: Path,
    z: Tensor,
    grid: Tensor,
    callback: Callback | None = None,
    *,
    tolerance: float = 1e-5,
) -> Tensor:
    """Dormand–Prince of order 5 with adaptive steps in (w, τ), on a continuous path (see `flow.sampler`).

    Arguments and result as in `flow.sampler.euler`; only the ends of the grid affect the result.

    Args:
        tolerance: relative and absolute, of each adaptive step.

    Example:
        >>> import torch
        >>> from flow.objective import Estimate
        >>> from flow.path import RectifiedFlow
        >>> def denoise(z, t):  # the data is N(0, 1): the exact walk ends where it starts
        ...     return Estimate((1 - t) * z / (t**2 + (1 - t) ** 2), t * z / (t**2 + (1 - t) ** 2))
        >>> z, grid = torch.tensor([-1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> torch.allclose(reference(denoise, RectifiedFlow(), z, grid), z, atol=1e-4)
        True
    """
    a, b = path(grid)
    tau = b / (a + b)

    def velocity(tau: Tensor, w: Tensor) -> Tensor:
        t = path.time(tau)
        a, b = path(t)
        x0, noise, _ = denoise(((a + b) * w).to(z.dtype), t.expand(len(w)))
        return (noise - x0).double()

    w = odeint(
        velocity,
        z.double() / (a[0] + b[0]),  # τ gets this type, and float32 is too coarse near the noise
        tau,
        rtol=tolerance,
        atol=tolerance,
        method="dopri5",
        options={"step_t": tau[-1:]},  # the last step must not pass τ = 0, where the path ends
    ).to(z.dtype)
    if callback:
        for i in range(1, len(grid)):
            callback(i, (a[i] + b[i]) * w[i], w[-1])
    return (a[-1] + b[-1]) * w[-1]
