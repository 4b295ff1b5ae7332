"""Likelihoods against closed forms: of Gaussians and mixtures, of correlated data, and of chains."""

import math

import pytest
import torch
from gaussians import GAUSSIAN, TWO, Mixture
from networks import inputs, plain, stirred
from processes import CONTINUOUS, ENDS, name
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from flow.likelihood import (
    bits_per_dimension,
    continuous_bound,
    discretised,
    exact_trace,
    hutchinson,
    log_likelihood,
    variational_bound,
)
from flow.objective import Estimate, Objective
from flow.path import EDM, Cosine, DDPMLinear, Discrete, ImprovedCosine, Path, RectifiedFlow, expand_as
from flow.reference import solutions
from flow.sampler import Denoiser
from flow.target import X0, Epsilon, Target, V, Velocity
from flow.variance import LearnedVariance, posterior

LEVELS = torch.linspace(-1, 1, 17, dtype=torch.float64)[:, None]
WIDTH = 1 / 8


def log_density(data: Mixture, x: Tensor, a: float | Tensor = 1.0, b: float | Tensor = 0.0) -> Tensor:
    """ln p of a·x0 + b·ε."""
    each = data.share.log() + Normal(a * data.mean, ((a * data.std) ** 2 + b**2) ** 0.5).log_prob(x)
    return torch.logsumexp(each, 1)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_the_likelihood_is_the_closed_form_s(data: Mixture, path: Path) -> None:
    x = torch.linspace(-1.5, 2, 15, dtype=torch.float64)[:, None]
    found = log_likelihood(data.denoiser(path), path, x, tolerance=1e-7)
    start, end = ENDS
    (a_0, _), (a, b) = path(start), path(end)
    z = data.flow(path, a_0 * x, start, end)
    mistaken = Normal(0.0, (a**2 + b**2).sqrt()).log_prob(z)[:, 0] - log_density(data, z, a, b)  # 0 where a = 0
    narrow = isinstance(path, EDM) and path.std < 1  # no t in float64 has more noise than σ = 138
    torch.testing.assert_close(found, log_density(data, x) + mistaken, rtol=0, atol=2e-3 if narrow else 2e-5)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_the_continuous_bound_of_an_exact_denoiser_is_the_likelihood(data: Mixture, path: Path) -> None:
    """Picture by picture, in the mean over the noise."""
    x, draws = torch.tensor([-0.5, 0.4, 0.7, 1.5], dtype=torch.float64), 4000
    repeated = x.repeat_interleave(draws)[:, None]
    found = continuous_bound(data.denoiser(path), path, repeated, lambda: torch.randn_like(repeated)).view(4, draws)
    error = found.std(1) / draws**0.5
    assert ((found.mean(1) + log_density(data, x[:, None])).abs() < 4 * error + 2e-3).all()
    assert error.max() < 0.03


def test_the_continuous_bound_of_another_denoiser_lies_above() -> None:
    path, x = Cosine(), 0.7 + 0.3 * torch.randn(20_000, 1, dtype=torch.float64)
    exact, wrong = (
        continuous_bound(data.denoiser(path), path, x, lambda: torch.randn_like(x)) for data in (GAUSSIAN, TWO)
    )
    entropy = -log_density(GAUSSIAN, x).mean()
    assert exact.mean().item() == pytest.approx(entropy.item(), abs=0.03)
    gap = (-log_density(TWO, x)).mean() - entropy  # the divergence of the data from what the model believes
    assert wrong.mean() - exact.mean() == pytest.approx(gap.item(), abs=0.06)


def test_the_continuous_bound_is_that_of_a_chain_of_many_steps() -> None:
    """The same noise levels, in a chain of 4,000 steps: but for the last term the sums agree."""
    gammas = torch.linspace(-9.2, 9.2, 4001, dtype=torch.float64)[1:]
    path, x = Discrete(torch.sigmoid(-gammas)), 0.7 + 0.3 * torch.randn(500, 1, dtype=torch.float64)
    normal = lambda: torch.randn_like(x)  # noqa: E731
    _, steps, _ = variational_bound(TWO.denoiser(path), path, x, normal, WIDTH, (-1.0, 1.0))
    whole = continuous_bound(TWO.denoiser(Cosine()), Cosine(), x, normal, points=4000)
    ends = (math.log(2 * math.pi * math.e) - 9.2) / 2
    assert (whole - ends).mean().item() == pytest.approx(steps.mean().item(), abs=0.02)


