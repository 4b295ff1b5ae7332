"""Samplers and time grids: against exact flows of Gaussians and mixtures, the papers' algorithms, and diffusers."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from flow.density import shift
from flow.grid import flow_match, karras, leading, linspace, trailing
from flow.objective import Estimate, Objective
from flow.path import (
    EDM,
    Cosine,
    DDPMLinear,
    Discrete,
    ImprovedCosine,
    LDMLinear,
    Path,
    RectifiedFlow,
    ZeroTerminalSNR,
    expand_as,
)
from flow.reference import reference
from flow.sampler import Denoiser, ddim, ddpm, dpmpp_2m, edm, euler, heun, langevin, midpoint
from flow.target import X0, Epsilon, Preconditioned, Target, V, solve
from flow.variance import LearnedVariance, posterior

CONTINUOUS = [RectifiedFlow(), Cosine(), EDM(), EDM(-0.5, 1.2, 1.0)]
CHAINS = [DDPMLinear(), LDMLinear(), ImprovedCosine(), ZeroTerminalSNR(LDMLinear())]
GRIDS = [trailing, leading, linspace]


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(0)


def name(thing: object) -> str:
    return thing if isinstance(thing, str) else getattr(thing, "__name__", type(thing).__name__)


def forbidden() -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def numbers(seed: int, like: Tensor) -> Callable[[], Tensor]:
    """Fresh normals, those that diffusers draws from a generator of the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=draw, dtype=like.dtype)


# Models that are exact, because the data is known.


