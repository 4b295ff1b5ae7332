"""Is it the words or the network? A model of the shapes learns on, told each scene in words or in plain facts.

    python -m benchmarks.told --model assets/shapes/model --told facts --least-t 0.8

Scenes of two groups with a relation are drawn. Told in words, the network gets their captions. Told in facts, it gets a
token for each group in the caption's place, a fixed random vector for every fact: shape, colour, number, size, and in
which half of the picture the relation puts the group. So nothing has to be understood any more.
`--loudness` makes the vectors for halves shorter than the others.

A copy of the network is trained on them, at t of at least `--least-t`. Printed are, for other scenes, the shares for
which the truth has a lower loss than the relation reversed, and than the colours exchanged (50 % is chance), and by how
much it is lower. Also, how far reversing the relation moves what is told.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.following import OPPOSITE, check, related
from cli import Parser, natural, one_line_errors, positive
from data.shapes import COLOURS, NUMBERS, RELATIONS, SHAPES, SIZES, Request, picture
from mmdit.network import Condition
from pipeline import Pipeline
from storage.models import find_model

TIMES = (0.75, 0.9, 0.97)
FACTS = (*SHAPES, *COLOURS, *SIZES, *NUMBERS[1:])
TRAINED, TESTED = 93, 91  # seeds of the scenes
BATCH, ENCODED = 32, 256
Tell = Callable[[list[Request]], Condition]


def facts(asked: Request) -> Tensor:
    """What is told of each group, (2, facts): ones for FACTS, then down and right, each −1, 0 or 1."""
    assert asked.relation
    down, right = RELATIONS[asked.relation]
    rows = []
    for group, sign in zip(asked.groups, (-1, 1), strict=True):  # the first group above: it lies up, −1
        named = {group.shape, group.colour, group.size, NUMBERS[group.count]}
        rows.append([*(float(fact in named) for fact in FACTS), sign * down, sign * right])
    return torch.tensor(rows)


def in_facts(pipe: Pipeline, loudness: float = 1.0) -> Tell:
    """Tells requests in two tokens, in a caption that is empty otherwise, and places with another loudness."""
    empty = pipe.condition([""])
    vectors = torch.randn(len(FACTS) + 2, pipe.network.text_dim, generator=torch.Generator().manual_seed(0))
    vectors[-2:] *= loudness

    def tell(asked: list[Request]) -> Condition:
        told = torch.stack([facts(one) for one in asked]) @ vectors
        text = torch.cat([told, torch.zeros(len(asked), empty.text.shape[1] - 2, told.shape[2])], dim=1)
        return Condition(text, torch.zeros(len(asked), empty.pooled.shape[1]))

    return tell


def in_words(pipe: Pipeline) -> Tell:
    """Tells requests in their captions."""
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


def train(pipe: Pipeline, tell: Tell, asked: list[Request], x0: Tensor, steps: int, lr: float, least: float) -> None:
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
            told = tell([asked[i] for i in rows])
        noise = torch.randn(x0[rows].shape, generator=draw)
        loss = pipe.objective.loss(network, x0[rows], noise, t, told).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm.step()
    network.eval()


@torch.no_grad()
def losses(pipe: Pipeline, told: Condition, x0: Tensor) -> Tensor:
    """The loss of each picture at each of TIMES, (len(TIMES), N), with the same noise each time."""
    draw, found = torch.Generator().manual_seed(1), []
    for t in TIMES:
        noise = torch.randn(x0.shape, generator=draw)
        for rows in torch.arange(len(x0)).split(BATCH):
            part = Condition._make(None if field is None else field[rows] for field in told)
            times = torch.full((len(rows),), t)
            found.append(pipe.objective.loss(pipe.network, x0[rows], noise[rows], times, part))
    return torch.cat(found).view(len(TIMES), len(x0))


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, required=True, help="a model of the shapes: its folder, or a run's")
    p.add_argument(
        "--told", choices=["facts", "words"], default="facts", help="how the scenes are told; default: facts"
    )
    p.add_argument("--loudness", type=float, default=1.0, help="of places among the facts; default: 1")
    p.add_argument("--least-t", type=float, default=0.0, help="least t of the training, below 0.95; default: 0")
    p.add_argument("--steps", type=natural, default=500, help="of 32 scenes")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument(
        "--scenes", type=positive, default=4096, help="their number, and a sixteenth of it others to test on"
    )
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        if not 0 <= args.least_t < 0.95:
            raise ValueError(f"--least-t must be from 0 to below 0.95, got {args.least_t}")
        pipe = Pipeline.load(find_model(args.model))
        check(pipe, args.model)
    tell = in_facts(pipe, args.loudness) if args.told == "facts" else in_words(pipe)
    train(pipe, tell, *encoded(pipe, TRAINED, args.scenes), args.steps, args.lr, args.least_t)
    asked, x0 = encoded(pipe, TESTED, max(1, args.scenes // 16))
    whole = tell(asked)
    true, changed = losses(pipe, whole, x0), tell([reversed_relation(one) for one in asked])
    moved, spread = (
        part.square().mean().sqrt() for part in (changed.text - whole.text, whole.text - whole.text.mean(0))
    )
    print(f"the relation reversed moves what is told by {float(moved / spread):.0%} of its spread over scenes")
    print(f"{'':<20}" + "".join(f"{f't = {t}':>18}" for t in TIMES))
    print(f"{'loss':<20}" + "".join(f"{float(loss):>18.4f}" for loss in true.mean(1)))
    for name, change in (("relation reversed", reversed_relation), ("colours exchanged", exchanged_colours)):
        other = losses(pipe, tell([change(one) for one in asked]), x0)
        better, more = (other > true).double().mean(1), (other - true).mean(1)
        print(
            f"{name:<20}" + "".join(f"{b:>10.0%} {m:+.4f}" for b, m in zip(better.tolist(), more.tolist(), strict=True))
        )


if __name__ == "__main__":
    main()
