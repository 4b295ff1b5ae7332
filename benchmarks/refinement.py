"""Deblurring by stochastic refinement (Whang et al. 2022): the plane of perception and distortion.

    python train.py fit --config configs/digits.yaml --config configs/picture/deblurring.yaml \\
        --config configs/picture/regressor.yaml --run.folder runs/deblurring-regressor --run.steps 1000 \\
        --run.validate_every 500
    python train.py fit --config configs/digits.yaml --config configs/picture/deblurring.yaml \\
        --config configs/picture/residual.yaml --run.folder runs/refined --run.steps 1000 --run.validate_every 500
    python train.py fit --config configs/digits.yaml --config configs/picture/deblurring.yaml \\
        --run.folder runs/deblurring --run.steps 1000 --run.validate_every 500
    python -m benchmarks.refinement

The regressor gives the mean of all pictures that a blurred one may come from, one model draws what it leaves, the other
one draws whole pictures. Held-out digits are blurred as in the training and made sharp with their captions. Three
tables: the judge's accuracy, the Fréchet distance over that of real digits, the PSNR, and that of the result blurred
again against the input (consistency); the mean of N samples, whose square error over the regressor's is 1 + 1/N if they
are those of the posterior; and one sample in few steps and many.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.superresolution import drawn, psnr, rows
from data import digits
from data.degrade import Degrade
from data.examined import Digits
from data.raw.pictures import save_png, sheet
from metrics.distance import Measure
from metrics.features import load_features
from metrics.figures import MARKERS, PALETTE
from pipeline import Pipeline

SAMPLES = (1, 2, 4, 8, 16)
STEPS = (1, 2, 4, 8, 20, 50)
SHOWN = 12
NAMES = {"plain": "whole pictures", "refined": "residuals"}


class Point(NamedTuple):
    """Pictures on the plane."""

    right: float
    ratio: float  # Fréchet distance over that of real digits
    psnr: float
    error: float  # mean square error
    again: float  # PSNR of the picture blurred again, against the input

    def cells(self) -> list[str]:
        return [f"{self.right:.1%}", f"{self.ratio:.2f}", f"{self.psnr:.1f} dB", f"{self.again:.1f} dB"]


def plot(single: dict[str, Point], means: dict[str, list[Point]], steps: dict[str, list[Point]], file: Path) -> None:
    """The Fréchet distance against the PSNR: means of N samples, one sample in few and many steps, input and mean."""
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    kinds = (
        (means, SAMPLES, "-", "mean of N samples", "N", (4, 5)),
        (steps, STEPS, ":", "one sample in k steps", "k", (-34, -3)),
    )
    for i, (name, label) in enumerate(NAMES.items()):
        for found, counts, style, what, letter, off in kinds:
            x, y = ([getattr(point, key) for point in found[name]] for key in ("psnr", "ratio"))
            look: dict[str, Any] = {"color": PALETTE[i], "linestyle": style, "marker": MARKERS[i], "markersize": 4}
            axes.plot(x, y, label=f"{label}: {what}", **look)
            for end in (0, -1):
                where: dict[str, Any] = {"xytext": off, "textcoords": "offset points", "fontsize": "small"}
                axes.annotate(f"{letter} = {counts[end]}", (x[end], y[end]), color=PALETTE[i], **where)
    mean, given = single["regressor"], single["input"]
    axes.scatter(mean.psnr, mean.ratio, color="black", marker="*", s=70, label="regressor", zorder=3)
    axes.plot([], [], " ", label=f"input, outside: {given.psnr:.1f} dB, {given.ratio:.1f}")
    axes.set(xlabel="PSNR, dB (distortion)", ylabel="Fréchet distance over that of real digits (perception)",
             title="Blurred digits made sharp")  # fmt: skip
    axes.margins(0.1)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, folder in (("regressor", "deblurring-regressor"), ("plain", "deblurring"), ("refined", "refined")):
        parser.add_argument(f"--{name}", type=Path, default=Path("runs") / folder)
    parser.add_argument("--blur", type=float, default=1.5, help="data.degrade.blur of the trainings")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="a PNG file: the plane of perception and distortion")
    parser.add_argument("--sheet", type=Path, help="a PNG file: blurred, regressor, plain, refined, real")
    args = parser.parse_args()
    regressor, *models = (Pipeline.load(path) for path in (args.regressor, args.plain, args.refined))
    pipes = dict(zip(NAMES, models, strict=True))
    if pipes["plain"].regressor or not (under := pipes["refined"].regressor):
        parser.error("--refined must be a model of residuals, and --plain one of whole pictures")
    degrade = Degrade(1, blur=args.blur)
    real, labels = digits.load("held_out")
    measure = Measure(load_features(Digits.features), digits.load("train").pixels, real)
    captions, blurred = Digits.said(labels), degrade.smaller(real)

    def point(pictures: Tensor) -> Point:
        quality, error = measure.quality(pictures, labels), (pictures - real).square().mean((1, 2, 3))
        again = (degrade.smaller(pictures) - blurred).square().mean((1, 2, 3))
        assert quality.accuracy is not None
        assert quality.distance_ratio is not None
        return Point(quality.accuracy, quality.distance_ratio, psnr(error), float(error.mean()), psnr(again))

    def sampled(name: str, steps: int, seed: int) -> Tensor:
        pipe = pipes[name]
        pipe.sampling = replace(pipe.sampling, steps=steps, guidance=1.0)
        return drawn(pipe, captions, blurred, seed)

    mean = drawn(regressor, captions, blurred, args.seed)
    single = {"input": point(blurred), "regressor": point(mean)}
    draws: dict[str, Tensor] = {}
    means: dict[str, list[Point]] = {}
    steps: dict[str, list[Point]] = {}
    for name, label in NAMES.items():
        seeds = [args.seed + 1000 * i for i in range(max(SAMPLES))]
        draws[name] = torch.stack([sampled(name, args.steps, seed) for seed in tqdm(seeds, desc=label)])
        means[name] = [point(draws[name][:count].mean(0)) for count in SAMPLES]
        steps[name] = [point(sampled(name, count, args.seed)) for count in tqdm(STEPS, desc="steps")]

    codec = pipes["refined"].codec
    x0 = codec.encode(real)
    condition = pipes["refined"].condition(captions)._replace(picture=codec.encode(blurred))
    left = under.residual(condition, x0.shape).of(x0).square().mean().sqrt()
    print(f"Standard deviation of the residuals: 1 in the training, {left:.2f} of the held-out digits.\n")

    table = [[name, *found.cells()] for name, found in single.items()]
    table += [[f"one sample of {label}", *means[name][0].cells()] for name, label in NAMES.items()]
    columns = ["right", "FD ratio", "PSNR", "PSNR, blurred again"]
    rows(["", *columns], table)

    base = single["regressor"].error
    table = []
    for i, count in enumerate(SAMPLES):
        row = [str(count), f"{1 + 1 / count:.2f}"]
        for name in NAMES:
            groups = draws[name].unflatten(0, (-1, count)).mean(1)  # (groups, N, 1, 8, 8)
            row += [f"{float((groups - real).square().mean()) / base:.2f}", *means[name][i].cells()[1:3]]
        table.append(row)
    heads = [f"{what}, {label}" for label in NAMES.values() for what in ("square error", "FD ratio", "PSNR")]
    rows(["mean of N samples", "1 + 1/N", *heads], table)

    table = [
        [str(count), *(cell for name in NAMES for cell in steps[name][i].cells()[1:3])]
        for i, count in enumerate(STEPS)
    ]  # fmt: skip
    rows(["steps", *(head for head in heads if "square" not in head)], table)

    if args.plot:
        plot(single, means, steps, args.plot)
    if args.sheet:
        shown: Sequence[Tensor] = (blurred, mean, *(draws[name][0] for name in NAMES), real)
        save_png(sheet(torch.cat([each[:SHOWN] for each in shown]), SHOWN), args.sheet)


if __name__ == "__main__":
    main()
