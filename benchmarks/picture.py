"""A whole picture by our `Pipeline` against diffusers' `StableDiffusion3Pipeline`: same weights, text and noise.

    python benchmarks/picture.py
    python benchmarks/picture.py --case sd3 --device cuda --dtype bfloat16 --size 1024

From noise to pixels by Euler's method with guidance; the text vectors are random. The large networks are as wide as the
released ones but have two blocks, and the VAE is small, so that the transformer takes most of the time. The two take
turns, a picture each, so that a noisy machine slows both. Prints seconds a picture (median), the median over turns of
the ratio, and the largest difference of the pixels, which in float32 must be below 1/255.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging
from torch import Tensor
from tqdm import trange

from data.latents import VAE
from data.text.encoder import Text, TextEncoder
from flow.objective import Objective
from mmdit import checkpoint
from pipeline import Pipeline
from pipeline.sampling import Sampling
from storage.weights import DType

SEED, SHIFT, TOKENS, CHANNELS, FACTOR = 5, 3.0, 333, 16, 8
Painter = Callable[[], Tensor]


class Case(NamedTuple):
    """A network and its picture."""

    heads: int  # of 64 channels
    depth: int
    text: int  # channels of a text token
    pooled: int
    steps: int
    size: int  # side of the picture, in pixels
    medium: bool = False  # what Stable Diffusion 3.5 medium adds: norms of q and k, second attentions


CASES = {
    "tiny": Case(heads=2, depth=3, text=224, pooled=192, steps=28, size=64),
    "sd3": Case(heads=24, depth=2, text=4096, pooled=2048, steps=4, size=256),
    "sd35-medium": Case(heads=24, depth=2, text=4096, pooled=2048, steps=4, size=256, medium=True),
}


class Given(TextEncoder):
    """A text encoder for captions that are encoded already.

    Args:
        texts: caption → its encoding.
    """

    def __init__(self, texts: dict[str, Text]) -> None:
        self.texts = texts
        self.tokens_dim, self.pooled_dim = (part.shape[-1] for part in next(iter(texts.values())))

    def encode(self, captions: Sequence[str]) -> Text:
        tokens, pooled = zip(*(self.texts[caption] for caption in captions), strict=True)
        return Text(torch.cat(tokens), torch.cat(pooled))

    def mask(self, captions: Sequence[str]) -> Tensor:
        return torch.ones(len(captions), next(iter(self.texts.values())).tokens.shape[1], dtype=torch.bool)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Does nothing: there are no encoders."""

    def to(self, device: torch.device | str) -> Self:
        return self

    def keep(self, kept: bool) -> None:
        """Does nothing: there are no encoders."""

    def fingerprint(self) -> dict[str, Any]:
        return {"class": "Given", "captions": sorted(self.texts)}

    def index(self) -> dict[str, list[str | None]]:
        return {}


def stirred(module: Any, scale: float) -> Any:
    """Adds noise of standard deviation `scale` to every parameter, since some start at zero or one."""
    for parameter in module.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return module.eval().requires_grad_(False)


def transformer(case: Case) -> Any:
    """diffusers' network with random weights."""
    network = SD3Transformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=case.depth,
        num_attention_heads=case.heads,
        attention_head_dim=64,
        caption_projection_dim=64 * case.heads,
        joint_attention_dim=case.text,
        pooled_projection_dim=case.pooled,
        pos_embed_max_size=192,
        dual_attention_layers=tuple(range(case.depth)) if case.medium else (),
        qk_norm="rms_norm" if case.medium else None,
    )
    return stirred(network, 0.02)


def vae() -> Any:
    """A random autoencoder with SD3's latents."""
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        latent_channels=CHANNELS,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return stirred(network, 0.05)


def painters(case: Case, guidance: float, device: str, dtype: DType) -> tuple[Painter, Painter]:
    """Ours and diffusers', each of which makes the case's picture, (1, 3, size, size) on the CPU."""
    torch.manual_seed(0)
    network, codec = transformer(case).to(getattr(torch, dtype)), vae().to(getattr(torch, dtype))
    positive, negative = (
        Text(*(torch.randn(shape).to(device, network.dtype) for shape in ((1, TOKENS, case.text), (1, case.pooled))))
        for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(Path(folder) / "transformer")
        codec.save_pretrained(Path(folder) / "vae")
        ours = Pipeline(
            checkpoint.load(folder, dtype, device),
            Objective(shift=SHIFT),
            VAE(folder, dtype).to(device),
            Given({"positive": positive, "negative": negative}),
            Sampling(case.steps, guidance, spacing="flow_match"),
        )
    nothing = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    theirs: Any = StableDiffusion3Pipeline(
        transformer=network.to(device), scheduler=scheduler, vae=codec.to(device), **nothing
    )
    theirs.set_progress_bar_config(disable=True)

    def mine() -> Tensor:
        return ours(["positive"], [SEED], "negative", height=case.size, width=case.size)

    def other() -> Tensor:
        side = case.size // FACTOR
        noise = torch.randn(1, CHANNELS, side, side, generator=torch.Generator().manual_seed(SEED))
        return theirs(
            prompt_embeds=positive.tokens, pooled_prompt_embeds=positive.pooled, latents=noise, output_type="pt",
            negative_prompt_embeds=negative.tokens, negative_pooled_prompt_embeds=negative.pooled,
            num_inference_steps=case.steps, guidance_scale=guidance, height=case.size, width=case.size,
        ).images.float().cpu()  # fmt: skip

    return mine, other


def seconds(painter: Painter, device: str) -> float:
    """Seconds for a picture."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    painter()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--case", choices=CASES, help="which network; default: all, one after the other")
    p.add_argument("--steps", type=int, help="of the sampler; default: 28 for tiny, else 4")
    p.add_argument("--size", type=int, help="side of the picture in pixels; default: 64 for tiny, else 256")
    p.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance")
    p.add_argument("--turns", type=int, default=7, help="pictures of each pipeline")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--dtype", choices=get_args(DType), default="float32", help="of network and VAE")
    args = p.parse_args()

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {args.device}, "
          f"{args.dtype}, guidance {args.guidance:g}")  # fmt: skip
    logging.set_verbosity_error()  # it warns of empty lists
    failed = []
    for name in [args.case] if args.case else CASES:
        case = CASES[name]
        case = case._replace(steps=args.steps or case.steps, size=args.size or case.size)
        mine, other = painters(case, args.guidance, args.device, args.dtype)
        pictures = mine(), other()
        apart = (pictures[0] - pictures[1]).abs().max().item()
        turns = [
            (seconds(mine, args.device), seconds(other, args.device))
            for _ in trange(args.turns, desc=f"timing {name}", unit="turn")
        ]
        a, b = (statistics.median(turn[i] for turn in turns) for i in (0, 1))
        ratio = statistics.median(theirs / ours for ours, theirs in turns)
        print(f"{name}, {case.steps} steps, {case.size}×{case.size}: ours {a:.3f} s, diffusers {b:.3f} s a picture, "
              f"{ratio:.2f} times as fast; pixels differ by at most {apart:.1e}")  # fmt: skip
        if args.dtype == "float32" and not (apart < 1 / 255 and pictures[1].std() > 0.02):
            failed.append(name)
    if failed:
        sys.exit(f"not the same picture, or a flat one: {', '.join(failed)}")


if __name__ == "__main__":
    main()
