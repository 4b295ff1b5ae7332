"""Few steps: densities, penalties, average velocities and networks told more than t, against mathematics."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import AutoModel, SD3Transformer2DModel
from torch import Tensor, nn

from flow.density import Steps, UShaped, stratified
from flow.grid import trailing
from flow.guidance import ClassifierFree, Weak
from flow.meanflow import MeanFlow, TwoTimes, average_velocity
from flow.objective import Estimate, Objective
from flow.path import EDM, Cosine, DDPMLinear, RectifiedFlow, expand_as
from flow.path import Path as Line
from flow.penalty import Penalty
from flow.sampler import euler, meanflow
from flow.target import X0, Epsilon, Target, V, Velocity, solve
from flow.weight import SechWeight
from mmdit import checkpoint
from mmdit.model import NUMBERS, Condition, MMDiT
from storage.weights import open_file, read_json, write_tensors

TOLD = [("two_times",), ("guidance_embeds",), ("two_times", "guidance_embeds")]


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(0)


def uniform(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# Densities.


@pytest.mark.parametrize("a", [0.1, 4.0, 12.0])
def test_u_shaped_is_its_pdf_and_symmetric(a: float) -> None:
    density, u = UShaped(a), uniform(200_000)
    share = torch.histogram(density(u), torch.linspace(0, 1, 41, dtype=torch.float64))[0] / len(u)
    fine = uniform(40 * 200)
    torch.testing.assert_close(share, density.pdf(fine).reshape(40, 200).mean(1) / 40, atol=2e-5, rtol=2e-3)
    torch.testing.assert_close(density(1 - u), 1 - density(u))
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(density.pdf(t), density.pdf(1 - t))
    named = torch.exp(a * t) + torch.exp(a * (1 - t))  # what it is in the paper, but for a factor
    torch.testing.assert_close(density.pdf(t) / named, (density.pdf(t) / named)[0].expand(21))
    assert density(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == pytest.approx([0, 1], abs=1e-12)
    assert density.pdf(t).argmin() == 10


def test_u_shaped_is_uniform_in_the_limit() -> None:
    u = uniform(100)
    torch.testing.assert_close(UShaped(1e-3)(u), u, atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 10])
def test_steps_are_a_sampler_s_times_alike(k: int, alpha: float) -> None:
    u = uniform(60 * k)
    grid = trailing(RectifiedFlow(), k, alpha)[:-1].flip(0)
    times, counts = Objective(density=Steps(k), shift=alpha).time(u, 64).unique(return_counts=True)
    torch.testing.assert_close(times, grid.float(), atol=0, rtol=1.2e-7)  # one bit of float32
    assert counts.tolist() == [60] * k
    if alpha == 1:
        assert torch.equal(Steps(k)(u).unique(), torch.arange(1, k + 1, dtype=torch.float64) / k)


def test_steps_end_at_the_noise_and_never_touch_the_data() -> None:
    ends = torch.tensor([0.0, 1 - 1e-12, 1.0], dtype=torch.float64)
    assert Steps(4)(ends).tolist() == [0.25, 1.0, 1.0]


def test_steps_have_probabilities_only_where_they_are() -> None:
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    probability = Steps(5).pdf(t)
    assert probability.sum().item() == pytest.approx(1)
    assert t[probability > 0].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert probability[probability > 0].tolist() == [0.2] * 5


@pytest.mark.parametrize(
    ("make", "bad", "said"),
    [(UShaped, 0.0, "a > 0"), (UShaped, -1.0, "a > 0"), (Steps, 0, "k >= 1"), (Steps, -2, "k >= 1")],
)
def test_impossible_densities_are_refused(make: type, bad: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(bad)


def test_a_map_in_k_steps_is_validated_at_its_own_times_and_all_else_at_any() -> None:
    t, of_three = uniform(8).float(), Objective(density=Steps(3), shift=2.0)
    grid = trailing(RectifiedFlow(), 3, 2.0)[:-1]
    torch.testing.assert_close(of_three.cell(t, 64).unique(), grid.flip(0).float())
    assert torch.equal(Objective(density=UShaped(), shift=2.0).cell(t, 64), t)


# Penalties.

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


# Average velocities of a Gaussian, which are known: its flow is affine.

MEAN, STD = 0.7, 0.3


def spread(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of z at t."""
    return (1 - t) * MEAN, (((1 - t) * STD) ** 2 + t**2).sqrt()


