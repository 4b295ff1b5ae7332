"""Quality against function evaluations: `python evaluate.py --model runs/a --model runs/b --steps 1,2,4,8,50`."""

import platform
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cli import (
    Parser,
    add_reading,
    add_sampling,
    fail,
    find_model,
    natural,
    one_line_errors,
    plain_warnings,
    positive,
    reading_of,
    sampling_of,
)
from data import digits
from metrics import report
from metrics.clip_score import clip_score
from metrics.distance import Measure
from metrics.distribution import enough
from metrics.features import CLIPFeatures, load_features
from metrics.straightness import path_length, straightness
from pipeline import Pipeline, Reading
from sampling import Sampling

SHOWN = 10  # pictures of each setting on the sheet


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, action="append", required=True, help="a model or run folder; repeatable")
    p.add_argument("--steps", default="1,2,4,5,8,10,25,50", help="numbers of sampling steps, with commas")
    add_sampling(p, repeatable=True)
    p.add_argument("--per-digit", type=positive, default=100, help="samples of each digit")
    p.add_argument("--seed", type=natural, default=0, help="of the first sample")
    p.add_argument("--reference", choices=["held_out", "train"], default="held_out", help="distances to which digits")
    p.add_argument("--features", default="judge:assets/digits/judge", help="judge:DIR, inception:FILE or clip:DIR")
    p.add_argument("--clip", type=Path, help="folder of a CLIP model, for the CLIP score")
    p.add_argument("--batch-size", type=positive, help="pictures at a time; default: as many as make 4,096 tokens")
    add_reading(p)
    p.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of results, plot, sheet and report")
    return p


class Setting(NamedTuple):
    """One row of the result."""

    name: str
    pipe: Pipeline
    sampling: Sampling


class Drawn(NamedTuple):
    """Pictures, and how they came about."""

    pictures: Tensor  # (N, C, H, W) in [0, 1], in 256 levels, as a PNG would hold them
    evaluations: float  # of the network, for each picture
    seconds: float  # for each picture
    path_length: float  # means over the pictures, in straight coordinates
    straightness: float


def whole_numbers(text: str) -> list[int]:
    """'1,2,4' as numbers; ValueError unless all are at least 1."""
    try:
        return [positive(part) for part in text.split(",")]
    except (ValueError, ArgumentTypeError):
        raise ValueError(f"--steps takes whole numbers of at least 1 such as 1,2,4; got {text}") from None


def labels(paths: Sequence[Path]) -> list[str]:
    """The paths without the folders that all of them begin with and end with: a/rf/1 and a/edm/1 are rf and edm."""
    parts = [path.parts for path in paths]
    while len(paths) > 1 and min(map(len, parts)) > 1:
        for end in (0, -1):
            if len({part[end] for part in parts}) == 1:
                parts = [part[1:] if end == 0 else part[:-1] for part in parts]
                break
        else:
            break
    return [str(Path(*part)) for part in parts]


def settings_of(args: Namespace, pipes: dict[str, Pipeline]) -> list[Setting]:
    """Every model with every sampler and number of steps; ValueError in one line where they do not fit."""
    found = []
    for name, pipe in pipes.items():
        for sampler in args.sampler or [pipe.sampling.sampler]:
            for steps in whole_numbers(args.steps):
                try:
                    sampling = sampling_of(args, pipe.sampling, sampler=sampler, steps=steps)
                    pipe.plan(sampling)
                except ValueError as error:
                    raise ValueError(f"{name} cannot be sampled so: {error}") from None
                found.append(Setting(name, pipe, sampling))
    return found


def draws_digits(pipes: dict[str, Pipeline]) -> None:
    """ValueError unless the pictures of all models can be averaged to the digits' 8×8 grey pixels."""
    for name, pipe in pipes.items():
        sides = [side * pipe.codec.factor for side in pipe.latent_size(None, None)]
        if any(side % digits.SIDE for side in sides):
            raise ValueError(f"{name} draws {sides[0]}×{sides[1]} pixels, which are no multiples of the digits' 8×8")


