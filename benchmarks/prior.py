"""Image embeddings from a prior: how near they are to those of the pictures, over three trainings.

    python encode.py --config configs/tokens/prior.yaml
    for seed in 0 1 2; do
        python train.py fit --config configs/tokens/prior.yaml --run.seed $seed --run.folder runs/prior-$seed
    done
    python -m benchmarks.prior

Of the full captions of unseen scenes, or with --short of those that leave some of it out: the mean cosine with the
embedding of the scene's picture, the same with that of the next scene's picture in its place (a shuffled caption), and
how often the own picture is the nearest of all. The loss of a prior says little of this. The rows are the text's own
embedding; two regressions, which give the mean of all embeddings that fit: an MLP on the pooled vectors, and one step
of the prior from noise alone; and draws of the prior at some guidance scales, the first and the better of two by the
text (Ramesh et al. 2022, §2.2). Each is the mean over the trainings ± their deviation; the MLP is trained with as many
seeds.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cli import Parser, one_line_errors, positive
from data import shapes
from data.clip import CLIPImage
from data.order import Use, stream
from data.text.encoder import TextEncoder
from pipeline import Pipeline
from pipeline.prior import best, candidates, text_embeddings
from pipeline.sampling import Sampling
from storage.models import find_model

SEED = 94  # of the scenes; no store of examples uses it
TRAINED = 10_000  # scenes that the MLP learns from, the first of those in the store
STEPS = 1000  # of the MLP
GUIDANCE = (1.0, 4.0)
BATCH = 250
Row = tuple[float, float, float]  # cosine with the own picture, with another, share of own pictures that are nearest


def scenes(seed: int, count: int, short: bool) -> tuple[Tensor, list[str]]:
    """The first scenes of a seed: pictures (count, 3, side, side) uint8, and their full or short captions."""
    drawn = [shapes.scene(seed, i) for i in range(count)]
    pixels = torch.from_numpy(np.stack([np.asarray(shapes.picture(scene)) for scene in drawn]))
    said = [shapes.captions(scene, stream(seed, Use.CAPTION, 0, i))[short] for i, scene in enumerate(drawn)]
    return pixels.permute(0, 3, 1, 2), said


def encoded(codec: CLIPImage, text: TextEncoder, pixels: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Standardised embeddings (N, D, 1, 1) of pictures, and the pooled vectors (N, P) of captions."""
    parts = range(0, len(captions), BATCH)
    latents = [codec.encode(pixels[i : i + BATCH] / 255) for i in parts]
    with torch.no_grad():
        pooled = [text.encode(captions[i : i + BATCH]).pooled for i in parts]
    return torch.cat(latents), torch.cat(pooled)


def regression(pooled: Tensor, latents: Tensor, seed: int) -> nn.Module:
    """An MLP from pooled vectors to standardised embeddings (N, D), by the mean square error."""
    torch.manual_seed(seed)
    wide = 512
    layers = (nn.Linear(pooled.shape[1], wide), nn.GELU(), nn.Linear(wide, wide), nn.GELU())
    model = nn.Sequential(nn.LayerNorm(pooled.shape[1]), *layers, nn.Linear(wide, latents.shape[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(pooled), (256,))
        loss = (model(pooled[rows]) - latents[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def measured(found: Tensor, real: Tensor) -> Row:
    """Of unit embeddings (N, D) and those of the pictures."""
    cosines = found @ real.T
    right = cosines.argmax(1) == torch.arange(len(real))
    return float(cosines.diag().mean()), float(cosines.roll(-1, 1).diag().mean()), float(right.double().mean())


def drawn(pipe: Pipeline, captions: list[str], count: int, sampling: Sampling) -> Tensor:
    """Draws for each caption, (count, N, D); caption i has the seed i."""
    parts = [range(len(captions))[i : i + BATCH] for i in range(0, len(captions), BATCH)]
    return torch.cat([candidates(pipe, [captions[i] for i in part], part, count, sampling) for part in parts], dim=1)


def rows_of(pipe: Pipeline, captions: list[str], real: Tensor) -> dict[str, Row]:
    """The rows of one prior. One step goes from noise alone, at t = 1, to the mean of what fits."""
    text = text_embeddings(pipe, captions)
    rows = {"prior, one step": measured(drawn(pipe, captions, 1, Sampling(steps=1, guidance=1.0))[0], real)}
    for scale in GUIDANCE:
        two = drawn(pipe, captions, 2, replace(pipe.sampling, guidance=scale))
        rows[f"prior, guidance {scale:g}, first draw"] = measured(two[0], real)
        rows[f"prior, guidance {scale:g}, best of two"] = measured(best(two, text), real)
    return rows


def averaged(rows: list[Row]) -> str:
    """Mean ± deviation of each column over the trainings."""
    columns = torch.tensor(rows, dtype=torch.float64).T
    spread = columns.std(1) if len(rows) > 1 else torch.zeros(3)
    cells = [f"{float(mean):.3f} ± {float(std):.3f}" for mean, std in zip(columns[:2].mean(1), spread, strict=False)]
    return " | ".join([*cells, f"{float(columns[2].mean()):.1%} ± {float(spread[2]):.1%}"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    default = [Path(f"runs/prior-{seed}") for seed in range(3)]
    parser.add_argument("--runs", type=Path, nargs="+", default=default, help="runs or model folders, one a seed")
    parser.add_argument("--count", type=positive, default=500, help="unseen scenes")
    parser.add_argument("--short", action="store_true", help="captions that leave out some of the scene")
    args = parser.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        pipes = [Pipeline.load(find_model(path)) for path in args.runs]
        codec = pipes[0].codec
        if not isinstance(codec, CLIPImage):
            raise ValueError(f"{args.runs[0]} holds no prior: give runs of configs/tokens/prior.yaml")
        for pipe, path in zip(pipes, args.runs, strict=True):
            pipes[0].check_alike(pipe, f"model in {path}")
    pixels, captions = scenes(SEED, args.count, args.short)
    latents, pooled = encoded(codec, pipes[0].text, pixels, captions)
    real = codec.embedding(latents)
    known, said = encoded(codec, pipes[0].text, *scenes(0, TRAINED, args.short))
    table = {"text": [measured(text_embeddings(pipes[0], captions), real)]}
    for seed, pipe in enumerate(tqdm(pipes, desc="priors", unit="prior", leave=False)):
        guess = regression(said, known.flatten(1), seed)(pooled).detach()
        rows = {"MLP": measured(codec.embedding(guess[..., None, None]), real)} | rows_of(pipe, captions, real)
        for name, row in rows.items():
            table.setdefault(name, []).append(row)
    kind = "short" if args.short else "full"
    print(f"{args.count} unseen scenes with {kind} captions, {len(pipes)} trainings\n")
    print("| embedding | cosine | shuffled | nearest |\n|---|---:|---:|---:|")
    print(*(f"| {name} | {averaged(rows)} |" for name, rows in table.items()), sep="\n")
    text = table["text"][0][0]
    print()
    for scale in GUIDANCE:
        first, two = (
            torch.tensor([row[0] for row in table[f"prior, guidance {scale:g}, {name}"]], dtype=torch.float64)
            for name in ("first draw", "best of two")
        )
        gain, spread = two - first, (two - first).std(correction=int(len(pipes) > 1))
        above = [int((part > text).sum()) for part in (first, two)]
        print(f"guidance {scale:g}: best of two gains {gain.mean():+.4f} ± {spread:.4f}; "
              f"above the text in {above[0]} and {above[1]} of {len(pipes)} trainings")  # fmt: skip


if __name__ == "__main__":
    main()