def flow_map(z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """z at t carried to s."""
    (m_t, std_t), (m_s, std_s) = (tuple(expand_as(x, z) for x in spread(some)) for some in (t, s))
    return m_s + std_s / std_t * (z - m_t)


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """E[ε − x0 | z], the flow map's derivative."""
    mean, std = (expand_as(x, z) for x in spread(t))
    time = expand_as(t, z)
    return -MEAN + (time - (1 - time) * STD**2) / std**2 * (z - mean)


def average(z: Tensor, t: Tensor, condition: None, end: Tensor) -> Tensor:
    """The average velocity from t to end: the chord, and the velocity itself where there is no interval."""
    apart = expand_as(t - end, z)
    chord = (z - flow_map(z, t, end)) / torch.where(apart > 0, apart, 1)
    return torch.where(apart > 0, chord, velocity(z, t))


def some_intervals(count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """(z, t, end), from tiny intervals to the whole, float64."""
    t = torch.cat([torch.ones(2, dtype=torch.float64), torch.rand(count - 2, dtype=torch.float64)])
    end = t * torch.rand(count, dtype=torch.float64)
    end[0], end[3] = 0, t[3] - 1e-4
    mean, std = spread(t)
    z = mean[:, None] + std[:, None] * torch.randn(count, 3, dtype=torch.float64)
    return z, t, end


def test_the_known_flow_is_that_of_its_velocity() -> None:
    z, t, _ = some_intervals()
    h = 1e-5
    moved = (flow_map(z, t, t + h) - flow_map(z, t, t - h)) / (2 * h)
    torch.testing.assert_close(velocity(z, t), moved, atol=1e-8, rtol=1e-7)


def test_the_average_velocity_satisfies_its_identity() -> None:
    z, t, end = some_intervals()
    target = average_velocity(average, z, t, end, velocity(z, t), None)
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
def test_another_average_does_not(wrong: TwoTimes) -> None:
    z, t, end = some_intervals()
    target = average_velocity(wrong, z, t, end, velocity(z, t), None)
    far = t - end > 0.3
    assert (target - wrong(z, t, None, end))[far].abs().mean() > 1e-2


def test_with_the_pair_s_own_velocity_the_target_is_right_in_the_mean() -> None:
    """Given z, which tells neither picture nor noise, so its product with anything of z has no mean: within 4.5σ."""
    count = 200_000
    x0 = MEAN + STD * torch.randn(count, 1, dtype=torch.float64)
    noise = torch.randn(count, 1, dtype=torch.float64)
    t, end = torch.full((count,), 0.8, dtype=torch.float64), torch.full((count,), 0.15, dtype=torch.float64)
    z = 0.2 * x0 + 0.8 * noise

    def deviations(u: TwoTimes) -> Tensor:
        off = average_velocity(u, z, t, end, noise - x0, None) - u(z, t, None, end)
        products = off * torch.cat([torch.ones_like(z), z, z**2, torch.sin(3 * z)], 1)
        return products.mean(0) / (products.std(0) / math.sqrt(count))

    assert deviations(average).abs().max() < 4.5
    assert deviations(lambda z, t, condition, end: velocity(z, t)).abs().max() > 50


def told(z: Tensor, t: Tensor, end: Tensor | None = None) -> Estimate:
    """The exact average velocity as a denoiser, and without an end the velocity."""
    y = velocity(z, t) if end is None else average(z, t, None, end)
    return Estimate(*solve(RectifiedFlow(), Velocity(), z, y, t))


@pytest.mark.parametrize("times", [[1, 0], [1, 0.83, 0], [1 - i / 10 for i in range(11)], [0.9, 0.2]], ids=len)
def test_the_sampler_of_average_velocities_is_exact_in_any_number_of_steps(times: list[float]) -> None:
    grid = torch.tensor(times, dtype=torch.float64)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = flow_map(z, grid[:1].expand(9), grid[-1:].expand(9))
    torch.testing.assert_close(meanflow(told, RectifiedFlow(), z, grid), exact, atol=1e-10, rtol=0)
    assert (euler(told, RectifiedFlow(), z, grid) - exact).abs().max() > 1e-2


def test_the_sampler_of_average_velocities_tells_both_times_and_reports_each_step() -> None:
    grid, seen, reports = torch.tensor([1.0, 0.6, 0.5, 0.0]), [], []

    def denoise(z: Tensor, t: Tensor, end: Tensor) -> Estimate:
        seen.append((t.tolist(), end.tolist()))
        return told(z, t, end)

    z = meanflow(denoise, RectifiedFlow(), torch.randn(2, 3), grid, lambda i, z, x0: reports.append((i, z)))
    t = grid.tolist()
    assert seen == [([t[i]] * 2, [t[i + 1]] * 2) for i in range(3)]
    assert [i for i, _ in reports] == [1, 2, 3]
    assert torch.equal(reports[-1][1], z)


@pytest.mark.parametrize("path", [Cosine(), EDM(), DDPMLinear()], ids=lambda path: type(path).__name__)
def test_the_sampler_of_average_velocities_walks_on_rectified_flow_alone(path: Line) -> None:
    with pytest.raises(ValueError, match="meanflow walks on rectified flow, and the path is " + type(path).__name__):
        meanflow(told, path, torch.zeros(1, 1), torch.tensor([1.0, 0.0]))


# Average velocities of networks.


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


def stirred(network: nn.Module, scale: float = 0.1) -> MMDiT:
    """With every weight random, so that nothing is hidden behind a zero gate."""
    draw = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=draw).to(parameter)
    return network.eval()


def plain(**changes: float | bool | tuple[int, ...]) -> MMDiT:
    sizes = {"in_channels": 3, "depth": 2, "width": 48, "heads": 3, "text_dim": 20, "pooled_dim": 10, "sample_size": 8}
    return MMDiT(**(sizes | {"pos_embed_max_size": 12} | changes))


def inputs(count: int = 4) -> tuple[Tensor, Tensor, Condition]:
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(count, 3, 8, 8, generator=draw)
    condition = Condition(torch.randn(count, 5, 20, generator=draw), torch.randn(count, 10, generator=draw))
    return z, torch.rand(count, generator=draw), condition


def rate(along: Callable[[float], Tensor], h: float) -> Tensor:
    """The derivative at 0 by central differences of order 6."""
    pairs = ((1, 45 / 60), (2, -9 / 60), (3, 1 / 60))
    return sum(share * (along(i * h) - along(-i * h)) for i, share in pairs) / h


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_the_derivative_along_the_path_is_that_of_finite_differences() -> None:
    network = Small()
    z, v, text = torch.randn(3, 16, 3, dtype=torch.float64)
    t = 0.2 + 0.8 * torch.rand(16, dtype=torch.float64)
    end = t * torch.rand(16, dtype=torch.float64)
    for condition in (None, Told(text)):
        found = (v - average_velocity(network, z, t, end, v, condition)) / (t - end)[:, None]
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
    found = (v - average_velocity(network, z, t, end, v, condition)) / (t - end)[:, None, None, None]

    monkeypatch.setattr("mmdit.model.timestep_features", features)
    moved = rate(lambda h: network(z + h * v, t + h, condition, end), 1e-5)
    assert max(map(relative, found, moved)) < 1e-4
    exact = (v - average_velocity(network, z, t, end, v, condition)) / (t - end)[:, None, None, None]
    assert max(map(relative, exact, moved)) < 1e-8
    for still in (lambda h: network(z + h * v, t, condition, end), lambda h: network(z, t + h, condition, end)):
        assert relative(found, rate(still, 1e-5)) > 1e-3  # both parts of the tangent count


def test_rows_without_an_interval_are_left_and_the_others_see_their_own_condition() -> None:
    network = Small()
    z, v, text = torch.randn(3, 6, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    end = torch.where(torch.arange(6) % 2 == 0, t, t / 3)
    before = v.clone()
    u = average_velocity(network, z, t, end, v, Told(text))
    assert torch.equal(u[::2], v[::2])
    assert torch.equal(v, before)
    for i in (1, 3, 5):
        alone = average_velocity(network, *(x[i : i + 1] for x in (z, t, end, v)), Told(text[i : i + 1]))
        torch.testing.assert_close(u[i : i + 1], alone)
        assert (u[i] - v[i]).abs().max() > 1e-3


def test_without_any_interval_it_is_the_velocity_though_one_picture_is_asked_of() -> None:
    """Processes that share a network's weights must all ask it, those too whose pictures have no interval."""
    asked = []

    def model(z: Tensor, t: Tensor, condition: None, end: Tensor) -> Tensor:
        asked.append(len(z))
        return z * t[:, None]

    v, t = torch.randn(3, 2), torch.rand(3)
    assert torch.equal(average_velocity(model, torch.randn(3, 2), t, t, v, None), v)
    assert asked == [1]


def test_no_gradient_flows_through_the_target() -> None:
    network, x0, noise = Small().float(), *torch.randn(2, 8, 3)
    t, end = torch.linspace(0.3, 0.9, 8), torch.linspace(0.0, 0.9, 8)
    target = average_velocity(network, x0, t, end, noise, None)
    assert not target.requires_grad
    assert torch.is_grad_enabled()
    Objective(average=MeanFlow()).loss(network, x0, noise, t, None, end).mean().backward()
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    z = expand_as(1 - t, x0) * x0 + expand_as(t, x0) * noise
    frozen = average_velocity(network, z, t, end, noise - x0, None)
    (network(z, t, None, end) - frozen).square().mean().backward()
    torch.testing.assert_close(found, [p.grad for p in network.parameters()])


# The objective.


@pytest.mark.parametrize(
    ("path", "target"), [(Cosine(), Velocity()), (DDPMLinear(), V()), (RectifiedFlow(), Epsilon()), (None, X0())]
)
def test_averages_are_of_velocities_on_rectified_flow(path: Line | None, target: Target) -> None:
    with pytest.raises(ValueError, match="average needs the path RectifiedFlow and the target Velocity"):
        Objective(path, target, average=MeanFlow())


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="0 < share <= 1"):
        MeanFlow(share)


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 1.0])
def test_a_share_of_the_times_begins_an_interval(share: float) -> None:
    count, draw = 1000, torch.Generator().manual_seed(0)
    u = torch.stack([stratified(count, draw) for _ in range(3)])
    objective = Objective(shift=2.0, average=MeanFlow(share))
    t, end = objective.times(u, 64)
    first, second = (objective.time(row, 64) for row in u[:2])
    assert (t.dtype, end.dtype, t.shape, end.shape) == (torch.float32, torch.float32, (count,), (count,))
    assert (end <= t).all()
    apart = u[2] < share
    assert abs(int(apart.sum()) - share * count) <= 1  # u is stratified
    assert torch.equal(t[~apart], first[~apart])
    assert torch.equal(end[~apart], first[~apart])
    assert (end < t)[apart].all()
    both = torch.stack([first, second]).sort(0).values
    assert torch.equal(torch.stack([end, t])[:, apart], both[:, apart])


