"""The process: derivatives, solves, densities, loss, guidance and sampler, against mathematics."""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flow.density import CosMap, Density, LogitNormal, Mode, Uniform, shift, stratified
from flow.guidance import ClassifierFree
from flow.objective import DensityWeight, Objective, TimeBins
from flow.path import Path, RectifiedFlow, expand_as
from flow.sampler import euler, linear_grid
from flow.target import X0, Epsilon, Target, V, Velocity, solve

TARGETS = [Epsilon(), X0(), V(), Velocity()]
DENSITIES = [Uniform(), LogitNormal(0, 1), LogitNormal(0.5, 0.6), Mode(1.29), Mode(-0.5), CosMap()]


class Cosine(Path):
    """A second path, curved, that the rest of the room has never heard of."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)

    def rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * torch.sin(math.pi * t / 2), math.pi / 2 * torch.cos(math.pi * t / 2)


PATHS = [RectifiedFlow(), Cosine()]


def name(thing: object) -> str:
    return type(thing).__name__


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_rate_is_the_derivative(path: Path) -> None:
    t = torch.rand(50, dtype=torch.float64)
    for i in range(2):
        _, derivative = torch.func.jvp(lambda t, i=i: path(t)[i], (t,), (torch.ones_like(t),))
        torch.testing.assert_close(path.rate(t)[i], derivative)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_ends_are_data_and_noise(path: Path) -> None:
    a, b = path(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(a, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(b, torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_solve_recovers_picture_and_noise(path: Path, target: Target) -> None:
    x0, noise = torch.randn(2, 16, 3, 4, 4, dtype=torch.float64)
    t = torch.linspace(0.01, 0.99, 16, dtype=torch.float64)
    a, b, p, q = (expand_as(c, x0) for c in (*path(t), *target.row(path, t)))
    found = solve(path, target, a * x0 + b * noise, p * x0 + q * noise, t)
    torch.testing.assert_close(found, (x0, noise))


def test_velocity_of_the_straight_line_solves_at_both_ends() -> None:
    x0, noise = torch.randn(2, 2, 3)
    t = torch.tensor([0.0, 1.0])
    z = torch.stack([x0[0], noise[1]])
    torch.testing.assert_close(solve(RectifiedFlow(), Velocity(), z, noise - x0, t), (x0, noise))


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


def test_shift_moves_mass_to_the_noise_and_keeps_the_ends() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift(t, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    torch.testing.assert_close(shift(shift(t, 2.0), 3.0), shift(t, 6.0))  # so a second application shows
    assert torch.equal(shift(t, 1.0), t)


def test_shift_enters_training_and_grid_once_and_equally() -> None:
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(Objective(density=Uniform(), shift=3.0).time(u).flip(0), linear_grid(8, 3.0))


def exact_model(objective: Objective, x0: Tensor, noise: Tensor):
    """A model that knows the pair, and so predicts the target without error."""

    def model(z: Tensor, t: Tensor, condition: object) -> Tensor:
        p, q = (expand_as(c, x0) for c in objective.target.row(objective.path, t))
        return p * x0 + q * noise

    return model


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_loss_is_zero_for_the_target_and_counts_per_image(path: Path, target: Target) -> None:
    objective = Objective(path, target)
    x0, noise = torch.randn(2, 5, 2, 4, 4)
    t = torch.rand(5)
    model = exact_model(objective, x0, noise)
    torch.testing.assert_close(objective.loss(model, x0, noise, t, None), torch.zeros(5), atol=1e-10, rtol=0)
    off = torch.arange(5.0).reshape(5, 1, 1, 1)
    loss = objective.loss(lambda *a: model(*a) + off, x0, noise, t, None)
    torch.testing.assert_close(loss, torch.arange(5.0) ** 2)
    torch.testing.assert_close(objective.denoise(model, x0, torch.full((5,), 0.5), None)[0].shape, x0.shape)


def test_loss_gives_the_model_the_point_on_the_path_and_the_condition() -> None:
    x0, noise = torch.randn(2, 3, 1, 2, 2)
    t = torch.tensor([0.0, 0.25, 1.0])
    seen = []
    Objective().loss(lambda z, t, c: seen.append((z, t, c)) or z, x0, noise, t, "condition")
    z, time, condition = seen[0]
    torch.testing.assert_close(z, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]]))
    assert torch.equal(time, t)
    assert condition == "condition"


def test_loss_is_float32_around_a_bfloat16_network() -> None:
    x0, noise = torch.randn(2, 4, 1, 2, 2, dtype=torch.bfloat16)
    seen = []
    loss = Objective().loss(lambda z, t, c: seen.append((z, t)) or z.bfloat16(), x0, noise, torch.rand(4), None)
    assert (loss.dtype, seen[0][0].dtype, seen[0][1].dtype) == (torch.float32,) * 3
    with pytest.raises(TypeError, match="float32"):
        Objective().loss(lambda z, t, c: z, x0, noise, torch.rand(4, dtype=torch.bfloat16), None)


def test_weighting_by_a_density_equals_drawing_from_it() -> None:
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x0, noise = torch.zeros(2, 4000, 1, dtype=torch.float64)

    def model(z: Tensor, t: Tensor, condition: object) -> Tensor:
        return t[:, None] ** 2  # so that the loss depends on t

    drawn = Objective(density=LogitNormal())
    weighted = Objective(density=Uniform(), weight=DensityWeight(LogitNormal()))
    a, b = (o.loss(model, x0, noise, o.time(u), None).mean().item() for o in (drawn, weighted))
    assert a == pytest.approx(b, rel=1e-3)
    unweighted = Objective(density=Uniform()).loss(model, x0, noise, u.float(), None).mean().item()
    assert a != pytest.approx(unweighted, rel=0.05)


def test_time_bins_average_by_t_and_start_afresh() -> None:
    bins = TimeBins(4)
    bins.add(torch.tensor([0.0, 0.1, 0.3]), torch.tensor([1.0, 3.0, 5.0]))
    bins.add(torch.tensor([1.0]), torch.tensor([7.0]))
    means = bins.means()
    assert means[:2] == [2.0, 5.0]
    assert math.isnan(means[2])
    assert means[3] == 7.0
    assert all(map(math.isnan, bins.means()))


class Told(NamedTuple):
    value: Tensor
    mask: Tensor | None = None


def test_guidance_extrapolates_every_channel_in_one_call() -> None:
    calls = []

    def model(z: Tensor, t: Tensor, condition: Told) -> Tensor:
        calls.append(len(z))
        return z + condition.value[:, :, None, None]

    z, t = torch.randn(3, 4, 2, 2), torch.rand(3)
    condition, null = Told(torch.randn(3, 4)), Told(torch.randn(1, 4))
    expected = z + (null.value + 2.5 * (condition.value - null.value))[:, :, None, None]
    torch.testing.assert_close(ClassifierFree(model, null, 2.5)(z, t, condition), expected)
    assert calls == [6]
    torch.testing.assert_close(ClassifierFree(model, null, 1.0)(z, t, condition), model(z, t, condition))
    torch.testing.assert_close(
        ClassifierFree(model, null, 0.0)(z, t, condition), model(z, t, Told(null.value.expand(3, 4)))
    )
    with pytest.raises(ValueError, match="same fields"):
        ClassifierFree(model, null, 2.0)(z, t, Told(condition.value, torch.ones(3, 4, dtype=torch.bool)))


def test_grid_goes_from_noise_to_data_and_refuses_no_steps() -> None:
    assert linear_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    torch.testing.assert_close(linear_grid(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    with pytest.raises(ValueError, match="at least 1"):
        linear_grid(0)


def gaussian_denoiser(path: Path, mean: float, std: float):
    """The exact posterior means when x0 ~ N(mean, std²): the ideal model."""

    def denoise(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (expand_as(c, z) for c in path(t))
        gain = a * std**2 / (a**2 * std**2 + b**2)
        return mean + gain * (z - a * mean), b * (z - a * mean) / (a**2 * std**2 + b**2)

    return denoise


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_euler_is_of_first_order_on_a_gaussian(path: Path) -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = 0.7 + 0.3 * z  # the flow map between Gaussians is affine
    errors = []
    for steps in (64, 128, 256):
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        errors.append((euler(gaussian_denoiser(path, 0.7, 0.3), path, z, grid) - exact).abs().max().item())
    assert errors[0] < 0.05
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.15)


def test_euler_on_the_straight_line_steps_along_the_velocity() -> None:
    z = torch.randn(4, 2, dtype=torch.float64)
    denoise = gaussian_denoiser(RectifiedFlow(), 0.7, 0.3)
    x0, noise = denoise(z, torch.full((4,), 0.8, dtype=torch.float64))
    step = euler(denoise, RectifiedFlow(), z, torch.tensor([0.8, 0.5], dtype=torch.float64))
    torch.testing.assert_close(step, z + (0.5 - 0.8) * (noise - x0))


def test_euler_gives_the_model_the_times_of_the_grid_and_reports_each_step() -> None:
    grid = torch.tensor([1.0, 0.83, 0.2, 0.0])  # any grid at all
    seen, told = [], []

    def denoise(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(t)
        return torch.zeros_like(z), z

    end = euler(denoise, RectifiedFlow(), torch.ones(2, 1), grid, lambda *step: told.append(step))
    assert [t.tolist() for t in seen] == [[x, x] for x in grid[:-1].tolist()]
    assert [n for n, _, _ in told] == [1, 2, 3]
    assert torch.equal(told[-1][1], end)
