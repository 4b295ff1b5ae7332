"""Overhead of encoding beyond the networks: `python benchmarks/encode.py`.

The same photographs (JPEG, 1200 × 800) and captions pass SD3's VAE and CLIP-L, in full size with random weights, in two
ways: as tensors in memory, and through `data.store.encoding` from files to a finished store. The two take turns.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from data.latents import VAE
from data.raw.sources import Pictures
from data.store.encoding import Encoding, Picture, StoreEncoder
from data.text.clip import CLIPText, write

ROOT = Path(__file__).parents[1]
CAPTION = "photograph number {} of a landscape in the evening, seen from above"


def networks(folder: Path) -> tuple[VAE, CLIPText]:
    """SD3's VAE and CLIP-L with random weights."""
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[128, 256, 512, 512], layers_per_block=2,
        latent_channels=16, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets/shapes/text/tokenizer", model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    write(folder, CLIPTextModelWithProjection(config), tokenizer)
    return VAE(folder / "vae"), CLIPText(folder)


def photographs(folder: Path, count: int) -> None:
    """Writes smooth random pictures with grain, as large and as slow to decode as photographs, with captions."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize((1200, 800))
        grain = np.asarray(coarse) + draw.normal(0, 6, (800, 1200, 3))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04}.jpg", quality=92)
        (folder / f"{i:04}.txt").write_text(CAPTION.format(i))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--pictures", type=int, default=16)
    p.add_argument("--side", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codec, text = networks(folder / "model")
        codec, text = codec.to(args.device), text.to(args.device)
        photographs(folder / "pictures", args.pictures)
        source = Pictures(str(folder / "pictures"))
        settings = Encoding(source, folder / "store", args.side, batch_size=args.batch_size)
        probe = StoreEncoder(settings, codec, text)
        batch = [probe.prepare(found) for found in source.read(0)]
        pixels = torch.stack([ready.pixels for ready in batch if isinstance(ready, Picture)]) / 255
        captions = [CAPTION.format(i) for i in range(args.pictures)]
        bare, whole = [], []
        for turn in range(args.turns + 1):  # the first warms up
            began = time.perf_counter()
            for part in range(0, args.pictures, args.batch_size):
                rows = slice(part, part + args.batch_size)
                codec.encode(pixels[rows]).cpu()
                text.encode(captions[rows]).tokens.cpu()
            bare.append(time.perf_counter() - began)
            target = Encoding(source, folder / f"store{turn}", args.side, batch_size=args.batch_size)
            began = time.perf_counter()
            StoreEncoder(target, codec, text).run()
            whole.append(time.perf_counter() - began)
        ratios = [w / b for w, b in zip(whole[1:], bare[1:], strict=True)]
    print(f"{args.pictures} pictures at {args.side}², {args.device}: bare {statistics.median(bare[1:]):.2f} s, "
          f"from files to store {statistics.median(whole[1:]):.2f} s")  # fmt: skip
    print(f"overhead {statistics.median(ratios) - 1:+.1%} (turns: {', '.join(f'{r - 1:+.1%}' for r in ratios)})")


if __name__ == "__main__":
    main()