def test_without_averages_times_are_what_they_were() -> None:
    u = torch.rand(3, 20, dtype=torch.float64)
    t, end = Objective(shift=2.0).times(u, 64)
    assert end is None
    assert torch.equal(t, Objective(shift=2.0).time(u[0], 64))


def linear(z: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
    """A model of one time, that may be told the other."""
    return 0.7 * z - expand_as(t, z)


@pytest.mark.parametrize("options", [{}, {"penalty": Penalty(0.5, 0.1)}, {"weight": SechWeight()}])
def test_an_interval_without_length_has_the_plain_loss(options: dict) -> None:
    x0, noise = torch.randn(2, 6, 3, 4, 4)
    t = torch.linspace(0.05, 0.95, 6)
    objective = Objective(average=MeanFlow(), **options)
    assert torch.equal(objective.loss(linear, x0, noise, t, None, t), objective.loss(linear, x0, noise, t, None))


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


def test_a_field_is_learned_in_the_place_of_the_pair() -> None:
    teacher, student = nn.Linear(3, 3), nn.Linear(3, 3)
    x0, noise = torch.randn(2, 6, 3)
    t, seen = torch.rand(6), []

    def field(z: Tensor, t: Tensor, condition: object, y: Tensor) -> Tensor:
        seen.append((z, t, condition, y))
        return teacher(z)

    def loss(network: nn.Module) -> Tensor:
        return Objective().loss(lambda z, t, condition: network(z), x0, noise, t, "told", field=field)

    assert torch.equal(loss(teacher), torch.zeros(6))
    assert (loss(student) > 1e-3).all()
    z, time, condition, y = seen[0]
    torch.testing.assert_close(z, (1 - t)[:, None] * x0 + t[:, None] * noise)
    assert (torch.equal(time, t), condition) == (True, "told")
    torch.testing.assert_close(y, noise - x0)
    loss(student).mean().backward()
    assert student.weight.grad.abs().max() > 0
    assert teacher.weight.grad is None
    found = student.weight.grad.clone()
    student.zero_grad()
    (student(z) - teacher(z).detach()).square().mean().backward()
    torch.testing.assert_close(found, student.weight.grad)


def test_a_field_s_average_is_learned_over_intervals() -> None:
    """Of the exact field, whose averages are known: their loss is nought but for float32, and the field's is not."""
    x0, noise = MEAN + STD * torch.randn(64, 3), torch.randn(64, 3)
    t = 0.4 + 0.6 * torch.rand(64)
    end = t * torch.rand(64) * 0.5
    objective = Objective(average=MeanFlow())
    field = lambda z, t, condition, y: velocity(z, t)  # noqa: E731
    assert objective.loss(average, x0, noise, t, None, end, field).max() < 1e-10
    other = objective.loss(lambda z, t, condition, end: velocity(z, t), x0, noise, t, None, end, field)
    assert other.mean() > 1e-2
    assert objective.loss(average, x0, noise, t, None, end).mean() > 1e-2  # a pair's own velocity is only so in mean


def test_the_denoiser_of_an_average_goes_straight_to_the_same_place() -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    t, end = torch.full((9,), 0.75, dtype=torch.float64), torch.full((9,), 0.125, dtype=torch.float64)
    x0, noise, variance = Objective().denoise(average, z, t, None, end)
    assert variance is None
    torch.testing.assert_close(0.875 * x0 + 0.125 * noise, flow_map(z, t, end), atol=1e-6, rtol=0)
    torch.testing.assert_close(0.25 * x0 + 0.75 * noise, z)


# Guidance.


class Text(NamedTuple):
    text: Tensor


class Watched:
    """A model whose calls are kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, ...]] = []

    def __call__(self, z: Tensor, t: Tensor, condition: Text, *end: Tensor) -> Tensor:
        self.calls.append((t, *end))
        y = torch.tanh(z * expand_as(condition.text, z)) + expand_as(t, z)
        return y - expand_as(end[0], z) ** 2 if end else y


def test_a_scale_for_each_picture_is_a_call_for_each() -> None:
    model, null, z, t = Watched(), Text(torch.tensor([0.3])), torch.randn(4, 3, 4, 4), torch.rand(4)
    condition, scales = Text(torch.linspace(1, 3, 4)), [0.0, 1.0, 2.5, 7.0]
    for options in ({}, {"rescale": 0.7}, {"channels": 2}):
        together = ClassifierFree(model, null, torch.tensor(scales)[:, None, None, None], **options)(z, t, condition)
        for i, scale in enumerate(scales):
            alone = ClassifierFree(model, null, scale, **options)(z, t, condition)
            torch.testing.assert_close(together[i], alone[i])
    assert (together[3] - together[2]).abs().max() > 0.1


def test_guidance_hands_the_end_to_every_branch() -> None:
    null, condition = Text(torch.tensor([0.3])), Text(torch.linspace(1, 3, 4))
    z, t = torch.randn(4, 3, 4, 4), torch.linspace(0.5, 0.8, 4)
    end, model, weak = t / 3, Watched(), Watched()
    guided = ClassifierFree(model, null, 3.0, weak=Weak(weak, 0.5))(z, t, condition, end)
    assert [[x.tolist() for x in call] for call in model.calls] == [[[*x.tolist()] * 2 for x in (t, end)]]
    assert [[x.tolist() for x in call] for call in weak.calls] == [[t.tolist(), end.tolist()]]
    no, yes = (Watched()(z, t, some, end) for some in (Text(null.text.expand(4)), condition))
    torch.testing.assert_close(guided, no + 3 * (yes - no))  # the weak model is the same one

    outside = Watched()
    unguided = ClassifierFree(outside, null, 3.0, interval=(0.9, 1.0))(z, t, condition, end)
    assert torch.equal(unguided, yes)
    assert [[x.tolist() for x in call] for call in outside.calls] == [[t.tolist(), end.tolist()]]
    without = Watched()
    ClassifierFree(without, null, 3.0)(z, t, condition)
    assert [len(call) for call in without.calls] == [1]


# The network.


def fully_told(network: MMDiT, t: Tensor, condition: Condition) -> tuple[Condition, Tensor | None]:
    if network.guidance_embeds:
        condition = condition._replace(guidance=torch.linspace(1, 7, len(t)))
    return condition, t / 3 if network.two_times else None


@torch.no_grad()
@pytest.mark.parametrize("numbers", TOLD, ids="+".join)
def test_a_network_that_is_told_more_is_at_first_the_same(numbers: tuple[str, ...], tmp_path: Path) -> None:
    network = stirred(plain())
    z, t, condition = inputs()
    before = network(z, t, condition)
    checkpoint.save(network, tmp_path)
    loaded = checkpoint.load(tmp_path, **dict.fromkeys(numbers, True))
    for number in numbers:
        network.add(number)
    for some in (network, loaded):
        assert [number for number in NUMBERS if getattr(some, number)] == list(numbers)
        more, end = fully_told(some, t, condition)
        assert torch.equal(some(z, t, more, end), before)
    half = checkpoint.load(tmp_path, "bfloat16", **dict.fromkeys(numbers, True))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_adding_again_changes_nothing() -> None:
    network = stirred(plain(two_times=True, guidance_embeds=True))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for number in NUMBERS:
        network.add(number)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_a_learned_embedding_makes_the_output_depend_on_it() -> None:
    z, t, condition = inputs()
    network = stirred(plain())
    network.add("two_times")
    network.span.fc2.weight.normal_(std=0.1)
    out = network(z, t, condition)
    assert torch.equal(network(z, t, condition, t), out)  # none is t itself
    ends = [network(z, t, condition, share * t) for share in (0.0, 0.5, 0.9)]
    assert all(relative(end, out) > 1e-3 for end in ends)
    assert relative(ends[0], ends[1]) > 1e-3

    network = stirred(plain())
    network.add("guidance_embeds")
    network.guidance.fc2.weight.normal_(std=0.1)
    outs = [network(z, t, condition._replace(guidance=torch.full((4,), scale))) for scale in (1.0, 1.2, 4.0, 7.0)]
    assert all(relative(a, b) > 1e-3 for a, b in pairwise(outs))
    mixed = network(z, t, condition._replace(guidance=torch.tensor([1.0, 4.0, 7.0, 1.0])))
    picked = torch.stack([outs[0][0], outs[2][1], outs[3][2], outs[0][3]])
    assert relative(mixed, picked) < 1e-5


def test_a_network_that_is_told_too_much_or_too_little_refuses() -> None:
    z, t, condition = inputs()
    scaled = condition._replace(guidance=torch.full((4,), 4.0))
    for network, told_it, end, said in (
        (plain(), condition, t, "has one time and was given two: it needs two_times"),
        (plain(guidance_embeds=True), scaled, t, "has one time and was given two: it needs two_times"),
        (plain(guidance_embeds=True), condition, None, "learned guidance and needs its scale"),
        (plain(), scaled, None, "no guidance_embeds for a scale"),
        (plain(two_times=True), scaled, t, "no guidance_embeds for a scale"),
    ):
        with pytest.raises(ValueError, match=said) as refusal:
            network(z, t, told_it, end)
        assert "\n" not in str(refusal.value)


@torch.no_grad()
@pytest.mark.parametrize("numbers", [(), *TOLD], ids=lambda numbers: "+".join(numbers) or "plain")
def test_what_a_network_is_told_comes_back_from_a_folder_and_a_single_file(
    numbers: tuple[str, ...], tmp_path: Path
) -> None:
    network = stirred(plain(dual_attention_layers=(1,), **dict.fromkeys(numbers, True)))
    z, t, condition = inputs()
    condition, end = fully_told(network, t, condition)
    checkpoint.save(network, tmp_path / "folder")
    write_tensors(checkpoint.single_file(network), tmp_path / "one.safetensors")
    naming, arguments = checkpoint.infer(open_file(tmp_path / "one.safetensors").under(checkpoint.PREFIX))
    assert naming == "original"
    assert [number for number in NUMBERS if arguments[number]] == list(numbers)
    for place in ("folder", "one.safetensors"):
        back = checkpoint.load(tmp_path / place)
        assert [number for number in NUMBERS if getattr(back, number)] == list(numbers)
        state = network.state_dict()
        assert back.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
        if place == "folder":  # the other does not tell the size of the training pictures, only the table
            assert torch.equal(back(z, t, condition, end), network(z, t, condition, end))
        again = checkpoint.load(tmp_path / place, two_times=True, guidance_embeds=True)  # what is there stays
        for name, tensor in back.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)


def test_only_a_plain_network_goes_by_diffusers_name(tmp_path: Path) -> None:
    checkpoint.save(plain(), tmp_path / "plain")
    assert read_json(tmp_path / "plain" / "config.json")["_class_name"] == "SD3Transformer2DModel"
    assert not {"time_scale", *NUMBERS} & read_json(tmp_path / "plain" / "config.json").keys()
    assert isinstance(AutoModel.from_pretrained(str(tmp_path / "plain")), SD3Transformer2DModel)
    for numbers in TOLD:
        folder = tmp_path / "+".join(numbers)
        checkpoint.save(plain(**dict.fromkeys(numbers, True)), folder)
        config = read_json(folder / "config.json")
        assert config["_class_name"] == "MMDiT"
        assert dict.fromkeys(numbers, True) == {n: config[n] for n in NUMBERS if n in config}
        with pytest.raises(ValueError, match="MMDiT"):
            AutoModel.from_pretrained(str(folder))


@torch.no_grad()
def test_the_time_scale_is_a_factor_on_t_and_comes_back(tmp_path: Path) -> None:
    z, t, condition = inputs()
    slow, fast = (stirred(plain(two_times=True, time_scale=scale)) for scale in (10.0, 1000.0))
    fast.load_state_dict(slow.state_dict())
    assert relative(slow(z, t, condition, t / 3), fast(z, t, condition, t / 3)) > 1e-3
    span = 2 / 3 * t  # is told on a scale of its own
    assert relative(slow(z, t, condition, t - span), fast(z, t / 100, condition, t / 100 - span)) < 1e-4
    checkpoint.save(slow, tmp_path)
    assert read_json(tmp_path / "config.json")["_class_name"] == "MMDiT"
    back = checkpoint.load(tmp_path)
    assert torch.equal(back(z, t, condition, t / 3), slow(z, t, condition, t / 3))
    with pytest.raises(ValueError, match="cannot tell the time_scale 10: write a folder"):
        checkpoint.single_file(slow)
    with pytest.raises(ValueError, match="time_scale must be > 0, got 0"):
        plain(time_scale=0)


def test_weights_without_what_the_config_tells_are_refused(tmp_path: Path) -> None:
    checkpoint.save(plain(two_times=True), tmp_path / "two")
    checkpoint.save(plain(), tmp_path / "one")
    for config, weights, said in (("two", "one", "span_embedder"), ("one", "two", "span_embedder")):
        folder = tmp_path / f"{config}-{weights}"
        folder.mkdir()
        (folder / "config.json").write_bytes((tmp_path / config / "config.json").read_bytes())
        file = f"{checkpoint.STEM}.safetensors"
        (folder / file).write_bytes((tmp_path / weights / file).read_bytes())
        with pytest.raises(ValueError, match=said) as refusal:
            checkpoint.load(folder)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("numbers", TOLD, ids="+".join)
def test_every_parameter_learns_after_the_first_steps(numbers: tuple[str, ...]) -> None:
    network = plain(**dict.fromkeys(numbers, True))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    z, t, condition = inputs()
    condition, end = fully_told(network, t, condition)
    objective = Objective(average=MeanFlow() if network.two_times else None)
    for _ in range(5):  # zero output, gates and the last layer of what is told hold the gradient back for a step each
        optimizer.zero_grad()
        objective.loss(network, z, z.flip(0), t, condition, end).mean().backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