def draw(pipe: Pipeline, sampling: Sampling, prompts: Sequence[str], seeds: Sequence[int], batch_size: int) -> Drawn:
    """A picture for each prompt, with everything that is measured on the way."""
    _, _, times = pipe.plan(sampling)
    a, b = pipe.objective.path(times)
    scale, tau = a + b, b / (a + b)
    pictures, lengths, bends, calls, seconds = [], [], [], 0, 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += len(inputs[0])

    hook = cast(nn.Module, pipe.network).register_forward_pre_hook(count)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        walk: list[Tensor] = []
        began = time.perf_counter()
        images = pipe(
            prompts[part],
            seeds[part],
            sampling=sampling,
            callback=lambda done, z, x0, walk=walk: walk.append((z / scale[done]).cpu()),  # type: ignore[misc]
        )
        seconds += time.perf_counter() - began
        pictures.append(digits.reduced(images).mul(255).round() / 255)
        lengths.append(path_length(walk))
        bends.append(straightness(walk, tau))
    hook.remove()
    n = len(prompts)
    return Drawn(
        torch.cat(pictures), calls / n, seconds / n, torch.cat(lengths).mean().item(), torch.cat(bends).mean().item()
    )


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError, FileExistsError, NotADirectoryError):
        how = Reading(**reading_of(args))
        names = labels(args.model)
        if len(set(args.model)) < len(names):
            raise ValueError("the same --model was given twice")
        pipes = {name: Pipeline.load(find_model(path), how) for name, path in zip(names, args.model, strict=True)}
        folders = dict(zip(names, map(str, args.model), strict=True))
        draws_digits(pipes)
        settings = settings_of(args, pipes)
        network = load_features(args.features)
        clip = CLIPFeatures(args.clip) if args.clip else None
        if clip:
            clip.text(["a picture"])  # a folder without a tokenizer should fail now
        enough(10 * args.per_digit, network.num_features)
        halves = [digits.load("train"), digits.load("held_out")]
        other, reference = halves if args.reference == "held_out" else halves[::-1]
        measure = Measure(network, other.pixels, reference.pixels)
        args.out.mkdir(parents=True, exist_ok=True)
    real = torch.cat([other.pixels[other.labels == label][: args.per_digit] for label in range(10)])
    asked = torch.arange(10).repeat_interleave(args.per_digit)
    templates = digits.HELD_OUT_TEMPLATES
    prompts = [digits.captions(int(label), templates)[i % len(templates)] for i, label in enumerate(asked)]
    seeds = range(args.seed, args.seed + len(prompts))
    rows: list[dict[str, Any]] = []
    sheet: dict[tuple[str, int], Tensor] = {}
    for name, pipe, sampling in tqdm(settings, desc="evaluating", unit="setting"):
        with one_line_errors(ValueError):
            drawn = draw(pipe, sampling, prompts, seeds, args.batch_size or pipe.batch_size())
        if not drawn.pictures.isfinite().all():
            fail(f"{name} draws pictures that are no numbers, by {sampling.sampler} in {sampling.steps} steps", 1)
        rows.append(
            {
                "model": name,
                "folder": folders[name],
                **asdict(sampling),
                "shift": pipe.shift(),
                "evaluations": drawn.evaluations,
                "samples": len(prompts),
                "seconds_per_picture": drawn.seconds,
                **measure.quality(drawn.pictures, asked)._asdict(),
                "path_length": drawn.path_length,
                "straightness": drawn.straightness,
                "clip_score": clip and clip_score(clip, drawn.pictures, prompts),
            }
        )
        series = name if len({s.sampling.sampler for s in settings}) == 1 else f"{name}, {sampling.sampler}"
        shown = drawn.pictures.unflatten(0, (10, -1))[:, 0]  # one of each digit
        sheet[series, sampling.steps] = shown[:SHOWN]
    record = {
        "settings": {
            "features": network.name,
            "preprocessing": network.preprocessing,
            "reference": args.reference,
            "real_distance": measure.real_distance,
            "per_digit": args.per_digit,
            "first_seed": args.seed,
            "captions": list(templates),
            "device": how.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
        "floor": measure.floor(real) if len(real) > network.num_features else None,
        "rows": rows,
    }
    with one_line_errors():
        models, steps = (list(dict.fromkeys(key[i] for key in sheet)) for i in (0, 1))
        report.write(record, report.sheet_image(sheet, cast(list[str], models), cast(list[int], steps), 32), args.out)
    columns = [
        "model",
        "sampler",
        "steps",
        "evaluations",
        "accuracy",
        "distance_ratio",
        "neighbour_ratio",
        "duplicates",
    ]
    print(report.table(rows, columns), end="")
    if record["floor"] is not None:
        print(f"FD ratio of real {'training' if args.reference == 'held_out' else 'held-out'} digits, "
              f"up to {args.per_digit} of each: {record['floor']:.2f}")  # fmt: skip
    print(f"Look at {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
