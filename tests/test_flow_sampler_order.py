"""Samplers of the ODE against exact flows: their order of convergence, and one line for all paths."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from gaussians import GAUSSIAN, TWO, Mixture
from torch import Tensor
from walks import CHAINS, CONTINUOUS, edm_ode, inner, name

from flow.grid import karras, trailing
from flow.path import Discrete, Path, RectifiedFlow
from flow.sampler import dpmpp_2m, euler, heun, midpoint


def karras_inner(path: Path, steps: int) -> Tensor:
    return karras(path, steps + 1, sigma_min=0.05, sigma_max=5.0)[:-1]


def test_gaussian_flow_is_affine() -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(GAUSSIAN.flow(RectifiedFlow(), z, one, zero), 0.7 + 0.3 * z)


def errors(walk: Callable, data: Mixture, path: Path, grid: Callable, counts: tuple[int, ...]) -> list[float]:
    found = []
    for steps in counts:
        times = grid(path, steps)
        z = data.start(path, times[0])
        exact = data.flow(path, z, times[0], times[-1])
        found.append((walk(data.denoiser(path), path, z, times) - exact).square().mean().sqrt().item())
    return found


ORDERS = [(euler, 1), (heun, 2), (midpoint, 2), (edm_ode, 2)]


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize(
    ("walk", "order", "grid"),
    [(walk, order, grid) for walk, order in ORDERS for grid in (inner, karras_inner)] + [(dpmpp_2m, 2, karras_inner)],
    ids=name,
)
def test_order_of_convergence(walk: Callable, order: int, grid: Callable, path: Path, data: Mixture) -> None:
    order += walk is midpoint and data is GAUSSIAN  # there it gains one
    found = errors(walk, data, path, grid, (64, 128, 256))
    assert found[-1] < 10.0 ** -(order + 1)
    for coarse, fine in pairwise(found):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize(("walk", "order"), ORDERS[:3], ids=name)
def test_order_from_pure_noise_to_data(walk: Callable, order: int, path: Path, data: Mixture) -> None:
    def even(path: Path, steps: int) -> Tensor:
        return path.time(torch.linspace(1, 0, steps + 1, dtype=torch.float64))

    order += walk is midpoint and data is GAUSSIAN
    for coarse, fine in pairwise(errors(walk, data, path, even, (64, 128, 256))):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("path", CHAINS, ids=name)
@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
def test_a_full_walk_on_a_chain_is_near_the_exact_flow(path: Discrete, data: Mixture) -> None:
    times = trailing(path, 1000)
    z = data.start(path, times[0])
    exact = data.flow(path, z, times[0], times[-1])
    first, second, multistep = (
        (walk(data.denoiser(path), path, z, times) - exact).abs().max().item() for walk in (euler, heun, dpmpp_2m)
    )
    assert first < 0.006
    assert max(second, multistep) < 0.003


@pytest.mark.parametrize("walk", [euler, heun, midpoint, dpmpp_2m, edm_ode], ids=name)
@pytest.mark.parametrize("path", CONTINUOUS[1:], ids=name)
@pytest.mark.parametrize("start", [1.0, 0.9])
def test_samplers_take_the_same_walk_on_every_path(walk: Callable, path: Path, start: float) -> None:
    if walk is edm_ode and start == 1:
        start = 0.99  # needs a finite σ
    line = RectifiedFlow()
    tau = torch.linspace(start, 0, 11, dtype=torch.float64)
    w = TWO.start(line, tau[0])
    on_line = walk(TWO.denoiser(line), line, w, tau)
    times = path.time(tau)
    scale = sum(path(times))
    torch.testing.assert_close(walk(TWO.denoiser(path), path, scale[0] * w, times), scale[-1] * on_line)


def test_euler_on_the_straight_line_steps_along_the_velocity() -> None:
    z = torch.randn(4, 1, dtype=torch.float64)
    denoise = TWO.denoiser(RectifiedFlow())
    x0, noise, _ = denoise(z, torch.full((4,), 0.8, dtype=torch.float64))
    step = euler(denoise, RectifiedFlow(), z, torch.tensor([0.8, 0.5], dtype=torch.float64))
    torch.testing.assert_close(step, z + (0.5 - 0.8) * (noise - x0))
