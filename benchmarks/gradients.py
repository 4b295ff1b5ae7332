"""Guidance by gradients beside classifier-free guidance: what each scale gives.

    python -m benchmarks.gradients digits   # the share of digits that were asked for, and the Fréchet distance
    python -m benchmarks.gradients shapes   # the share of right pictures, by category
    python -m benchmarks.gradients agreement  # the classifier's gradient against what the network knows of the class

Digits: an unconditional model with the classifier of noisy pictures; the same with the judge of clean pictures, once on
the noisy pictures, where it fails, and once on x̂0 through the network; and the conditional model with classifier-free
guidance. The judge also measures, so its own guidance looks better than it is. Shapes: the CLIP of noisy pictures with
the unconditional and with the conditional model, and classifier-free guidance. Results go to runs/gradients/, and for
the digits the curves to --plot. Agreement: of held-out digits at each t, the change of the velocity by the gradient
against the difference of the conditional and the unconditional network: their cosine, and the scale s that brings the
unconditional network nearest to the true velocity.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from baselines.classifier import Classifier
from data import digits
from data.examined import Digits, Examined, Shapes
from data.latents import Pixels
from flow.guidance import Score, of_picture
from flow.sampler import Denoiser
from metrics.figures import MARKERS, PALETTE
from metrics.judge import Judge
from metrics.table import Row
from pipeline import Pipeline, Pull
from pipeline.gradients import pulled
from studies.categories import ByCategory
from studies.measure import AgainstReal, Setting, draw

OUT = Path("runs/gradients")
DIGITS, SHAPES = Path("assets/digits"), Path("assets/shapes")
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
TIMES = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
FREE = {"digits": (1.0, 1.5, 2.0, 3.0, 5.0, 8.0), "shapes": (1.0, 1.5, 2.0, 3.0, 5.0)}


def by_judge(judge: Judge, codec: Pixels, through: bool) -> Callable[[Sequence[str], Denoiser], Score]:
    """ln p of the digit that a prompt names, by the judge of clean pictures: of z as it is, or of x̂0."""

    def score(prompts: Sequence[str], denoise: Denoiser) -> Score:
        labels = torch.tensor([digits.asked_for(prompt) for prompt in prompts])

        def likely(x0: Tensor) -> Tensor:
            logits = judge.logits(x0 / codec.scale + codec.shift)
            return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]

        return of_picture(denoise, likely) if through else lambda z, t: likely(z)

    return score


def digits_settings(pipe: Pipeline, prompts: Sequence[str]) -> list[Setting]:
    """Every way of guidance with every scale, in 50 Euler steps."""
    assert isinstance(pipe.codec, Pixels)
    way = replace(pipe.sampling, steps=50, sampler="euler", guidance=0.0)
    judge = Judge.load(DIGITS / "judge").requires_grad_(False)
    found = [Setting("classifier-free", f"{s:g}", pipe, replace(way, guidance=s)) for s in FREE["digits"]]
    for scale in SCALES:
        guided = pulled(pipe, f"{DIGITS / 'classifier'}:{scale}", None, None, prompts)
        found.append(Setting("classifier of noisy pictures", f"{scale:g}", guided, way))
    for name, through in (("judge of clean pictures, on z", False), ("judge of clean pictures, on x̂0", True)):
        for scale in SCALES:
            guided = pipe.pulled([Pull(by_judge(judge, pipe.codec, through), scale)])
            found.append(Setting(name, f"{scale:g}", guided, way))
    return found


def shapes_settings(pipe: Pipeline, prompts: Sequence[str]) -> list[Setting]:
    """Classifier-free guidance, and the CLIP of noisy pictures on the model with and without its captions."""
    way = replace(pipe.sampling, steps=20, sampler="euler")
    found = [Setting("classifier-free", f"{s:g}", pipe, replace(way, guidance=s)) for s in FREE["shapes"]]
    for name, guidance in (("CLIP, conditional model", 1.0), ("CLIP, unconditional model", 0.0)):
        for scale in SCALES:
            guided = pulled(pipe, None, f"{SHAPES / 'clip'}:{scale}", None, prompts)
            found.append(Setting(name, f"{scale:g}", guided, replace(way, guidance=guidance)))
    return found


def agreement(pipe: Pipeline, seed: int) -> None:
    """Prints how well the classifier's gradient agrees with the network's own knowledge of the class, by t."""
    classifier, held = Classifier.load(DIGITS / "classifier"), digits.load("held_out")
    x0, labels = pipe.codec.encode(held.pixels), held.labels
    condition, null = pipe.condition(Digits.said(labels)), pipe.condition([""] * len(x0))
    generator = torch.Generator().manual_seed(seed)
    print(
        "| t | cosine | best scale | error, unconditional | with s = 1 | conditional |\n|---:|---:|---:|---:|---:|---:|"
    )
    for t in TIMES:
        noise, times = torch.randn(x0.shape, generator=generator), torch.full((len(x0),), t)
        z = (1 - t) * x0 + t * noise  # rectified flow, on which w is z
        gradient = torch.func.grad(lambda z, times=times: classifier.score(z, times, labels).sum())(z)
        change = -t / (1 - t) * gradient
        with torch.no_grad():
            known, plain = pipe.network(z, times, condition), pipe.network(z, times, null)
        true, more = noise - x0, known - plain
        cosine = (more * change).sum() / more.norm() / change.norm()
        best = ((true - plain) * change).sum() / change.square().sum()
        errors = [(v - true).square().mean().item() for v in (plain, plain + change, known)]
        print(f"| {t:g} | {cosine:.2f} | {best:.2f} | {' | '.join(f'{error:.3f}' for error in errors)} |")


def plot(rows: Sequence[Row], file: Path) -> None:
    """The Fréchet distance against the share of digits that were asked for: a line for each way of guidance."""
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        line = [row for row in rows if row["model"] == name]
        x, y = ([row[key] for row in line] for key in ("accuracy", "distance_ratio"))
        axes.plot(x, y, color=PALETTE[i], marker=MARKERS[i], markersize=5, linewidth=1.5, label=name)
        for row, across, up in zip(line, x, y, strict=True):
            axes.annotate(row["folder"], (across, up), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(
        yscale="log", xlabel="share of the digits that were asked for", ylabel="Fréchet distance / that of real digits"
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25, linewidth=0.5, which="both")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, format="png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=[*FREE, "agreement"])
    parser.add_argument("--samples", type=int, default=1000, help="digits for each scale")
    parser.add_argument("--per-category", type=int, default=50, help="shapes of each category for each scale")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts of the shapes, and of the first picture")
    parser.add_argument("--plot", type=Path, help="a PNG file for the curves of the digits")
    args = parser.parse_args()
    if args.data == "agreement":
        agreement(Pipeline.load(DIGITS / "model"), args.seed)
        return
    out = OUT / args.data
    out.mkdir(parents=True, exist_ok=True)
    measured: AgainstReal | ByCategory
    if args.data == "digits":
        examined: Examined = Digits.held_out(args.samples)
        settings = digits_settings(Pipeline.load(DIGITS / "model"), examined.prompts)
        measured = AgainstReal(examined, out, seed=args.seed)
    else:
        examined = Shapes.by_category(args.per_category, args.seed)
        settings = shapes_settings(Pipeline.load(SHAPES / "model"), examined.prompts)
        measured = ByCategory(examined, out, args.seed)
    seconds = {}
    for setting in tqdm(settings, desc="settings"):
        drawn = draw(setting, examined, args.seed, measured.batch_size(setting.pipe))
        measured.add(setting, drawn)
        seconds[setting[:2]] = drawn.seconds
    if args.plot:
        plot(measured.rows, args.plot)
    keys = ("accuracy", "distance_ratio") if args.data == "digits" else (*examined.categories, "overall")
    print(f"| guidance | scale | {' | '.join(keys)} | seconds a picture |\n|---|---:|{'---:|' * (len(keys) + 1)}")
    for row in measured.rows:
        values = [format(row[key], ".2f" if key == "distance_ratio" else ".1%") for key in keys]
        print(f"| {row['model']} | {row['folder']} | {' | '.join(values)} | "
              f"{seconds[row['model'], row['folder']]:.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
