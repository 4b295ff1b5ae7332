"""Average velocities: their identity on known flows, and derivatives of networks along the path."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gaussians import MEAN, STD, average, flow_map, some_intervals, velocity
from networks import inputs, plain, relative, stirred
from torch import Tensor, nn

from flow.meanflow import MeanFlow, average_after_step, average_velocity
from flow.objective import Interval, Model
from flow.path import expand_as


def test_the_known_flow_is_that_of_its_velocity() -> None:
    z, t, _ = some_intervals()
    h = 1e-5
    moved = (flow_map(z, t, t + h) - flow_map(z, t, t - h)) / (2 * h)
    torch.testing.assert_close(velocity(z, t), moved, atol=1e-8, rtol=1e-7)


def test_the_average_velocity_satisfies_its_identity() -> None:
    z, t, end = some_intervals()
    target = average_velocity(average, z, t, Interval.between(end, t), velocity(z, t), None)
    torch.testing.assert_close(target, average(z, t, None, end), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda z, t, condition, end: velocity(z, t),
        lambda z, t, condition, end: average(z, t, condition, end) + 0.1 * (t - end)[:, None] * z,
        lambda z, t, condition, end: average(z, t, condition, end / 2),
    ],
    ids=["velocity", "off", "beyond the end"],
)
def test_a_wrong_average_velocity_violates_the_identity(wrong: Model) -> None:
    z, t, end = some_intervals()
    target = average_velocity(wrong, z, t, Interval.between(end, t), velocity(z, t), None)
    far = t - end > 0.3
    assert (target - wrong(z, t, None, end))[far].abs().mean() > 1e-2


def test_with_the_pair_s_own_velocity_the_target_is_right_in_the_mean() -> None:
    """Given z, which tells neither picture nor noise, so its product with anything of z has no mean: within 4.5σ."""
    count = 200_000
    x0 = MEAN + STD * torch.randn(count, 1, dtype=torch.float64)
    noise = torch.randn(count, 1, dtype=torch.float64)
    t, end = torch.full((count,), 0.8, dtype=torch.float64), torch.full((count,), 0.15, dtype=torch.float64)
    z = 0.2 * x0 + 0.8 * noise

    def deviations(u: Model) -> Tensor:
        off = average_velocity(u, z, t, Interval.between(end, t), noise - x0, None) - u(z, t, None, end)
        products = off * torch.cat([torch.ones_like(z), z, z**2, torch.sin(3 * z)], 1)
        return products.mean(0) / (products.std(0) / math.sqrt(count))

    assert deviations(average).abs().max() < 4.5
    assert deviations(lambda z, t, condition, end: velocity(z, t)).abs().max() > 50


def after(model: Callable[..., Tensor], z: Tensor, t: Tensor, end: Tensor, v: Tensor, step: float) -> Tensor:
    """The target of a finite step along the model's own velocity."""
    later = average_after_step(model, z, t, Interval.between(end, t), None, step)
    return v - (1 - step) / step * (model(z, t, None, end) - later)


def test_a_finite_step_finds_the_average_but_for_its_straightness() -> None:
    """Its error falls with the step, as that of Euler's method does."""
    z, t, end = some_intervals()
    exact = average(z, t, None, end)
    errors = [(after(average, z, t, end, velocity(z, t), step) - exact).abs() for step in (0.2, 0.02, 0.002)]
    assert [float(error.max()) for error in errors] == pytest.approx([0.15, 0.013, 0.0013], rel=0.3)
    short = t - end < 1e-3
    assert errors[0][short].max() < 1e-3


@pytest.mark.parametrize("step", [0.5, 0.1])
def test_a_finite_step_along_straight_paths_is_exact(step: float) -> None:
    z, t, end = some_intervals()
    speed = torch.randn(3, dtype=torch.float64)

    def straight(z: Tensor, t: Tensor, condition: None, end: Tensor) -> Tensor:
        return speed + torch.zeros_like(z)

    torch.testing.assert_close(after(straight, z, t, end, straight(z, t, None, t), step), speed.expand_as(z))


def test_in_the_limit_a_finite_step_is_the_derivative_along_the_network_s_velocity() -> None:
    network = Small()
    z, v = torch.randn(2, 16, 3, dtype=torch.float64)
    t = 0.2 + 0.8 * torch.rand(16, dtype=torch.float64)
    end = t * torch.rand(16, dtype=torch.float64)
    interval = Interval.between(end, t)
    with torch.no_grad():
        own = network(z, t, None, t)
        expected = v + average_velocity(network, z, t, interval, own, None) - own
        assert relative(after(network, z, t, end, v, 1e-5), expected) < 1e-4
        assert relative(after(network, z, t, end, v, 0.5), expected) > 1e-3


class Told(NamedTuple):
    text: Tensor
    mask: Tensor | None = None


