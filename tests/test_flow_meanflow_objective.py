"""The objective of average velocities: its intervals, its loss and its denoiser."""

from inspect import signature

import pytest
import torch
from gaussians import average, flow_map
from networks import linear

from flow.density import stratified
from flow.meanflow import MeanFlow
from flow.objective import Interval, Objective
from flow.path import RectifiedFlow
from flow.penalty import Penalty
from flow.target import Velocity
from flow.weight import SechWeight


def test_averages_are_of_velocities_on_rectified_flow() -> None:
    objective = MeanFlow()
    assert (type(objective.path), type(objective.target)) == (RectifiedFlow, Velocity)
    assert not {"path", "target"} & signature(MeanFlow).parameters.keys()  # there is nothing else to choose


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="0 < share <= 1"):
        MeanFlow(share=share)


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 1.0])
def test_a_share_of_the_times_begins_an_interval(share: float) -> None:
    count, draw = 1000, torch.Generator().manual_seed(0)
    u = torch.stack([stratified(count, draw) for _ in range(3)])
    objective = MeanFlow(shift=2.0, share=share)
    t, (end, rows) = objective.times(u, 64)
    first, second = (objective.training_time(row, 64) for row in u[:2])
    assert (t.dtype, end.dtype, t.shape, end.shape) == (torch.float32, torch.float32, (count,), (count,))
    assert (end <= t).all()
    apart = u[2] < share
    assert torch.equal(rows, apart.nonzero()[:, 0])
    assert abs(int(apart.sum()) - share * count) <= 1  # u is stratified
    assert torch.equal(t[~apart], first[~apart])
    assert torch.equal(end[~apart], first[~apart])
    assert (end < t)[apart].all()
    both = torch.stack([first, second]).sort(0).values
    assert torch.equal(torch.stack([end, t])[:, apart], both[:, apart])


def test_without_averages_times_are_what_they_were() -> None:
    u = torch.rand(3, 20, dtype=torch.float64)
    t, interval = Objective(shift=2.0).times(u, 64)
    assert interval is None
    assert torch.equal(t, Objective(shift=2.0).training_time(u[0], 64))


@pytest.mark.parametrize("options", [{}, {"penalty": Penalty(0.5, 0.1)}, {"weight": SechWeight()}])
def test_an_interval_without_length_has_the_plain_loss(options: dict) -> None:
    x0, noise = torch.randn(2, 6, 3, 4, 4)
    t = torch.linspace(0.05, 0.95, 6)
    objective = MeanFlow(**options)
    nowhere = Interval.between(t, t)
    assert torch.equal(objective.loss(linear, x0, noise, t, None, nowhere), objective.loss(linear, x0, noise, t, None))


def test_the_denoiser_of_an_average_goes_straight_to_the_same_place() -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    t, end = torch.tensor([0.75, 0.125], dtype=torch.float64)
    x0, noise, variance = Objective().denoise(average, z, t, None, end)
    assert variance is None
    torch.testing.assert_close(0.875 * x0 + 0.125 * noise, flow_map(z, t, end), atol=1e-6, rtol=0)
    torch.testing.assert_close(0.25 * x0 + 0.75 * noise, z)
