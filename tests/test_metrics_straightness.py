"""How straight a walk is: lines, a quarter of a circle, and walks that are none."""

import numpy as np
import pytest
import torch
from measured import normal
from torch import Tensor

from metrics.straightness import path_length, straightness


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_straightness_of_a_straight_line_is_zero(n: int):
    """At constant speed in τ, whatever the steps, up or down."""
    start, way = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    tau = torch.rand(n + 1, generator=torch.Generator().manual_seed(n)).sort().values
    for times in (tau, tau.flip(0)):
        walk = [start + t * way for t in times.double()]
        torch.testing.assert_close(straightness(walk, times), torch.zeros(3).double(), atol=1e-12, rtol=0)
        expected = (times[-1] - times[0]).abs().double() * way.flatten(1).norm(dim=1)
        torch.testing.assert_close(path_length(walk), expected)


def test_a_straight_line_at_a_changing_speed_is_not_straight_in_tau():
    """w = τ² v has the length |v| of its chord, but S = ∫ (2τ − 1)² dτ |v|² = |v|² / 3."""
    way, tau = normal(3, 5), torch.linspace(0, 1, 1001).double()
    walk = [t**2 * way for t in tau]
    torch.testing.assert_close(path_length(walk), way.norm(dim=1))
    torch.testing.assert_close(straightness(walk, tau), way.norm(dim=1) ** 2 / 3, rtol=1e-5, atol=0)


def test_quarter_circle():
    """n chords of a quarter: 2n sin(π/4n) long → π/2, and S = 4n² sin²(π/4n) − 2 → π²/4 − 2."""

    def walk(n: int) -> tuple[list[Tensor], Tensor]:
        tau = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        angle = tau * torch.pi / 2
        return list(torch.stack([angle.cos(), angle.sin()], dim=1)[:, None]), tau

    for n in (1, 2, 5, 40):
        w, tau = walk(n)
        length = 2 * n * np.sin(np.pi / (4 * n))
        assert path_length(w).item() == pytest.approx(length, rel=1e-12)
        assert straightness(w, tau).item() == pytest.approx(length**2 - 2, abs=1e-12)
        assert straightness(w[::-1], tau.flip(0)).item() == pytest.approx(length**2 - 2, abs=1e-12)
    w, tau = walk(1000)
    assert path_length(w).item() == pytest.approx(np.pi / 2, rel=1e-6)
    assert straightness(w, tau).item() == pytest.approx(np.pi**2 / 4 - 2, rel=1e-5)


@pytest.mark.parametrize("tau", [[0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.5, 0.5]])
def test_walks_without_proper_times_are_refused(tau: list[float]):
    with pytest.raises(ValueError, match="τ"):
        straightness([torch.zeros(1, 2)] * 3, torch.tensor(tau))


def test_a_walk_of_one_state_is_refused():
    with pytest.raises(ValueError, match="two states"):
        path_length([torch.zeros(1, 2)])
