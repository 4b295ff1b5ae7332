"""Draws what captions of shapes ask for and reads it back: `python judge.py --model runs/shapes`.

GenEval's six categories (Ghosh et al. 2023) on scenes of `data/shapes.py`: a picture is right if it shows exactly
what was asked for and nothing else.
"""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cli import (
    Parser,
    add_reading,
    add_sampling,
    natural,
    one_line_errors,
    plain_warnings,
    positive,
    reading_of,
    sampling_of,
)
from data import shapes
from storage.models import find_model

SHOWN = 8  # pictures of each category on the sheet


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, action="append", required=True, help="a model or run folder; repeatable")
    p.add_argument("--steps", type=positive, default=20, help="sampling steps")
    add_sampling(p)
    p.add_argument("--per-category", type=positive, default=200, help="pictures of each category")
    p.add_argument("--seed", type=natural, default=0, help="of the requests and of the first picture")
    p.add_argument("--batch-size", type=positive, default=64, help="pictures at a time")
    add_reading(p)
    p.add_argument("--out", type=Path, default=Path("judged"), help="folder of results and sheets")
    return p


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError, FileExistsError, NotADirectoryError):
        import torch

        from data.raw.pictures import save_png, sheet
        from metrics.table import table
        from pipeline import Pipeline, Reading
        from storage.weights import write_json

        how = Reading(**reading_of(args))
        pipes = {str(path): Pipeline.load(find_model(path), how) for path in args.model}
        for name, pipe in pipes.items():
            sizes = [side * pipe.codec.factor for side in pipe.latent_size(None, None)]
            if sizes != [shapes.SIDE] * 2 or pipe.codec.pixel_channels != 3:
                raise ValueError(f"{name} does not draw pictures of {shapes.SIDE}×{shapes.SIDE} in colour")
        settings = {name: sampling_of(args, pipe.sampling, steps=args.steps, sampler=args.sampler)
                    for name, pipe in pipes.items()}  # fmt: skip
        for name, pipe in pipes.items():
            pipe.plan(settings[name])
        args.out.mkdir(parents=True, exist_ok=True)
    asked = {category: shapes.requests(category, args.per_category, args.seed) for category in shapes.CATEGORIES}
    flat = [request for requests in asked.values() for request in requests]
    rows: list[dict[str, Any]] = []
    for number, (name, pipe) in enumerate(pipes.items()):
        starts = range(0, len(flat), args.batch_size)
        with one_line_errors(ValueError):
            drawn = torch.cat(
                [
                    pipe(
                        [request.caption() for request in flat[i : i + args.batch_size]],
                        range(args.seed, args.seed + len(flat))[i : i + args.batch_size],
                        sampling=settings[name],
                    )
                    for i in tqdm(starts, desc=name, unit="batch", leave=False)
                ]
            )
        levels = drawn.mul(255).round().div(255)  # as a PNG would hold them
        found = [shapes.read(picture.movedim(0, -1).double().numpy()) for picture in levels]
        right = np.array([shapes.fulfils(some, request) for some, request in zip(found, flat, strict=True)])
        by_category = right.reshape(len(asked), -1)
        scores = dict(zip(asked, by_category.mean(1).tolist(), strict=True))
        rows.append({"model": name, "steps": args.steps, "guidance": settings[name].guidance, **scores,
                     "overall": float(np.mean(list(scores.values())))})  # fmt: skip
        shown = drawn.unflatten(0, by_category.shape)[:, :SHOWN].flatten(0, 1)
        shown_right = torch.from_numpy(by_category[:, :SHOWN].reshape(-1)).long()
        marks = torch.tensor([[0.85, 0.1, 0.1], [0.1, 0.65, 0.2]])[shown_right]
        framed = torch.nn.functional.pad(shown, (2, 2, 2, 2), value=-1)
        framed = torch.where(framed < 0, marks[:, :, None, None], framed)  # green where right, red where wrong
        with one_line_errors():
            save_png(sheet(framed, SHOWN), args.out / f"sheet-{number}.png")
            captions = [{"caption": request.caption(), "right": bool(ok), "found": [f._asdict() for f in some]}
                        for request, ok, some in zip(flat, right, found, strict=True)]  # fmt: skip
            write_json({"model": name, "seed": args.seed, "pictures": captions}, args.out / f"pictures-{number}.json")
    with one_line_errors():
        write_json({"per_category": args.per_category, "seed": args.seed, "rows": rows}, args.out / "results.json")
    print(table(rows, list(rows[0])), end="")
    print(f"Look at {args.out / 'sheet-0.png'}: a row for each category, framed green where it is right")


if __name__ == "__main__":
    main()