class Small(nn.Module):
    """A smooth network of everything that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 3)).double()

    def forward(self, z: Tensor, t: Tensor, condition: Told | None, end: Tensor) -> Tensor:
        given = torch.zeros_like(z) if condition is None else condition.text
        return self.net(torch.cat([z, t[:, None], end[:, None], given], 1))


def rate(along: Callable[[float], Tensor], h: float) -> Tensor:
    """The derivative at 0 by central differences of order 6."""
    pairs = ((1, 45 / 60), (2, -9 / 60), (3, 1 / 60))
    return sum(share * (along(i * h) - along(-i * h)) for i, share in pairs) / h


@torch.no_grad()
def test_the_derivative_along_the_path_is_that_of_finite_differences() -> None:
    network = Small()
    z, v, text = torch.randn(3, 16, 3, dtype=torch.float64)
    t = 0.2 + 0.8 * torch.rand(16, dtype=torch.float64)
    end = t * torch.rand(16, dtype=torch.float64)
    for condition in (None, Told(text)):
        found = (v - average_velocity(network, z, t, Interval.between(end, t), v, condition)) / (t - end)[:, None]
        moved = rate(lambda h, c=condition: network(z + h * v, t + h, c, end), 1e-3)
        assert relative(found, moved) < 1e-9


def features(t: Tensor, dim: int, scale: float) -> Tensor:
    """The network's features of a number, in float64."""
    angle = scale * t[:, None] * torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, dtype=torch.float64))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"time_scale": 10.0}, {"qk_norm": False, "dual_attention_layers": (0,), "guidance_embeds": True}],
    ids=["plain", "slow time", "other parts"],
)
def test_the_derivative_of_the_transformer_is_that_of_finite_differences(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The differences are of features in float64: in the network's float32 they would measure how t is rounded."""
    network = stirred(plain(two_times=True, **options).double())
    z, _, condition = inputs()
    z, v = z.double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    if network.guidance_embeds:
        condition = condition._replace(guidance=torch.tensor([1.0, 2.5, 4.0, 7.0]))
    condition = condition._replace(mask=torch.arange(5) < torch.tensor([3, 5, 1, 4])[:, None])
    t, end = torch.tensor([[0.97, 0.71, 0.3, 0.05], [0, 0.4, 0.29, 0.01]], dtype=torch.float64)
    found = (v - average_velocity(network, z, t, Interval.between(end, t), v, condition)) / (t - end)[
        :, None, None, None
    ]

    monkeypatch.setattr("mmdit.model.timestep_features", features)
    moved = rate(lambda h: network(z + h * v, t + h, condition, end), 1e-5)
    assert max(map(relative, found, moved)) < 1e-4
    exact = (v - average_velocity(network, z, t, Interval.between(end, t), v, condition)) / (t - end)[
        :, None, None, None
    ]
    assert max(map(relative, exact, moved)) < 1e-8
    for still in (lambda h: network(z + h * v, t, condition, end), lambda h: network(z, t + h, condition, end)):
        assert relative(found, rate(still, 1e-5)) > 1e-3  # both parts of the tangent count


def test_rows_without_an_interval_are_left_and_the_others_see_their_own_condition() -> None:
    network = Small()
    z, v, text = torch.randn(3, 6, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    end = torch.where(torch.arange(6) % 2 == 0, t, t / 3)
    before = v.clone()
    u = average_velocity(network, z, t, Interval.between(end, t), v, Told(text))
    assert torch.equal(u[::2], v[::2])
    assert torch.equal(v, before)
    for i in (1, 3, 5):
        one_z, one_t, one_end, one_v = (x[i : i + 1] for x in (z, t, end, v))
        alone = average_velocity(network, one_z, one_t, Interval.between(one_end, one_t), one_v, Told(text[i : i + 1]))
        torch.testing.assert_close(u[i : i + 1], alone)
        assert (u[i] - v[i]).abs().max() > 1e-3


def test_without_any_interval_it_is_the_velocity_though_one_picture_is_asked_of() -> None:
    """Processes that share a network's weights must all ask it, those too whose pictures have no interval."""
    asked = []

    def model(z: Tensor, t: Tensor, condition: None, end: Tensor) -> Tensor:
        asked.append(len(z))
        return z * t[:, None]

    v, t = torch.randn(3, 2), torch.rand(3)
    assert torch.equal(average_velocity(model, torch.randn(3, 2), t, Interval.between(t, t), v, None), v)
    assert asked == [1]


def test_no_gradient_flows_through_the_target() -> None:
    network, x0, noise = Small().float(), *torch.randn(2, 8, 3)
    t, end = torch.linspace(0.3, 0.9, 8), torch.linspace(0.0, 0.9, 8)
    target = average_velocity(network, x0, t, Interval.between(end, t), noise, None)
    assert not target.requires_grad
    assert torch.is_grad_enabled()
    MeanFlow().loss(network, x0, noise, t, None, Interval.between(end, t)).mean().backward()
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    z = expand_as(1 - t, x0) * x0 + expand_as(t, x0) * noise
    frozen = average_velocity(network, z, t, Interval.between(end, t), noise - x0, None)
    (network(z, t, None, end) - frozen).square().mean().backward()
    torch.testing.assert_close(found, [p.grad for p in network.parameters()])
