"""Digits of 4 × 4 pixels enlarged to 8 × 8: what a sampler, a regressor and interpolation make of them.

    python train.py fit --config configs/digits.yaml --config configs/picture/superresolution.yaml \\
        --run.folder runs/upscaler --run.validate_every 5000
    python train.py fit --config configs/digits.yaml --config configs/picture/superresolution.yaml \\
        --config configs/picture/regressor.yaml --run.folder runs/regressor --run.validate_every 5000
    python train.py fit --config configs/digits.yaml --config configs/picture/small.yaml --run.folder runs/small \\
        --run.validate_every 5000
    python -m benchmarks.superresolution

Three tables. Held-out digits made smaller and enlarged again: the judge's accuracy, the Fréchet distance over that of
real digits, the PSNR, and the error of the result made smaller again. The perception–distortion curve: the mean of N
samples, whose square error over the regressor's is 1 + 1/N if the samples are those of the posterior (Whang et al.
2022). And the cascade: what the small model draws, enlarged with noise of several levels added.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import digits
from data.degrade import enlarged
from data.examined import Digits
from data.raw.pictures import save_png, sheet
from metrics.distance import Measure
from metrics.features import load_features
from pipeline import Pipeline

ROOT = Path("runs")
SAMPLES = (1, 2, 4, 8, 16)
LEVELS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
SIDE, SHOWN = 4, 12


def drawn(pipe: Pipeline, prompts: Sequence[str], pictures: Tensor, first_seed: int, level: float = 0.0) -> Tensor:
    """One sample for each picture."""
    found, size = [], pipe.batch_size()
    for start in range(0, len(prompts), size):
        part = slice(start, min(start + size, len(prompts)))
        seeds = range(first_seed + part.start, first_seed + part.stop)
        found.append(pipe(prompts[part], seeds, picture=pictures[part], level=level))
    return torch.cat(found)


def psnr(error: Tensor) -> float:
    """In dB, of mean square errors (N,) of pictures in [0, 1]: the mean over the pictures' own."""
    return float((-10 * error.clamp(min=1e-9).log10()).mean())


def rows(header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}")
    print(*(f"| {' | '.join(row)} |" for row in body), sep="\n", end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("upscaler", "regressor", "small"):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / name)
    parser.add_argument("--samples", type=int, default=1000, help="pictures of the cascade")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="a PNG file: small, bicubic, regressor, three samples, real")
    args = parser.parse_args()
    upscaler, regressor, small = (Pipeline.load(path) for path in (args.upscaler, args.regressor, args.small))
    for pipe in (upscaler, small):
        pipe.sampling = type(pipe.sampling)(steps=args.steps, guidance=1.0)
    judge = load_features(Digits.features)
    real, labels = digits.load("held_out")
    train = digits.load("train")
    measure = Measure(judge, train.pixels, real)
    captions = Digits.said(labels)
    tiny = digits.resized(real, SIDE, 1)

    def quality(pictures: Tensor, asked: Tensor) -> list[str]:
        found = measure.quality(pictures, asked)
        return [f"{found.accuracy:.1%}", f"{found.distance_ratio:.2f}"]

    draws = torch.stack([drawn(upscaler, captions, tiny, args.seed + 1000 * i)
                         for i in tqdm(range(max(SAMPLES)), desc="samples")])  # fmt: skip
    mean = drawn(regressor, captions, tiny, args.seed)
    body = []
    for name, each in (
        ("bicubic", enlarged(tiny, 8, 8)),
        ("regressor", mean),
        ("one sample", draws[0]),
        ("real", real),
    ):
        error = (each - real).square().mean((1, 2, 3))
        again = (digits.resized(each, SIDE, 1) - tiny).square().mean((1, 2, 3))
        dB = ["–", "–"] if name == "real" else [f"{psnr(error):.1f} dB", f"{psnr(again):.1f} dB"]
        body.append([name, *quality(each, labels), *dB])
    rows(["", "right", "FD ratio", "PSNR", "PSNR, made smaller again"], body)

    if args.sheet:
        shown = [enlarged(tiny, 8, 8), mean, *draws[:3], real]
        nearest = tiny.repeat_interleave(2, -1).repeat_interleave(2, -2)
        some = torch.cat([each[:SHOWN] for each in (nearest, *shown)])
        save_png(sheet(some, SHOWN), args.sheet)

    base = (mean - real).square().mean()
    body = []
    for count in SAMPLES:
        groups = draws.unflatten(0, (-1, count)).mean(1)  # (groups, N, 1, 8, 8)
        ratio = float((groups - real).square().mean() / base)
        body.append([str(count), f"{ratio:.3f}", f"{1 + 1 / count:.3f}", *quality(groups[0], labels)])
    rows(["mean of N samples", "square error over the regressor's", "1 + 1/N", "right", "FD ratio"], body)

    asked = Digits.held_out(args.samples)
    first = []
    for start in range(0, args.samples, small.batch_size()):
        part = slice(start, min(start + small.batch_size(), args.samples))
        first.append(small(asked.prompts[part], range(args.seed + part.start, args.seed + part.stop)))
    pictures = torch.cat(first)
    body = []
    for level in LEVELS:
        large = drawn(upscaler, asked.prompts, pictures, args.seed, level)
        body.append([f"{level:g}", *quality(large, asked.labels)])
    rows(["noise added to the small picture", "right", "FD ratio"], body)


if __name__ == "__main__":
    main()
