"""Pictures and captions to a store: bucket, cover and crop, latents, text."""

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.latents import Codec
from data.order import Use, normal
from data.raw.base import UNIT, Fault, Filters, Raw, Source, perceptual_hash
from data.raw.buckets import Buckets
from data.raw.pictures import PictureError, cover, open_picture, size_of
from data.raw.sources import Pictures  # noqa: F401  # so that a config finds it by its name
from data.store.reader import Drop, Sample, Writer
from data.text.encoder import CutCaptions, Text, TextEncoder

VERSION = 1  # of the plan
AHEAD = 4  # batches of pictures that are decoded while another is encoded
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Encoding:
    """What is encoded, how, and where to.

    Args:
        source: the captioned pictures.
        store: the folder of the store.
        side: of a square picture, in pixels; others have as many pixels at most (`data.buckets`).
        step: what heights and widths are multiples of.
        max_aspect: of the most oblong bucket, its longer side over its shorter one.
        latents: the mean of the VAE's posterior; one draw from it; or mean and log-variance, twice as large, from which
            each visit in training draws anew.
        text: the encoders' token and pooled vectors; or captions alone, which are encoded in training. Tokens take the
            most room: at SD3's size ten times that of the latents.
        filters: which inputs are left out.
        duplicates: pictures whose perceptual hashes differ in so many of 64 bits or fewer are taken once, 0 to 8; none
            keeps all.
        batch_size: pictures that are encoded at once.
        threads: that read and decode pictures.
        seed: of the draws.
        device: where codec and text encoders compute; none is a GPU where there is one.
    """

    source: Source
    store: Path
    side: int = 512
    step: int = 64
    max_aspect: float = 2.0
    latents: Literal["mean", "draw", "posterior"] = "mean"
    text: Literal["encoded", "captions"] = "encoded"
    filters: Filters = field(default_factory=Filters)
    duplicates: int | None = None
    batch_size: int = 16
    threads: int = 4
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.threads < 1:
            raise ValueError(f"batch_size and threads must be at least 1, got {self.batch_size} and {self.threads}")
        if self.duplicates is not None and not 0 <= self.duplicates <= 8:
            raise ValueError(f"duplicates must be from 0 to 8 bits, got {self.duplicates}")
        Buckets(self.side, self.step, self.max_aspect)


class Picture(NamedTuple):
    """An input that is ready to be encoded."""

    raw: Raw
    bucket: int
    pixels: Tensor  # (C, H, W) uint8
    size: tuple[int, int]  # original height and width
    crop: tuple[int, int]  # top and left of the crop in the scaled picture
    phash: int


