"""Paths: coefficients, their derivatives, ends and inverses."""

import math
from functools import partial

import pytest
import torch
from processes import CONTINUOUS, ENDS, PATHS, PRESERVING, TIMES, name
from torch.distributions import Normal

from flow.path import EDM, DDPMLinear, Discrete, Path, VariancePreserving
from flow.target import Epsilon, Preconditioned
from flow.variance import LearnedVariance
from flow.weight import P2, EDMWeight, MinSNR


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_rate_is_the_derivative(path: Path) -> None:
    for i in range(2):
        _, derivative = torch.func.jvp(lambda t, i=i: path(t)[i], (TIMES,), (torch.ones_like(TIMES),))
        torch.testing.assert_close(path.rate(TIMES)[i], derivative)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_ends_are_data_and_noise(path: Path) -> None:
    a, b = path(ENDS)
    assert a[0] == pytest.approx(1 / path.sigma_data if isinstance(path, EDM) else 1)
    assert b[0] == 0
    last = path.alphas_cumprod[-1].item() if isinstance(path, Discrete) else 0.0
    if isinstance(path, VariancePreserving):
        last = math.exp(-10.05)  # the mean of β from 0.1 to 20
        assert b[1] == pytest.approx(1 - last if path.sub else math.sqrt(1 - last))
        assert a[1] ** 2 == pytest.approx(last)
    else:
        assert (a[1] ** 2, b[1] ** 2) == pytest.approx((last, 1 - last), abs=1e-15)


def test_vp_is_the_continuous_cousin_of_ddpm_s_chain() -> None:
    """Its integral of β is nearly the chain's sum of −ln(1 − β_n), with β of a thousandth for each step."""
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    for found, expected in zip(VariancePreserving()(t), DDPMLinear()(t), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=2e-3)
    finer = 1 - torch.linspace(0.1, 20, 50_000, dtype=torch.float64) / 50_000
    for found, expected in zip(VariancePreserving()(t), Discrete(torch.cumprod(finer, 0))(t), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    a, b = VariancePreserving()(t)
    torch.testing.assert_close(VariancePreserving(sub=True)(t), (a, b**2))


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_noise_takes_over_from_picture(path: Path) -> None:
    a, b = path(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert bool(((b / (a + b)).diff() > 0).all())


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_coefficients_keep_the_shape_and_type_of_t(path: Path) -> None:
    for t in (torch.rand(2, 3), torch.rand(4).double(), torch.tensor(0.5)):
        assert [(c.shape, c.dtype) for c in path(t)] == [(t.shape, t.dtype)] * 2
        torch.testing.assert_close(path(t), tuple(c.to(t) for c in path(path.snap(t.double()))), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("path", PRESERVING, ids=name)
def test_variance_preserving_paths_preserve_it(path: Path) -> None:
    a, b = path(torch.linspace(0, 1, 1001, dtype=torch.float64))
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(a))


@pytest.mark.parametrize("path", [p for p in CONTINUOUS if isinstance(p, EDM)], ids=name)
def test_edm_is_a_log_normal_sigma_seen_through_c_in(path: EDM) -> None:
    a, b = path(TIMES)
    sigma = Normal(0.0, 1.0).icdf(TIMES).mul(path.std).add(path.mean).exp()
    torch.testing.assert_close(b / a, sigma)
    torch.testing.assert_close(a, 1 / (sigma**2 + path.sigma_data**2).sqrt())


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_time_inverts_the_share_of_noise(path: Path) -> None:
    last, noise = path(ENDS[1])
    ends = torch.stack([ENDS[0], noise / (last + noise)])
    tau = torch.cat([ends, torch.tensor([1e-6, 0.001, 0.3, 0.5, 0.9, 0.98], dtype=torch.float64)])
    a, b = path(path.time(tau))
    torch.testing.assert_close(b / (a + b), tau, atol=0, rtol=1e-8)
    a, b = path(TIMES)
    torch.testing.assert_close(path.time(b / (a + b)), TIMES)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_snap_goes_to_the_nearest_time(path: Path) -> None:
    t = torch.tensor([0.0, 0.0004, 0.0006, 0.12349, 0.12351, 1.0], dtype=torch.float64)
    if isinstance(path, Discrete):
        expected = torch.tensor([0, 0, 0.001, 0.123, 0.124, 1], dtype=torch.float64)
        torch.testing.assert_close(path.snap(t), expected)
        torch.testing.assert_close(path(path.snap(t)), path(t))
    else:
        assert torch.equal(path.snap(t), t)
        assert torch.equal(path.training_time(t), t)


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (EDM, {"std": 0.0}),
        (VariancePreserving, {"first": 0.0}),
        (VariancePreserving, {"first": 2.0, "last": 1.0}),
        (EDM, {"sigma_data": -1.0}),
        (Preconditioned, {"sigma_data": 0.0}),
        (partial(LearnedVariance, DDPMLinear(), Epsilon()), {"vlb_weight": 0.0}),
        (MinSNR, {"gamma": 0.0}),
        (P2, {"k": 0.0}),
        (P2, {"gamma": -1.0}),
        (EDMWeight, {"std": 0.0}),
        (EDMWeight, {"sigma_data": 0.0}),
    ],
)
def test_impossible_parameters_are_refused(make: type, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"needs .* got"):
        make(**bad)
