"""What a fact of a caption is worth: how much the least possible loss grows if the fact is left out of the caption.

    python -m benchmarks.facts

Scenes of two shapes with a relation are encoded and mixed with noise at t. All scenes that a caption allows are sampled
and encoded, too, so the best denoiser that knows this caption and nothing else is known: the mean of these latents,
weighted by how well they explain the noised ones. Its loss (of the velocity) is printed, and what is added without a
fact. Only large t are measured: at a small t hardly any sampled scene is close to the noised one.

A fact that is worth much can still be hard to learn: "above" without the order of the two groups tells only their axis.
With `--model` the losses of a model with the whole caption and without a caption are printed, too.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.following import OPPOSITE, load_shapes, related
from cli import Parser, one_line_errors, positive
from data.latents import VAE, Codec
from data.order import Use, stream
from data.shapes import COLOURS, RELATIONS, SHAPES, Request, Scene, picture, place
from pipeline import Pipeline
from studies.presentation import table

TIMES = (0.8, 0.9, 0.97)
SEED = 93
DRAWN = 128  # noised scenes of each caption
ENCODED = 256  # at a time
MODEL = ("the model, with the whole caption", "the model, without a caption")
RELATED = 0.7  # share of pairs whose caption tells a relation, as in `data.shapes.request`


class Part(NamedTuple):
    """Scenes of one caption among those that a vaguer caption allows."""

    latents: Tensor  # (N, numbers)
    share: float


def vaguer(asked: Request) -> dict[str, list[tuple[Request, float]]]:
    """For each fact: the full captions that a caption without it allows, and their probabilities."""
    first, second = asked.groups
    assert asked.relation

    def groups(one: object, two: object = second) -> Request:
        return replace(asked, groups=(one, two))  # type: ignore[arg-type]

    related_ways: list[tuple[Request, float]] = [(replace(asked, relation=r), RELATED / 4) for r in RELATIONS]
    reversed_one = replace(asked, relation=OPPOSITE[asked.relation])
    exchanged = groups(replace(first, colour=second.colour), replace(second, colour=first.colour))
    shapes = [shape for shape in SHAPES if shape != second.shape]
    return {
        "nothing": [(asked, 1.0)],
        "the relation": [*related_ways, (replace(asked, relation=None), 1 - RELATED)],
        "which group comes first in the relation": [(asked, 0.5), (reversed_one, 0.5)],
        "which group has which colour": [(asked, 0.5), (exchanged, 0.5)],
        "the first colour": [(groups(replace(first, colour=c)), 1 / len(COLOURS)) for c in COLOURS],
        "the first shape": [(groups(replace(first, shape=s)), 1 / len(shapes)) for s in shapes],
    }


def encoded(codec: Codec, asked: Request, count: int, draw: np.random.Generator) -> Tensor:
    """The latents of `count` scenes of a caption, (count, numbers)."""
    drawn: list[np.ndarray] = []
    while len(drawn) < count:
        if objects := place(asked, draw):
            drawn.append(np.asarray(picture(Scene(asked, objects))))
    pixels = torch.from_numpy(np.stack(drawn)).movedim(-1, 1) / 255
    return torch.cat([codec.encode(some) for some in pixels.split(ENCODED)]).flatten(1)


def least_loss(x0: Tensor, noise: Tensor, t: float, parts: Sequence[Part]) -> float:
    """The loss ‖(x̂0 − x0)/t‖² per number of the best denoiser of z = (1 − t)·x0 + t·ε, if the data are these parts.

    As the ideal denoiser of a finite data set (Karras et al. 2022, appendix B.3), x̂0 is the mean of x under
    p(x | z) ∝ p(x)·exp(−‖z − (1 − t)·x‖² / (2·t²)), and v̂ − v = (x0 − x̂0)/t.

    Args:
        x0: latents, (n, numbers).
        noise: (n, numbers).
        t: the time.
        parts: the prior p(x), sampled.
    """
    z = (1 - t) * x0 + t * noise
    latents = torch.cat([part.latents for part in parts])
    prior = torch.cat([torch.full((len(p.latents),), p.share / len(p.latents)).log() for p in parts])
    squares = torch.cdist(z.double(), (1 - t) * latents.double()).square()
    weights = (prior - squares / (2 * t**2)).softmax(1)
    return float((weights.float() @ latents - x0).square().mean() / t**2)


@torch.no_grad()
def model_losses(pipe: Pipeline, x0: Tensor, noise: Tensor, caption: str) -> np.ndarray:
    """The loss of a model at TIMES, (len(TIMES),).

    Args:
        pipe: the model.
        x0: latents, (n, numbers).
        noise: (len(TIMES), n, numbers).
        caption: of all of them.
    """
    shape = (len(x0), pipe.network.in_channels, *pipe.latent_size(None, None))
    condition = pipe.condition([caption] * len(x0))
    found = [
        pipe.objective.loss(pipe.network, x0.view(shape), own.view(shape), torch.full((len(x0),), t), condition)
        for t, own in zip(TIMES, noise, strict=True)
    ]
    return torch.stack(found).mean(1).double().numpy()


def measured(codec: Codec, scenes: int, samples: int, pipe: Pipeline | None = None) -> dict[str, list[float]]:
    """For each fact: the least loss at TIMES with a caption without it, (len(TIMES),), averaged over captions.

    With a model also its losses, under the names of MODEL.
    """
    draw, generator = stream(SEED, Use.SCENE, 1), torch.Generator().manual_seed(SEED)
    drawn = (one.request for one in related(SEED, 8 * scenes))
    single = [asked for asked in drawn if all(group.count == 1 for group in asked.groups)][:scenes]
    sums: dict[str, np.ndarray] = {}
    for asked in tqdm(single, desc="captions", leave=False):
        kept = {asked: encoded(codec, asked, samples, draw)}
        x0 = encoded(codec, asked, DRAWN, draw)
        noise = torch.randn((len(TIMES), *x0.shape), generator=generator)
        for name, ways in vaguer(asked).items():
            for way, _ in ways:
                if way not in kept:
                    kept[way] = encoded(codec, way, samples, draw)
            parts = [Part(kept[way], share) for way, share in ways]
            found = [least_loss(x0, own, t, parts) for t, own in zip(TIMES, noise, strict=True)]
            sums[name] = sums.get(name, np.zeros(len(TIMES))) + np.array(found)
        for name, caption in zip(MODEL, (asked.caption(), ""), strict=True):
            if pipe:
                sums[name] = sums.get(name, np.zeros(len(TIMES))) + model_losses(pipe, x0, noise, caption)
    return {name: list(total / len(single)) for name, total in sums.items()}


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--vae", type=Path, default=Path("assets/shapes/vae"), help="the VAE's folder")
    source.add_argument("--model", type=Path, help="a model of the shapes, whose loss is printed beside")
    p.add_argument("--captions", type=positive, default=8, help="their number")
    p.add_argument("--samples", type=positive, default=400, help="scenes of each full caption")
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        pipe = load_shapes(args.model) if args.model else None
        codec = pipe.codec if pipe else VAE(args.vae)
    found = measured(codec, args.captions, args.samples, pipe)
    complete = found.pop("nothing")
    of_model = [[name, *(f"{loss:.4f}" for loss in found.pop(name))] for name in MODEL if name in found]
    rows = [["with the whole caption", *(f"{loss:.4f}" for loss in complete)]]
    for name, losses in found.items():
        added = (loss - least for loss, least in zip(losses, complete, strict=True))
        rows.append([f"without {name}", *(f"{loss:+.4f}" for loss in added)])
    rows += of_model
    print(table(["least loss at t", *map(str, TIMES)], rows))


if __name__ == "__main__":
    main()
