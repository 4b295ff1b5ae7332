"""At which t the noised latents of a scene decide what it shows, and from which t a model can finish a scene.

    python -m benchmarks.decisions                      # what the latents say
    python -m benchmarks.decisions --model runs/shapes  # and what a model makes of them

First: a scene of one shape is encoded and mixed with noise at t. Its alternatives differ from it in colour, shape or
place alone and are equally likely. The table gives the mean probability of the true one, given the noised latents. No
model can do better. So a training should draw many t where this number rises, and a sampler should take many steps
there.

Second: held-out scenes are mixed with noise at t, and the model walks from there to a picture, with the caption that
says everything. The table gives the share of right pictures by t. Where it is low although the first table is near 1,
the latents say what the scene is and the model does not see it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.following import load_shapes
from cli import Parser, one_line_errors, positive
from data import shapes
from data.examined import Shapes
from data.latents import VAE, Codec
from pipeline import Pipeline
from studies.presentation import table

TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
NOISES = 16  # for each scene
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)  # shares of the steps
Alternatives = Callable[[shapes.Placed], list[shapes.Placed]]


def places(side: int) -> list[tuple[int, int]]:
    """All (top, left) of a shape."""
    line = range(shapes.STEP, shapes.SIDE - shapes.STEP - side + 1, shapes.STEP)
    return [(top, left) for top in line for left in line]


ALTERNATIVES: dict[str, Alternatives] = {
    "colour": lambda one: [one._replace(colour=colour) for colour in shapes.COLOURS],
    "shape": lambda one: [one._replace(shape=shape) for shape in shapes.SHAPES],
    "place": lambda one: [one._replace(top=top, left=left) for top, left in places(one.side)],
}


def encoded(codec: Codec, scenes: list[shapes.Placed]) -> Tensor:
    """The latents (N, C, h, w) of scenes of one shape each."""
    nothing = shapes.Request(())
    drawn = [np.asarray(shapes.picture(shapes.Scene(nothing, (one,)))) for one in scenes]
    return codec.encode(torch.from_numpy(np.stack(drawn)).movedim(-1, 1) / 255)


def certainty(latents: Tensor, true: int, t: float, draw: torch.Generator) -> float:
    """The mean probability of latents[true] given z = (1 − t)·latents[true] + t·ε, if all are equally likely.

    log p(z | x) = −‖z − (1 − t)·x‖² / (2·t²) + constant.
    """
    noise = torch.randn((NOISES, *latents.shape[1:]), generator=draw)
    z = (1 - t) * latents[true] + t * noise
    squares = (z[:, None] - (1 - t) * latents).flatten(2).square().sum(2)  # (NOISES, alternatives)
    return float((-squares / (2 * t**2)).softmax(1)[:, true].mean())


def decided(codec: Codec, scenes: int) -> list[list[str]]:
    """The rows of the first table."""
    numbers, draw = np.random.default_rng(0), torch.Generator().manual_seed(0)
    rows = []
    for size, side in shapes.SIZES.items():
        for kind, alternatives in ALTERNATIVES.items():
            found = np.zeros(len(TIMES))
            for _ in range(scenes):
                top, left = places(side)[int(numbers.integers(len(places(side))))]
                shape, colour = (
                    list(words)[int(numbers.integers(len(words)))] for words in (shapes.SHAPES, shapes.COLOURS)
                )
                one = shapes.Placed(shape, colour, side, top, left)
                others = alternatives(one)
                latents = encoded(codec, others)
                found += [certainty(latents, others.index(one), t, draw) for t in TIMES]
            rows.append([f"{size}: {kind}", *(f"{share:.2f}" for share in found / scenes)])
    return rows


def finished(pipe: Pipeline, scenes: int) -> list[list[str]]:
    """The rows of the second table: t, and the share of right pictures."""
    examined = Shapes.held_out(scenes, scenes)
    pictures = examined.real["held_out"][:scenes]
    sampling = replace(pipe.sampling, steps=20)
    rows = []
    for strength in STRENGTHS:
        _, _, times = pipe.plan(sampling, strength=strength)
        drawn = [
            pipe(examined.prompts[i : i + 50], range(i, min(i + 50, scenes)), sampling=sampling,
                 image=pictures[i : i + 50], strength=strength)
            for i in range(0, scenes, 50)
        ]  # fmt: skip
        right = [verdict.right for verdict in examined.verdicts(torch.cat(drawn).cpu())]
        rows.append([f"{float(times[0]):.2f}", f"{np.mean(right):.0%}"])
    return rows


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, help="a model or run folder")
    p.add_argument("--scenes", type=positive, default=40, help="scenes of each kind; of a model five times as many")
    args = p.parse_args()
    torch.set_grad_enabled(False)
    with one_line_errors(ValueError, FileNotFoundError):
        pipe = load_shapes(args.model) if args.model else None
    codec = pipe.codec if pipe else VAE("assets/shapes/vae")
    print(table(["probability of the true one, at t", *map(str, TIMES)], decided(codec, args.scenes)))
    if pipe:
        print(table(["from t", "right"], finished(pipe, 5 * args.scenes)))


if __name__ == "__main__":
    main()