class Mixture:
    """x0 of one dimension from Gaussians; with one of them, a Gaussian. Knows the posterior means and the flow map."""

    def __init__(self, means: list[float], stds: list[float], shares: list[float]) -> None:
        self.mean, self.std, self.share = (torch.tensor(x, dtype=torch.float64) for x in (means, stds, shares))

    def denoiser(self, path: Path) -> Denoiser:
        def denoise(z: Tensor, t: Tensor) -> Estimate:
            a, b = (expand_as(c, z) for c in path(t))
            variance = (a * self.std) ** 2 + b**2
            off = z - a * self.mean
            share = torch.softmax(self.share.log() - variance.log() / 2 - off**2 / variance / 2, -1)
            x0 = self.mean + a * self.std**2 / variance * off
            return Estimate(*((share * x).sum(-1, keepdim=True) for x in (x0, b / variance * off)))

        return denoise

    def distribution(self, path: Path, t: Tensor, z: Tensor) -> Tensor:
        a, b = path(t)
        std = ((a * self.std) ** 2 + b**2).sqrt()
        return (self.share * torch.special.ndtr((z - a * self.mean) / std)).sum(-1, keepdim=True)

    def flow(self, path: Path, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """z at t carried along the ODE to s: in one dimension paths do not cross, so quantile goes to quantile."""
        target = self.distribution(path, t, z)
        low, high = torch.full_like(z, -20.0), torch.full_like(z, 20.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.distribution(path, s, middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def start(self, path: Path, t: Tensor) -> Tensor:
        """Points where z is likely at t, (9, 1)."""
        a, b = path(t)
        spread = ((a * self.std.max()) ** 2 + b**2).sqrt()
        return a * self.mean.mean() + spread * torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]


GAUSSIAN = Mixture([0.7], [0.3], [1.0])
TWO = Mixture([-0.6, 0.8], [0.3, 0.4], [0.4, 0.6])


def inner(path: Path, steps: int) -> Tensor:
    return torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)


def karras_inner(path: Path, steps: int) -> Tensor:
    return karras(path, steps + 1, sigma_min=0.05, sigma_max=5.0)[:-1]


def edm_ode(denoise: Denoiser, path: Path, z: Tensor, grid: Tensor) -> Tensor:
    return edm(denoise, path, z, grid, forbidden)


def test_gaussian_flow_is_affine() -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(GAUSSIAN.flow(RectifiedFlow(), z, one, zero), 0.7 + 0.3 * z)


def errors(walk: Callable, data: Mixture, path: Path, grid: Callable, counts: tuple[int, ...]) -> list[float]:
    found = []
    for steps in counts:
        times = grid(path, steps)
        z = data.start(path, times[0])
        exact = data.flow(path, z, times[0], times[-1])
        found.append((walk(data.denoiser(path), path, z, times) - exact).square().mean().sqrt().item())
    return found


ORDERS = [(euler, 1), (heun, 2), (midpoint, 2), (edm_ode, 2)]


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize(
    ("walk", "order", "grid"),
    [(walk, order, grid) for walk, order in ORDERS for grid in (inner, karras_inner)] + [(dpmpp_2m, 2, karras_inner)],
    ids=name,
)
def test_order_of_convergence(walk: Callable, order: int, grid: Callable, path: Path, data: Mixture) -> None:
    order += walk is midpoint and data is GAUSSIAN  # there it gains one
    found = errors(walk, data, path, grid, (64, 128, 256))
    assert found[-1] < 10.0 ** -(order + 1)
    for coarse, fine in pairwise(found):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize(("walk", "order"), ORDERS[:3], ids=name)
def test_order_from_pure_noise_to_data(walk: Callable, order: int, path: Path, data: Mixture) -> None:
    def even(path: Path, steps: int) -> Tensor:
        return path.time(torch.linspace(1, 0, steps + 1, dtype=torch.float64))

    order += walk is midpoint and data is GAUSSIAN
    for coarse, fine in pairwise(errors(walk, data, path, even, (64, 128, 256))):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize("grid", [inner, trailing], ids=name)
def test_reference_is_as_near_as_its_tolerance(path: Path, data: Mixture, grid: Callable) -> None:
    times = grid(path, 3)
    z = data.start(path, times[0])
    exact = data.flow(path, z, times[0], times[-1])
    for tolerance, bound in ((1e-9, 1e-7), (1e-5, 1e-3)):
        found = reference(data.denoiser(path), path, z, times, tolerance=tolerance)
        assert (found - exact).abs().max() < bound
    single = reference(data.denoiser(path), path, z.float(), times)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, found.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_reference_looks_only_where_the_path_is(path: Path) -> None:
    seen, told = [], []
    denoise = GAUSSIAN.denoiser(path)
    times = trailing(path, 4)
    z = GAUSSIAN.start(path, times[0])
    end = reference(
        lambda z, t: seen.append(t) or denoise(z, t), path, z, times, lambda *step: told.append(step)
    )  # fmt: skip
    assert all(0 <= t.min() <= t.max() <= 1 for t in seen)
    assert [n for n, _, _ in told] == [1, 2, 3, 4]
    assert torch.equal(told[-1][1], end)
    for (_, z_s, _), s in zip(told, times[1:], strict=True):
        assert (z_s - GAUSSIAN.flow(path, z, times[0], s)).abs().max() < 2e-4


@pytest.mark.parametrize("path", CHAINS, ids=name)
@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
def test_a_chain_walked_in_full_is_near_the_flow(path: Discrete, data: Mixture) -> None:
    times = trailing(path, 1000)
    z = data.start(path, times[0])
    exact = data.flow(path, z, times[0], times[-1])
    first, second, multistep = (
        (walk(data.denoiser(path), path, z, times) - exact).abs().max().item() for walk in (euler, heun, dpmpp_2m)
    )
    assert first < 0.006
    assert max(second, multistep) < 0.003


@pytest.mark.parametrize("walk", [euler, heun, midpoint, dpmpp_2m, edm_ode], ids=name)
@pytest.mark.parametrize("path", CONTINUOUS[1:], ids=name)
@pytest.mark.parametrize("start", [1.0, 0.9])
def test_all_paths_are_one_line(walk: Callable, path: Path, start: float) -> None:
    if walk is edm_ode and start == 1:
        start = 0.99  # needs a finite σ
    line = RectifiedFlow()
    tau = torch.linspace(start, 0, 11, dtype=torch.float64)
    w = TWO.start(line, tau[0])
    on_line = walk(TWO.denoiser(line), line, w, tau)
    times = path.time(tau)
    scale = sum(path(times))
    torch.testing.assert_close(walk(TWO.denoiser(path), path, scale[0] * w, times), scale[-1] * on_line)


def test_euler_on_the_straight_line_steps_along_the_velocity() -> None:
    z = torch.randn(4, 1, dtype=torch.float64)
    denoise = TWO.denoiser(RectifiedFlow())
    x0, noise, _ = denoise(z, torch.full((4,), 0.8, dtype=torch.float64))
    step = euler(denoise, RectifiedFlow(), z, torch.tensor([0.8, 0.5], dtype=torch.float64))
    torch.testing.assert_close(step, z + (0.5 - 0.8) * (noise - x0))


# Which times a sampler asks for, what it reports, and how much randomness it takes.

N = 6
FIXED = [
    (euler, {}, N, 0),
    (heun, {}, 2 * N - 1, 0),
    (midpoint, {}, 2 * N, 0),
    (dpmpp_2m, {}, N, 0),
    (ddim, {}, N, 0),
    (ddim, {"eta": 0.5}, N, N),
    (ddpm, {}, N, N - 1),
    (ddpm, {"variance": "large"}, N, N - 1),
    (ddpm, {"variance": "learned"}, N, N - 1),
    (edm, {}, 2 * N - 1, 0),
    (edm, {"churn": 1.0}, 2 * N - 1, N),
    (edm, {"churn": 1.0, "churn_min": 0.1, "churn_max": 30.0}, 2 * N - 1, 3),  # σ = 80, 21.1, 4.1, 0.5, 0.02, 0.002
    (langevin, {}, 20 * N + 1, 20 * N),
    (langevin, {"repeats": 2}, 2 * N + 1, 2 * N),
]


@pytest.mark.parametrize(("walk", "options", "evaluations", "draws"), FIXED, ids=name)
def test_evaluations_times_reports_and_noise(walk: Callable, options: dict, evaluations: int, draws: int) -> None:
    path = LDMLinear() if walk is ddpm else EDM()
    times = karras(path, N) if walk in (edm, langevin) else trailing(path, N)
    z = torch.randn(3, 1, dtype=torch.float64)
    seen, told, asked = [], [], []
    exact = TWO.denoiser(path)

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        assert t.shape == (3,)
        assert bool((t == t[0]).all())
        seen.append(t[0].item())
        return Estimate(*exact(z, t)[:2], torch.zeros_like(z))

    def noise() -> Tensor:
        asked.append(len(seen))
        return torch.randn_like(z)

    arguments = (noise,) if walk in (ddim, ddpm, edm, langevin) else ()
    end = walk(denoise, path, z, times, *arguments, callback=lambda *step: told.append(step), **options)
    assert len(seen) == evaluations
    assert len(asked) == draws
    if walk is not midpoint and not options.get("churn"):  # which look in between
        assert set(seen) == set(times[:-1].tolist())
        assert seen == sorted(seen, reverse=True)
    assert [n for n, _, _ in told] == list(range(1, N + 1))
    assert all(x.shape == z.shape for _, *both in told for x in both)
    if walk is not langevin:  # which cleans its last z
        assert torch.equal(told[-1][1], end)
    assert end.dtype == z.dtype


@pytest.mark.parametrize(("walk", "options", "evaluations", "draws"), FIXED, ids=name)
def test_no_sampler_leaves_float32(walk: Callable, options: dict, evaluations: int, draws: int) -> None:
    path = LDMLinear() if walk is ddpm else EDM()
    times = karras(path, N) if walk in (edm, langevin) else trailing(path, N)
    seen = []

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        seen.append((z.dtype, t.dtype))
        return Estimate(z / 2, z / 2, z)

    z = torch.randn(3, 1)
    arguments = (numbers(0, z),) if walk in (ddim, ddpm, edm, langevin) else ()
    assert walk(denoise, path, z, times, *arguments, **options).dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float64)}


