"""How well a ControlNet trained on the edges of the shapes is followed, and whether captions still are.

    python -m benchmarks.control --model assets/shapes/model --control runs/shapes-edges

For the captions of each category a scene is placed that fulfils them. The model draws each caption alone, and with the
edges of the scene as hint, from the same noise. Printed are the share of right pictures, as `evaluate.py --by category`
counts them, and how well the edges of what was drawn lie on the hint: F1 of edge pixels, each found if there is one
within a pixel.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import binary_dilation
from torch import Tensor
from tqdm import tqdm

from cli import Parser, finite, natural, one_line_errors, positive
from data.examined import Shapes
from data.order import Use, stream
from data.raw.base import Raw
from data.raw.hints import Edges
from data.raw.pictures import save_png, sheet, to_image
from data.shapes import Request, Scene, picture, place
from data.store.encoding import levels
from mmdit import control
from mmdit.control import Control
from pipeline import Pipeline
from pipeline.sampling import Sampling
from storage.models import find_model

BATCH, SHOWN = 50, 8
RAW = Raw("", b"", ("",), (1.0,))


def edges(pictures: Tensor) -> Tensor:
    """Hints of pictures (N, 3, H, W) in [0, 1], of the same shape."""
    return torch.stack([levels(Edges()(RAW, to_image(one))) for one in pictures]) / 255


def overlap(drawn: Tensor, wanted: Tensor) -> float:
    """F1 of two sets of edges (H, W) bool, each pixel found if the other set has one within a pixel."""
    if not drawn.any() or not wanted.any():
        return float(drawn.any() == wanted.any())
    square = np.ones((3, 3), dtype=bool)
    near = [torch.from_numpy(binary_dilation(one.numpy(), square)) for one in (wanted, drawn)]
    precision, recall = (
        float((one & there).sum() / one.sum()) for one, there in zip((drawn, wanted), near, strict=True)
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def scene_of(asked: Request, seed: int, number: int) -> Tensor:
    """A picture (3, H, W) in [0, 1] that fulfils a request."""
    draw = stream(seed, Use.SCENE, 1, number)
    while (objects := place(asked, draw)) is None:
        pass
    return levels(picture(Scene(asked, objects))) / 255


def drawn(
    pipe: Pipeline,
    prompts: list[str],
    sampling: Sampling,
    hints: Tensor | None = None,
    known: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """A picture of each prompt, (N, 3, H, W), with seed i for picture i.

    Args:
        pipe: the model.
        prompts: N texts.
        sampling: how it is sampled.
        hints: pictures to work from, (N, 3, H, W).
        known: pictures that are kept where the masks are 0, (N, 3, H, W).
        masks: (N, 1, H, W).
    """
    found = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="drawing", leave=False):
        part = slice(start, start + BATCH)
        picture, image, mask = (None if given is None else given[part] for given in (hints, known, masks))
        seeds = range(len(prompts))[part]
        found.append(
            pipe(prompts[part], seeds, sampling=sampling, image=image, strength=1.0, mask=mask, picture=picture)
        )
    return torch.cat(found)


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="python -m benchmarks.control", description=__doc__)
    p.add_argument("--model", type=Path, default=Path("assets/shapes/model"), help="the base")
    p.add_argument("--control", type=Path, required=True, help="the ControlNet: its run, its folder")
    p.add_argument("--scale", type=finite, default=1.0, help="factor of what it adds")
    p.add_argument("--per-category", type=positive, default=50, help="captions of each category")
    p.add_argument("--seed", type=natural, default=1, help="of captions and scenes")
    p.add_argument("--steps", type=positive, default=20, help="Euler steps")
    p.add_argument("--guidance", type=finite, default=3.0, help="classifier-free guidance")
    p.add_argument("--sheet", type=Path, help="a PNG: hints, drawn with them, drawn without, some of each category")
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        base = Pipeline.load(find_model(args.model))
        steered = base.steered([Control(control.load(args.control), args.scale)])
        asked = Shapes.by_category(args.per_category, args.seed)
        sampling = Sampling(steps=args.steps, guidance=args.guidance)
        hints = edges(torch.stack([scene_of(one, args.seed, i) for i, one in enumerate(asked.asked)]))
        pictures = {
            "without": drawn(base, asked.prompts, sampling),
            "with": drawn(steered, asked.prompts, sampling, hints),
        }
    shape = (len(asked.categories), args.per_category)
    print("| | " + " | ".join(asked.categories) + " | all | edges |")
    print("|---" * (len(asked.categories) + 3) + "|")
    wanted = hints[:, 0] > 0.5
    for name, these in pictures.items():
        right = np.array([verdict.right for verdict in asked.verdicts(these)]).reshape(shape).mean(1)
        lines = edges(these)[:, 0] > 0.5
        found = np.mean([overlap(a, b) for a, b in zip(lines, wanted, strict=True)])
        print(
            f"| {name} | "
            + " | ".join(f"{100 * x:.0f}" for x in right)
            + f" | {100 * right.mean():.0f} % | {found:.3f} |"
        )
    if args.sheet:
        rows = [x.unflatten(0, shape)[:, :SHOWN] for x in (hints, pictures["with"], pictures["without"])]
        together = torch.stack(rows, dim=1).flatten(0, 2)  # for each category: hints, with, without
        save_png(sheet(together, min(SHOWN, args.per_category)), args.sheet)
        print(f"Look at {args.sheet}")


if __name__ == "__main__":
    main()
