"""Which times a sampler asks for, what it reports, how much randomness it takes, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from gaussians import TWO
from torch import Tensor
from walks import name, numbers

from flow.grid import karras, trailing
from flow.objective import Estimate
from flow.path import EDM, DDPMLinear, LDMLinear, Path, RectifiedFlow, VariancePreserving
from flow.sampler import ddim, ddpm, dpmpp_2m, edm, euler, heun, langevin, midpoint
from flow.target import Epsilon
from flow.variance import LearnedVariance

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
        assert t.shape == ()
        seen.append(t.item())
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
def test_samplers_keep_float32(walk: Callable, options: dict, evaluations: int, draws: int) -> None:
    path = LDMLinear() if walk is ddpm else EDM()
    times = karras(path, N) if walk in (edm, langevin) else trailing(path, N)
    seen = []

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        seen.append((z.dtype, t.dtype))
        return Estimate(z / 2, z / 2, z)

    z = torch.randn(3, 1)
    arguments = (numbers(0, z),) if walk in (ddim, ddpm, edm, langevin) else ()
    told = []
    report = lambda _, *both: told.extend(x.dtype for x in both)  # noqa: E731
    assert walk(denoise, path, z, times, *arguments, callback=report, **options).dtype == torch.float32
    assert set(told) == {torch.float32}
    assert set(seen) == {(torch.float64 if walk is edm else torch.float32, torch.float64)}


def test_pairs_of_times_are_read_from_the_grid() -> None:
    times = torch.tensor([1.0, 0.83, 0.2, 0.0])  # any grid at all
    seen = []

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        seen.append(t)
        return Estimate(torch.zeros_like(z), z)

    end = euler(denoise, RectifiedFlow(), torch.ones(2, 1), times[:-1])
    assert [t.item() for t in seen] == times[:-2].tolist()
    torch.testing.assert_close(end, torch.full((2, 1), 0.83 * 0.2))


@pytest.mark.parametrize(
    ("walk", "path", "options", "said"),
    [
        (ddim, RectifiedFlow(), {"eta": -0.1}, "eta"),
        (ddim, RectifiedFlow(), {"eta": 1.1}, "eta"),
        (ddpm, RectifiedFlow(), {}, "ddim:eta=1"),
        (ddpm, LDMLinear(), {"variance": "learned"}, "learned variance"),
        (edm, EDM(), {"churn": -1.0}, "churn >= 0"),
        (edm, EDM(), {"churn_noise": -1.0}, "churn_noise >= 0"),
        (edm, EDM(), {}, "finite first sigma"),
        (langevin, EDM(), {"repeats": 0}, "repeats >= 1"),
        (langevin, EDM(), {"step": 2.0}, "step < 2"),
        (langevin, EDM(), {}, "finite first sigma"),
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
    objective = LearnedVariance(path, Epsilon())
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


def test_churn_asks_for_no_time_beyond_the_noise() -> None:
    path, times = VariancePreserving(), []
    largest = float(path(torch.ones(()))[1] / path(torch.ones(()))[0])

    def denoise(z: Tensor, t: Tensor, end: Tensor | None = None) -> Estimate:
        times.append(t.item())
        return Estimate(torch.zeros_like(z), z)

    grid = karras(path, 4, sigma_max=0.95 * largest)
    edm(denoise, path, torch.ones(1, 2), grid, lambda: torch.ones(1, 2), churn=10.0)
    assert times[0] == pytest.approx(1, abs=1e-6)
    assert max(times) <= 1
