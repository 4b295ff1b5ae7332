"""Pictures from image embeddings (DALL·E 2): how well captions are drawn through a prior, and pictures varied.

    python train.py fit --config configs/shapes.yaml --config configs/tokens/decoder.yaml
    python -m benchmarks.decoder --prior runs/prior-0

First the share of right pictures by category, as `evaluate.py --by category` counts them, of the same captions and from
the same noise: of the model without embeddings, and of the decoder, shown the caption, the embedding that the prior
draws for it (the best of two), or both. Then variations: of unseen scenes the decoder is shown the embedding of the
picture alone, with noise of each level. Printed are the share that has all that the scene's full caption says, and the
cosine of the embedding of what was drawn with that of the scene and with that of the next scene.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cli import Parser, finite, natural, one_line_errors, positive
from data.clip import CLIPImage
from data.examined import Shapes, scenes
from data.raw.pictures import save_png, sheet
from data.shapes import scene
from pipeline import Pipeline
from pipeline.prior import draw
from pipeline.sampling import Sampling
from storage.models import find_model

SCENES = 96  # seed of the scenes to vary; no store of examples uses it
BATCH, SHOWN = 50, 10


def drawn(
    pipe: Pipeline,
    prompts: list[str],
    sampling: Sampling,
    embeddings: Tensor | None = None,
    level: float = 0.0,
    first: int = 0,
) -> Tensor:
    """A picture of each prompt, (N, 3, H, W), picture i with the seed first + i.

    Args:
        pipe: the model.
        prompts: N texts.
        sampling: how it is sampled.
        embeddings: unit image embeddings, (N, D).
        level: of their noise.
        first: seed of the first picture.
    """
    found = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="drawing", leave=False):
        part = slice(start, start + BATCH)
        shown = None if embeddings is None else embeddings[part]
        seeds = range(first, first + len(prompts))[part]
        found.append(pipe(prompts[part], seeds, sampling=sampling, embedding=shown, level=level))
    return torch.cat(found)


def of_captions(
    base: Pipeline, decoder: Pipeline, prior: Pipeline, asked: Shapes, sampling: Sampling, level: float
) -> dict[str, list[bool]]:
    """What is shown → whether the picture of each caption is right."""
    prompts, empty = asked.prompts, [""] * len(asked.prompts)
    parts = [range(len(prompts))[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    from_prior = torch.cat(
        [draw(prior, [prompts[i] for i in part], part) for part in tqdm(parts, desc="prior", leave=False)]
    )
    pictures = {
        "model without embeddings: caption": drawn(base, prompts, sampling),
        "decoder: caption": drawn(decoder, prompts, sampling),
        "decoder: prior's embedding": drawn(decoder, empty, sampling, from_prior, level),
        "decoder: both": drawn(decoder, prompts, sampling, from_prior, level),
    }
    return {name: [verdict.right for verdict in asked.verdicts(these)] for name, these in pictures.items()}


def embedded(codec: CLIPImage, pictures: Tensor) -> Tensor:
    """Unit embeddings (N, D) of pictures (N, 3, H, W) in [0, 1]."""
    return torch.cat([codec.embedding(codec.encode(part)) for part in pictures.split(BATCH)])


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="python -m benchmarks.decoder", description=__doc__)
    p.add_argument("--model", type=Path, default=Path("assets/shapes/model"), help="the model without embeddings")
    p.add_argument("--decoder", type=Path, default=Path("runs/decoder"), help="the decoder: its run, its folder")
    p.add_argument("--prior", type=Path, required=True, help="a prior of its embeddings")
    p.add_argument("--per-category", type=positive, default=50, help="captions of each category")
    p.add_argument("--scenes", type=positive, default=200, help="pictures to vary")
    p.add_argument("--seed", type=natural, default=1, help="of the captions")
    p.add_argument("--steps", type=positive, default=20, help="Euler steps")
    p.add_argument("--guidance", type=finite, default=3.0, help="classifier-free guidance")
    p.add_argument("--level", type=finite, default=0.0, help="noise of the prior's embeddings")
    p.add_argument("--levels", type=finite, nargs="*", default=[0.0, 0.25, 0.5], help="noise of the scenes' embeddings")
    p.add_argument("--sheet", type=Path, help="a PNG: some scenes, and two variations of each at each level")
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        base, decoder, prior = (Pipeline.load(find_model(path)) for path in (args.model, args.decoder, args.prior))
        codec = decoder.image_encoder
        if codec is None:
            raise ValueError(f"{args.decoder} takes no image embeddings: train one with configs/tokens/decoder.yaml")
        if prior.codec.fingerprint() != codec.fingerprint():
            raise ValueError(f"{args.prior} does not draw the embeddings that {args.decoder} takes: give its own prior")
        asked, sampling = Shapes.by_category(args.per_category, args.seed), Sampling(args.steps, args.guidance)
    shape = (len(asked.categories), args.per_category)
    print("| | " + " | ".join(asked.categories) + " | all |")
    print("|---" * (len(asked.categories) + 2) + "|")
    for name, right in of_captions(base, decoder, prior, asked, sampling, args.level).items():
        shares = np.array(right).reshape(shape).mean(1)
        print(f"| {name} | " + " | ".join(f"{share:.0%}" for share in shares) + f" | {np.mean(right):.0%} |")
    pixels = scenes(SCENES, args.scenes)
    whole = Shapes([scene(SCENES, i).request for i in range(args.scenes)])
    real = embedded(codec, pixels)
    rows = [pixels[:SHOWN]]
    print("\n| variations | as the full caption says | cosine | with another |\n|---|---|---|---|")
    for level in args.levels:
        pictures = drawn(decoder, [""] * args.scenes, sampling, real, level)
        again = drawn(decoder, [""] * len(rows[0]), sampling, real[:SHOWN], level, first=args.scenes)
        rows += [pictures[:SHOWN], again]
        share = np.mean([verdict.right for verdict in whole.verdicts(pictures)])
        made = embedded(codec, pictures)
        own, other = (float((made * theirs).sum(1).mean()) for theirs in (real, real.roll(-1, 0)))
        print(f"| level {level:g} | {share:.0%} | {own:.3f} | {other:.3f} |")
    if args.sheet:
        save_png(sheet(torch.cat(rows), len(rows[0])), args.sheet)


if __name__ == "__main__":
    main()
