"""The shift of times toward noise, for one size of pictures and growing with their area."""

import pytest
import torch

from flow.density import Uniform, shift
from flow.grid import trailing
from flow.objective import Objective
from flow.path import RectifiedFlow


def test_shift_moves_mass_to_the_noise_and_keeps_the_ends() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift(t, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    torch.testing.assert_close(shift(shift(t, 2.0), 3.0), shift(t, 6.0))  # so a second application shows
    assert torch.equal(shift(t, 1.0), t)


def test_shift_enters_training_and_grid_once_and_equally() -> None:
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    times = Objective(density=Uniform(), shift=3.0).training_time(u, 64)
    torch.testing.assert_close(times.flip(0), trailing(RectifiedFlow(), 8, 3.0).float())


def test_shift_grows_with_the_root_of_the_area() -> None:
    """Esser et al. 2024, eq. 23: α = √(m / n), so four times the pixels double it."""
    objective = Objective(density=Uniform(), shift=3.0, shift_area=128 * 128)
    assert [objective.alpha(side * side) for side in (64, 128, 256)] == pytest.approx([1.5, 3.0, 6.0])
    assert objective.alpha(64 * 256) == pytest.approx(3.0)
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    for area in (64 * 64, 128 * 128, 96 * 160):
        alpha = 3.0 * (area / 128**2) ** 0.5
        torch.testing.assert_close(
            objective.training_time(u, area).flip(0), trailing(RectifiedFlow(), 8, alpha).float()
        )


def test_without_an_area_one_shift_is_for_all() -> None:
    objective = Objective(shift=3.0)
    u = torch.rand(100, dtype=torch.float64)
    assert {objective.alpha(area) for area in (1, 64, 2**20)} == {3.0}
    assert torch.equal(objective.training_time(u, 1), objective.training_time(u, 2**20))
    assert torch.equal(objective.training_time(u, 64), Objective(shift=3.0, shift_area=64).training_time(u, 64))
    for wrong in ({"shift": 0.0}, {"shift_area": 0}, {"shift_area": -4}):
        with pytest.raises(ValueError, match="must be > 0"):
            Objective(**wrong)
