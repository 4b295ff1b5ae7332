"""How a model is sampled, as text for a command line or a model folder, such as `ddim:eta=1` or `karras:rho=5`."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flow import grid, sampler
from flow.guidance import Guider, Projected, ZeroStar
from flow.objective import Estimate, Objective
from flow.path import Path
from flow.reference import reference
from flow.target import Target, determinant
from flow.variance import LearnedVariance
from tokens.process import autoregressive

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        sampler.euler, sampler.heun, sampler.midpoint, sampler.dpmpp_2m, reference,
        sampler.ddim, sampler.sde, sampler.pc, sampler.ddpm, sampler.edm, sampler.langevin, sampler.meanflow,
        autoregressive,
    )
}  # fmt: skip
GRIDS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (grid.trailing, grid.flow_match, grid.leading, grid.linspace, grid.karras, grid.given)
}


def cfg(path: Path, target: Target, times: Tensor) -> None:
    """Plain classifier-free guidance, which needs no guider."""


GUIDERS: dict[str, Callable[..., Guider | None]] = {"cfg": cfg, "apg": Projected, "zero-star": ZeroStar}
MOST_STEPS = 10_000
Walk = Callable[[sampler.Denoiser, Tensor, sampler.Noise, sampler.Callback | None], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled by default. The model folder stores it.

    Args:
        steps: steps of the sampler, 1 to 10,000.
        guidance: scale s of classifier-free guidance, y = y_null + s·(y_cond − y_null). 1 turns guidance off and halves
            the cost. Between 0 and 1 the prompt has less effect, and 0, the unconditional model, takes no prompt.
        sampler: euler, meanflow (for a network of two times), heun, midpoint, dpmpp_2m, reference, ddim, sde, pc, ddpm,
            edm, langevin or autoregressive (for a model of codes), with options after a colon, such as ddim:eta=1,
            ddpm:variance=large or autoregressive:top_p=0.9.
        spacing: the time grid: trailing, flow_match (the released models'), leading, linspace, karras with options
            such as karras:sigma_max=80, or given with one time for each step: given:times=1/0.83/0.4.
        guider: how guidance above 1 joins its two branches: cfg, by the formula above; apg (Sadat et al. 2024) with
            options such as apg:eta=0,threshold=2,momentum=-0.5; zero-star (Fan et al. 2025) such as
            zero-star:zero_steps=1.
        rescale: guidance rescale φ, 0 to 1.
        interval: the times (from, to) at which guidance is used.
        skip_layers: blocks of the network that skip-layer guidance leaves out; 7, 8 and 9 in Stable Diffusion 3.5
            medium. Needs classifier-free guidance.
        skip_scale: scale of skip-layer guidance.
        skip_interval: the shares (from, to) of the steps between which skip-layer guidance is used.
    """

    steps: int = 28
    guidance: float = 4.5
    sampler: str = "euler"
    spacing: str = "trailing"
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    skip_layers: tuple[int, ...] = ()
    skip_scale: float = 2.8
    skip_interval: tuple[float, float] = (0.01, 0.2)
    guider: str = "cfg"

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps must be at least 1 and at most {MOST_STEPS:,}, got {self.steps}")
        if not all(isinstance(text, str) for text in (self.sampler, self.spacing, self.guider)):
            raise ValueError("sampler, spacing and guider must be text, "
                             f"got {self.sampler}, {self.spacing} and {self.guider}")  # fmt: skip
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be a finite number of at least 0, got {self.guidance:g}: 1 is none")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be between 0 and 1, got {self.rescale}")
        for name in ("interval", "skip_interval"):
            ends = tuple(float(end) for end in getattr(self, name))  # JSON gives lists
            object.__setattr__(self, name, ends)
            if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
                raise ValueError(f"{name} must be two numbers, 0 <= from <= to <= 1, got {ends}")
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))
        if self.skip_layers and self.guidance == 1:
            raise ValueError("skip_layers need classifier-free guidance: give a guidance other than 1")
        if not math.isfinite(self.skip_scale):
            raise ValueError(f"skip_scale must be a finite number, got {self.skip_scale}")
        parse_choice(SAMPLERS, "sampler", self.sampler)
        parse_choice(GRIDS, "spacing", self.spacing)
        parse_choice(GUIDERS, "guider", self.guider)
        if self.guider != "cfg" and self.guidance < 1:
            raise ValueError(f"guider {self.guider} needs a guidance above 1, got {self.guidance:g}: take cfg")

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """ValueError if there is a prompt, but the guidance is 0, which would ignore it."""
        if self.guidance == 0 and any(prompts):
            raise ValueError("guidance 0 would ignore the prompt: 1 is none; 0 is the unconditional model, prompt ''")

    @property
    def method(self) -> str:
        """The sampler's name, without its options."""
        return self.sampler.partition(":")[0]

    @property
    def stochastic(self) -> bool:
        """Whether the sampler can draw noise between its steps."""
        return "noise" in inspect.signature(SAMPLERS[self.method]).parameters

    def refuse_noise(self) -> None:
        """ValueError if the sampler can draw noise between its steps."""
        if self.stochastic:
            raise ValueError(f"sampler {self.sampler} draws noise on the way: take euler, heun or dpmpp_2m")

    def walk(
        self, objective: Objective, shift: float | None = None, strength: float = 1.0, backward: bool = False
    ) -> tuple[Walk, Tensor]:
        """The sampler as a function (denoise, z, noise, callback) → z, and its times (steps + 1,), float64 on the host.

        Args:
            objective: what the model was trained on.
            shift: α of the grid; None means that of the training.
            strength: share of the steps that are taken: the last ones, rounded up.
            backward: walk from data to noise, by a deterministic sampler.

        Raises:
            ValueError: in one line, if sampler, spacing, steps, path and target do not fit each other.
        """
        method = parse_choice(SAMPLERS, "sampler", self.sampler)
        grid = parse_choice(GRIDS, "spacing", self.spacing)
        if objective.discrete != (self.method == autoregressive.__name__):
            kind = "a model of codes: take autoregressive" if objective.discrete else "no model of codes"
            raise ValueError(f"sampler {self.sampler} does not fit: this is {kind}")
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
        times = grid(objective.path, self.steps, objective.shift if shift is None else shift)
        times = times[int(self.steps - self.steps * strength) :]
        if backward:
            if self.method not in ("euler", "heun", "midpoint", "reference"):
                raise ValueError(f"sampler {self.sampler} cannot go backward: take euler, heun or midpoint")
            if self.skip_layers:
                raise ValueError("skip_layers cannot go backward: leave them out")
            times = times.flip(0)
        self.check_guider(objective, times, strength, backward)

        def walk(
            denoise: sampler.Denoiser, z: Tensor, noise: sampler.Noise, callback: sampler.Callback | None = None
        ) -> Tensor:
            more = {"noise": noise} if self.stochastic else {}
            return method(denoise, objective.path, z, times, callback=callback, **more)

        pixel = torch.zeros(1, 1, dtype=torch.float64)
        target = type(objective.target).__name__

        def probe(z: Tensor, t: Tensor, end: Tensor | None = None) -> Estimate:
            if not 1e-9 < determinant(objective.path, objective.target, t).abs() < math.inf:  # or NaN
                raise ValueError(f"at t = {t:g} {target} does not determine picture and noise; train on V, say")
            return Estimate(z, z, z if isinstance(objective, LearnedVariance) else None)

        try:  # a dry run on one pixel without a network finds everything that does not fit
            walk(probe, pixel, lambda: pixel)
        except ValueError as error:
            raise ValueError(f"sampler {self.sampler} with {self.spacing} spacing: {error}") from None
        return walk, times

    def guide(self, objective: Objective, times: Tensor) -> Guider | None:
        """A new guider for a walk at these times; none if guidance is off or by the formula.

        Raises:
            ValueError: in one line, if an option is impossible or there are too few steps.
        """
        make = parse_choice(GUIDERS, "guider", self.guider)
        return None if self.guidance == 1 else make(objective.path, objective.target, times)

    def check_guider(self, objective: Objective, times: Tensor, strength: float = 1.0, backward: bool = False) -> None:
        """ValueError, in one line, if the guider fits not its options, the objective, the sampler or the walk."""
        if self.guider == "cfg":
            return
        if objective.discrete or self.method == sampler.meanflow.__name__:
            kind = "codes" if objective.discrete else "average velocities"
            raise ValueError(f"guider {self.guider} is for a velocity at one time, and not for {kind}: take cfg")
        guider = self.guide(objective, times)
        if guider and guider.zero_steps and strength < 1:
            raise ValueError("zero_steps are for a walk that begins at pure noise, not at an image: take zero_steps=0")
        if self.method == reference.__name__ or backward:
            self.check_field(objective, times)

    def check_field(self, objective: Objective, times: Tensor) -> None:
        """ValueError if the velocity at a point and a time depends on the walk that leads there."""
        guider = self.guide(objective, times)
        if guider and (guider.zero_steps or guider.momentum):
            raise ValueError(f"guider {self.guider} depends on the walk, and here only the point and the time may "
                             "count: take momentum=0 or zero_steps=0")  # fmt: skip

    def skip_times(self, times: Tensor) -> tuple[float, float] | None:
        """The first and last t (from, to) at which skip-layer guidance is used; None if there is no such step."""
        first, last = (self.steps * share for share in self.skip_interval)
        inside = [float(t) for i, t in enumerate(times[:-1].float()) if first < i < last]  # the model's t is float32
        return (inside[-1], inside[0]) if inside and self.skip_layers else None


def parse_choice(table: Mapping[str, Callable[..., Any]], kind: str, text: str) -> partial:
    """The function with options that `name` or `name:key=value,key=value` means. ValueError in one line if unknown."""
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
            number = "a whole number" if isinstance(options[key].default, int) else "a number"
            wanted = " or ".join(words) if words else number
            raise ValueError(f"{kind} {name} takes {key} as {wanted}, got {value!r}") from None
    return partial(table[name], **values)


def random_normals(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    """A function that returns fresh normal numbers (B, *shape) at each call.

    Picture i has its own CPU generator, seeded with seeds[i]. The first call returns what `torch.randn(shape,
    generator)` does, so a picture does not depend on its batch.
    """
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: sent(torch.stack([torch.randn(shape, generator=draw) for draw in draws]), device)


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers from the host, on a device. From pinned memory the copy does not wait for the device's work."""
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)
