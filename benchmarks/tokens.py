"""Pictures as codes: what depth, restarts and reranking are worth, on the shapes.

    python -m benchmarks.tokens codes
    python -m benchmarks.tokens rerank --model runs/tokens-shapes

`codes` trains RQ-VAEs of four depths from scratch: with restarts of codes that are hardly used, without, and without
but from a codebook that k-means made of the first features. For unseen scenes it prints the PSNR of the first depths,
how many a judge still reads as drawn, the perplexity of the codes and their share in use. `rerank` draws several
pictures for each prompt of every category and keeps the one whose CLIP embedding lies nearest to that of the prompt, as
DALL·E does (Ramesh et al. 2021, §2.6). It prints the share of right ones, and that of prompts of which any picture is
right, the most that a reranking can reach.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from cli import Parser, one_line_errors, positive
from data import shapes
from data.clip import CLIPImage
from data.examined import Shapes
from data.text.clip import CLIPText
from pipeline import Pipeline
from storage.models import find_model
from tokens.quantize import usage
from tokens.vqvae import VQVAE
from tools.train_shapes_vae import SCENES, pictures
from training.autoencoder import COMMITMENT, CodedAutoencoder, fit

ASSETS = Path(__file__).parents[1] / "assets" / "shapes"
DEPTH, BATCH, RATE, UNSEEN = 4, 16, 2e-3, 300
COUNTS = (1, 2, 4, 8)


def rows(header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}")
    print(*(f"| {' | '.join(row)} |" for row in body), sep="\n")


def batch(scenes: Tensor) -> Tensor:
    return scenes[torch.randint(SCENES, (BATCH,))] / 127.5 - 1


def codes(steps: int, seed: int) -> None:
    """The table of depths and restarts."""
    scenes, unseen = pictures(0, SCENES), pictures(SCENES, UNSEEN) / 255
    requests = [shapes.scene(1, SCENES + i).request for i in range(UNSEEN)]
    body = []
    for name, restart in (("restarts", 1.0), ("none", 0.0), ("k-means start", 0.0)):
        torch.manual_seed(seed)
        coded = CodedAutoencoder(VQVAE(widths=(32, 32, 64), depth=DEPTH, restart=restart))
        vqvae = coded.vqvae
        if name == "k-means start":
            with torch.no_grad():
                features = vqvae.project(vqvae.encoder(scenes[:50] / 127.5 - 1))
            vqvae.quantizer.start(features.movedim(1, -1).flatten(0, 2))
        fit(coded, lambda step: batch(scenes), steps, RATE, lambda step: COMMITMENT)
        vqvae.eval()
        with torch.no_grad():
            found = torch.cat([vqvae(2 * part - 1).codes for part in unseen.split(100)])
            for depth in range(1, DEPTH + 1):
                decoded = [vqvae.decode(part) for part in found[:, :depth].split(100)]
                back = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)
                psnr = float((-10 * (back - unseen).square().mean((1, 2, 3)).log10()).mean())
                read = [shapes.read(one.movedim(0, -1).double().numpy()) for one in back]
                right = np.mean([shapes.fulfils(some, asked) for some, asked in zip(read, requests, strict=True)])
                perplexity, share = usage(found[:, depth - 1], vqvae.size)
                overall = f"{usage(found, vqvae.size)[1]:.0%}" if depth == DEPTH else ""
                body.append([name, str(depth), f"{psnr:.1f}", f"{right:.1%}",
                             f"{perplexity:.0f}", f"{share:.0%}", overall])  # fmt: skip
    rows(["codebook", "depth", "PSNR (dB)", "judged right", "perplexity", "in use here", "in use at all"], body)


def drawn(pipe: Pipeline, prompts: Sequence[str], count: int, seed: int) -> Tensor:
    """`count` pictures for each prompt, (count, prompts, 3, 64, 64)."""
    found = []
    for number in tqdm(range(count), desc="drawing", unit="picture of each prompt"):
        first = seed + number * len(prompts)
        parts = [range(len(prompts))[i : i + 64] for i in range(0, len(prompts), 64)]
        found.append(torch.cat([pipe([prompts[i] for i in part], [first + i for i in part]) for part in parts]))
    return torch.stack(found)


def rerank(model: Path, each: int, seed: int) -> None:
    """The table of the best of several."""
    pipe, examined = Pipeline.load(find_model(model)), Shapes.by_category(each, seed)
    tower, text = CLIPImage(ASSETS / "image"), CLIPText(ASSETS / "text")
    found = drawn(pipe, examined.prompts, max(COUNTS), seed)
    with torch.no_grad():
        said = normalize(text.encode(examined.prompts).pooled[:, text.slots[0].pooled], dim=-1)
    near = torch.stack([(tower.embedding(tower.encode(one)) * said).sum(-1) for one in found])  # count, prompts
    right = torch.tensor([[verdict.right for verdict in examined.verdicts(one)] for one in found])
    body = []
    for count in COUNTS:
        chosen = near[:count].argmax(0)
        picked = right[chosen, torch.arange(len(chosen))].double()
        categories = picked.reshape(len(examined.categories), -1).mean(1)
        body.append([str(count), *(f"{share:.0%}" for share in categories.tolist()), f"{picked.mean():.0%}",
                     f"{right[:count].any(0).double().mean():.0%}"])  # fmt: skip
    rows(["best of", *examined.categories, "all", "any right"], body)


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("measured", choices=["codes", "rerank"])
    p.add_argument("--steps", type=positive, default=1000, help="of each training of `codes`; default: 1000")
    p.add_argument("--model", type=Path, default=Path("runs/tokens-shapes"), help="of `rerank`")
    p.add_argument("--per-category", type=positive, default=50, help="prompts of `rerank`; default: 50")
    p.add_argument("--seed", type=positive, default=1, help="default: 1")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    torch.set_num_threads(1)
    with one_line_errors(ValueError, FileNotFoundError):
        if args.measured == "codes":
            codes(args.steps, args.seed)
        else:
            rerank(args.model, args.per_category, args.seed)


if __name__ == "__main__":
    main()