@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine()], ids=name)
def test_it_integrates_to_one(path: Path) -> None:
    x = torch.linspace(-3, 4, 701, dtype=torch.float64)[:, None]
    mass = log_likelihood(TWO.denoiser(path), path, x).exp().sum() * (x[1, 0] - x[0, 0])
    assert mass.item() == pytest.approx(1, abs=1e-4)


def correlated(path: Path) -> tuple[MultivariateNormal, Denoiser]:
    """Three correlated numbers, whose field has a Jacobian that is not diagonal, and their denoiser."""
    root = torch.tensor([[0.8, 0.0, 0.0], [0.5, 0.4, 0.0], [-0.6, 0.3, 0.5]], dtype=torch.float64)
    mean, covariance = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64), root @ root.T

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        a, b = path(t)
        gain = torch.linalg.solve(a**2 * covariance + b**2 * torch.eye(3).double(), (z - a * mean).T).T
        return Estimate(mean + a * gain @ covariance, b * gain)

    return MultivariateNormal(mean, covariance), denoise


def test_an_estimated_divergence_is_right_in_the_mean_and_only_there() -> None:
    path, count = RectifiedFlow(), 2000
    data, denoise = correlated(path)
    x = torch.tensor([[0.5, 0.1, -0.4]], dtype=torch.float64)
    truth = data.log_prob(x).item()
    assert log_likelihood(denoise, path, x, tolerance=1e-7).item() == pytest.approx(truth, abs=2e-5)
    probe = torch.randint(2, (count, 3), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    found = log_likelihood(denoise, path, x.expand(count, 3), probe)
    assert found.std() > 0.1
    assert found.mean().item() == pytest.approx(truth, abs=3 * found.std().item() / math.sqrt(count))


def test_traces_of_a_network_are_those_of_its_jacobian() -> None:
    network = stirred(plain(in_channels=1, patch_size=1, sample_size=4, pos_embed_max_size=4))
    _, t, condition = inputs()
    z = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))

    def field(z: Tensor) -> Tensor:
        return network(z.view(4, 1, 4, 4), t, condition).flatten(1)

    jacobian = torch.autograd.functional.jacobian(lambda z: field(z).sum(0), z)  # pictures do not mix
    expected = torch.einsum("ibi->b", jacobian)
    v, found = exact_trace(field, z)
    torch.testing.assert_close(v, field(z))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    probe = torch.randint(2, z.shape, generator=torch.Generator().manual_seed(3)).float() * 2 - 1
    estimate = torch.einsum("bi,ibj,bj->b", probe, jacobian, probe)
    torch.testing.assert_close(hutchinson(probe)(field, z)[1], estimate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("path", "target"), [(RectifiedFlow(), Velocity()), (Cosine(), V())])
def test_a_model_that_knows_the_data_has_their_likelihood(path: Path, target: Target) -> None:
    """Through an objective, as a network's: z and t in float32."""
    objective, denoise = Objective(path, target), TWO.denoiser(path)

    def model(z: Tensor, t: Tensor, condition: None) -> Tensor:
        x0, noise, _ = denoise(z.double(), t.double())
        p, q = (expand_as(c, z) for c in target.row(path, t))
        return (p * x0 + q * noise).float()

    x = torch.linspace(-1.5, 2, 15, dtype=torch.float64)[:, None]
    found = log_likelihood(lambda z, t: objective.denoise(model, z, t, None), path, x)
    torch.testing.assert_close(found, log_density(TWO, x), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("target", "end"), [(Epsilon(), "at t = 1"), (X0(), "at t = 0")])
