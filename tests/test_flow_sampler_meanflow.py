"""The sampler of average velocities: exact in any number of steps."""

import pytest
import torch
from gaussians import average, flow_map, velocity
from torch import Tensor

from flow.objective import Estimate
from flow.path import EDM, Cosine, DDPMLinear, RectifiedFlow
from flow.path import Path as Line
from flow.sampler import euler, meanflow
from flow.target import Velocity, solve


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


def test_the_sampler_of_average_velocities_passes_both_times_and_reports_each_step() -> None:
    grid, seen, reports = torch.tensor([1.0, 0.6, 0.5, 0.0]), [], []

    def denoise(z: Tensor, t: Tensor, end: Tensor) -> Estimate:
        seen.append((t.tolist(), end.tolist()))
        return told(z, t, end)

    z = meanflow(denoise, RectifiedFlow(), torch.randn(2, 3), grid, lambda i, z, x0: reports.append((i, z)))
    t = grid.tolist()
    assert seen == [(t[i], t[i + 1]) for i in range(3)]
    assert [i for i, _ in reports] == [1, 2, 3]
    assert torch.equal(reports[-1][1], z)


@pytest.mark.parametrize("path", [Cosine(), EDM(), DDPMLinear()], ids=lambda path: type(path).__name__)
def test_the_sampler_of_average_velocities_walks_on_rectified_flow_alone(path: Line) -> None:
    with pytest.raises(ValueError, match="meanflow needs RectifiedFlow, and the path is " + type(path).__name__):
        meanflow(told, path, torch.zeros(1, 1), torch.tensor([1.0, 0.0]))
