"""How long one picture takes from prompt to pixels, warm, at batch 1, on a CPU; models side by side.

    python -m benchmarks.latency --model assets/shapes/model --model assets/shapes/student:1 --threads 1

The models take turns, a picture each, so that a noisy machine slows all alike. The first turns do not count, and text
encoders stay in memory. Every turn encodes its prompt anew; the empty prompt of guidance is encoded as often as in
`sample.py`. Printed are medians over the turns in milliseconds, with the quartiles in brackets: of the whole picture,
and of its parts, which are text encoding, the network's evaluations, decoding, and the rest (noise, sampler, guidance).
"""

import platform
import statistics
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import trange

from cli import Parser, one_line_errors, positive
from pipeline import Pipeline
from storage.models import find_model

PROMPT = "a large red circle"  # texts are padded, so that its words cost nothing
WARM = 3  # turns that do not count
PARTS = ("text", "network", "decoding")


class Timed:
    """A pipeline that measures the seconds of its parts.

    Args:
        pipe: the pipeline, which is changed.
        steps: of the sampler; None means the model's own.

    Raises:
        ValueError: in one line, if the model cannot draw from a prompt alone, or not in so many steps.
    """

    def __init__(self, pipe: Pipeline, steps: int | None = None) -> None:
        self.pipe, self.sampling = pipe, replace(pipe.sampling, steps=steps or pipe.sampling.steps)
        pipe.check_drawn(image=False)
        pipe.refuse_picture()
        pipe.plan(self.sampling)
        pipe.check_prompts(self.sampling, [PROMPT])
        pipe.text.keep(True)
        self.evaluations = 0  # of the last picture, each of both branches of guidance
        self.seconds: dict[str, float] = {}
        pipe.network.register_forward_pre_hook(self._count)
        owners: tuple[tuple[Any, str], ...] = (pipe, "condition"), (pipe.network, "forward"), (pipe.codec, "decode")
        for part, (owner, method) in zip(PARTS, owners, strict=True):
            setattr(owner, method, self._timed(part, getattr(owner, method)))

    def _count(self, network: Any, inputs: Sequence[Any]) -> None:
        self.evaluations += len(inputs[0])

    def _timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def call(*args: Any, **more: Any) -> Any:
            start = time.perf_counter()
            result = work(*args, **more)
            self.seconds[part] += time.perf_counter() - start
            return result

        return call

    def draw(self, turn: int) -> dict[str, float]:
        """Draws a picture. Returns the seconds of the whole and of its parts, by name."""
        self.evaluations, self.seconds = 0, dict.fromkeys(PARTS, 0.0)
        prompt = PROMPT + " " * turn  # the same tokens, but another text: encoders may keep the result of each text
        start = time.perf_counter()
        self.pipe([prompt], [turn], sampling=self.sampling)
        whole = time.perf_counter() - start
        return {"picture": whole, **self.seconds, "rest": whole - sum(self.seconds.values())}


def choice(text: str) -> tuple[Path, int | None]:
    """A parser's `type`: MODEL or MODEL:STEPS. ArgumentTypeError for anything else."""
    path, colon, number = text.rpartition(":")
    try:
        steps = positive(number) if colon else None
    except (ValueError, ArgumentTypeError):
        steps = 0
    if steps == 0 or not text or (colon and not path):
        raise ArgumentTypeError(f"{text!r} is not MODEL or MODEL:STEPS, such as assets/shapes/student:1")
    return Path(path if colon else text), steps


def shown(seconds: Sequence[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, high = np.quantile(seconds, (0.25, 0.75))
    return f"{1000 * statistics.median(seconds):.1f} ({1000 * low:.1f}–{1000 * high:.1f})"


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=choice, action="append", required=True, metavar="MODEL[:STEPS]",
                   help="a model folder or a run's folder, and the steps if not its own; repeatable")  # fmt: skip
    p.add_argument("--turns", type=positive, default=40, help="pictures of each model that count")
    p.add_argument("--threads", type=positive, help="of torch; default: its own choice")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with one_line_errors(ValueError, FileNotFoundError):
        models = [Timed(Pipeline.load(find_model(path)), steps) for path, steps in args.model]
        turns = [
            [model.draw(turn) for model in models] for turn in trange(WARM + args.turns, desc="timing", unit="turn")
        ][WARM:]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {args.turns} turns\n")
    names = list(turns[0][0])
    print(f"| ms | steps | evaluations | {' | '.join(names)} |\n|---|{'---:|' * (2 + len(names))}")
    for (path, _), model, *drawn in zip(args.model, models, *turns, strict=True):
        cells = [shown([one[name] for one in drawn]) for name in names]
        print(f"| {path} | {model.sampling.steps} | {model.evaluations} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