def test_pairs_of_times_are_read_from_the_grid() -> None:
    times = torch.tensor([1.0, 0.83, 0.2, 0.0])  # any grid at all
    seen = []

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        seen.append(t)
        return Estimate(torch.zeros_like(z), z)

    end = euler(denoise, RectifiedFlow(), torch.ones(2, 1), times[:-1])
    assert [t.tolist() for t in seen] == [[x, x] for x in times[:-2].tolist()]
    torch.testing.assert_close(end, torch.full((2, 1), 0.83 * 0.2))


# Stochastic samplers. On Gaussian data each is affine in the start and in each of its normals, so the mean and the
# covariance that it ends with follow exactly from its answers to unit impulses: no sampling error.

MEAN = torch.tensor([0.6, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
UNIT = torch.eye(2, dtype=torch.float64)
POINT = torch.zeros(2, 2, dtype=torch.float64)


def gaussian(path: Path, covariance: Tensor, grid: Tensor | None = None) -> Denoiser:
    """Exact, for x0 ~ N(MEAN, covariance). With a grid it knows its true reverse steps' variance, if isotropic."""

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        a, b = path(t[0])
        off = (z - a * MEAN) @ torch.linalg.inv(a**2 * covariance + b**2 * UNIT)
        return Estimate(MEAN + a * off @ covariance, b * off, None if grid is None else output(t[0]).expand_as(z))

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


def test_edm_adds_as_much_noise_as_it_is_told() -> None:
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


# The same algorithms written down from their papers, and diffusers' schedulers.


def toy(z: Tensor, t: Tensor, condition: object) -> Tensor:
    """An affine model that depends on the time too."""
    return 0.4 * z + 0.3 * z.flip(-1) + 0.2 * t.to(z.dtype).reshape(-1, *(1,) * (z.ndim - 1)) - 0.1


def reading(path: Path, target: object, model: Callable = toy, channels: int | None = None) -> Denoiser:
    """The model read as a target, in the precision of z."""

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        y = model(z, t, None)
        return Estimate(*solve(path, target, z, y[:, :channels], t), None if channels is None else y[:, channels:])

    return denoise


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
        t = path.time(sigma / (1 + sigma)).expand(len(x))
        return TWO.denoiser(path)(path(t[0])[0] * x, t).x0

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


def chained(scheduler: type, path: Discrete, **options: object):
    """diffusers' scheduler with our ᾱ, which is float64."""
    theirs = scheduler(clip_sample=False, **options)
    theirs.alphas_cumprod = path.alphas_cumprod
    return theirs


def stepped(theirs: object, model: Callable, z: Tensor, **options: object) -> Tensor:
    for k in theirs.timesteps:
        z = theirs.step(model(z, (k + 1).double().expand(len(z)) / 1000, None), k, z, **options).prev_sample
    return z


READINGS = [
    (DDPMLinear(), Epsilon(), "epsilon"),
    (LDMLinear(), V(), "v_prediction"),
    (ImprovedCosine(), X0(), "sample"),
    (ImprovedCosine(), Epsilon(), "epsilon"),
]


@pytest.mark.parametrize(("path", "target", "prediction"), READINGS, ids=name)
@pytest.mark.parametrize(("variance", "theirs_is"), [("small", "fixed_small"), ("large", "fixed_large")])
@pytest.mark.parametrize(("grid", "steps"), [(trailing, 1000), (linspace, 50), (leading, 7), (linspace, 48)])
def test_ddpm_is_that_of_diffusers(
    path: Discrete, target: Target, prediction: str, variance: str, theirs_is: str, grid: Callable, steps: int
) -> None:
    theirs = chained(
        DDPMScheduler, path, variance_type=theirs_is, prediction_type=prediction, timestep_spacing=name(grid)
    )  # fmt: skip
    theirs.set_timesteps(steps)
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = stepped(theirs, toy, z, generator=torch.Generator().manual_seed(3))
    times = grid(path, steps)
    assert (times[:-1] * 1000 - 1).round().tolist() == theirs.timesteps.tolist()
    found = ddpm(reading(path, target), path, z, times, numbers(3, z), variance=variance)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize(("grid", "steps"), [(trailing, 1000), (linspace, 50), (leading, 7)])
def test_ddpm_with_a_learned_variance_is_that_of_diffusers(grid: Callable, steps: int) -> None:
    path = ImprovedCosine()

    def model(z: Tensor, t: Tensor, condition: object) -> Tensor:
        return torch.cat([toy(z, t, None), torch.cos(3 * z)], 1)

    theirs = chained(DDPMScheduler, path, variance_type="learned_range", timestep_spacing=name(grid))
    theirs.set_timesteps(steps)
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = stepped(theirs, model, z, generator=torch.Generator().manual_seed(3))
    found = ddpm(reading(path, Epsilon(), model, 3), path, z, grid(path, steps), numbers(3, z), variance="learned")
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())


def test_the_last_step_of_ddpm_adds_no_noise_unlike_diffusers() -> None:
    path = LDMLinear()
    theirs = chained(DDPMScheduler, path, variance_type="fixed_large", timestep_spacing="trailing")
    theirs.set_timesteps(10)
    z, k = torch.randn(2, 3, 4, dtype=torch.float64), theirs.timesteps[-1]
    assert k > 0  # where theirs adds noise, even though the step ends at the data
    found = ddpm(reading(path, Epsilon()), path, z, trailing(path, 10)[-2:], forbidden, variance="large")
    expected = theirs.step(
        toy(z, (k + 1).double().expand(2) / 1000, None), k, z, generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(found, expected.pred_original_sample)
    assert not torch.allclose(found, expected.prev_sample, atol=0.01)


@pytest.mark.parametrize(("path", "target", "prediction"), READINGS, ids=name)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("grid", "steps"), [(trailing, 50), (leading, 50), (trailing, 1), (linspace, 1000)])
def test_ddim_is_that_of_diffusers(
    path: Discrete, target: Target, prediction: str, eta: float, grid: Callable, steps: int
) -> None:
    theirs = chained(DDIMScheduler, path, prediction_type=prediction, timestep_spacing=name(grid))
    theirs.set_timesteps(steps)
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = stepped(theirs, toy, z, eta=eta, generator=torch.Generator().manual_seed(3))
    times = grid(path, steps)
    assert (times[:-1] * 1000 - 1).round().tolist() == theirs.timesteps.tolist()
    found = ddim(reading(path, target), path, z, times, numbers(3, z), eta=eta)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())
    if eta == 0:
        assert torch.equal(found, euler(reading(path, target), path, z, times))


