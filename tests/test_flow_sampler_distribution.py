"""Stochastic samplers keep the distribution.

On Gaussian data each is affine in the start and in each of its normals, so the mean and the covariance that it ends
with follow exactly from its answers to unit impulses: no sampling error.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from walks import CHAINS, CONTINUOUS, GRIDS, forbidden, name

from flow.grid import karras, trailing
from flow.objective import Estimate
from flow.path import EDM, Cosine, Discrete, LDMLinear, Path, RectifiedFlow, VariancePreserving, ZeroTerminalSNR
from flow.sampler import Denoiser, ddim, ddpm, edm, euler, langevin, pc, sde
from flow.variance import posterior

MEAN = torch.tensor([0.6, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
UNIT = torch.eye(2, dtype=torch.float64)
POINT = torch.zeros(2, 2, dtype=torch.float64)


def gaussian(path: Path, covariance: Tensor, grid: Tensor | None = None) -> Denoiser:
    """Exact, for x0 ~ N(MEAN, covariance). With a grid it knows its true reverse steps' variance, if isotropic."""

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        a, b = path(t)
        off = (z - a * MEAN) @ torch.linalg.inv(a**2 * covariance + b**2 * UNIT)
        return Estimate(MEAN + a * off @ covariance, b * off, None if grid is None else output(t).expand_as(z))

    def output(t: Tensor) -> Tensor:
        after = grid[grid < t].max()
        exact = posterior(path, t, after)
        (a, b), (a_s, b_s) = path(t), path(after)
        before, now = a_s**2 * covariance[0, 0] + b_s**2, a**2 * covariance[0, 0] + b**2
        true = before - (a / a_s * before) ** 2 / now  # Var(z_s | z_t), by Bayes' rule
        return (2 * true.log() - exact.large.log() - exact.small.log()) / (exact.large.log() - exact.small.log())

    return denoise


