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

from benchmarks.control import drawn
from cli import Parser, finite, natural, one_line_errors, positive
from data.examined import Shapes
from data.raw.base import Raw
from data.raw.hints import Hole
from data.raw.pictures import save_png, sheet
from data.shapes import picture, scene
from data.store.encoding import levels
from mmdit import control
from mmdit.control import Control
from pipeline import Pipeline
from pipeline.sampling import Sampling
from storage.models import find_model

SHOWN = 10


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
        asked = Shapes([one.request for one in scenes])
        images = [picture(one) for one in scenes]
        known = torch.stack([levels(image) for image in images]) / 255
        raws = [Raw(str(i), b"", ("",), (1.0,)) for i in range(args.num)]
        hints = torch.stack([levels(hole(*both)) for both in zip(raws, images, strict=True)]) / 255
        masks = torch.zeros_like(known[:, :1])
        for mask, raw, image in zip(masks, raws, images, strict=True):
            left, top, right, bottom = hole.box(raw.id, image.size)
            mask[0, top:bottom, left:right] = 1
        ways = {
            "blending": drawn(base, asked.prompts, sampling, None, known, masks),
            "ControlNet": drawn(steered, asked.prompts, sampling, hints),
            "both": drawn(steered, asked.prompts, sampling, hints, known, masks),
        }
    print("| | right | seam |\n|---|---|---|")
    for name, pictures in (ways | {"true pictures": known}).items():
        share = np.mean([verdict.right for verdict in asked.verdicts(pictures)])
        seams = [seam(pixels, mask[0]) for pixels, mask in zip(pictures, masks, strict=True)]
        print(f"| {name} | {100 * share:.0f} % | {np.mean(seams):.3f} |")
    if args.sheet:
        rows = [hints, *ways.values(), known]
        save_png(sheet(torch.cat([row[:SHOWN] for row in rows]), min(SHOWN, args.num)), args.sheet)
        print(f"Look at {args.sheet}")


if __name__ == "__main__":
    main()
