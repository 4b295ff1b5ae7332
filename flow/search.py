"""Time grids for few steps of Euler's method, searched on fine trajectories of the model.

In straight coordinates w = z/(a + b), τ = b/(a + b) (`flow.path`) a recorded fine trajectory gives the result of every
Euler step from one of its times to another. The cost of each step, a squared distance, is computed without the network,
and dynamic programming finds the n steps of least total cost (Watson et al. 2021, "Learning to Efficiently Sample from
Diffusion Probabilistic Models"; Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling").

The total ignores how errors grow or cancel in later steps. `coordinate_search` accounts for it, but needs real walks.
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
    """Walks as `flow.sampler.euler`, with the same arguments, and records states and slopes."""
    states, slopes = [], []

    def recording(z: Tensor, t: Tensor) -> Estimate:
        estimate = denoise(z, t)
        states.append(z)
        slopes.append(estimate.noise - estimate.x0)
        return estimate

    states.append(euler(recording, path, z, grid, callback))
    a, b = path(grid)
    return Trajectory(
        b / (a + b), torch.stack([z / c for z, c in zip(states, a + b, strict=True)]), torch.stack(slopes)
    )


def costs(fine: Trajectory) -> Tensor:
    """The cost of a step from fine time i to a later j: the mean over samples of ‖w_i + (τ_j − τ_i)·v_i − w_j‖².

    Infinite where j ≤ i. The costs of equal batches may be averaged.

    Returns:
        (N, N + 1) float64, on the CPU.
    """
    N = len(fine.slopes)
    cost = torch.full((N, N + 1), torch.inf, dtype=torch.float64)
    for i, (w, v) in enumerate(zip(fine.states, fine.slopes, strict=False)):
        for j in range(i + 1, N + 1):
            difference = w + (fine.tau[j] - fine.tau[i]) * v - fine.states[j]
            cost[i, j] = difference.double().square().sum() / len(difference)
    return cost


def cheapest(cost: Tensor, steps: int) -> list[int]:
    """The fine times 0 = i_0 < i_1 < … < i_steps = N of least total cost, by dynamic programming.

    Args:
        cost: cost of each step, (N, N + 1), infinite where there is no step.
        steps: number of steps, 1 to N; ValueError otherwise.
    """
    N = len(cost)
    if not 1 <= steps <= N:
        raise ValueError(f"steps must be from 1 to the {N} of the fine walk, got {steps}")
    total = torch.full((N + 1,), torch.inf, dtype=cost.dtype)  # least cost of reaching each time
    total[0] = 0
    sources = []
    for _ in range(steps):
        total, source = (total[:-1, None] + cost).min(0)
        sources.append(source)
    stops = [N]
    for source in reversed(sources):
        stops.append(int(source[stops[-1]]))
    return stops[::-1]


def coordinate_search(error: Callable[[Sequence[int]], float], stops: Sequence[int], stride: int = 4) -> list[int]:
    """Moves one inner stop at a time while the error falls. The stride is halved down to 1.

    Args:
        error: maps stops to an error, such as the end error of a real walk.
        stops: initial fine times, rising; the first and the last stay fixed.
        stride: the longest move, in fine times.

    Returns:
        Stops such that no move of 1 lowers the error. Their error is at most that of the initial stops.
    """
    best, least = list(stops), error(stops)
    tested = {tuple(best)}
    while stride:
        moved = False
        for k in range(1, len(best) - 1):
            for move in (-stride, stride):
                tried = [*best[:k], best[k] + move, *best[k + 1 :]]
                if tuple(tried) in tested or not all(i < j for i, j in pairwise(tried)):
                    continue
                tested.add(tuple(tried))
                if (found := error(tried)) < least:
                    best, least, moved = tried, found, True
        stride = stride if moved else stride // 2
    return best
