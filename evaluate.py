"""Measures models of the digits: `python evaluate.py --model runs/digits --steps 1,2,4,8,50`."""

import json
from argparse import ArgumentTypeError
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

from cli import Parser, fail, find_model, finite, natural, one_line_errors, positive
from data import digits
from data.pictures import save_png, sheet
from metrics.distance import frechet_distance, measure
from metrics.judge import Judge
from pipeline import Pipeline

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, action="append", required=True, help="a model or run folder; repeatable")
    p.add_argument("--steps", type=str, default="1,2,4,8,25,50", help="numbers of sampling steps, with commas")
    p.add_argument("--guidance", type=finite, help="default: each model's own")
    p.add_argument("--per-digit", type=positive, default=100, help="samples of each digit")
    p.add_argument("--seed", type=natural, default=0, help="of the first sample")
    p.add_argument("--judge", type=Path, default=Path("assets/digits/judge"), help="folder of the judge")
    p.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for results.json, quality.png, sheets")
    return p


def whole_numbers(text: str) -> list[int]:
    """'1,2,4' as numbers; ValueError unless all are at least 1."""
    try:
        return [positive(part) for part in text.split(",")]
    except (ValueError, ArgumentTypeError):
        raise ValueError(f"--steps takes whole numbers of at least 1 such as 1,2,4; got {text}") from None


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        steps = whole_numbers(args.steps)
        judge = Judge.load(args.judge)
        pipes = {str(path): Pipeline.load(find_model(path)) for path in args.model}
        args.out.mkdir(parents=True, exist_ok=True)
    (train, real_labels), (held_out, _) = digits.load("train"), digits.load("held_out")
    real = torch.cat([train[real_labels == label][: args.per_digit] for label in range(10)])
    floor = frechet_distance(judge, real, held_out) / frechet_distance(judge, train, held_out)
    labels = torch.arange(10).repeat_interleave(args.per_digit)
    prompts = [
        digits.captions(int(label), digits.HELD_OUT_TEMPLATES)[i % len(digits.HELD_OUT_TEMPLATES)]
        for i, label in enumerate(labels)
    ]
    for path, pipe in pipes.items():
        if (pipe.codec.pixel_channels, *pipe.latent_size(None, None)) != (1, 8, 8):
            fail(f"{path} does not draw digits of 8×8 grey pixels, which is what the judge knows")
    results = []
    rounds = [(name, pipe, n) for name, pipe in pipes.items() for n in steps]
    sheets = {name: f"{Path(name).name}-{i}" if len(pipes) > 1 else Path(name).name for i, name in enumerate(pipes)}
    for name, pipe, n in tqdm(rounds, desc="evaluating", unit="setting"):
        seeds = range(args.seed, args.seed + len(prompts))
        parts = [
            pipe(prompts[i : i + 100], seeds[i : i + 100], steps=n, guidance=args.guidance)
            for i in range(0, len(prompts), 100)
        ]
        pictures = torch.cat(parts).mul(255).round() / 255  # as the PNG would hold them
        scale = pipe.sampling.guidance if args.guidance is None else args.guidance
        quality = measure(judge, pictures, labels, train, held_out)
        results.append({"model": name, "steps": n, "guidance": scale, "samples": len(prompts)} | quality._asdict())
        shown = pictures.unflatten(0, (10, -1))[:, :10].flatten(0, 1)
        with one_line_errors():
            save_png(sheet(shown, 10, side=40), args.out / f"{sheets[name]}-{n:03d}-steps.png")
    with one_line_errors():
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        plot(results, floor, args.out / "quality.png")
    print("| model | steps | accuracy | FD / FD of real | neighbours | repeats |\n|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['model']} | {r['steps']} | {r['accuracy']:.1%} | {r['distance_ratio']:.2f} | "
            f"{r['neighbour_ratio']:.2f} | {r['duplicates']} |"
        )
    print(f"FD / FD of real, for real training digits, {args.per_digit} of each: {floor:.2f}")


def plot(results: list[dict], floor: float, file: Path) -> None:
    """Distance against steps, one line a model, with what real digits reach."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for model in dict.fromkeys(r["model"] for r in results):
        rows = [r for r in results if r["model"] == model]
        axes.plot([r["steps"] for r in rows], [r["distance_ratio"] for r in rows], "o-", label=model)
    axes.axhline(1, color="grey", linewidth=1, linestyle="--", label="training digits, as they come")
    axes.axhline(floor, color="grey", linewidth=1, linestyle=":", label="training digits, as many of each")
    axes.set(xscale="log", yscale="log", xlabel="Euler steps", ylabel="Fréchet distance / that of real digits")
    ticks = sorted({r["steps"] for r in results})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
