"""The objective of average velocities: its intervals, its loss and its denoiser."""

from inspect import signature

import pytest
import torch
from gaussians import average, flow_map
from networks import linear
from torch import Tensor, nn

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


@pytest.mark.parametrize("step", [-0.1, 1.0])
def test_impossible_steps_are_refused(step: float) -> None:
    with pytest.raises(ValueError, match="0 <= step < 1"):
        MeanFlow(step=step)


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


class Curved(nn.Module):
    """u = a·z·(t + 2·end)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7))
        self.seen = 0

    def forward(self, z: Tensor, t: Tensor, condition: None, end: Tensor) -> Tensor:
        self.seen += len(z)
        return self.a * z * (t + 2 * end)[:, None]


def test_the_loss_with_a_finite_step_and_its_gradient() -> None:
    """Only the average over the interval learns. Pictures without an interval learn the pair's velocity."""
    x0, noise = torch.randn(2, 4, 5)
    t, end = torch.tensor([0.9, 0.6, 0.5, 0.8]), torch.tensor([0.1, 0.6, 0.4, 0.0])
    network, step = Curved(), 0.25
    loss = MeanFlow(step=step).loss(network, x0, noise, t, None, Interval.between(end, t))
    loss.sum().backward()
    a, (x, e, s, r) = 0.7, (c[:, None] for c in (t, end, t - step * (t - end), t))
    z, v = (1 - x) * x0 + x * noise, noise - x0
    found = a * z * (x + 2 * e)
    moved = z - (r - s) * a * z * 3 * x
    target = v - (1 - step) / step * (found - a * moved * (s + 2 * e))
    target[1] = v[1]
    torch.testing.assert_close(loss, (found - target).square().mean(1))
    assert network.a.grad is not None
    expected = (2 * (found - target) * found / a).mean(1).sum()
    torch.testing.assert_close(network.a.grad, expected)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_finite_step_costs_two_passes_of_the_share(share: float) -> None:
    objective, network = MeanFlow(share=share, step=0.1), Curved()
    x0, noise = torch.randn(2, 64, 5)
    t, interval = objective.times(torch.stack([stratified(64, torch.Generator().manual_seed(i)) for i in range(3)]), 64)
    objective.loss(network, x0, noise, t, None, interval)
    assert network.seen == 64 * (1 + objective.extra_passes)


@pytest.mark.parametrize("options", [{}, {"step": 0.1}, {"penalty": Penalty(0.5, 0.1)}, {"weight": SechWeight()}])
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
