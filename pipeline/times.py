"""Times that suit a model in few steps of Euler's method: recorded, searched, tested on other noise (`flow.search`)."""

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
    """What is searched.

    Args:
        steps: of the walks that are to be good, one search for each.
        num: of all walks; the first half to search on, the others to test on.
        fine: steps of the walks that count as right, spaced as the model's own.
        seed: walk i starts from the noise of seed + i.
        batch_size: walks at a time; none takes the pipeline's.
        sampling: the model's, by Euler's method. Times written out (`given`) are left for trailing ones.

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
                raise ValueError(f"steps must be from 1 to the {self.fine} of the fine walk, got {steps}: raise --fine")
        if self.sampling.sampler != "euler":
            raise ValueError(f"times are searched for sampler euler, not for {self.sampling.sampler}")
        if self.sampling.skip_layers:
            raise ValueError("skip-layer guidance works by shares of the steps, which fine and few steps do not share")
        if self.sampling.spacing.partition(":")[0] == "given":
            object.__setattr__(self, "sampling", replace(self.sampling, spacing="trailing"))

    def spaced(self, steps: int, spacing: str | None = None) -> Sampling:
        """The sampling in so many steps; none takes its own spacing."""
        return replace(self.sampling, steps=steps, spacing=spacing or self.sampling.spacing)


class Batch(NamedTuple):
    """Walks at a time: what starts them, what guides them and where the fine one ends."""

    noise: Tensor  # (B, C, h, w)
    denoise: Denoiser
    end: Tensor  # (B, C, h, w)


class GridSearch:
    """Records, searches and tests. ValueError in one line for what does not fit the model.

    Args:
        pipe: the model.
        captions: what the walks draw.
        request: what is searched.
    """

    def __init__(self, pipe: Pipeline, captions: Captions, request: Request) -> None:
        self.pipe, self.captions, self.request = pipe, captions, request
        self.path = pipe.objective.path
        self.latent, _, self.times = pipe.plan(request.spaced(request.fine))
        for steps in request.steps:
            pipe.plan(request.spaced(steps))

    @torch.inference_mode()
    def run(self) -> list[dict[str, Any]]:
        """For each number of steps: the spacing found, and the distances on the test half by name of the spacing.

        A distance is the root mean square over walks and latent values between the end of a walk and the fine one's.
        """
        half, num = self.request.num // 2, self.request.num
        with tqdm(total=num * self.request.fine, desc="fine walks", unit="step", leave=False) as bar:
            search, cost = self._recorded(range(half), bar)
            test, _ = self._recorded(range(half, num), bar)
        return [self._searched(steps, search, test, cost) for steps in self.request.steps]

    def _recorded(self, numbers: range, bar: tqdm) -> tuple[list[Batch], Tensor]:
        """The fine walks of these numbers, and the mean cost of each step along them, (fine, fine + 1)."""
        size = self.request.batch_size or self.pipe.batch_size()
        batches, total = [], torch.zeros(self.request.fine, self.request.fine + 1, dtype=torch.float64)
        times = self.times.to(self.pipe.device)
        for part in (numbers[i : i + size] for i in range(0, len(numbers), size)):
            seeds = [self.request.seed + number for number in part]
            noise = random_normals(seeds, (self.pipe.network.in_channels, *self.latent), self.pipe.device)()
            prompts = [self.captions[number] for number in part]
            denoise = self.pipe.denoiser(prompts, "", self.request.spaced(self.request.fine), times)

            def told(done: int, z: Tensor, x0: Tensor, walks: int = len(part)) -> None:
                bar.update(walks)

            fine = record(denoise, self.path, self.pipe.scale_at(times[0]) * noise, times, told)
            if not fine.states[-1].isfinite().all():
                raise ValueError("the network overflowed: take bfloat16 or float32, or less guidance")
            total += costs(fine) * len(part) / len(numbers)
            batches.append(Batch(noise, denoise, fine.states[-1].clone()))
        return batches, total

    def _distance(self, batches: Sequence[Batch], times: Tensor, callback: Callback | None = None) -> float:
        """How far from the fine ends walks on these times end, in latents."""
        times = times.to(self.pipe.device)
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
        with suppress(ValueError):  # a target that tells nothing at pure noise cannot begin there
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
    """Distances on the test half, and below them what to copy."""
    names = list(found[0]["distance"])
    title = f"distance to the end of the fine walk (rms); own: {found[0]['own']}"
    head = f"{'steps':>5}" + "".join(f"{name:>10}" for name in names)
    rows = [f"{row['steps']:5}" + "".join(f"{row['distance'][name]:10.4f}" for name in names) for row in found]
    flags = [f"--sampler euler --steps {row['steps']} --spacing {row['spacing']}" for row in found]
    return "\n".join([title, head, *rows, *flags])
