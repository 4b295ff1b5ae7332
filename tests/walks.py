"""What the tests of samplers share: paths and grids to walk on, sources of noise, a toy model and how it is read."""

from collections.abc import Callable

import torch
from torch import Tensor

from flow.grid import leading, linspace, trailing
from flow.objective import Estimate
from flow.path import EDM, Cosine, DDPMLinear, ImprovedCosine, LDMLinear, Path, RectifiedFlow, ZeroTerminalSNR
from flow.sampler import Denoiser, edm
from flow.target import solve

CONTINUOUS = [RectifiedFlow(), Cosine(), EDM(), EDM(-0.5, 1.2, 1.0)]
CHAINS = [DDPMLinear(), LDMLinear(), ImprovedCosine(), ZeroTerminalSNR(LDMLinear())]
GRIDS = [trailing, leading, linspace]


def name(thing: object) -> str:
    return thing if isinstance(thing, str) else getattr(thing, "__name__", type(thing).__name__)


def forbidden() -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def numbers(seed: int, like: Tensor) -> Callable[[], Tensor]:
    """Fresh normals, those that diffusers draws from a generator of the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=draw, dtype=like.dtype)


def inner(path: Path, steps: int) -> Tensor:
    return torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)


def edm_ode(denoise: Denoiser, path: Path, z: Tensor, grid: Tensor) -> Tensor:
    return edm(denoise, path, z, grid, forbidden)


def toy(z: Tensor, t: Tensor, condition: object) -> Tensor:
    """An affine model that depends on the time too."""
    return 0.4 * z + 0.3 * z.flip(-1) + 0.2 * t.to(z.dtype).reshape(-1, *(1,) * (z.ndim - 1)) - 0.1


def reading(path: Path, target: object, model: Callable = toy, channels: int | None = None) -> Denoiser:
    """The model read as a target, in the precision of z."""

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        y = model(z, t, None)
        return Estimate(*solve(path, target, z, y[:, :channels], t), None if channels is None else y[:, channels:])

    return denoise
