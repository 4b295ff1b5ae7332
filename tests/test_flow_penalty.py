"""Penalties of a picture's mean square: their values, gradients and limits, and their place in the loss."""

import math

import pytest
import torch
from networks import linear

from flow.objective import Objective
from flow.path import RectifiedFlow
from flow.penalty import Penalty
from flow.target import Velocity
from flow.weight import SechWeight

SQUARES = torch.tensor([0.0, 1e-9, 1e-6, 1e-4, 0.03, 1.0, 20.0], dtype=torch.float64)
SOME = torch.full_like(SQUARES, 0.4)


def test_the_penalty_of_power_0_is_the_mean_square() -> None:
    torch.testing.assert_close(Penalty(0, 0.1)(SQUARES, SOME), SQUARES)


@pytest.mark.parametrize("c", [1e-3, 0.05, 1.0])
def test_the_penalty_of_power_half_is_twice_the_pseudo_huber(c: float) -> None:
    huber = (SQUARES + c**2).sqrt() - c
    torch.testing.assert_close(Penalty(0.5, c)(SQUARES, SOME), 2 * huber)


@pytest.mark.parametrize("c", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 0.75, 0.999, 1.0])
def test_the_penalty_s_gradient_is_that_of_a_weighted_mean_square(power: float, c: float) -> None:
    m = SQUARES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Penalty(power, c)(m, SOME).sum(), m)
    weight = (m + c**2).detach() ** -power  # stop-gradient, as MeanFlow writes it
    (expected,) = torch.autograd.grad((weight * m).sum(), m)
    torch.testing.assert_close(gradient, expected, atol=0, rtol=1e-10)
    assert Penalty(power, c)(SQUARES, SOME)[0] == 0


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
def test_c_falls_from_one_at_the_data_to_c_at_the_noise_with_decay(power: float, decay: bool) -> None:
    c = 0.02
    for t, then in ((0.0, 1.0), (0.5, math.sqrt(c)), (1.0, c)):
        expected = Penalty(power, then if decay else c)(SQUARES, SOME)
        torch.testing.assert_close(Penalty(power, c, decay)(SQUARES, torch.full_like(SQUARES, t)), expected)


@pytest.mark.parametrize("c", [1e-3, 0.5])
def test_the_powers_join_at_one(c: float) -> None:
    limit = Penalty(1, c)(SQUARES, SOME)
    away = [(Penalty(1 - d, c)(SQUARES, SOME) - limit).abs().max().item() for d in (1e-3, 1e-4, 1e-5)]
    assert away[0] < 0.2
    assert away[1] < 0.11 * away[0]  # as the distance of the powers
    assert away[2] < 0.11 * away[1]


@pytest.mark.parametrize(("power", "c"), [(-0.1, 0.1), (1.1, 0.1), (0.5, 0.0), (0.5, -1.0), (0.5, 1.5)])
def test_impossible_penalties_are_refused(power: float, c: float) -> None:
    with pytest.raises(ValueError, match="Penalty needs 0 <= power <= 1 and 0 < c <= 1"):
        Penalty(power, c)


@pytest.mark.parametrize("decay", [False, True])
def test_the_loss_is_the_penalty_of_each_picture_s_mean_square_then_weighted(decay: bool) -> None:
    x0, noise, t = *torch.randn(2, 6, 3, 4, 4), torch.linspace(0.05, 0.95, 6)
    penalty = Penalty(0.75, 0.03, decay)
    square = Objective().loss(linear, x0, noise, t, None)
    torch.testing.assert_close(Objective(penalty=penalty).loss(linear, x0, noise, t, None), penalty(square, t))
    weight = SechWeight()
    factor = weight(RectifiedFlow(), Velocity(), t)
    found = Objective(penalty=penalty, weight=weight).loss(linear, x0, noise, t, None)
    torch.testing.assert_close(found, factor * penalty(square, t))
