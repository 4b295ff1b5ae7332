"""Samples from the posterior of a picture: the mean of N has 1 + 1/N times the square error of the regressor."""

import pytest
import torch
from processes import CONTINUOUS, name
from torch import Tensor

from flow.objective import Estimate
from flow.path import Path
from flow.reference import reference
from flow.sampler import Denoiser

STD, NOISE = 0.8, 0.5  # x0 ~ N(0, STD²); the picture that is seen is x0 + NOISE·n
COUNT = 20_000


def exact(path: Path, seen: Tensor) -> tuple[Denoiser, Tensor]:
    """The denoiser of x0 given what is seen, and the regressor, which is the posterior's mean."""
    gain = STD**2 / (STD**2 + NOISE**2)
    mean, variance = gain * seen, (1 - gain) * STD**2

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        a, b = path(t)
        off = z - a * mean
        spread = a**2 * variance + b**2
        return Estimate(mean + a * variance / spread * off, b / spread * off)

    return denoise, mean


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_the_mean_of_n_samples_has_its_share_of_the_error(path: Path) -> None:
    x0 = STD * torch.randn(COUNT, 1, dtype=torch.float64)
    seen = x0 + NOISE * torch.randn_like(x0)
    denoise, mean = exact(path, seen)
    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    a, b = path(times[0])
    draws = []
    for _ in range(4):
        end = reference(denoise, path, (a**2 + b**2).sqrt() * torch.randn_like(x0), times)
        draws.append(end / path(times[-1])[0])
    base = (mean - x0).square().mean()
    for count in (1, 2, 4):
        ratio = (torch.stack(draws[:count]).mean(0) - x0).square().mean() / base
        assert ratio.item() == pytest.approx(1 + 1 / count, abs=0.05)  # three standard errors
