"""Time grids: the times that a sampler visits, from noise to data. The last is 0. Each grid is (steps + 1,) float64."""

import math

import torch
from torch import Tensor

from flow.density import shift
from flow.path import Discrete, Path, RectifiedFlow


def trailing(path: Path, steps: int, alpha: float = 1.0) -> Tensor:
    """Equal steps from t = 1, shifted once (`flow.density.shift`). On a chain n = T, T − T/steps, …, rounded.

    Lin et al. 2024, table 2, "trailing".

    Example:
        >>> trailing(RectifiedFlow(), 4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
        >>> trailing(RectifiedFlow(), 2, alpha=3.0)
        tensor([1.0000, 0.7500, 0.0000], dtype=torch.float64)
    """
    _count(path, steps)
    _positive(alpha)
    grid = path.snap(shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha))
    if not bool((grid.diff() < 0).all()):
        raise ValueError(f"{steps} steps with shift {alpha} give equal times on {type(path).__name__}: use fewer")
    return grid


def flow_match(path: Path, steps: int, alpha: float = 1.0) -> Tensor:
    """The grid of the released Stable Diffusion 3 models: equal steps from 1 to shift(1/1000), shifted, then 0.

    The last noisy time is therefore shifted twice. Only this grid gives the pictures of other tools (it equals that of
    diffusers' `FlowMatchEulerDiscreteScheduler`, to the bit in float32).

    Example:
        >>> flow_match(RectifiedFlow(), 4)
        tensor([1.0000, 0.6670, 0.3340, 0.0010, 0.0000], dtype=torch.float64)
    """
    _count(path, steps)
    _positive(alpha)
    if not isinstance(path, RectifiedFlow):
        raise ValueError(f"flow_match spacing needs RectifiedFlow, and the path is {type(path).__name__}: use trailing")
    least = shift(torch.tensor(0.001), alpha).double()
    times = shift(torch.linspace(1, float(least), steps, dtype=torch.float64), alpha)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def leading(path: Path, steps: int, alpha: float = 1.0) -> Tensor:
    """DDIM's n = i·⌊T/steps⌋ + 1 for i = steps − 1 … 0. It never visits the noisiest times of a chain.

    Song et al. 2020, appendix D.2, "linear"; Lin et al. 2024, table 2, "leading".

    Example:
        >>> from flow.path import DDPMLinear
        >>> leading(DDPMLinear(), 4)  # n = 751, 501, 251, 1 of 1000
        tensor([0.7510, 0.5010, 0.2510, 0.0010, 0.0000], dtype=torch.float64)
    """
    T = _chain(path, steps, alpha, "leading")
    return torch.cat([torch.arange(steps - 1, -1, -1) * (T // steps) + 1, torch.zeros(1)]).double() / T


def linspace(path: Path, steps: int, alpha: float = 1.0) -> Tensor:
    """Improved DDPM's equal steps from n = T to n = 1, rounded, then 0 (Nichol & Dhariwal 2021, §4).

    Example:
        >>> from flow.path import DDPMLinear
        >>> linspace(DDPMLinear(), 4)  # n = 1000, 667, 334, 1 of 1000
        tensor([1.0000, 0.6670, 0.3340, 0.0010, 0.0000], dtype=torch.float64)
    """
    T = _chain(path, steps, alpha, "linspace")
    return torch.cat([torch.linspace(T - 1, 0, steps, dtype=torch.float64).round() + 1, torch.zeros(1)]).double() / T


def karras(
    path: Path, steps: int, alpha: float = 1.0, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """σ_i = (σ_max^(1/ρ) + i/(n−1)·(σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ, then 0 (Karras et al. 2022, eq. 5).

    It works on any continuous path, with σ = b/a. It starts at σ_max, not at pure noise.

    Example:
        >>> a, b = RectifiedFlow()(karras(RectifiedFlow(), 3, sigma_min=1.0, sigma_max=9.0, rho=1.0))
        >>> b / a  # σ in equal steps, as rho is 1
        tensor([9.0000, 5.0000, 1.0000, 0.0000], dtype=torch.float64)
    """
    _count(path, steps)
    if isinstance(path, Discrete):
        raise ValueError(f"karras spacing needs a continuous path, and {type(path).__name__} is discrete: use trailing")
    if alpha != 1:
        raise ValueError(f"karras spacing has no shift, got {alpha}: give shift 1, or use trailing")
    if not 0 < sigma_min < sigma_max < math.inf or rho <= 0:
        given = f"{sigma_min}, {sigma_max} and {rho}"
        raise ValueError(f"karras spacing needs 0 < sigma_min < sigma_max and rho > 0, got {given}")
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64) ** (1 / rho)
    sigma = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps, dtype=torch.float64)) ** rho
    grid = torch.cat([path.time(sigma / (1 + sigma)), torch.zeros(1, dtype=torch.float64)])
    if grid[0] > 1:
        raise ValueError(f"no time of {type(path).__name__} has sigma_max {sigma_max:g}: take a smaller one")
    if not bool((grid.diff() < 0).all()):
        raise ValueError(f"{steps} steps of karras spacing give equal times on {type(path).__name__}: use fewer")
    return grid


def given(path: Path, steps: int, alpha: float = 1.0, *, times: str = "") -> Tensor:
    """A list of times, such as `flow.search` finds: `1/0.83/0.4`. The final 0 is not written.

    A chain uses the nearest times that it has. No shift is applied, so `alpha` changes nothing.

    Args:
        times: one per step, falling, above 0 and at most 1, separated by slashes.

    Example:
        >>> given(RectifiedFlow(), 2, times="1/0.4")
        tensor([1.0000, 0.4000, 0.0000], dtype=torch.float64)
    """
    _count(path, steps)
    try:
        numbers = [float(part) for part in times.split("/")]
    except ValueError:
        raise ValueError(f"given spacing needs times, such as given:times=1/0.83/0.4, got {times!r}") from None
    if len(numbers) != steps:
        raise ValueError(f"given spacing has {len(numbers)} times for {steps} steps: give one time per step")
    wanted = torch.tensor([*numbers, 0.0], dtype=torch.float64)
    if not (bool((wanted.diff() < 0).all()) and numbers[0] <= 1):
        raise ValueError(f"given spacing needs falling times, above 0 and at most 1, got {times}")
    grid = path.snap(wanted)
    if not bool((grid.diff() < 0).all()):
        raise ValueError(f"times {times} are not distinct on {type(path).__name__}: use others")
    return grid


def _positive(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"shift must be > 0, got {alpha}")


def _count(path: Path, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if isinstance(path, Discrete) and steps > path.steps:
        raise ValueError(f"steps must be at most the {path.steps} of {type(path).__name__}, got {steps}")


def _chain(path: Path, steps: int, alpha: float, name: str) -> int:
    _count(path, steps)
    if not isinstance(path, Discrete):
        raise ValueError(f"{name} spacing needs a discrete path, and {type(path).__name__} is continuous: use trailing")
    if alpha != 1:
        raise ValueError(f"{name} spacing has no shift, got {alpha}: use trailing")
    return path.steps