class StoreEncoder:
    """Fills a store, one rank's shards of it; what is there already is not done again.

    Args:
        how: what to do.
        codec: encodes pictures.
        text: encodes captions.

    Raises:
        ValueError: sizes do not fit the codec, or the store there holds something else.
    """

    def __init__(self, how: Encoding, codec: Codec, text: TextEncoder) -> None:
        self.how, self.codec, self.text = how, codec, text
        self.buckets = Buckets(how.side, how.step, how.max_aspect)
        if how.step % codec.factor:
            raise ValueError(f"encode.step must be a multiple of {codec.factor}, the codec's factor, got {how.step}")
        if how.latents != "mean":
            codec.posterior(torch.zeros(1, codec.pixel_channels, how.step, how.step))  # a codec without it
        self.with_text = how.text == "encoded"
        self.cut = 0  # captions whose tails no encoder read
        null = None
        text.keep(True)
        if self.with_text:
            tokens, pooled = text.encode([""])
            null = Text(tokens[0].cpu(), pooled[0].cpu())
        self.writer = Writer(how.store, self.plan(), null)

    def plan(self) -> dict[str, Any]:
        """All that the content of the store depends on."""
        how, buckets = self.how, self.buckets
        filters = {name: getattr(how.filters, name) for name in Filters.__dataclass_fields__}
        return {
            "version": VERSION,
            "codec": self.codec.fingerprint(),
            "text": self.text.fingerprint() if self.with_text else None,
            "tokens": self.with_text,
            "latents": how.latents,
            "seed": how.seed if how.latents == "draw" else None,
            "factor": self.codec.factor,
            "channels": self.codec.channels * (2 if how.latents == "posterior" else 1),
            "buckets": {
                "side": buckets.side,
                "step": buckets.step,
                "max_aspect": buckets.max_aspect,
                "sizes": [list(size) for size in buckets.sizes],
            },
            "crop": "cover, centre",
            "source": how.source.describe(),
            "filters": filters,
            "duplicates": how.duplicates,
        }

    def run(self, rank: int = 0, world: int = 1) -> dict[str, Any] | None:
        """Encodes this rank's shards; the report, if no shard of any rank is left to do."""
        own = range(rank, self.how.source.shards, world)
        done = inputs = 0  # finished shards, and the inputs in them
        with (
            ThreadPoolExecutor(self.how.threads) as pool,
            tqdm(
                desc="encoding",
                unit="picture",
                total=len(own) * UNIT,
                smoothing=0.02,
                mininterval=0.2 if sys.stderr.isatty() else 15,
            ) as bar,
        ):
            for shard in own:
                bar.update(self.writer.position(shard)[1])
                for count in self._shard(shard, pool):
                    bar.update(count)
                done, inputs = done + 1, inputs + self.writer.position(shard)[1]
                bar.total = round(inputs / done * len(own))  # for the time left: the others are taken to be alike
        if self.cut:
            told = f"{self.cut} times a caption was longer than a text encoder reads: its tail was cut"
            warnings.warn(told, stacklevel=2)
        return self.writer.finish(self.how.source.shards, self.how.duplicates)

    def _shard(self, shard: int, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Encodes what is left of a shard, unit by unit, telling now and then how many inputs more are done."""
        _, start, finished = self.writer.position(shard)
        if finished:
            return
        found = self.how.source.read(shard, start)
        ready = ahead(pool, self.prepare, found, AHEAD * self.how.batch_size)
        following = next(ready, None)
        while True:
            samples: dict[int, Sample] = {}
            drops: list[Drop] = []
            waiting: dict[int, list[tuple[int, Picture]]] = {}  # by bucket, until they make a batch
            count = 0
            while following is not None and count < UNIT:
                if isinstance(following, Drop):
                    drops.append(following)
                else:
                    queue = waiting.setdefault(following.bucket, [])
                    queue.append((count, following))
                    if len(queue) == self.how.batch_size:
                        samples |= self._encode(shard, start, waiting.pop(following.bucket))
                following, count = next(ready, None), count + 1
                yield 1
            for bucket in sorted(waiting):
                samples |= self._encode(shard, start, waiting[bucket])
            last = following is None
            self.writer.write(shard, [samples[i] for i in sorted(samples)], drops, count, last)
            start += count
            if last:
                return

    def prepare(self, found: Raw | Fault) -> Picture | Drop:
        """An input, read, filtered, scaled and cropped; or why it is left out."""
        if isinstance(found, Fault):
            return Drop(*found)
        try:
            size = size_of(found.picture)
            if reason := self.how.filters.reason(size, found.captions):
                return Drop(found.id, *reason)
            bucket = self.buckets.of(*size)
            height, width = self.buckets.sizes[bucket]
            image = open_picture(found.picture, self.codec.pixel_channels, wanted=(height, width))
            phash = perceptual_hash(image) if self.how.duplicates is not None else 0
            image, top, left = cover(image, height, width)
        except PictureError as error:
            return Drop(found.id, error.reason, str(error))
        pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
        raw = self.how.filters.trimmed(found)
        return Picture(raw, bucket, torch.from_numpy(pixels.copy()), size, (top, left), phash)

    def _encode(self, shard: int, start: int, batch: list[tuple[int, Picture]]) -> dict[int, Sample]:
        """Samples of pictures of one bucket, by their number in the unit."""
        pictures = [picture for _, picture in batch]
        pixels = torch.stack([picture.pixels for picture in pictures]).to(torch.float32).div(255)
        if self.how.latents == "mean":
            latents = self.codec.encode(pixels)
        else:
            mean, logvar = self.codec.posterior(pixels)
            if self.how.latents == "draw":
                numbers = np.array([start + i for i, _ in batch])
                noise = normal(self.how.seed, Use.POSTERIOR, shard, numbers, tuple(mean.shape[1:]))
                latents = mean + (logvar / 2).exp() * noise.to(mean)
            else:
                latents = torch.cat([mean, logvar], dim=1)
        counts = [len(picture.raw.captions) for picture in pictures]
        pooled: list[Any] = [None] * len(batch)
        tokens: list[Any] = [None] * len(batch)
        if self.with_text:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", CutCaptions)
                text = self.text.encode([caption for picture in pictures for caption in picture.raw.captions])
            self.cut += sum(warning.message.count for warning in told if isinstance(warning.message, CutCaptions))
            tokens, pooled = (list(part.to(torch.bfloat16).cpu().split(counts)) for part in text)
        rows = zip(batch, latents.to(torch.bfloat16).cpu(), pooled, tokens, strict=True)
        return {
            i: Sample(p.raw.id, p.raw.captions, p.raw.weights, p.bucket, p.size, p.crop, p.phash, *encoded)
            for (i, p), *encoded in rows
        }


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Made], items: Iterable[Item], depth: int
) -> Iterator[Made]:
    """What the function makes of the items, in order, with up to `depth` of them under way."""
    source = iter(items)
    waiting: deque[Future[Made]] = deque(pool.submit(function, item) for item in islice(source, depth))
    while waiting:
        made = waiting.popleft().result()
        waiting.extend(pool.submit(function, item) for item in islice(source, 1))
        yield made
