"""Trains the judge of the digits on the training split and writes `assets/digits/judge/`.

    python -m tools.train_digits_judge

The command writes the same bytes each time on the same machine. The pictures are shifted, rotated, scaled and sheared a
little at random. The held-out pictures are used only for the accuracy printed at the end.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from tqdm import tqdm

from cli import Parser
from data import digits
from metrics.judge import Judge

FOLDER = Path(__file__).parents[1] / "assets" / "digits" / "judge"
STEPS, BATCH, RATE = 2000, 128, 3e-3


def jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures `(B, 1, 8, 8)` shifted by σ = 0.4 pixels, rotated by σ = 6°, scaled and sheared by σ = 6 %."""
    shape = (len(pixels), 2, 3)
    sigma = torch.tensor([[0.06, math.radians(6), 0.1], [math.radians(6), 0.06, 0.1]])  # 2 units of the grid = 8 pixels
    move = torch.eye(2, 3) + sigma * torch.randn(shape, generator=generator)
    grid = affine_grid(move, list(pixels.shape), align_corners=False)  # (B, 8, 8, 2)
    return grid_sample(pixels, grid, align_corners=False)


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train, held_out = digits.load("train"), digits.load("held_out")
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in tqdm(range(STEPS), desc="judge", unit="step"):
        rows = torch.randint(len(train.labels), (BATCH,), generator=generator)
        logits = judge.logits(jitter(train.pixels[rows], generator))
        loss = cross_entropy(logits, train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.save(FOLDER)
    for name, split in (("train", train), ("held out", held_out)):
        right = (judge.classify(split.pixels) == split.labels).sum().item()
        print(f"judge, {name}: {right} of {len(split.labels)} right = {right / len(split.labels):.2%}")


if __name__ == "__main__":
    main()