@pytest.mark.parametrize(("grid", "steps"), [(trailing, 7), (trailing, 30), (linspace, 50)])
def test_ddim_reads_the_next_time_where_diffusers_computes_it(grid: Callable, steps: int) -> None:
    path = LDMLinear()
    theirs = chained(DDIMScheduler, path, timestep_spacing=name(grid))
    theirs.set_timesteps(steps)
    times = grid(path, steps)
    assert (times[:-1] * 1000 - 1).round().tolist() == theirs.timesteps.tolist()
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = stepped(theirs, toy, z)
    denoise = reading(path, Epsilon())
    computed = z
    for t in times[:-1]:
        computed = euler(denoise, path, computed, torch.stack([t, (t - 1000 // steps / 1000).clamp(min=0)]))
    torch.testing.assert_close(computed, expected)  # theirs jumps as if the steps divided the chain,
    assert not torch.allclose(euler(denoise, path, z, times), expected, rtol=1e-3)  # and so not to the listed times


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_euler_on_the_straight_line_is_that_of_diffusers(alpha: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=alpha)
    theirs.set_timesteps(sigmas=np.linspace(1, 0, 8)[:-1])
    times = trailing(RectifiedFlow(), 7, alpha)
    torch.testing.assert_close(theirs.sigmas, times.float())
    z = x = torch.randn(2, 3, 4)
    for t in theirs.timesteps:
        x = theirs.step(toy(x, (t / 1000).expand(2), None), t, x).prev_sample
    objective = Objective()
    found = euler(lambda z, t: objective.denoise(toy, z, t, None), RectifiedFlow(), z, times)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "walk"), [(EDMEulerScheduler, euler), (EDMDPMSolverMultistepScheduler, dpmpp_2m)], ids=name
)
@pytest.mark.parametrize("steps", [1, 2, 10, 30])
def test_edm_path_is_that_of_diffusers(scheduler: type, walk: Callable, steps: int) -> None:
    path, theirs = EDM(), scheduler()
    theirs.set_timesteps(steps)
    times = karras(path, steps)
    a, b = path(times)
    torch.testing.assert_close((b / a).float(), theirs.sigmas, rtol=1e-5, atol=0)
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    x = (z / a[0]).float()
    for k, t in zip(theirs.timesteps, times, strict=False):
        x = theirs.step(toy(theirs.scale_model_input(x, k), t.expand(2), None), k, x).prev_sample
    found = walk(reading(path, Preconditioned()), path, z, times)
    torch.testing.assert_close((found / a[-1]).float(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("target", "prediction"), [(Epsilon(), "epsilon"), (V(), "v_prediction")], ids=name)
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_dpmpp_2m_on_a_chain_is_that_of_diffusers(target: Target, prediction: str, steps: int) -> None:
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction,
        timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    z = torch.randn(2, 3, 4)
    times = trailing(LDMLinear(), steps)
    assert (times[:-1] * 1000 - 1).round().tolist() == theirs.timesteps.tolist()
    found = dpmpp_2m(reading(LDMLinear(), target), LDMLinear(), z.double(), times).float()
    torch.testing.assert_close(found, stepped(theirs, toy, z), rtol=1e-3, atol=1e-4)  # theirs counts in float32


# Grids.


def test_grids_by_hand() -> None:
    chain, line = DDPMLinear(), RectifiedFlow()
    for found, expected in (
        (trailing(line, 4), [1, 0.75, 0.5, 0.25, 0]),
        (trailing(line, 4, 3.0), [1, 0.9, 0.75, 0.5, 0]),
        (trailing(line, 1), [1, 0]),
        (trailing(chain, 4), [1, 0.75, 0.5, 0.25, 0]),
        (trailing(chain, 3), [1, 0.667, 0.333, 0]),
        (trailing(chain, 3, 3.0), [1, 0.857, 0.6, 0]),
        (leading(chain, 4), [0.751, 0.501, 0.251, 0.001, 0]),
        (leading(chain, 3), [0.667, 0.334, 0.001, 0]),
        (linspace(chain, 4), [1, 0.667, 0.334, 0.001, 0]),
        (linspace(chain, 1), [1, 0]),
        (linspace(chain, 7), [1, 0.833, 0.667, 0.501, 0.334, 0.167, 0.001, 0]),  # ties to the even of 0 … 999
    ):
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_the_released_grid_is_that_of_diffusers_to_the_bit(steps: int, alpha: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=alpha)
    scheduler.set_timesteps(steps)
    times = flow_match(RectifiedFlow(), steps, alpha).float()
    assert torch.equal(times, scheduler.sigmas)
    assert torch.equal(1000 * times[:-1], scheduler.timesteps)


def test_the_released_grid_by_hand() -> None:
    four = [1, 0.857692, 0.602151, 0.008929, 0]
    assert flow_match(RectifiedFlow(), 4, 3.0).tolist() == pytest.approx(four, abs=5e-7)
    many = flow_match(RectifiedFlow(), 28, 3.0).tolist()
    assert many[:3] + many[-4:] == pytest.approx([1, 0.987381, 0.974108, 0.199827, 0.110906, 0.008929, 0], abs=5e-7)


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_karras_grid_by_hand(path: Path) -> None:
    for options, expected in (
        ({"rho": 1.0, "sigma_min": 1.0, "sigma_max": 9.0}, [9, 5, 1, 0]),
        ({"rho": 2.0, "sigma_min": 1.0, "sigma_max": 9.0}, [9, 4, 1, 0]),
        ({}, [80, ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, 0.002, 0]),
    ):
        a, b = path(karras(path, 3, **options))
        assert (b / a).tolist() == pytest.approx(expected, rel=1e-6)
    a, b = path(karras(path, 1))
    assert (b / a).tolist() == pytest.approx([80, 0])


def test_karras_grid_reaches_into_the_tail() -> None:
    path = EDM(0.5, 0.6, 1.0)
    a, b = path(karras(path, 3, sigma_min=0.002, sigma_max=10.0))
    assert (b / a)[-2].item() == pytest.approx(0.002)


@pytest.mark.parametrize("path", [*CONTINUOUS, *CHAINS], ids=name)
@pytest.mark.parametrize("grid", [*GRIDS, karras], ids=name)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 33, 50])
def test_grids_fall_to_the_data(path: Path, grid: Callable, steps: int) -> None:
    if isinstance(path, Discrete) == (grid is karras) or (grid in (leading, linspace) and path in CONTINUOUS):
        return
    times = grid(path, steps)
    assert times.shape == (steps + 1,)
    assert bool((times.diff() < 0).all())
    assert times[-1] == 0
    assert times[0] == 1 if grid in (trailing, linspace) else 0 < times[0] < 1
    assert torch.equal(path.snap(times), times)


@pytest.mark.parametrize("path", CHAINS, ids=name)
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_as_many_steps_as_the_chain_has_are_all_of_it(path: Discrete, grid: Callable) -> None:
    assert torch.equal(grid(path, 1000), torch.arange(1000, -1, -1, dtype=torch.float64) / 1000)


def test_shift_is_applied_once_then_snapped() -> None:
    even = torch.linspace(1, 0, 11, dtype=torch.float64)
    for path in (RectifiedFlow(), Cosine(), EDM()):
        assert torch.equal(trailing(path, 10, 2.5), shift(even, 2.5))
    assert torch.equal(trailing(LDMLinear(), 10, 2.5), LDMLinear().snap(shift(even, 2.5)))


@pytest.mark.parametrize(
    ("grid", "path", "arguments", "said"),
    [
        (trailing, RectifiedFlow(), (0,), "at least 1"),
        (trailing, LDMLinear(), (-1,), "at least 1"),
        (karras, EDM(), (0,), "at least 1"),
        (leading, LDMLinear(), (0,), "at least 1"),
        (trailing, LDMLinear(), (1001,), "at most the 1000"),
        (leading, LDMLinear(), (1001,), "at most the 1000"),
        (linspace, LDMLinear(), (1001,), "at most the 1000"),
        (trailing, LDMLinear(), (1000, 3.0), "fall together"),
        (trailing, RectifiedFlow(), (10, 0.0), "shift must be > 0"),
        (trailing, RectifiedFlow(), (10, math.nan), "shift must be > 0"),
        (trailing, RectifiedFlow(), (10, math.inf), "shift must be > 0"),
        (leading, RectifiedFlow(), (10,), "needs a discrete path"),
        (linspace, EDM(), (10,), "needs a discrete path"),
        (leading, LDMLinear(), (10, 3.0), "no shift"),
        (linspace, LDMLinear(), (10, 3.0), "no shift"),
        (karras, EDM(), (10, 3.0), "no shift"),
        (flow_match, RectifiedFlow(), (0,), "at least 1"),
        (flow_match, RectifiedFlow(), (10, -1.0), "shift must be > 0"),
        (flow_match, Cosine(), (10,), "the path is Cosine: use trailing"),
        (karras, LDMLinear(), (10,), "needs a continuous path"),
        (karras, EDM(0.0, 0.2), (10,), "fall together"),
    ],
    ids=name,
)
def test_grids_that_cannot_be_are_refused(grid: Callable, path: Path, arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        grid(path, *arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options",
    [{"sigma_min": 0.0}, {"sigma_min": 90.0}, {"sigma_max": math.inf}, {"rho": 0.0}, {"rho": math.inf},
     {"sigma_min": math.nan}, {"sigma_max": math.nan}],
)  # fmt: skip
def test_karras_options_that_cannot_be_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="karras spacing"):
        karras(EDM(), 10, **options)


@pytest.mark.parametrize(
    ("walk", "path", "options", "said"),
    [
        (ddim, RectifiedFlow(), {"eta": -0.1}, "eta"),
        (ddim, RectifiedFlow(), {"eta": 1.1}, "eta"),
        (ddpm, RectifiedFlow(), {}, "ddim:eta=1"),
        (ddpm, LDMLinear(), {"variance": "learned"}, "learned its variance"),
        (edm, EDM(), {"churn": -1.0}, "churn >= 0"),
        (edm, EDM(), {"churn_noise": -1.0}, "churn_noise >= 0"),
        (edm, EDM(), {}, "finite sigma"),
        (langevin, EDM(), {"repeats": 0}, "repeats >= 1"),
        (langevin, EDM(), {"step": 2.0}, "step < 2"),
        (langevin, EDM(), {}, "finite sigma"),
    ],
    ids=name,
)
def test_samplers_refuse_what_they_cannot_do(walk: Callable, path: Path, options: dict, said: str) -> None:
    z = torch.randn(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=said) as refusal:
        walk(TWO.denoiser(path), path, z, trailing(path, 4), numbers(0, z), **options)
    assert "\n" not in str(refusal.value)


def test_a_learned_variance_reaches_the_sampler() -> None:
    path = DDPMLinear()
    objective = Objective(path, Epsilon(), variance=LearnedVariance())
    z = torch.randn(2, 3, 4)
    ends = []
    for output in (-1.0, 1.0):

        def model(z: Tensor, t: Tensor, condition: object, output: float = output) -> Tensor:
            return torch.cat([z / 2, torch.full_like(z, output)], 1)

        def denoise(z: Tensor, t: Tensor, model: Callable = model) -> Estimate:
            return objective.denoise(model, z, t, None)

        ends.append(ddpm(denoise, path, z, trailing(path, 10), numbers(5, z), variance="learned"))
        fixed = "small" if output < 0 else "large"
        torch.testing.assert_close(ends[-1], ddpm(denoise, path, z, trailing(path, 10), numbers(5, z), variance=fixed))
    assert not torch.allclose(*ends)