def test_a_target_that_does_not_determine_the_ends_is_refused(target: Target, end: str) -> None:
    objective = Objective(RectifiedFlow(), target)
    with pytest.raises(ValueError, match=f"not give a finite picture and noise {end}"):
        log_likelihood(lambda z, t: objective.denoise(lambda z, t, c: 0.5 * z, z, t, None), objective.path, LEVELS)


def test_a_chain_has_no_integral() -> None:
    with pytest.raises(ValueError, match="DDPMLinear is a chain: take variational_bound"):
        continuous_bound(GAUSSIAN.denoiser(DDPMLinear()), DDPMLinear(), LEVELS, lambda: LEVELS)


def test_a_chain_has_no_flow_and_a_flow_no_bound() -> None:
    with pytest.raises(ValueError, match="DDPMLinear is discrete"):
        log_likelihood(GAUSSIAN.denoiser(DDPMLinear()), DDPMLinear(), LEVELS)
    with pytest.raises(ValueError, match="RectifiedFlow is continuous"):
        variational_bound(GAUSSIAN.denoiser(RectifiedFlow()), RectifiedFlow(), LEVELS, lambda: LEVELS, 0.1, (-1, 1))


def test_not_a_number_ends_the_solver() -> None:
    def slope(tau: float, w: Tensor) -> Tensor:
        return w if tau < 1 else w * math.nan

    with pytest.raises(ValueError, match="cannot keep tolerance"):
        list(solutions(slope, torch.ones(1, 1, dtype=torch.float64), (0.0, 1.0), 1e-3))


@pytest.mark.parametrize("learned", [False, True])
def test_a_bound_can_be_computed_on_a_device(learned: bool) -> None:
    """All that is as large as a picture is there."""
    x = torch.empty(2, 1, 4, 4, device="meta")
    found = variational_bound(
        lambda z, t: Estimate(0.5 * z, z, 0.1 * z if learned else None), SHORT, x, lambda: x, WIDTH, (-1.0, 1.0)
    )
    assert found.is_meta


# Levels


def test_uniform_levels_cost_their_logarithm() -> None:
    """17 levels in [−1, 1], dequantised over [−17/16, 17/16]."""
    density = torch.full((3,), -64 * math.log(17 / 8))
    found = bits_per_dimension(density, 64, WIDTH)
    torch.testing.assert_close(found, torch.full((3,), math.log2(17)))


def test_levels_have_the_mass_of_the_normal_around_them() -> None:
    mean, log_variance = torch.full_like(LEVELS, 0.3), torch.full_like(LEVELS, math.log(0.04))
    found = discretised(LEVELS, mean, log_variance, WIDTH, -1.0, 1.0).exp()
    below = Normal(0.3, 0.2).cdf((LEVELS[1:] + LEVELS[:-1])[:, 0] / 2)
    expected = torch.cat([below, torch.ones(1)]) - torch.cat([torch.zeros(1), below])
    torch.testing.assert_close(found, expected.double(), atol=1e-9, rtol=1e-6)


def test_levels_far_from_the_mean_are_unlikely_and_not_impossible() -> None:
    """Forty deviations away; the density there, times the width of a level, is nearly the mass."""
    narrow = torch.full_like(LEVELS, 2 * math.log(1 / 40))
    far = LEVELS[[1, -2]]  # on both sides
    found = discretised(far, 0 * far, narrow[:2], 1e-4, -1.0, 1.0)
    expected = Normal(0.0, 1 / 40).log_prob(far.float()).double() + math.log(1e-4)
    torch.testing.assert_close(found, expected[:, 0], rtol=1e-4, atol=0)
    assert discretised(LEVELS[:1], -LEVELS[:1], narrow[:1], WIDTH, -1.0, 1.0).isfinite().all()


# The bound of a chain

SHORT = Discrete(torch.cumprod(1 - torch.linspace(0.02, 0.4, 12, dtype=torch.float64), 0))


def noise_of(x: Tensor, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=draw, dtype=torch.float64) for _ in range(1000)]


