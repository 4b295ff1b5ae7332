"""Can the network use a fact, if its condition says it plainly? A model of the shapes is trained further to find out.

    python -m benchmarks.conditioning --model assets/shapes/model --condition facts --min-t 0.8

The scenes have two groups and a relation. With `--condition caption` the network gets their captions. With `facts` it
gets one token for each group in the caption's place: the sum of a fixed random vector for each fact, which are shape,
colour, number, size, and the half of the picture in which the group lies. `--place-scale` multiplies the vectors of the
halves.

A copy of the network is trained on them, at t of at least `--min-t`. For other scenes the command prints how often the
right condition has a lower loss than one with the relation reversed or the colours exchanged (50 % is chance), and by
how much. It also prints how far reversing the relation moves the condition.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.following import OPPOSITE, load_shapes, related
from cli import Parser, natural, one_line_errors, positive
from data.shapes import COLOURS, NUMBERS, RELATIONS, SHAPES, SIZES, Request, picture
from mmdit.network import Condition
from pipeline import Pipeline
from studies.presentation import table

TIMES = (0.75, 0.9, 0.97)
FACTS = (*SHAPES, *COLOURS, *SIZES, *NUMBERS[1:])
TRAINED, TESTED = 93, 91  # seeds of the scenes
BATCH, ENCODED = 32, 256
Conditions = Callable[[list[Request]], Condition]


def facts(asked: Request) -> Tensor:
    """The facts of each group, (2, len(FACTS) + 2): 0 or 1 for each of FACTS, then down and right, each −1, 0 or 1."""
    assert asked.relation
    down, right = RELATIONS[asked.relation]
    rows = []
    for group, sign in zip(asked.groups, (-1, 1), strict=True):  # the first group above: it lies up, −1
        named = {group.shape, group.colour, group.size, NUMBERS[group.count]}
        rows.append([*(float(fact in named) for fact in FACTS), sign * down, sign * right])
    return torch.tensor(rows)


def from_facts(pipe: Pipeline, place_scale: float = 1.0) -> Conditions:
    """Conditions of two tokens of facts, and zeros otherwise. The vectors of places are multiplied by a scale."""
    empty = pipe.condition([""])
    vectors = torch.randn(len(FACTS) + 2, pipe.network.text_dim, generator=torch.Generator().manual_seed(0))
    vectors[-2:] *= place_scale

    def conditions(asked: list[Request]) -> Condition:
        text = torch.zeros(len(asked), *empty.text.shape[1:])
        text[:, :2] = torch.stack([facts(one) for one in asked]) @ vectors
        return Condition(text, torch.zeros(len(asked), *empty.pooled.shape[1:]))

    return conditions


def from_captions(pipe: Pipeline) -> Conditions:
    """Conditions of the captions, by the model's text encoders."""
    return lambda asked: pipe.condition([one.caption() for one in asked])


def reversed_relation(asked: Request) -> Request:
    assert asked.relation
    return replace(asked, relation=OPPOSITE[asked.relation])


def exchanged_colours(asked: Request) -> Request:
    first, second = asked.groups
    return replace(asked, groups=(replace(first, colour=second.colour), replace(second, colour=first.colour)))


@torch.no_grad()
def encoded(pipe: Pipeline, seed: int, count: int) -> tuple[list[Request], Tensor]:
    """Requests for two groups with a relation, and the latents of their scenes."""
    drawn = related(seed, count)
    parts = []
    for i in tqdm(range(0, count, ENCODED), desc="scenes", leave=False):
        pixels = np.stack([np.asarray(picture(scene)) for scene in drawn[i : i + ENCODED]])
        parts.append(pipe.codec.encode(torch.from_numpy(pixels).movedim(-1, 1) / 255))
    return [scene.request for scene in drawn], torch.cat(parts)


def train(
    pipe: Pipeline, conditions: Conditions, asked: list[Request], x0: Tensor, steps: int, lr: float, least: float
) -> None:
    """Trains the pipeline's network at t of at least `least`, from the objective's own density."""
    network, draw = pipe.network.train().requires_grad_(True), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr, (0.9, 0.95))
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 50, total_iters=50)
    area = x0[0, 0].numel()
    for _ in tqdm(range(steps), desc="training", unit="step"):
        rows = torch.randint(len(x0), (BATCH,), generator=draw)
        many = pipe.objective.training_time(torch.rand(64 * BATCH, generator=draw), area)
        t = many[many >= least][:BATCH]
        with torch.no_grad():
            condition = conditions([asked[i] for i in rows])
        noise = torch.randn(x0[rows].shape, generator=draw)
        loss = pipe.objective.loss(network, x0[rows], noise, t, condition).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm.step()
    network.eval()


@torch.no_grad()
def losses(pipe: Pipeline, condition: Condition, x0: Tensor) -> Tensor:
    """The loss of each picture at each of TIMES, (len(TIMES), N), with the same noise each time."""
    draw, found = torch.Generator().manual_seed(1), []
    for t in TIMES:
        noise = torch.randn(x0.shape, generator=draw)
        for rows in torch.arange(len(x0)).split(BATCH):
            part = Condition._make(None if field is None else field[rows] for field in condition)
            times = torch.full((len(rows),), t)
            found.append(pipe.objective.loss(pipe.network, x0[rows], noise[rows], times, part))
    return torch.cat(found).view(len(TIMES), len(x0))


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, required=True, help="a model of the shapes: its folder, or a run's")
    p.add_argument("--condition", choices=["facts", "caption"], default="facts", help="default: facts")
    p.add_argument("--place-scale", type=float, default=1.0, help="length of the vectors of places; default: 1")
    p.add_argument("--min-t", type=float, default=0.0, help="least t of the training, below 0.95; default: 0")
    p.add_argument("--steps", type=natural, default=500, help="of 32 scenes")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--scenes", type=positive, default=4096, help="their number; a sixteenth more to test on")
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        if not 0 <= args.min_t < 0.95:
            raise ValueError(f"--min-t must be from 0 to below 0.95, got {args.min_t}")
        pipe = load_shapes(args.model)
    conditions = from_facts(pipe, args.place_scale) if args.condition == "facts" else from_captions(pipe)
    train(pipe, conditions, *encoded(pipe, TRAINED, args.scenes), args.steps, args.lr, args.min_t)
    asked, x0 = encoded(pipe, TESTED, max(1, args.scenes // 16))
    right = conditions(asked)
    changed = {
        "relation reversed": conditions([reversed_relation(one) for one in asked]),
        "colours exchanged": conditions([exchanged_colours(one) for one in asked]),
    }
    moved = (changed["relation reversed"].text - right.text).square().mean().sqrt()
    spread = (right.text - right.text.mean(0)).square().mean().sqrt()
    print(f"reversing the relation moves the condition by {float(moved / spread):.0%} of its spread over scenes")
    least = losses(pipe, right, x0)
    rows = [["loss", *(f"{loss:.4f}" for loss in least.mean(1).tolist())]]
    for name, condition in changed.items():
        added = losses(pipe, condition, x0) - least
        shares, means = (added > 0).double().mean(1).tolist(), added.mean(1).tolist()
        rows.append([name, *(f"{share:.0%}, {mean:+.4f}" for share, mean in zip(shares, means, strict=True))])
    print(table(["right condition is better at t", *map(str, TIMES)], rows))


if __name__ == "__main__":
    main()
