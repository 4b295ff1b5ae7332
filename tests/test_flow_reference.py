"""The adaptive reference solver: as exact as its tolerance, on the path alone."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gaussians import GAUSSIAN, TWO, Mixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from walks import CONTINUOUS, inner, name

from flow.grid import trailing
from flow.objective import Estimate
from flow.path import Path, RectifiedFlow
from flow.reference import reference


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize("grid", [inner, trailing], ids=name)
def test_reference_is_as_near_as_its_tolerance(path: Path, data: Mixture, grid: Callable) -> None:
    times = grid(path, 3)
    z = data.start(path, times[0])
    exact = data.flow(path, z, times[0], times[-1])
    for options, bound in (({"tolerance": 1e-9}, 1e-7), ({}, 5e-6), ({"tolerance": 1e-5}, 5e-4)):
        found = reference(data.denoiser(path), path, z, times, **options)
        assert (found - exact).abs().max() < bound
    single = reference(data.denoiser(path), path, z.float(), times)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, exact.float(), atol=1e-5, rtol=0)


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
        assert (z_s - GAUSSIAN.flow(path, z, times[0], s)).abs().max() < 5e-6


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors."""

    count = 0

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_reference_reads_one_number_a_step_and_walks_in_float64() -> None:
    seen = []

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        seen.append(z.dtype)
        return TWO.denoiser(RectifiedFlow())(z, t)

    times = trailing(RectifiedFlow(), 3)
    z = TWO.start(RectifiedFlow(), times[0]).float()
    with Reads() as reads:
        reference(denoise, RectifiedFlow(), z, times)
    assert set(seen) == {torch.float64}
    assert len(seen) == 1 + 6 * reads.count


@pytest.mark.parametrize(("tolerance", "said"), [(0.0, "tolerance > 0"), (1e-300, "take a larger one")])
def test_impossible_tolerances_are_refused(tolerance: float, said: str) -> None:
    times = trailing(RectifiedFlow(), 1)
    z = TWO.start(RectifiedFlow(), times[0])
    with pytest.raises(ValueError, match=said) as refusal:
        reference(TWO.denoiser(RectifiedFlow()), RectifiedFlow(), z, times, tolerance=tolerance)
    assert "\n" not in str(refusal.value)


def test_a_model_that_overflows_ends_the_walk_with_a_reason() -> None:
    times, z = trailing(RectifiedFlow(), 1), torch.ones(2, 1)
    with pytest.raises(ValueError, match="cannot keep tolerance"):
        reference(lambda z, t: Estimate(z * math.nan, z), RectifiedFlow(), z, times)
