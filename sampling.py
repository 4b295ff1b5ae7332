"""How a model is sampled, in words that a command line or a model folder can hold: `ddim:eta=1`, `karras:rho=5`."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flow import grid, sampler
from flow.objective import Estimate, Objective
from flow.reference import reference
from flow.target import determinant

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        sampler.euler, sampler.heun, sampler.midpoint, sampler.dpmpp_2m, reference,
        sampler.ddim, sampler.ddpm, sampler.edm, sampler.langevin,
    )
}  # fmt: skip
GRIDS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (grid.trailing, grid.leading, grid.linspace, grid.karras)
}
Walk = Callable[[sampler.Denoiser, Tensor, sampler.Noise, sampler.Callback | None], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled unless the caller says otherwise. Stored with the model.

    Args:
        steps: of the sampler, at least 1.
        guidance: scale of classifier-free guidance; 1 is none and costs half.
        sampler: euler, heun, midpoint, dpmpp_2m, reference, ddim, ddpm, edm or langevin, with options after a colon,
            such as ddim:eta=1 or ddpm:variance=large,….
        spacing: of the times: trailing, leading, linspace, or karras with options as karras:sigma_max=80.
        rescale: φ of the guidance, 0 to 1.
        interval: the times (from, to) in which guidance works.
    """

    steps: int = 28
    guidance: float = 4.5
    sampler: str = "euler"
    spacing: str = "trailing"
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not isinstance(self.sampler, str) or not isinstance(self.spacing, str):
            raise ValueError(f"sampler and spacing are words, got {self.sampler} and {self.spacing}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be between 0 and 1, got {self.rescale}")
        object.__setattr__(self, "interval", tuple(float(end) for end in self.interval))  # JSON knows only lists
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"interval must be two times, 0 <= from <= to <= 1, got {self.interval}")
        chosen(SAMPLERS, "sampler", self.sampler)
        chosen(GRIDS, "spacing", self.spacing)

    def walk(self, objective: Objective, shift: float | None = None) -> tuple[Walk, Tensor]:
        """The sampler as a function (denoise, z, noise, callback) → z, and its times (steps + 1,), float64.

        Args:
            objective: what the model was trained on.
            shift: α of the grid; none takes that of the training.

        Raises:
            ValueError: in one line, if sampler, spacing, steps, path and target do not fit each other.
        """
        method = chosen(SAMPLERS, "sampler", self.sampler)
        grid = chosen(GRIDS, "spacing", self.spacing)
        times = grid(objective.path, self.steps, objective.shift if shift is None else shift)
        noisy = "noise" in inspect.signature(method).parameters

        def walk(
            denoise: sampler.Denoiser, z: Tensor, noise: sampler.Noise, callback: sampler.Callback | None = None
        ) -> Tensor:
            more = {"noise": noise} if noisy else {}
            return method(denoise, objective.path, z, times.to(z.device), callback=callback, **more)

        pixel = torch.zeros(1, 1, dtype=torch.float64)
        target = type(objective.target).__name__

        def probe(z: Tensor, t: Tensor) -> Estimate:
            if not determinant(objective.path, objective.target, t).abs() > 1e-9:  # zero or NaN
                raise ValueError(f"at t = {t[0]:g} {target} does not tell picture from noise; train on V, say")
            return Estimate(z, z, z if objective.variance else None)

        try:  # one pixel and no network: whatever does not fit shows before any work
            walk(probe, pixel, lambda: pixel)
        except ValueError as error:
            raise ValueError(f"sampler {self.sampler} with {self.spacing} spacing: {error}") from None
        return walk, times


def chosen(table: dict[str, Callable[..., Tensor]], kind: str, text: str) -> partial:
    """The function that `name` or `name:key=value,key=value` stands for; ValueError in one line if there is none."""
    name, _, rest = text.partition(":")
    if name not in table:
        raise ValueError(f"there is no {kind} {name!r}: choose one of {', '.join(table)}")
    options = {p.name: p for p in inspect.signature(table[name]).parameters.values() if p.kind is p.KEYWORD_ONLY}
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in options:
            known = f"its options are {', '.join(options)}" if options else "it has none"
            raise ValueError(f"{kind} {name} has no option {key!r}: {known}")
        words = getattr(options[key].annotation, "__args__", None)
        try:
            values[key] = type(options[key].default)(value)
            if (words and value not in words) or (isinstance(values[key], float) and math.isnan(values[key])):
                raise ValueError
        except ValueError:
            wanted = (
                " or ".join(words)
                if words
                else "a whole number"
                if isinstance(options[key].default, int)
                else "a number"
            )
            raise ValueError(f"{kind} {name} takes {key} as {wanted}, got {value!r}") from None
    return partial(table[name], **values)


def random_normals(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    """Fresh normals (B, *shape) at each call, picture i's from a CPU generator of its own, seeded with seeds[i].

    The first call gives what `torch.randn(shape, generator)` would, so a picture does not depend on its batch.
    """
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(device)