def moments(walk: Callable, path: Path, grid: Tensor, denoise: Denoiser, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what the walk ends with, from the exact distribution at grid[0]."""
    a, b = path(grid[0])
    count = 0

    def counting() -> Tensor:
        nonlocal count
        count += 1
        return torch.zeros(1, 2, dtype=torch.float64)

    walk(denoise, path, (a * MEAN)[None], grid, counting)
    z = (a * MEAN).repeat(3 + 2 * count, 1)  # row 0: nothing but the mean; then one row for each unit impulse
    z[1:3] += torch.linalg.cholesky(a**2 * covariance + b**2 * UNIT).T
    step = 0

    def impulse() -> Tensor:
        nonlocal step
        noise = torch.zeros_like(z)
        noise[3 + 2 * step : 5 + 2 * step] = UNIT
        step += 1
        return noise

    end = walk(denoise, path, z, grid, impulse)
    answer = end[1:] - end[0]
    return end[0], answer.T @ answer


def off(walk: Callable, path: Path, grid: Tensor, covariance: Tensor = COVARIANCE, told: bool = False) -> float:
    """How far the walk's result is from the distribution at the grid's end."""
    mean, found = moments(walk, path, grid, gaussian(path, covariance, grid if told else None), covariance)
    a, b = path(grid[-1])
    return max((mean / a - MEAN).abs().max().item(), ((found - b**2 * UNIT) / a**2 - covariance).abs().max().item())


def walker(walk: Callable, **options: object) -> Callable:
    return lambda denoise, path, z, grid, noise: walk(denoise, path, z, grid, noise, **options)


@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine(), LDMLinear(), ZeroTerminalSNR(LDMLinear())], ids=name)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_distribution_to_first_order(path: Path, eta: float) -> None:
    coarse, middle, fine = (off(walker(ddim, eta=eta), path, trailing(path, n)) for n in (100, 200, 400))
    assert fine < 0.015
    assert coarse / middle == pytest.approx(2, rel=0.2)
    assert middle / fine == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_distribution_of_edm(eta: float) -> None:
    coarse, fine = (off(walker(ddim, eta=eta), EDM(), karras(EDM(), n)) for n in (200, 400))
    assert fine < 0.02
    assert coarse / fine == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine(), VariancePreserving()], ids=name)
@pytest.mark.parametrize("w", ["noise", "product", "sbdm"])
def test_every_reverse_sde_keeps_the_distribution_to_first_order(path: Path, w: str) -> None:
    coarse, middle, fine = (off(walker(sde, w=w), path, trailing(path, n)) for n in (200, 400, 800))
    assert fine < 0.015
    assert coarse / middle > 1.7
    assert middle / fine > 1.7


def test_without_noise_the_reverse_sde_is_euler_s_walk() -> None:
    path, grid, z = Cosine(), trailing(Cosine(), 7), torch.randn(3, 2, dtype=torch.float64)
    denoise = gaussian(path, COVARIANCE)
    assert torch.equal(sde(denoise, path, z, grid, forbidden, scale=0.0), euler(denoise, path, z, grid))


def test_few_steps_of_ddim_with_noise_lose_variance_and_those_of_the_sde_do_not() -> None:
    """Data of deviation 0.4 in 50 and in 10 steps."""
    covariance, found = 0.16 * UNIT, {}
    for steps in (50, 10):
        for word, walk in {"ddim": walker(ddim, eta=1.0), "noise": walker(sde), "sbdm": walker(sde, w="sbdm")}.items():
            grid = trailing(RectifiedFlow(), steps)
            spread = moments(walk, RectifiedFlow(), grid, gaussian(RectifiedFlow(), covariance), covariance)[1]
            found[word, steps] = spread[0, 0].sqrt().item()
    assert found["ddim", 50] == pytest.approx(0.373, abs=1e-3)
    assert found["ddim", 10] == pytest.approx(0.303, abs=1e-3)
    assert found["noise", 50] == pytest.approx(0.397, abs=2e-3)
    assert found["sbdm", 50] == pytest.approx(0.4, abs=2e-3)


@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine(), LDMLinear()], ids=name)
def test_correctors_keep_the_distribution(path: Path) -> None:
    coarse, fine = (off(walker(pc), path, trailing(path, n)) for n in (25, 100))
    assert fine < 0.015
    assert fine < 0.6 * coarse


def test_a_corrector_is_a_step_of_langevin_dynamics() -> None:
    """After Euler's step, what `langevin` does at that level."""
    path, denoise = RectifiedFlow(), gaussian(RectifiedFlow(), COVARIANCE)
    z, noise = torch.randn(2, 3, 2, dtype=torch.float64)
    t, s = torch.tensor([0.8, 0.5], dtype=torch.float64)
    found = pc(denoise, path, z, torch.stack([t, s]), lambda: noise, step=0.3)
    moved = euler(denoise, path, z, torch.stack([t, s]))
    states: list[Tensor] = []
    grid = torch.stack([s, s, s])  # the walk's second step shows what its first one, at s, has made
    langevin(denoise, path, moved, grid, lambda: noise, lambda i, z, x0: states.append(z), repeats=1, step=0.3)
    torch.testing.assert_close(found, states[0])


@pytest.mark.parametrize("path", CHAINS, ids=name)
@pytest.mark.parametrize(("variance", "full", "short"), [("small", 0.007, 0.04), ("large", 0.0007, 0.005)])
def test_ddpm_over_the_whole_chain_keeps_the_distribution(
    path: Discrete, variance: str, full: float, short: float
) -> None:
    assert off(walker(ddpm, variance=variance), path, trailing(path, 1000)) < full
    assert off(walker(ddpm, variance=variance), path, trailing(path, 50)) > short  # the bound above means something


@pytest.mark.parametrize("path", CHAINS, ids=name)
@pytest.mark.parametrize("steps", [2, 3, 50])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_ddpm_is_exact_in_any_number_of_steps_where_its_variance_is(path: Discrete, steps: int, grid: Callable) -> None:
    times = grid(path, steps)
    above = times[:-1]  # the step to the data has no noise, and so gives the mean of x0
    assert off(walker(ddpm, variance="small"), path, times, POINT) < 1e-9
    assert off(walker(ddpm, variance="small"), path, above, POINT) < 1e-9
    assert off(walker(ddpm, variance="large"), path, above, UNIT) < 1e-9
    assert off(walker(ddpm, variance="learned"), path, above, 0.3 * UNIT, told=True) < 1e-9
    assert off(walker(ddpm, variance="large"), path, above, 0.3 * UNIT) > 1e-6


@pytest.mark.parametrize("path", [*CONTINUOUS, *CHAINS], ids=name)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_exact_on_a_single_picture(path: Path, eta: float) -> None:
    times = trailing(path, 5)
    for end in (3, 4, 6):  # at every level, not only at the data
        a, b = path(times[end - 1])
        mean, found = moments(walker(ddim, eta=eta), path, times[:end], gaussian(path, POINT), POINT)
        torch.testing.assert_close(mean, a * MEAN)
        torch.testing.assert_close(found, b**2 * UNIT)


@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine(), EDM()], ids=name)
@pytest.mark.parametrize("options", [{}, {"churn": 10.0}, {"churn": 20.0, "churn_min": 0.05, "churn_max": 50.0}])
def test_edm_keeps_the_distribution_to_second_order(path: Path, options: dict) -> None:
    coarse, fine = (off(walker(edm, **options), path, karras(path, n)) for n in (100, 200))
    assert fine < 2e-3
    assert coarse / fine > 3.2


def test_churn_noise_scales_the_added_noise() -> None:
    times = karras(EDM(), 30)
    _, plain = moments(walker(edm, churn=20.0), EDM(), times, gaussian(EDM(), COVARIANCE), COVARIANCE)
    _, more = moments(
        walker(edm, churn=20.0, churn_noise=1.05), EDM(), times, gaussian(EDM(), COVARIANCE), COVARIANCE
    )  # fmt: skip
    assert bool((torch.linalg.eigvalsh(more - plain) > 0).all())


@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine(), EDM()], ids=name)
def test_langevin_keeps_the_distribution(path: Path) -> None:
    few, more, many = (off(walker(langevin, repeats=n, step=0.4), path, karras(path, 50)) for n in (5, 10, 40))
    assert many < 0.025  # at each level it comes near the distribution only as long as it walks
    assert more < 0.6 * few
    assert many < 0.35 * more
