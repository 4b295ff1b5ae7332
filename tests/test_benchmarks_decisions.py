"""What noised latents decide: the probability of the true alternative, and models that finish scenes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from benchmarks import decisions
from data import shapes
from pipeline import Pipeline


@pytest.mark.parametrize(("length", "t"), [(1.0, 0.5), (3.0, 0.6), (4.0, 0.9)])
def test_of_two_alternatives_the_log_odds_are_normal(length: float, t: float) -> None:
    """With s = (1 − t)·‖x − x'‖/t they are N(s²/2, s²), and the mean probability is that of their sigmoid."""
    latents = torch.zeros(2, 4, 8, 8)
    latents[1] = length / 16  # 256 numbers
    s = (1 - t) * length / t
    expected, _ = integrate.quad(lambda x: stats.norm.pdf(x) / (1 + np.exp(-(s**2 / 2 + s * x))), -10, 10)
    draw = torch.Generator().manual_seed(0)
    found = np.mean([decisions.certainty(latents, 0, t, draw) for _ in range(400)])
    assert found == pytest.approx(expected, abs=0.01)


def test_alternatives_differ_in_one_thing_and_hold_the_true_one() -> None:
    one = shapes.Placed("cross", "pink", 12, 8, 40)
    for kind, count in (("colour", 8), ("shape", 4), ("place", 12 * 12)):
        others = decisions.ALTERNATIVES[kind](one)
        assert len(set(others)) == len(others) == count
        assert one in others
        assert all(
            sum(a != b for a, b in zip(one, other, strict=True)) <= (2 if kind == "place" else 1) for other in others
        )


def test_models_start_at_later_and_later_times_up_to_noise(drawer: Path) -> None:
    """From noise alone a random network draws nothing right."""
    rows = decisions.finished(Pipeline.load(drawer), 20)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert rows[-1] == ["1.00", "0%"]
