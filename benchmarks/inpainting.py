"""Inpainting of the shapes: the blending that needs no training against a ControlNet that was trained on holes.

    python -m benchmarks.inpainting --model assets/shapes/model --control runs/shapes-holes

A rectangle of each of some unseen scenes is drawn anew from its full caption, in three ways from the same noise: known
latents are blended in at each step (`sample.py --image --mask`), a ControlNet sees the picture with a grey hole, or
both. Printed are the share of pictures that show what the caption says and nothing else, and the seam: by how much
neighbouring pixels on the two sides of the rectangle's border differ, mean over border and channels of values from 0
to 1. That of the true picture is printed, too.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cli import Parser, finite, natural, one_line_errors, positive
from data.raw.base import Raw
from data.raw.hints import Hole
from data.raw.pictures import save_png, sheet
from data.shapes import fulfils, picture, read, scene
from mmdit import control
from mmdit.control import Control
from pipeline import Pipeline
from pipeline.sampling import Sampling
from storage.models import find_model

BATCH, SHOWN = 50, 10


def seam(picture: Tensor, mask: Tensor) -> float:
    """Mean difference of neighbours across the border of a mask (H, W), in a picture (C, H, W)."""
    steps = []
    for way in (1, 2):
        across = mask.diff(dim=way - 1) != 0
        steps.append(picture.diff(dim=way).abs()[:, across].flatten())
    return float(torch.cat(steps).mean())


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="python -m benchmarks.inpainting", description=__doc__)
    p.add_argument("--model", type=Path, default=Path("assets/shapes/model"), help="the base")
    p.add_argument("--control", type=Path, required=True, help="the ControlNet that was trained on holes")
    p.add_argument("--num", type=positive, default=200, help="number of scenes")
    p.add_argument("--seed", type=natural, default=4, help="of scenes and holes")
    p.add_argument("--steps", type=positive, default=20, help="Euler steps")
    p.add_argument("--guidance", type=finite, default=3.0, help="classifier-free guidance")
    p.add_argument("--sheet", type=Path, help="a PNG: pictures with holes, then each way, then the true pictures")
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        base = Pipeline.load(find_model(args.model))
        steered = base.steered([Control(control.load(args.control))])
        sampling = Sampling(steps=args.steps, guidance=args.guidance)
        hole, scenes = Hole(seed=args.seed), [scene(args.seed, i) for i in range(args.num)]
        images = [picture(one) for one in scenes]
        true: list[Tensor] = []
        holed: list[Tensor] = []
        masks = torch.zeros(args.num, 1, *images[0].size[::-1])
        for i, whole in enumerate(images):
            raw = Raw(str(i), b"", ("",), (1.0,))
            left, top, end, bottom = hole.box(raw.id, whole.size)
            masks[i, 0, top:bottom, left:end] = 1
            for found, one in ((true, whole), (holed, hole(raw, whole))):
                found.append(torch.from_numpy(np.asarray(one).copy()).movedim(-1, 0) / 255)
        known, hints = torch.stack(true), torch.stack(holed)
        ways: dict[str, tuple[Pipeline, bool, bool]] = {
            "blending": (base, True, False), "ControlNet": (steered, False, True), "both": (steered, True, True),
        }  # fmt: skip
        drawn = {}
        for name, (pipe, blends, hinted) in ways.items():
            parts = []
            for start in tqdm(range(0, args.num, BATCH), desc=name, leave=False):
                part = slice(start, start + BATCH)
                prompts = [each.request.caption() for each in scenes[part]]
                image, mask = (known[part], masks[part]) if blends else (None, None)
                shown = hints[part] if hinted else None
                parts.append(
                    pipe(prompts, range(args.num)[part], sampling=sampling, image=image, strength=1.0, mask=mask,
                         picture=shown)
                )  # fmt: skip
            drawn[name] = torch.cat(parts)
    print("| | right | seam |\n|---|---|---|")
    for name, pictures in (drawn | {"true pictures": known}).items():
        right = [
            fulfils(read(pixels.movedim(0, -1).double().numpy()), each.request)
            for pixels, each in zip(pictures, scenes, strict=True)
        ]
        seams = [seam(pixels, mask[0]) for pixels, mask in zip(pictures, masks, strict=True)]
        print(f"| {name} | {100 * np.mean(right):.0f} % | {np.mean(seams):.3f} |")
    if args.sheet:
        rows = [hints, *drawn.values(), known]
        save_png(sheet(torch.cat([row[:SHOWN] for row in rows]), min(SHOWN, args.num)), args.sheet)
        print(f"Look at {args.sheet}")


if __name__ == "__main__":
    main()
