"""Which words of a caption a model of the shapes reads: its loss with the true caption against an altered one.

    python -m benchmarks.following --model assets/shapes/model

Each of some unseen scenes of two groups with a relation is explained by its caption and by captions with one fact
changed: the relation reversed, the colours or the shapes of the groups exchanged, the colour, shape or number of the
first group replaced. Noise and times are the same for all. Printed are the share of scenes for which the true caption
has the lower loss, summed over four t (50 % is chance), by how much, and how far the change moves the text encoders'
states, as a share of their spread over scenes.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from tqdm import tqdm

from cli import Parser, natural, one_line_errors, positive
from data.examined import Shapes
from data.order import Use, stream
from data.shapes import COLOURS, RELATIONS, SHAPES, Request, Scene, picture, scene
from mmdit.network import Condition
from pipeline import Pipeline
from storage.models import find_model

TIMES = (0.45, 0.6, 0.75, 0.9)  # where scenes are decided: benchmarks.decisions
BATCH = 64
OPPOSITE = {
    name: other for name, way in RELATIONS.items() for other, back in RELATIONS.items() if way == (-back[0], -back[1])
}


def related(seed: int, count: int) -> list[Scene]:
    """The first scenes of a seed with a relation between groups of two colours."""
    found: list[Scene] = []
    number = 0
    while len(found) < count:
        drawn = scene(seed, number)
        colours = {group.colour for group in drawn.request.groups}
        if drawn.request.relation and len(colours) == 2:
            found.append(drawn)
        number += 1
    return found


def altered(asked: Request, draw: Generator) -> dict[str, Request]:
    """What is changed → the request with that change."""
    first, second = asked.groups

    def other(words: tuple[str, ...], *taken: str | None) -> str:
        left = [word for word in words if word not in taken]
        return left[int(draw.integers(len(left)))]

    def groups(**change: object) -> Request:
        return replace(asked, groups=(replace(first, **change), second))  # type: ignore[arg-type]

    def exchanged(name: str) -> Request:
        ours, theirs = ({name: getattr(group, name)} for group in asked.groups)
        return replace(asked, groups=(replace(first, **theirs), replace(second, **ours)))

    assert asked.relation
    return {
        "relation reversed": replace(asked, relation=OPPOSITE[asked.relation]),
        "colours exchanged": exchanged("colour"),
        "shapes exchanged": exchanged("shape"),
        "another colour": groups(colour=other(tuple(COLOURS), first.colour, second.colour)),
        "another shape": groups(shape=other(SHAPES, first.shape, second.shape)),
        "another number": groups(count=first.count % 3 + 1),
    }


def losses(pipe: Pipeline, x0: Tensor, noise: Tensor, condition: Condition) -> Tensor:
    """The loss of each picture at each t, (T, N). The noise is (T, N, C, h, w)."""
    found = []
    for t, own in zip(TIMES, noise, strict=True):
        for rows in torch.arange(len(x0)).split(BATCH):
            part = Condition._make(None if field is None else field[rows] for field in condition)
            times = torch.full((len(rows),), t)
            found.append(pipe.objective.loss(pipe.network, x0[rows], own[rows], times, part, None, None))
    return torch.cat(found).view(len(TIMES), len(x0))


def load_shapes(model: Path) -> Pipeline:
    """A model of the shapes, from its folder or a run's. ValueError or FileNotFoundError in one line if it is none."""
    pipe = Pipeline.load(find_model(model))
    size = tuple(side * pipe.codec.factor for side in pipe.latent_size(None, None))
    Shapes([]).check(str(model), size, pipe.codec.pixel_channels)  # type: ignore[arg-type]
    return pipe


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, required=True, help="a model of the shapes: its folder, or a run's")
    p.add_argument("--scenes", type=positive, default=256, help="their number")
    p.add_argument("--seed", type=natural, default=91, help="of the scenes; not that of the training")
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        pipe = load_shapes(args.model)
    drawn = related(args.seed, args.scenes)
    pixels = torch.from_numpy(np.stack([np.asarray(picture(one)) for one in drawn])).movedim(-1, 1) / 255
    x0 = pipe.codec.encode(pixels)
    noise = torch.randn((len(TIMES), *x0.shape), generator=torch.Generator().manual_seed(args.seed))
    draw = stream(args.seed, Use.REQUESTS, 0)
    changes = [altered(one.request, draw) for one in drawn]
    texts = {"": [one.request.caption() for one in drawn]}
    texts |= {name: [change[name].caption() for change in changes] for name in changes[0]}
    conditions = {name: pipe.condition(captions) for name, captions in texts.items()}
    found = {name: losses(pipe, x0, noise, conditions[name]) for name in tqdm(texts, desc="captions", leave=False)}
    true, states = found.pop(""), conditions[""].text.float()
    spread = (states - states.mean(0)).square().mean().sqrt()
    print(f"{'change':<20}{'true is better':>16}{'loss':>10}{'text states':>14}")
    for name, other in found.items():
        better = (other.sum(0) > true.sum(0)).double().mean()
        moved = (conditions[name].text.float() - states).square().mean().sqrt() / spread
        print(f"{name:<20}{better:>16.0%}{float((other - true).mean()):>+10.4f}{float(moved):>14.0%}")


if __name__ == "__main__":
    main()
