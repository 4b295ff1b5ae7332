"""Time grids for few steps of Euler's method, searched on a model's own fine trajectories.

In straight coordinates w = z/(a + b), τ = b/(a + b) (`flow.path`) a step of Euler's method from one time of a fine
trajectory to any other is known from what was recorded. So all steps are priced without the network, and dynamic
programming finds the n that cost least together (Watson et al. 2021, "Learning to Efficiently Sample from Diffusion
Probabilistic Models"; Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling"). The costs are
squared distances.

Their sum does not see how errors grow or cancel on the way. `descend` sees it, at the price of real walks.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flow.objective import Estimate
from flow.path import Path
from flow.sampler import Callback, Denoiser, euler


class Trajectory(NamedTuple):
    """A fine walk of B samples in straight coordinates."""

    tau: Tensor  # falling, (N + 1,) float64
    states: Tensor  # w, (N + 1, B, …)
    slopes: Tensor  # dw/dτ = ε̂ − x̂0, (N, B, …)


def record(denoise: Denoiser, path: Path, z: Tensor, grid: Tensor, callback: Callback | None = None) -> Trajectory:
    """Walks as `flow.sampler.euler`, whose arguments these are, and keeps what was met."""
    states, slopes = [], []

    def noting(z: Tensor, t: Tensor) -> Estimate:
        estimate = denoise(z, t)
        states.append(z)
        slopes.append(estimate.noise - estimate.x0)
        return estimate

    states.append(euler(noting, path, z, grid, callback))
    a, b = path(grid)
    return Trajectory(
        b / (a + b), torch.stack([z / c for z, c in zip(states, a + b, strict=True)]), torch.stack(slopes)
    )


def costs(fine: Trajectory) -> Tensor:
    """What a step from each fine time i to each later j costs: the mean over samples of ‖w_i + (τ_j − τ_i)·v_i − w_j‖².

    Infinite where j ≤ i. The mean over several batches of a sample is the mean of theirs.

    Returns:
        (N, N + 1) float64, on the CPU.
    """
    N = len(fine.slopes)
    found = torch.full((N, N + 1), torch.inf, dtype=torch.float64)
    for i, (w, v) in enumerate(zip(fine.states, fine.slopes, strict=False)):
        for j in range(i + 1, N + 1):
            off = w + (fine.tau[j] - fine.tau[i]) * v - fine.states[j]
            found[i, j] = off.double().square().sum() / len(off)
    return found


def cheapest(cost: Tensor, steps: int) -> list[int]:
    """The fine times 0 = i_0 < i_1 < … < i_steps = N whose steps cost least together, by dynamic programming.

    Args:
        cost: of each step, (N, N + 1), infinite where there is none.
        steps: at most N, or ValueError.
    """
    N = len(cost)
    if not 1 <= steps <= N:
        raise ValueError(f"steps must be from 1 to the {N} of the fine walk, got {steps}")
    total = torch.full((N + 1,), torch.inf, dtype=cost.dtype)  # of the cheapest way to each time in so many steps
    total[0] = 0
    sources = []
    for _ in range(steps):
        total, source = (total[:-1, None] + cost).min(0)
        sources.append(source)
    stops = [N]
    for source in reversed(sources):
        stops.append(int(source[stops[-1]]))
    return stops[::-1]


def descend(error: Callable[[Sequence[int]], float], stops: Sequence[int], stride: int = 4) -> list[int]:
    """Coordinate search: moves one inner stop at a time as long as the error falls, in strides that halve down to 1.

    Args:
        error: of a grid of fine times, such as the end error of the real walk.
        stops: where it begins, rising; the first and the last stay.
        stride: the longest move, in fine times.

    Returns:
        Stops where no move of 1 lowers the error: never worse than the first.
    """
    best, least = list(stops), error(stops)
    known = {tuple(best)}
    while stride:
        moved = False
        for k in range(1, len(best) - 1):
            for move in (-stride, stride):
                tried = [*best[:k], best[k] + move, *best[k + 1 :]]
                if tuple(tried) in known or not all(i < j for i, j in pairwise(tried)):
                    continue
                known.add(tuple(tried))
                if (found := error(tried)) < least:
                    best, least, moved = tried, found, True
        stride = stride if moved else stride // 2
    return best
