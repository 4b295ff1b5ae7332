"""Densities of training times, and stratified draws from them."""

import math

import pytest
import torch
from processes import name

from flow.density import CosMap, Density, LogitNormal, Mode, Uniform, shift, stratified

DENSITIES = [Uniform(), LogitNormal(0, 1), LogitNormal(0.5, 0.6), Mode(1.29), Mode(-0.5), CosMap()]


@pytest.mark.parametrize("density", DENSITIES, ids=name)
def test_density_maps_uniform_numbers_to_its_pdf(density: Density) -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    edges = torch.linspace(0, 1, 41, dtype=torch.float64)
    share = torch.histogram(density(u), edges)[0] / len(u)
    fine = (torch.arange(40 * 200, dtype=torch.float64) + 0.5) / (40 * 200)
    expected = density.pdf(fine).reshape(40, 200).mean(1) / 40
    torch.testing.assert_close(share, expected, atol=2e-5, rtol=2e-3)


def test_density_values_of_the_paper() -> None:
    half = torch.tensor([0.5], dtype=torch.float64)
    assert Mode(1.29).pdf(half).item() == pytest.approx(1 / (1 - 1.29 * (math.pi / 2 - 1)))
    assert CosMap().pdf(half).item() == pytest.approx(4 / math.pi)
    assert LogitNormal(0, 1).pdf(half).item() == pytest.approx(4 / math.sqrt(2 * math.pi))
    assert LogitNormal(1, 0.6)(half).item() > 0.5  # a positive mean moves mass toward the noise


@pytest.mark.parametrize(("make", "bad"), [(Mode, 2.0), (Mode, -1.1), (lambda s: LogitNormal(0, s), 0.0)])
def test_impossible_densities_are_refused(make: type, bad: float) -> None:
    with pytest.raises(ValueError, match="needs"):
        make(bad)


def test_stratified_has_one_number_in_each_cell_and_replays() -> None:
    u = stratified(64, torch.Generator().manual_seed(1))
    assert (u * 64).floor().sort().values.tolist() == list(range(64))
    assert not torch.equal(u, u.sort().values)
    assert torch.equal(u, stratified(64, torch.Generator().manual_seed(1)))


def test_stratified_lowers_the_variance_of_a_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    t = LogitNormal()
    plain = torch.stack([t(torch.rand(16, dtype=torch.float64, generator=draw)).mean() for _ in range(500)])
    strata = torch.stack([t(stratified(16, draw)).mean() for _ in range(500)])
    assert strata.var() < 0.05 * plain.var()
    assert abs(strata.mean().item() - 0.5) < 0.002


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shift_keeps_both_ends_and_stays_between_them(dtype: torch.dtype) -> None:
    """A start that rounding moves beyond 1 or just below it has a picture of a negative or of a tiny share."""
    t = torch.cat([torch.linspace(0, 1, 101, dtype=dtype), torch.tensor([1 - torch.finfo(dtype).eps], dtype=dtype)])
    for alpha in [*(n / 100 for n in range(1, 100)), 1.0, 3.0, 1e6]:
        moved = shift(t, alpha)
        assert (moved[0], moved[100]) == (0, 1)
        assert moved.max() == 1
    assert torch.equal(shift(t, 1.0), t)