def test_its_terms_are_the_divergences_of_torch() -> None:
    x = LEVELS[::4]
    drawn = noise_of(x)

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        return Estimate(0.4 * z, z)

    prior, middle, last = variational_bound(denoise, SHORT, x, iter(drawn).__next__, WIDTH, (-1.0, 1.0))
    a, b = (c.item() for c in SHORT(torch.tensor(1.0, dtype=torch.float64)))
    torch.testing.assert_close(prior, kl_divergence(Normal(a * x, b), Normal(0 * x, 1.0)).sum(1))
    total = torch.zeros(len(x), dtype=torch.float64)
    for k, n in enumerate(range(12, 1, -1)):
        t, s = (torch.tensor(i / 12, dtype=torch.float64) for i in (n, n - 1))
        (a, b), exact = SHORT(t), posterior(SHORT, t, s)
        z = a * x + b * drawn[k]
        along = SHORT(s)[0] * 0 + (SHORT(s)[1] ** 2 - exact.small).sqrt()
        means = [SHORT(s)[0] * x0 + along * (z - a * x0) / b for x0 in (x, 0.4 * z)]
        deviation = exact.small.sqrt()
        total += kl_divergence(*(Normal(mean, deviation) for mean in means)).sum(1)
    torch.testing.assert_close(middle, total)
    a, b = SHORT(torch.tensor(1 / 12, dtype=torch.float64))
    second = posterior(SHORT, *(torch.tensor(i / 12, dtype=torch.float64) for i in (2, 1))).small
    mean = 0.4 * (a * x + b * drawn[11])
    torch.testing.assert_close(last, -discretised(x, mean, second.log().expand_as(x), WIDTH, -1.0, 1.0))


def test_a_learned_variance_s_terms_are_those_that_it_was_trained_with() -> None:
    """But for the first step, which has a density in training."""
    objective, x = LearnedVariance(ImprovedCosine(), Epsilon(), vlb_weight=1.0), LEVELS[:, None, None]
    drawn = noise_of(x)
    model = lambda z, t, condition: torch.cat([0.9 * z, 0.3 * z], 1)  # noqa: E731
    middle = variational_bound(
        lambda z, t: objective.denoise(model, z, t, None), objective.path, x, iter(drawn).__next__, WIDTH, (-1.0, 1.0)
    )[1]
    total = torch.zeros(len(x), dtype=torch.float64)
    for k, n in enumerate(range(1000, 1, -1)):
        t = torch.full((len(x),), n / 1000, dtype=torch.float64)
        a, b = (expand_as(c, x) for c in objective.path(t))
        z = a * x + b * drawn[k]
        estimate = objective.denoise(model, z, t[0], None)
        assert estimate.variance is not None
        term = objective.bound(x, estimate.x0, estimate.variance, t)
        total += term * math.log(2) / 1000
    torch.testing.assert_close(middle, total, rtol=1e-4, atol=1e-6)


def test_the_bound_lies_above_the_code_of_the_data_and_near_it_for_many_steps() -> None:
    """Levels of a normal distribution: no code is shorter than their entropy, and the best denoiser comes near."""
    share = Normal(0.0, 0.35).log_prob(LEVELS[:, 0]).exp()
    share = share / share.sum()
    entropy = -(share * share.log()).sum().item()
    x = LEVELS.expand(17, 400)
    gaps = []
    for path in (SHORT, DDPMLinear()):

        def denoise(z: Tensor, t: Tensor, path: Path = path) -> Estimate:
            a, b = path(t)
            weight = torch.softmax(share.log() - (z[..., None] - a * LEVELS[:, 0]).square() / (2 * b**2), -1)
            x0 = weight @ LEVELS[:, 0]
            return Estimate(x0, (z - a * x0) / b)

        parts = variational_bound(denoise, path, x, iter(noise_of(x)).__next__, WIDTH, (-1.0, 1.0))
        gaps.append((share * parts.sum(0) / 400).sum().item() - entropy)
    assert gaps[0] > 2 * gaps[1] > 0
    assert gaps[1] < 0.3  # falls like 1/T
