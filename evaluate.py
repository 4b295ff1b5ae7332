"""Quality against function evaluations: `python evaluate.py --model runs/a --model runs/b --steps 1,2,4,8,50`.

On the digits, or with `--data shapes` on the shapes: `data/examined.py` says what is asked for and compared with.
"""

import platform
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
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
    natural,
    one_line_errors,
    plain_warnings,
    positive,
    reading_of,
    sampling_of,
)
from data import digits
from data.examined import DATA, Examined, Half
from metrics import report
from metrics.clip_score import clip_score
from metrics.distance import Measure
from metrics.distribution import enough
from metrics.features import CLIPFeatures, FeatureNetwork, load_features
from metrics.figures import sheet_image
from metrics.straightness import path_length, straightness
from metrics.table import Row, table
from pipeline import Pipeline, Reading
from pipeline.sampling import Sampling
from storage.models import find_model

PRINTED = ["model", "sampler", "steps", "evaluations", "accuracy", "distance_ratio", "neighbour_ratio", "duplicates"]


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, action="append", required=True, help="a model or run folder; repeatable")
    p.add_argument("--data", choices=DATA, default="digits", help="what the models draw; default: digits")
    p.add_argument("--steps", default="1,2,4,5,8,10,25,50", help="numbers of sampling steps, with commas")
    add_sampling(p, repeatable=True)
    count = p.add_mutually_exclusive_group()
    count.add_argument("--samples", type=positive, default=1000, help="samples in all; default: 1000")
    count.add_argument("--per-digit", type=positive, help="samples of each digit instead")
    p.add_argument("--seed", type=natural, default=0, help="of the first sample")
    p.add_argument("--reference", choices=["held_out", "train"], default="held_out", help="distances to which half")
    p.add_argument("--features", help="judge:DIR, shapes:DIR, inception:FILE or clip:DIR; default: the data's judge")
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


def examined_of(args: Namespace) -> Examined:
    """The data set with as many prompts as the flags say."""
    if args.per_digit is None:
        return DATA[args.data](args.samples)
    if args.data != "digits":
        raise ValueError(f"--per-digit counts digits; with --data {args.data} give --samples")
    return DATA[args.data](10 * args.per_digit)


def draw(
    pipe: Pipeline,
    sampling: Sampling,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    compared: Callable[[Tensor], Tensor] = digits.reduced,
) -> Drawn:
    """A picture for each prompt, in the form in which it is `compared`, with everything measured on the way."""
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
        pictures.append(compared(images).mul(255).round() / 255)
        lengths.append(path_length(walk))
        bends.append(straightness(walk, tau))
    hook.remove()
    n = len(prompts)
    return Drawn(
        torch.cat(pictures), calls / n, seconds / n, torch.cat(lengths).mean().item(), torch.cat(bends).mean().item()
    )


def row(
    setting: Setting, drawn: Drawn, folder: str, examined: Examined, measure: Measure, clip: CLIPFeatures | None
) -> Row:
    """What was measured of one setting."""
    quality = measure.quality(drawn.pictures, examined.labels)
    if (right := examined.accuracy(drawn.pictures)) is not None:
        quality = quality._replace(accuracy=right)
    return {
        "model": setting.name,
        "folder": folder,
        **asdict(setting.sampling),
        "shift": setting.pipe.shift(),
        "evaluations": drawn.evaluations,
        "samples": len(drawn.pictures),
        "seconds_per_picture": drawn.seconds,
        **quality._asdict(),
        "path_length": drawn.path_length,
        "straightness": drawn.straightness,
        "clip_score": clip and clip_score(clip, drawn.pictures, examined.prompts),
    }


def settings_used(
    args: Namespace, examined: Examined, network: FeatureNetwork, measure: Measure, device: str
) -> dict[str, Any]:
    """What all rows have in common."""
    return {
        "data": args.data,
        "features": network.name,
        "preprocessing": network.preprocessing,
        "reference": args.reference,
        "real_distance": measure.real_distance,
        **examined.settings,
        "first_seed": args.seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


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
        examined = examined_of(args)
        for name, pipe in pipes.items():
            height, width = (side * pipe.codec.factor for side in pipe.latent_size(None, None))
            examined.check(name, (height, width), pipe.codec.pixel_channels)
        settings = settings_of(args, pipes)
        network = load_features(args.features or examined.features)
        clip = CLIPFeatures(args.clip) if args.clip else None
        if clip:
            clip.text(["a picture"])  # a folder without a tokenizer should fail now
        enough(len(examined.prompts), network.num_features)
        other: Half = "train" if args.reference == "held_out" else "held_out"
        measure = Measure(network, examined.real[other], examined.real[args.reference])
        args.out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + len(examined.prompts))
    rows: list[Row] = []
    sheet: dict[tuple[str, int], Tensor] = {}
    for setting in tqdm(settings, desc="evaluating", unit="setting"):
        name, pipe, sampling = setting
        with one_line_errors(ValueError):
            batch_size = args.batch_size or pipe.batch_size()
            drawn = draw(pipe, sampling, examined.prompts, seeds, batch_size, examined.compared)
        if not drawn.pictures.isfinite().all():
            fail(f"{name} draws pictures that are no numbers, by {sampling.sampler} in {sampling.steps} steps", 1)
        rows.append(row(setting, drawn, folders[name], examined, measure, clip))
        series = name if len({s.sampling.sampler for s in settings}) == 1 else f"{name}, {sampling.sampler}"
        sheet[series, sampling.steps] = drawn.pictures[examined.shown]
    real = examined.alike(other)
    record = {
        "settings": settings_used(args, examined, network, measure, how.device),
        "floor": measure.floor(real) if len(real) > network.num_features else None,
        "rows": rows,
    }
    with one_line_errors():
        models, steps = (list(dict.fromkeys(key[i] for key in sheet)) for i in (0, 1))
        image = sheet_image(sheet, cast(list[str], models), cast(list[int], steps), examined.side)
        report.write(record, image, args.out)
    print(table(rows, PRINTED), end="")
    if record["floor"] is not None:
        half = "training" if other == "train" else "held-out"
        print(f"FD ratio of real {half} {examined.amount}: {record['floor']:.2f}")
    print(f"Look at {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
