"""Guidance by a gradient: with a mixture's own posterior it is conditioning, exactly, on every path and target."""

from itertools import pairwise

import pytest
import torch
from gaussians import Mixture
from processes import PAIRS, PATHS, TIMES, name, pair
from torch import Tensor

from flow.guidance import Score, of_picture, uphill
from flow.objective import Estimate
from flow.path import DDPMLinear, Path, RectifiedFlow, VariancePreserving
from flow.sampler import ddim, euler
from flow.target import Target, determinant, solve

CLASSES = [Mixture([-0.9, 0.2], [0.3, 0.2], [0.5, 0.5]), Mixture([0.8], [0.4], [1.0])]
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
ALL = Mixture([-0.9, 0.2, 0.8], [0.3, 0.2, 0.4], [0.15, 0.15, 0.7])


def posterior(path: Path, label: int) -> Score:
    """ln p(class | z) of the mixtures."""

    def score(z: Tensor, t: Tensor) -> Tensor:
        a, b = path(t)
        likelihoods = []
        for each in CLASSES:
            spread = torch.distributions.Normal(a * each.mean, ((a * each.std) ** 2 + b**2).sqrt())
            likelihoods.append((each.share.log() + spread.log_prob(z)).logsumexp(1))
        return (torch.stack(likelihoods, 1) + SHARES.log()).log_softmax(1)[:, label]

    return score


def gradient(score: Score, z: Tensor, t: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(score(leaf, t).sum(), leaf)[0]


@pytest.mark.parametrize("both", PAIRS, ids=pair)
def test_the_exact_posterior_makes_the_conditional_output(both: tuple[Path, Target]) -> None:
    """x̂0, ε̂ and the model's output y' = y − (b·det/a)·∇ ln p(c | z)."""
    path, target = both
    for label, conditional in enumerate(CLASSES):
        score = posterior(path, label)
        guided = uphill(ALL.denoiser(path), path, score, 1.0, (0.0, 0.99))
        for t in TIMES[::8]:
            z = ALL.start(path, t)
            found, expected, plain = (each(z, t) for each in (guided, conditional.denoiser(path), ALL.denoiser(path)))
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
            (a, b), (p, q) = path(t), target.row(path, t)
            y = p * plain.x0 + q * plain.noise
            y = y - b * determinant(path, target, t) / a * gradient(score, z, t)
            torch.testing.assert_close(y, p * expected.x0 + q * expected.noise, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(solve(path, target, z, y, t)[0], expected.x0, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_picture_and_noise_still_make_z(path: Path) -> None:
    guided = uphill(ALL.denoiser(path), path, posterior(path, 0), 7.0)
    for t in TIMES[::12]:
        z, (a, b) = ALL.start(path, t), path(t)
        found = guided(z, t)
        torch.testing.assert_close(a * found.x0 + b * found.noise, z)


def test_the_walk_ends_in_the_class_that_was_asked_for() -> None:
    path = RectifiedFlow()
    z = torch.randn(4000, 1, dtype=torch.float64)
    times = torch.linspace(1, 0, 201, dtype=torch.float64)
    first = uphill(ALL.denoiser(path), path, posterior(path, 0), 1.0, (0.0, 0.995))
    drawn = euler(first, path, z, times)
    exact = euler(CLASSES[0].denoiser(path), path, z, times)
    assert (drawn - exact).abs().max() < 0.02  # only the first step, from t = 1, is not guided
    assert abs(drawn.mean() - CLASSES[0].mean.mean()) < 0.03


def test_of_ddim_it_is_the_papers_algorithm() -> None:
    """ε̂ − √(1 − ᾱ)·s·g, and x̂0 found again from it (Dhariwal & Nichol 2021, algorithm 2)."""
    path, times = DDPMLinear(), torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    score, denoise, z = posterior(path, 1), ALL.denoiser(path), torch.randn(5, 1, dtype=torch.float64)
    expected = z
    for t, s in pairwise(times):
        (a, b), (a_next, b_next) = path(t), path(s)
        noise = denoise(expected, t).noise - b * 3.0 * gradient(score, expected, t)
        expected = a_next * (expected - b * noise) / a + b_next * noise
    found = ddim(uphill(denoise, path, score, 3.0, (0.0, 0.9)), path, z, times, lambda: torch.zeros_like(z), eta=0.0)
    torch.testing.assert_close(found, expected)


def test_outside_the_interval_it_does_nothing_and_computes_nothing() -> None:
    def score(z: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return z.sum(1)

    asked: list[float] = []
    path, z = RectifiedFlow(), torch.randn(3, 1, dtype=torch.float64)
    denoise = ALL.denoiser(path)
    guided = uphill(denoise, path, score, 2.0, (0.2, 0.6))
    for t, inside in ((0.1, False), (0.2, True), (0.6, True), (0.7, False), (1.0, False)):
        time = torch.tensor(t, dtype=torch.float64)
        same = torch.equal(guided(z, time).x0, denoise(z, time).x0)
        assert same is not inside
    assert asked == [0.2, 0.6]


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_by_default_it_begins_where_two_percent_are_picture(path: Path) -> None:
    for t in torch.linspace(0.001, 1, 1000, dtype=torch.float64):
        a, b = path(t)
        z = ALL.start(path, t)
        same = torch.equal(
            uphill(ALL.denoiser(path), path, posterior(path, 0), 2.0)(z, t).x0, ALL.denoiser(path)(z, t).x0
        )
        assert same == bool(b / (a + b) > 0.98)


def test_it_keeps_the_variance_and_passes_the_end() -> None:
    def denoise(z: Tensor, t: Tensor, *end: Tensor) -> Estimate:
        return Estimate(z, z, z + end[0])

    found = uphill(denoise, RectifiedFlow(), lambda z, t: z.sum(1), 1.0)(torch.ones(2, 3), *torch.tensor([0.5, 0.25]))
    assert torch.equal(found.variance, torch.full((2, 3), 1.25))  # type: ignore[arg-type]


def test_the_gradient_of_a_reward_of_pictures_goes_through_the_model() -> None:
    path, t = RectifiedFlow(), torch.tensor(0.4, dtype=torch.float64)
    denoise, z = ALL.denoiser(path), torch.randn(6, 1, dtype=torch.float64)
    guided = uphill(denoise, path, of_picture(denoise, lambda x0: 3 * x0[:, 0]), 0.5)(z, t)
    step = 1e-5
    slope = (denoise(z + step, t).x0 - denoise(z - step, t).x0) / (2 * step)
    torch.testing.assert_close(guided.x0, denoise(z, t).x0 + 0.4**2 / 0.6 * 0.5 * 3 * slope)


def test_no_picture_is_left_at_pure_noise() -> None:
    denoise = ALL.denoiser(RectifiedFlow())
    with pytest.raises(ValueError, match=r"at t = 1 there is no picture left to guide.*such as at 0.98"):
        uphill(denoise, RectifiedFlow(), lambda z, t: z.sum(1), 1.0, (0.0, 1.0))
    path = VariancePreserving()  # keeps a little
    t = torch.ones((), dtype=torch.float64)
    found = uphill(ALL.denoiser(path), path, posterior(path, 0), 1.0, (0.0, 1.0))(ALL.start(path, t), t)
    assert all(x.isfinite().all() for x in found[:2])
