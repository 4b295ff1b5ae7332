"""Stores of random pictures in three shapes, and batches from them."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tiny
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data.batch import Batch
from data.latents import VAE, Codec, Pixels
from data.module import Stored
from data.raw.base import Raw, Source
from data.store.encoding import Encoding, StoreEncoder
from data.store.reader import Store
from data.text.clip import CLIPText

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "assets/shapes/text"
CODEC = Pixels(3)
COUNT, HELD_OUT = 72, 9
SIZES = ((14, 40), (20, 20), (40, 14))  # heights and widths of the pictures; a bucket for each
BUCKETS = ((8, 32), (16, 16), (32, 8))


class Painted(Source):
    """Random pictures of three shapes with one, two or three captions."""

    shards = 2

    def read(self, shard: int, start: int = 0) -> Iterator[Raw]:
        for number in range(shard * COUNT // 2 + start, (shard + 1) * COUNT // 2):
            height, width = SIZES[number % 3]
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            words = ("a red circle", "two large blue squares", "a cross above a small triangle")
            count = 2 if number % 3 == 1 else 1 + number // 3 % 3
            told = tuple(f"{word} and {number} pixels" for word in words[:count])
            yield Raw(f"painted-{number:03d}", Image.fromarray(pixels), told, (1.0, 3.0, 0.5)[:count])

    def describe(self) -> dict[str, Any]:
        return {"kind": "Painted"}


def made(folder: Path, encoder: CLIPText, codec: Codec = CODEC, **how: Any) -> str:
    settings = {"side": 16, "step": 8, "max_aspect": 4.0, "device": "cpu"} | how
    assert StoreEncoder(Encoding(Painted(), folder, **settings), codec, encoder).run()
    return str(folder)


def assert_equal(a: Batch, b: Batch, rows: slice = slice(None)) -> None:
    """Equality to the bit of a batch and of rows of another."""
    assert a.step == b.step
    assert np.array_equal(a.positions, b.positions[rows])
    for name in ("x0", "noise", "text", "pooled", "kept", "sizes"):
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs[rows]), name
    assert a.captions == (b.captions and b.captions[rows])


def batches(data: Stored, steps: int, start: int = 0) -> list[Batch]:
    """The first global batches of a training, as they leave the loader."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=start, global_rank=0, world_size=1, accumulate_grad_batches=1
    )
    return list(islice(data.train_dataloader(), steps))


def identities(batch: Batch, known: dict[bytes, str]) -> list[str]:
    return [known[row.view(torch.uint8).numpy().tobytes()] for row in batch.x0]


def by_content(path: str) -> dict[bytes, str]:
    """Latents → id."""
    store = Store(path)
    members = [rows for rows in map(store.members, range(len(store.buckets))) if len(rows)]
    return {
        latents.view(torch.uint8).numpy().tobytes(): store.ids()[int(row)].as_py()
        for rows in members
        for row, latents in zip(rows, store.latents(np.array(rows)), strict=True)
    }


def vae(folder: Path) -> VAE:
    """A small random VAE, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Groups of several channels, so that a latent of one pixel has a variance.
        network = AutoencoderKL.from_config(dict(tiny.vae().config) | {"norm_num_groups": 8})
        tiny.frozen(network).save_pretrained(folder)
    return VAE(folder)


def stores(folder: Path) -> dict[str, str]:
    """The same pictures as latents with tokens, with captions alone, at half the size, and as posteriors."""
    text = CLIPText(TEXT)
    return {
        "tokens": made(folder / "tokens", text),
        "captions": made(folder / "captions", text, text="captions"),
        "small": made(folder / "small", text, side=8),
        "posterior": made(folder / "posterior", text, vae(folder / "vae"), latents="posterior"),
    }
