"""Time grids: by hand, against diffusers, and what cannot be one."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from walks import CHAINS, CONTINUOUS, GRIDS, name

from flow.density import shift
from flow.grid import flow_match, karras, leading, linspace, trailing
from flow.path import EDM, Cosine, DDPMLinear, Discrete, LDMLinear, Path, RectifiedFlow, VariancePreserving


def test_grids_by_hand() -> None:
    chain, line = DDPMLinear(), RectifiedFlow()
    for found, expected in (
        (trailing(line, 4), [1, 0.75, 0.5, 0.25, 0]),
        (trailing(line, 4, 3.0), [1, 0.9, 0.75, 0.5, 0]),
        (trailing(line, 1), [1, 0]),
        (trailing(chain, 4), [1, 0.75, 0.5, 0.25, 0]),
        (trailing(chain, 3), [1, 0.667, 0.333, 0]),
        (trailing(chain, 3, 3.0), [1, 0.857, 0.6, 0]),
        (leading(chain, 4), [0.751, 0.501, 0.251, 0.001, 0]),
        (leading(chain, 3), [0.667, 0.334, 0.001, 0]),
        (linspace(chain, 4), [1, 0.667, 0.334, 0.001, 0]),
        (linspace(chain, 1), [1, 0]),
        (linspace(chain, 7), [1, 0.833, 0.667, 0.501, 0.334, 0.167, 0.001, 0]),  # ties to the even of 0 … 999
    ):
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_the_released_grid_is_that_of_diffusers_to_the_bit(steps: int, alpha: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=alpha)
    scheduler.set_timesteps(steps)
    times = flow_match(RectifiedFlow(), steps, alpha).float()
    assert torch.equal(times, scheduler.sigmas)
    assert torch.equal(1000 * times[:-1], scheduler.timesteps)


def test_the_released_grid_by_hand() -> None:
    four = [1, 0.857692, 0.602151, 0.008929, 0]
    assert flow_match(RectifiedFlow(), 4, 3.0).tolist() == pytest.approx(four, abs=5e-7)
    many = flow_match(RectifiedFlow(), 28, 3.0).tolist()
    assert many[:3] + many[-4:] == pytest.approx([1, 0.987381, 0.974108, 0.199827, 0.110906, 0.008929, 0], abs=5e-7)


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_karras_grid_by_hand(path: Path) -> None:
    for options, expected in (
        ({"rho": 1.0, "sigma_min": 1.0, "sigma_max": 9.0}, [9, 5, 1, 0]),
        ({"rho": 2.0, "sigma_min": 1.0, "sigma_max": 9.0}, [9, 4, 1, 0]),
        ({}, [80, ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, 0.002, 0]),
    ):
        a, b = path(karras(path, 3, **options))
        assert (b / a).tolist() == pytest.approx(expected, rel=1e-6)
    a, b = path(karras(path, 1))
    assert (b / a).tolist() == pytest.approx([80, 0])


def test_karras_grid_reaches_into_the_tail() -> None:
    path = EDM(0.5, 0.6, 1.0)
    a, b = path(karras(path, 3, sigma_min=0.002, sigma_max=10.0))
    assert (b / a)[-2].item() == pytest.approx(0.002)


def test_karras_grid_begins_no_earlier_than_the_path() -> None:
    """VP has σ = 152 at t = 1."""
    assert karras(VariancePreserving(), 5, sigma_max=150.0)[0] < 1
    with pytest.raises(ValueError, match="no time of VariancePreserving has sigma_max 160: take a smaller one"):
        karras(VariancePreserving(), 5, sigma_max=160.0)


@pytest.mark.parametrize("path", [*CONTINUOUS, *CHAINS], ids=name)
@pytest.mark.parametrize("grid", [*GRIDS, karras], ids=name)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 33, 50])
def test_grids_fall_to_the_data(path: Path, grid: Callable, steps: int) -> None:
    if isinstance(path, Discrete) == (grid is karras) or (grid in (leading, linspace) and path in CONTINUOUS):
        return
    times = grid(path, steps)
    assert times.shape == (steps + 1,)
    assert bool((times.diff() < 0).all())
    assert times[-1] == 0
    assert times[0] == 1 if grid in (trailing, linspace) else 0 < times[0] < 1
    assert torch.equal(path.snap(times), times)


@pytest.mark.parametrize("path", CHAINS, ids=name)
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_as_many_steps_as_the_chain_has_are_all_of_it(path: Discrete, grid: Callable) -> None:
    assert torch.equal(grid(path, 1000), torch.arange(1000, -1, -1, dtype=torch.float64) / 1000)


def test_shift_is_applied_once_then_snapped() -> None:
    even = torch.linspace(1, 0, 11, dtype=torch.float64)
    for path in (RectifiedFlow(), Cosine(), EDM()):
        assert torch.equal(trailing(path, 10, 2.5), shift(even, 2.5))
    assert torch.equal(trailing(LDMLinear(), 10, 2.5), LDMLinear().snap(shift(even, 2.5)))


@pytest.mark.parametrize(
    ("grid", "path", "arguments", "said"),
    [
        (trailing, RectifiedFlow(), (0,), "at least 1"),
        (trailing, LDMLinear(), (-1,), "at least 1"),
        (karras, EDM(), (0,), "at least 1"),
        (leading, LDMLinear(), (0,), "at least 1"),
        (trailing, LDMLinear(), (1001,), "at most the 1000"),
        (leading, LDMLinear(), (1001,), "at most the 1000"),
        (linspace, LDMLinear(), (1001,), "at most the 1000"),
        (trailing, LDMLinear(), (1000, 3.0), "give equal times"),
        (trailing, RectifiedFlow(), (10, 0.0), "shift must be > 0"),
        (trailing, RectifiedFlow(), (10, math.nan), "shift must be > 0"),
        (trailing, RectifiedFlow(), (10, math.inf), "shift must be > 0"),
        (leading, RectifiedFlow(), (10,), "needs a discrete path"),
        (linspace, EDM(), (10,), "needs a discrete path"),
        (leading, LDMLinear(), (10, 3.0), "no shift"),
        (linspace, LDMLinear(), (10, 3.0), "no shift"),
        (karras, EDM(), (10, 3.0), "no shift"),
        (flow_match, RectifiedFlow(), (0,), "at least 1"),
        (flow_match, RectifiedFlow(), (10, -1.0), "shift must be > 0"),
        (flow_match, Cosine(), (10,), "the path is Cosine: use trailing"),
        (karras, LDMLinear(), (10,), "needs a continuous path"),
        (karras, EDM(0.0, 0.2), (10,), "give equal times"),
    ],
    ids=name,
)
def test_impossible_grids_are_refused(grid: Callable, path: Path, arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        grid(path, *arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options",
    [{"sigma_min": 0.0}, {"sigma_min": 90.0}, {"sigma_max": math.inf}, {"rho": 0.0}, {"rho": math.inf},
     {"sigma_min": math.nan}, {"sigma_max": math.nan}],
)  # fmt: skip
def test_impossible_karras_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="karras spacing"):
        karras(EDM(), 10, **options)
