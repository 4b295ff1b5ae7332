"""Trains the judge of the shapes on scenes drawn for it and writes `assets/shapes/judge/`.

    python -m tools.train_shapes_judge

The command writes the same bytes each time on the same machine. From 64 features and one linear layer the network
predicts how many shapes there are of each kind, and which shapes and colours there are in each part of the picture. So
the features encode shape, number, colour, size and position. They have only seen faultless pictures, and differ on
others.

At the end it prints how often the counts are right in unseen scenes. It takes about four minutes on one core. The
weights are stored in half precision.
"""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from tqdm import tqdm

from cli import Parser
from data import shapes
from metrics.judge import Judge

FOLDER = Path(__file__).parents[1] / "assets" / "shapes" / "judge"
SEED, UNSEEN = 3, 1000  # a seed that neither a store of examples nor the evaluation uses
STEPS, BATCH, RATE = 5000, 64, 3e-3
COLOURS, SIZES = tuple(shapes.COLOURS), tuple(shapes.SIZES.values())
KINDS = len(shapes.SHAPES) * len(COLOURS) * len(SIZES)
COUNTS = len(shapes.NUMBERS)  # no to four
GRID = 4  # parts of a picture along a side
MARKS = len(shapes.SHAPES) + len(COLOURS)  # of a part


def counts(drawn: shapes.Scene) -> np.ndarray:
    """Number of shapes of each kind, (KINDS,) int64."""
    found = np.zeros((len(shapes.SHAPES), len(COLOURS), len(SIZES)), dtype=np.int64)
    for placed in drawn.objects:
        found[shapes.SHAPES.index(placed.shape), COLOURS.index(placed.colour), SIZES.index(placed.side)] += 1
    return found.reshape(-1)


def places(drawn: shapes.Scene) -> np.ndarray:
    """Shapes and colours whose centre is in each part of the picture, (GRID · GRID · MARKS,) of 0 and 1."""
    found = np.zeros((GRID, GRID, MARKS), dtype=np.float32)
    for placed in drawn.objects:
        row, column = ((start + placed.side // 2) * GRID // shapes.SIDE for start in (placed.top, placed.left))
        found[row, column, shapes.SHAPES.index(placed.shape)] = 1
        found[row, column, len(shapes.SHAPES) + COLOURS.index(placed.colour)] = 1
    return found.reshape(-1)


def examples(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (count, 3, 64, 64) in [0, 1] with their `counts` and `places`."""
    drawn = [shapes.scene(SEED, i) for i in range(first, first + count)]
    pixels = torch.from_numpy(np.stack([np.asarray(shapes.picture(scene)) for scene in drawn]))
    many, where = (torch.from_numpy(np.stack([labels(scene) for scene in drawn])) for labels in (counts, places))
    return rearrange(pixels, "b h w c -> b c h w") / 255, many, where


def split(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The judge's logits of counts (B, COUNTS, KINDS) and of places (B, GRID · GRID · MARKS)."""
    return rearrange(logits[:, : COUNTS * KINDS], "b (n k) -> b n k", n=COUNTS), logits[:, COUNTS * KINDS :]


def loss_of(logits: Tensor, many: Tensor, where: Tensor) -> Tensor:
    """The sum of the cross-entropies of counts and places, per picture, in nats."""
    count_logits, place_logits = split(logits)
    places_loss = binary_cross_entropy_with_logits(place_logits, where, reduction="sum")
    return (cross_entropy(count_logits, many, reduction="sum") + places_loss) / len(logits)


@torch.no_grad()
def report(judge: Judge) -> None:
    """Prints the judge's accuracy on unseen scenes."""
    pixels, many, where = examples(STEPS * BATCH, UNSEEN)
    count_logits, place_logits = split(torch.cat([judge.logits(part) for part in pixels.split(100)]))
    right = (count_logits.argmax(1) == many).all(1).double().mean()
    placed = ((place_logits > 0) == (where > 0)).all(1).double().mean()
    print(f"shapes' judge, unseen scenes: all counts right in {right:.1%}, all places in {placed:.1%}")


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    classes = COUNTS * KINDS + GRID**2 * MARKS
    judge = Judge(num_classes=classes, channels=3, side=shapes.SIDE, stem=(16, 32))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    bar = tqdm(range(STEPS), desc="judge", unit="step")
    for step in bar:
        pixels, many, where = examples(step * BATCH, BATCH)
        loss = loss_of(judge.logits(pixels), many, where)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            bar.set_postfix(nats=f"{float(loss):.2f}")
    judge.half().save(FOLDER)
    report(Judge.load(FOLDER))


if __name__ == "__main__":
    main()
