"""The adaptive reference solver: as exact as its tolerance, on the path alone."""

from collections.abc import Callable

import pytest
import torch
from gaussians import GAUSSIAN, TWO, Mixture
from walks import CONTINUOUS, inner, name

from flow.grid import trailing
from flow.path import Path
from flow.reference import reference


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize("grid", [inner, trailing], ids=name)
def test_reference_is_as_near_as_its_tolerance(path: Path, data: Mixture, grid: Callable) -> None:
    times = grid(path, 3)
    z = data.start(path, times[0])
    exact = data.flow(path, z, times[0], times[-1])
    for tolerance, bound in ((1e-9, 1e-7), (1e-5, 1e-3)):
        found = reference(data.denoiser(path), path, z, times, tolerance=tolerance)
        assert (found - exact).abs().max() < bound
    single = reference(data.denoiser(path), path, z.float(), times)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, found.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_the_reference_evaluates_only_times_of_the_path(path: Path) -> None:
    seen, told = [], []
    denoise = GAUSSIAN.denoiser(path)
    times = trailing(path, 4)
    z = GAUSSIAN.start(path, times[0])
    end = reference(
        lambda z, t: seen.append(t) or denoise(z, t), path, z, times, lambda *step: told.append(step)
    )  # fmt: skip
    assert all(0 <= t.min() <= t.max() <= 1 for t in seen)
    assert [n for n, _, _ in told] == [1, 2, 3, 4]
    assert torch.equal(told[-1][1], end)
    for (_, z_s, _), s in zip(told, times[1:], strict=True):
        assert (z_s - GAUSSIAN.flow(path, z, times[0], s)).abs().max() < 2e-4
