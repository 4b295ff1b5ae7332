"""Samplers against the algorithms of their papers, written down step by step."""

import math
from itertools import pairwise

import pytest
import torch
from gaussians import TWO
from torch import Tensor
from walks import CONTINUOUS, name, numbers

from flow.grid import karras
from flow.objective import Estimate, Objective
from flow.path import EDM, Path, expand_as
from flow.sampler import edm, langevin
from flow.target import Preconditioned, solve


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize(
    "options", [{}, {"churn": 1.0}, {"churn": 90.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}]
)
def test_edm_is_algorithm_2_of_the_paper(path: Path, options: dict) -> None:
    sigma = torch.tensor([80.0, 21.0, 4.0, 0.5, 0.02, 0.0], dtype=torch.float64)
    times = path.time(sigma / (1 + sigma))
    x = 80 * torch.randn(4, 1, dtype=torch.float64)
    found = edm(TWO.denoiser(path), path, path(times[0])[0] * x, times, numbers(1, x), **options)

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        t = path.time(sigma / (1 + sigma))
        return TWO.denoiser(path)(path(t)[0] * x, t).x0

    noise = numbers(1, x)
    low, high = options.get("churn_min", 0.0), options.get("churn_max", math.inf)
    for now, then in pairwise(sigma):
        gamma = min(options.get("churn", 0.0) / 5, math.sqrt(2) - 1) if low <= now <= high else 0.0
        hat = now + gamma * now
        if gamma:
            x = x + (hat**2 - now**2).sqrt() * options.get("churn_noise", 1.0) * noise()
        slope = (x - denoised(x, hat)) / hat
        ahead = x + (then - hat) * slope
        if then > 0:
            ahead = x + (then - hat) * (slope + (ahead - denoised(ahead, then)) / then) / 2
        x = ahead
    torch.testing.assert_close(found, path(times[-1])[0] * x, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("steps", "near"), [(2, 5e-5), (3, 1e-5), (18, 5e-7)])
def test_edm_in_float32_is_that_in_float64_but_for_the_rounding_of_the_model(steps: int, near: float) -> None:
    """In one step from σ = 80 to 0.002 an x in float32 would lose 2e-3."""
    path, objective = EDM(), Objective(EDM(), Preconditioned())
    z, times = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0)), karras(path, steps)

    def model(z: Tensor, t: Tensor, condition: None) -> Tensor:
        return torch.tanh(3 * z + expand_as(t, z))

    def exact(z: Tensor, t: Tensor) -> Estimate:
        return Estimate(*solve(path, objective.target, z, model(z, t.float(), None), t))

    found = edm(lambda z, t: objective.denoise(model, z, t, None), path, z, times, numbers(0, z))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, edm(exact, path, z.double(), times, numbers(0, z)).float(), rtol=0, atol=near)


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_langevin_is_algorithm_1_of_the_paper(path: Path) -> None:
    sigma = torch.tensor([10.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    times = path.time(sigma / (1 + sigma))
    x = torch.randn(4, 1, dtype=torch.float64)
    found = langevin(TWO.denoiser(path), path, path(times[0])[0] * x, times, numbers(1, x), repeats=3, step=0.3)
    noise = numbers(1, x)

    def density(x: Tensor, level: Tensor) -> Tensor:
        std = (TWO.std**2 + level**2).sqrt()
        return torch.logsumexp(TWO.share.log() - std.log() - ((x - TWO.mean) / std) ** 2 / 2, -1).sum()

    for level in sigma[:-1]:
        alpha = 0.3 * level**2
        for _ in range(3):
            x = x + alpha / 2 * torch.func.grad(density)(x, level) + alpha.sqrt() * noise()
    x = x + level**2 * torch.func.grad(density)(x, level)  # Tweedie: the last clean picture
    torch.testing.assert_close(found, path(times[-1])[0] * x, rtol=1e-6, atol=1e-9)
