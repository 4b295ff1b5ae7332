"""The posterior of a step and its learned variance."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from processes import CHAINS, CONTINUOUS, PATHS, name
from torch.distributions import Normal, kl_divergence

from flow.objective import Objective
from flow.path import DDPMLinear, Discrete, LDMLinear, Path, expand_as
from flow.target import X0, Epsilon, Target, V, solve
from flow.variance import LearnedVariance, learned_log_variance, posterior


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_a_learned_variance_needs_a_chain(path: Path) -> None:
    with pytest.raises(ValueError, match="LearnedVariance needs a discrete path, such as ImprovedCosine"):
        LearnedVariance(path, V())


LEAPS = [(n, s) for n in (1, 2, 3, 500, 999, 1000) for s in (0, 1, 2, 400, 998, 999) if s < n]


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_posterior_is_that_of_ddpm_over_any_leap(path: Discrete) -> None:
    bar = torch.cat([torch.ones(1, dtype=torch.float64), path.alphas_cumprod])
    n, s = torch.tensor(LEAPS).T
    found = posterior(path, n / 1000, s / 1000)
    beta = 1 - bar[n] / bar[s]
    close = {"rtol": 1e-8, "atol": 1e-15}
    torch.testing.assert_close(found.large, beta, **close)
    torch.testing.assert_close(found.small, (1 - bar[s]) / (1 - bar[n]) * beta, **close)
    torch.testing.assert_close(found.x0_coefficient, bar[s].sqrt() * beta / (1 - bar[n]), **close)
    x0, noise = torch.randn(2, len(n), dtype=torch.float64)
    z = bar[n].sqrt() * x0 + (1 - bar[n]).sqrt() * noise
    eq7 = bar[s].sqrt() * beta / (1 - bar[n]) * x0 + (1 - beta).sqrt() * (1 - bar[s]) / (1 - bar[n]) * z
    mean = bar[s].sqrt() * x0 + ((1 - bar[s]) - found.small).clamp(min=0).sqrt() * noise
    torch.testing.assert_close(mean, eq7, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_posterior_is_bayes_rule(path: Path) -> None:
    t, s = torch.tensor([[0.9, 0.5], [0.5, 0.499], [0.02, 0.01], [1.0, 0.3]], dtype=torch.float64).T
    (a, b), (a_s, b_s) = path(t), path(s)
    found = posterior(path, t, s)
    alpha = a / a_s
    torch.testing.assert_close((alpha * b_s) ** 2 + found.large, b**2)  # s → t adds noise of variance β
    precision = 1 / b_s**2 + alpha**2 / found.large  # prior of z_s given x0 × likelihood of z_t
    torch.testing.assert_close(found.small, 1 / precision)
    torch.testing.assert_close(found.x0_coefficient, a_s / b_s**2 / precision)


@pytest.mark.parametrize("path", CHAINS, ids=name)
@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_posterior_is_that_of_diffusers(path: Discrete, steps: int) -> None:
    theirs = DDPMScheduler(timestep_spacing="linspace")
    theirs.alphas_cumprod = path.alphas_cumprod  # theirs is float32
    theirs.set_timesteps(steps)
    for k, before in zip(theirs.timesteps[:-1], theirs.timesteps[1:], strict=True):
        found = posterior(path, (k + 1) / 1000, (before + 1) / 1000)
        small, large, learned = (
            theirs._get_variance(k, torch.tensor(0.3), kind) for kind in ("fixed_small", "fixed_large", "learned_range")
        )
        assert (found.small.item(), found.large.item()) == pytest.approx((small.item(), large.item()), rel=1e-7)
        between = learned_log_variance(found, torch.tensor([0.3], dtype=torch.float64))
        assert between.item() == pytest.approx(learned.item(), rel=1e-6)


def test_interpolated_variance_goes_from_small_to_large() -> None:
    exact = posterior(LDMLinear(), torch.tensor([0.5, 1.0]), torch.tensor([0.499, 0.9]))
    output = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).expand(2, 3)
    middle = (exact.small * exact.large).sqrt()
    torch.testing.assert_close(
        learned_log_variance(exact, output).exp(), torch.stack([exact.small, middle, exact.large], 1)
    )


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_learned_variance_is_the_bound_in_bits(path: Discrete) -> None:
    n = torch.tensor([1, 2, 3, 500, 999, 1000])
    x0, estimate = torch.randn(2, 6, 2, 4, 4, dtype=torch.float64)
    output = torch.rand(6, 2, 4, 4, dtype=torch.float64) * 2 - 1
    found = LearnedVariance(path, V(), vlb_weight=0.25).bound(x0, estimate, output, (n / 1000).float())
    bar = torch.cat([torch.ones(1, dtype=torch.float64), path.alphas_cumprod])
    beta = (1 - bar[n] / bar[n - 1])[:, None, None, None]
    before, after = ((1 - bar[k])[:, None, None, None] for k in (n - 1, n))
    small = before / after * beta
    small[0] = (1 - bar[1]) / (1 - bar[2]) * (1 - bar[2] / bar[1])  # β̃ of n = 1 is 0, that of n = 2 stands in
    z = torch.randn_like(x0)
    true, guess = (
        (1 - before).sqrt() * beta / after * x + (1 - beta).sqrt() * before / after * z for x in (x0, estimate)
    )
    std = ((output + 1) / 4 * beta.log() + (1 - output) / 4 * small.log()).exp()
    bound = kl_divergence(Normal(true, small.sqrt()), Normal(guess, std))
    bound[0] = -Normal(estimate[0], std[0]).log_prob(x0[0])
    torch.testing.assert_close(found, 0.25 * 1000 * bound.flatten(1).mean(1) / math.log(2), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_the_bound_is_zero_for_the_true_step(path: Discrete) -> None:
    n = torch.arange(2, 1001)
    x0 = torch.randn(999, 4, dtype=torch.float64)
    bound = LearnedVariance(path, V(), vlb_weight=1.0).bound(x0, x0, torch.full_like(x0, -1), n / 1000)
    torch.testing.assert_close(bound, torch.zeros_like(bound), atol=1e-9, rtol=0)
    worse = LearnedVariance(path, V(), vlb_weight=1.0).bound(x0, x0, torch.full_like(x0, -0.5), n / 1000)
    assert bool((worse > 0).all())


@pytest.mark.parametrize("target", [Epsilon(), X0(), V()], ids=name)
def test_hybrid_loss_adds_the_bound_and_holds_the_mean(target: Target) -> None:
    path = DDPMLinear()
    objective = LearnedVariance(path, target)
    x0, noise = torch.randn(2, 4, 3, 2, 2)
    t = torch.tensor([0.001, 0.01, 0.5, 0.9])
    output = torch.randn(4, 6, 2, 2, requires_grad=True)
    y, v = output.chunk(2, 1)
    both = objective.loss(lambda *_: output, x0, noise, t, None)
    simple = Objective(path, target).loss(lambda *_: y, x0, noise, t, None)
    a, b = (expand_as(c, x0) for c in path(t))
    estimate, _ = solve(path, target, a * x0 + b * noise, y, t)
    bound = objective.bound(x0, estimate, v, t)
    torch.testing.assert_close(both, simple + bound.float())
    (of_both,) = torch.autograd.grad(both.sum(), output, retain_graph=True)
    (of_simple,) = torch.autograd.grad(simple.sum(), output, retain_graph=True)
    (of_bound,) = torch.autograd.grad(bound.sum(), output)
    torch.testing.assert_close(of_both[:, :3], of_simple[:, :3])
    assert bool((of_bound[:, :3] == 0).all())
    assert bool((of_both[:2, 3:] != 0).all())  # near the noise β̃ is as good as β


def test_denoise_returns_the_learned_variance() -> None:
    z, output = torch.randn(4, 3, 2, 2), torch.randn(4, 6, 2, 2)
    t = torch.tensor(0.5)
    estimate = LearnedVariance(LDMLinear(), Epsilon()).denoise(lambda *_: output, z, t, None)
    assert torch.equal(estimate.variance, output[:, 3:])
    torch.testing.assert_close(estimate.noise, output[:, :3])
    torch.testing.assert_close(estimate[:2], solve(LDMLinear(), Epsilon(), z, output[:, :3], t))
