"""Weights of the loss: what a formulation implies, and the factors of the papers."""

import pytest
import torch
from processes import CONTINUOUS, PAIRS, PATHS, PRESERVING, TIMES, name
from torch import Tensor
from torch.distributions import Normal

from flow.objective import Objective
from flow.path import EDM, Cosine, Discrete, Path, RectifiedFlow
from flow.target import X0, Epsilon, Preconditioned, Target, V, Velocity
from flow.weight import P2, EDMWeight, ExponentialWeight, LogSNRWeight, MinSNR, SechWeight, Weight, implied_weight


def snr(path: Path, t: Tensor) -> Tensor:
    a, b = path(t)
    return (a / b) ** 2


def log_snr(path: Path, t: Tensor) -> Tensor:
    return snr(path, t).log()


def constant(values: Tensor) -> bool:
    return bool((values / values.mean() - 1).abs().max() < 1e-9)


def test_implied_weights_of_the_paper() -> None:
    t = TIMES
    torch.testing.assert_close(implied_weight(RectifiedFlow(), Velocity(), t), t / (1 - t))
    cosine = log_snr(Cosine(), t)
    assert constant(implied_weight(Cosine(), V(), t) / torch.exp(-cosine / 2))
    assert constant(implied_weight(Cosine(), Epsilon(), t) * torch.cosh(cosine / 2))


@pytest.mark.parametrize("path", [p for p in CONTINUOUS if isinstance(p, EDM)], ids=name)
def test_implied_weight_of_edm(path: EDM) -> None:
    value = log_snr(path, TIMES)
    mean, std = (torch.tensor(2 * c, dtype=torch.float64) for c in (-path.mean, path.std))
    normal = Normal(mean, std).log_prob(value).exp()
    implied = implied_weight(path, Preconditioned(path.sigma_data), TIMES)
    assert constant(implied / (normal * (torch.exp(-value) + path.sigma_data**2)))


@pytest.mark.parametrize(
    ("weight", "path", "target"),
    [
        (ExponentialWeight(), RectifiedFlow(), Velocity()),
        (ExponentialWeight(), Cosine(), V()),
        (ExponentialWeight(), Cosine(), Velocity()),
        (SechWeight(), Cosine(), Epsilon()),
        (EDMWeight(), EDM(), Preconditioned()),
        (EDMWeight(0.3, 0.7, 1.5), EDM(0.3, 0.7, 1.5), Preconditioned(1.5)),
    ],
    ids=name,
)
def test_a_formulation_needs_no_factor_for_the_weight_it_implies(weight: Weight, path: Path, target: Target) -> None:
    assert constant(weight(path, target, TIMES))
    assert not constant(weight(path, X0(), TIMES))


def test_exponential_weight_of_rectified_flow_is_one() -> None:
    factor = ExponentialWeight()(RectifiedFlow(), Velocity(), TIMES)
    torch.testing.assert_close(factor, torch.ones_like(TIMES))


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("weight", [MinSNR(), MinSNR(1.0), P2(), P2(0.5, 2.0), ExponentialWeight(), SechWeight(),
                                    EDMWeight()], ids=name)  # fmt: skip
def test_a_weighted_loss_is_the_same_whatever_the_target(weight: Weight, path: Path) -> None:
    if isinstance(weight, LogSNRWeight) and isinstance(path, Discrete):
        with pytest.raises(ValueError, match="discrete"):
            weight(path, V(), TIMES)
        with pytest.raises(ValueError, match="discrete"):  # and so does an objective, before any training
            Objective(path, V(), weight=weight)
        return
    x0, noise, error = torch.randn(3, 49, dtype=torch.float64)
    a, b = path(TIMES)
    guess = (a * x0 + b * noise - b * (noise + error)) / a  # of x0, by whoever takes noise + error for the noise
    losses = []
    for target in (target for p, target in PAIRS if p is path):
        p, q = target.row(path, TIMES)
        loss = (p * (guess - x0) + q * error).square()
        losses.append(weight(path, target, TIMES) * loss)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_of_the_paper(path: Path, gamma: float) -> None:
    ratio = snr(path, TIMES)
    assert (ratio.min() < gamma) & (ratio.max() > gamma)
    least = ratio.clamp(max=gamma)
    torch.testing.assert_close(MinSNR(gamma)(path, X0(), TIMES), least)
    torch.testing.assert_close(MinSNR(gamma)(path, Epsilon(), TIMES), least / ratio)
    if path in PRESERVING:
        torch.testing.assert_close(MinSNR(gamma)(path, V(), TIMES), least / (ratio + 1))


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize(("k", "gamma"), [(1.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_p2_of_the_paper(path: Path, k: float, gamma: float) -> None:
    ratio = snr(path, TIMES)
    factor = (k + ratio) ** -gamma
    torch.testing.assert_close(P2(k, gamma)(path, Epsilon(), TIMES), factor)
    torch.testing.assert_close(P2(k, gamma)(path, X0(), TIMES), factor * ratio)
    if path in PRESERVING:
        torch.testing.assert_close(P2(k, gamma)(path, V(), TIMES), factor * ratio / (ratio + 1))


def test_weight_multiplies_the_loss() -> None:
    x0, noise = torch.randn(2, 5, 1, 4, 4)
    t = torch.linspace(0.1, 0.9, 5)
    plain, weighted = (
        Objective(Cosine(), V(), weight=weight).loss(lambda z, t, c: z, x0, noise, t, None)
        for weight in (None, MinSNR())
    )
    torch.testing.assert_close(weighted, MinSNR()(Cosine(), V(), t) * plain)
