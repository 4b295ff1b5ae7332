"""Targets: picture and noise are found again from what a network predicts."""

import math

import pytest
import torch
from processes import CONTINUOUS, ENDS, PAIRS, PATHS, PRESERVING, TIMES, name, pair

from flow.objective import Objective
from flow.path import EDM, Cosine, Path, RectifiedFlow, expand_as
from flow.target import X0, Epsilon, Preconditioned, Target, V, Velocity, determinant, solve


@pytest.mark.parametrize("both", PAIRS, ids=pair)
def test_solve_recovers_picture_and_noise(both: tuple[Path, Target]) -> None:
    path, target = both
    x0, noise = torch.randn(2, 49, 3, 4, 4, dtype=torch.float64)
    a, b, p, q = (expand_as(c, x0) for c in (*path(TIMES), *target.row(path, TIMES)))
    found = solve(path, target, a * x0 + b * noise, p * x0 + q * noise, TIMES)
    torch.testing.assert_close(found, (x0, noise))


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_determinants(path: Path) -> None:
    a, b = path(TIMES)
    torch.testing.assert_close(determinant(path, Epsilon(), TIMES), a)
    torch.testing.assert_close(determinant(path, X0(), TIMES), -b)
    torch.testing.assert_close(determinant(path, V(), TIMES), a**2 + b**2)
    torch.testing.assert_close(determinant(path, Preconditioned(0.7), TIMES), -((b**2 + (0.7 * a) ** 2).sqrt()) / 0.7)


def test_velocity_is_determined_everywhere() -> None:
    t = torch.cat([ENDS, TIMES])
    torch.testing.assert_close(determinant(RectifiedFlow(), Velocity(), t), torch.ones_like(t))
    torch.testing.assert_close(determinant(Cosine(), Velocity(), t), torch.full_like(t, math.pi / 2))


def test_velocity_of_the_straight_line_solves_at_both_ends() -> None:
    x0, noise = torch.randn(2, 2, 3)
    t = torch.tensor([0.0, 1.0])
    z = torch.stack([x0[0], noise[1]])
    torch.testing.assert_close(solve(RectifiedFlow(), Velocity(), z, noise - x0, t), (x0, noise))


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("target", [V(), Preconditioned(), Preconditioned(1.0)], ids=name)
def test_v_and_preconditioned_solve_at_both_ends(path: Path, target: Target) -> None:
    x0, noise = torch.randn(2, 2, 3, dtype=torch.float64)
    a, b, p, q = (expand_as(c, x0) for c in (*path(ENDS), *target.row(path, ENDS)))
    found = solve(path, target, a * x0 + b * noise, p * x0 + q * noise, ENDS)
    torch.testing.assert_close(found[0][0], x0[0])
    torch.testing.assert_close(found[1][1], noise[1])


@pytest.mark.parametrize("path", [p for p in CONTINUOUS if isinstance(p, EDM)], ids=name)
def test_preconditioned_is_edm_of_the_paper(path: EDM) -> None:
    x0, noise, output = torch.randn(3, 49, 5, dtype=torch.float64)
    a, b = path(TIMES)
    sigma, data = (b / a)[:, None], path.sigma_data
    x = x0 + sigma * noise
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2).sqrt()
    c_in = 1 / (sigma**2 + data**2).sqrt()
    z = a[:, None] * x0 + b[:, None] * noise
    torch.testing.assert_close(z, c_in * x)
    target = Preconditioned(data)
    p, q = target.row(path, TIMES)
    torch.testing.assert_close(p[:, None] * x0 + q[:, None] * noise, (x0 - c_skip * x) / c_out)
    denoised, rest = solve(path, target, z, output, TIMES)
    torch.testing.assert_close(denoised, c_skip * x + c_out * output)
    torch.testing.assert_close(rest, (x - denoised) / sigma)
    karras = (sigma**2 + data**2) / (sigma * data) ** 2  # their λ(σ), which makes the loss on F unweighted
    error = (output - (x0 - c_skip * x) / c_out).square()
    torch.testing.assert_close(error, karras * (denoised - x0).square())
    loss = Objective(path, target).loss(lambda *_: output, x0, noise, TIMES.float(), None)
    torch.testing.assert_close(loss.double(), error.mean(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", PRESERVING, ids=name)
def test_preconditioned_of_unit_data_is_minus_v(path: Path) -> None:
    found, v = Preconditioned(1.0).row(path, TIMES), V().row(path, TIMES)
    torch.testing.assert_close(found, (-v[0], -v[1]))
