"""Searches the best times for a few steps of Euler's method and tests them on other noise (`flow.search`)."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from flow.grid import given
from flow.sampler import Callback, Denoiser, euler
from flow.search import cheapest, coordinate_search, costs, record
from pipeline import Pipeline
from pipeline.pairs import Captions
from pipeline.sampling import Sampling, random_normals


@dataclass(frozen=True)
class Request:
    """The settings of a search. A walk is one run of the sampler, from noise to a picture.

    Args:
        steps: the numbers of steps, one search for each.
        num: number of all walks; the first half is for the search, the other half for the test.
        fine: steps of the reference walks, on the model's own time grid.
        seed: walk i starts from the noise of seed + i.
        batch_size: walks at a time; None means the pipeline's batch size.
        sampling: the model's, with Euler's method. Trailing spacing takes the place of `given` times.

    Raises:
        ValueError: in one line, if these do not fit each other.
    """

    steps: tuple[int, ...]
    num: int
    fine: int
    seed: int
    batch_size: int | None
    sampling: Sampling

    def __post_init__(self) -> None:
        if self.num < 2:
            raise ValueError(f"num must be at least 2, half to search on and half to test on, got {self.num}")
        for steps in self.steps:
            if not 1 <= steps <= self.fine:
                raise ValueError(
                    f"steps must be from 1 to the {self.fine} of the reference walk, got {steps}: raise --fine"
                )
        if self.sampling.sampler != "euler":
            raise ValueError(f"times are searched for sampler euler, not for {self.sampling.sampler}")
        if self.sampling.skip_layers:
            raise ValueError("skip-layer guidance depends on the number of steps: search without --skip-layers")
        if self.sampling.spacing.partition(":")[0] == "given":
            object.__setattr__(self, "sampling", replace(self.sampling, spacing="trailing"))

    def spaced(self, steps: int, spacing: str | None = None) -> Sampling:
        """The sampling with this number of steps. The spacing None means its own."""
        return replace(self.sampling, steps=steps, spacing=spacing or self.sampling.spacing)


class Batch(NamedTuple):
    """A batch of walks: their noise, their denoiser and the ends of the reference walks."""

    noise: Tensor  # (B, C, h, w)
    denoise: Denoiser
    end: Tensor  # (B, C, h, w)


class GridSearch:
    """Records reference walks, searches times and tests them. ValueError in one line if the request does not fit.

    Args:
        pipe: the model.
        captions: the prompts.
        request: the settings.
    """

    def __init__(self, pipe: Pipeline, captions: Captions, request: Request) -> None:
        pipe.refuse_codes()
        self.pipe, self.captions, self.request = pipe, captions, request
        self.path = pipe.objective.path
        self.latent, _, self.times = pipe.plan(request.spaced(request.fine))
        request.sampling.check_field(pipe.objective, self.times)
        for steps in request.steps:
            pipe.plan(request.spaced(steps))

    @torch.inference_mode()
    def run(self) -> list[dict[str, Any]]:
        """For each number of steps: the spacing found, and the distance on the test half for each spacing.

        The distance is the root mean square, over walks and latents, between the ends of a walk and of its reference.
        """
        half, num = self.request.num // 2, self.request.num
        with tqdm(total=num * self.request.fine, desc="reference walks", unit="step", leave=False) as bar:
            search, cost = self._recorded(range(half), bar)
            test, _ = self._recorded(range(half, num), bar)
        return [self._searched(steps, search, test, cost) for steps in self.request.steps]

    def _recorded(self, numbers: range, bar: tqdm) -> tuple[list[Batch], Tensor]:
        """The reference walks with these numbers, and the mean cost of each step along them, (fine, fine + 1)."""
        size = self.request.batch_size or self.pipe.batch_size()
        batches, total = [], torch.zeros(self.request.fine, self.request.fine + 1, dtype=torch.float64)
        for part in (numbers[i : i + size] for i in range(0, len(numbers), size)):
            seeds = [self.request.seed + number for number in part]
            noise = random_normals(seeds, (self.pipe.network.in_channels, *self.latent), self.pipe.device)()
            prompts = [self.captions[number] for number in part]
            denoise = self.pipe.denoiser(prompts, "", self.request.spaced(self.request.fine), self.times)

            def on_step(done: int, z: Tensor, x0: Tensor, walks: int = len(part)) -> None:
                bar.update(walks)

            fine = record(denoise, self.path, self.pipe.scale_at(self.times[0]) * noise, self.times, on_step)
            if not fine.states[-1].isfinite().all():
                raise ValueError("the network overflowed: take bfloat16 or float32, or less guidance")
            total += costs(fine) * len(part) / len(numbers)
            batches.append(Batch(noise, denoise, fine.states[-1].clone()))
        return batches, total

    def _distance(self, batches: Sequence[Batch], times: Tensor, callback: Callback | None = None) -> float:
        """The distance of walks on these times to the reference walks, in latents."""
        a, b = self.path(times[-1])
        squares = torch.zeros((), dtype=torch.float64)
        for noise, denoise, end in batches:
            w = euler(denoise, self.path, self.pipe.scale_at(times[0]) * noise, times, callback) / (a + b)
            squares += (w - end).double().square().sum().cpu()
        return float((squares / sum(batch.end.numel() for batch in batches)).sqrt())

    def _searched(self, steps: int, search: Sequence[Batch], test: Sequence[Batch], cost: Tensor) -> dict[str, Any]:
        request, objective = self.request, self.pipe.objective
        with tqdm(desc=f"searching {steps} steps", unit="step", leave=False) as bar:

            def error(stops: Sequence[int]) -> float:
                return self._distance(search, self.times[list(stops)], lambda *_: bar.update())

            even = [round(i * request.fine / steps) for i in range(steps + 1)]
            stops = coordinate_search(error, min(cheapest(cost, steps), even, key=error))
        written = "/".join(f"{t:.6g}" for t in self.times[stops[:-1]].tolist())
        rows = {}
        with suppress(ValueError):  # some targets do not determine the picture at pure noise
            rows["uniform"] = request.spaced(steps, "trailing").walk(objective, 1.0)[1]
        rows["own"] = self.pipe.plan(request.spaced(steps))[2]
        rows["searched"] = given(self.path, steps, times=written)
        return {
            "steps": steps,
            "spacing": f"given:times={written}",
            "own": request.sampling.spacing,
            "distance": {name: self._distance(test, times) for name, times in rows.items()},
        }


def table(found: Sequence[dict[str, Any]]) -> str:
    """The distances on the test half, followed by the flags to copy."""
    names = list(found[0]["distance"])
    title = f"distance to the end of the reference walk (rms); own: {found[0]['own']}"
    head = f"{'steps':>5}" + "".join(f"{name:>10}" for name in names)
    rows = [f"{row['steps']:5}" + "".join(f"{row['distance'][name]:10.4f}" for name in names) for row in found]
    flags = [f"--sampler euler --steps {row['steps']} --spacing {row['spacing']}" for row in found]
    return "\n".join([title, head, *rows, *flags])
