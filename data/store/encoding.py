"""Encodes pictures and captions into a store: bucket, scale and crop, latents, text."""

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
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm import tqdm

from data.latents import Codec
from data.order import Use, normal
from data.raw.base import UNIT, Cropped, Fault, Filters, Mirrored, Raw, Source, perceptual_hash
from data.raw.beside import Masks
from data.raw.buckets import Buckets
from data.raw.choices import Choices  # noqa: F401  # so that a config finds it by its name
from data.raw.hints import Hint
from data.raw.pictures import PictureError, cover, open_picture, room, size_of
from data.raw.profiles import BROKEN
from data.raw.sources import Pictures  # noqa: F401  # so that a config finds it by its name
from data.store.reader import MASKS, VERSION, Drop, Sample, Writer
from data.store.samples import CHOICE, HINT
from data.text.encoder import CutCaptions, Text, TextEncoder

EXACT = 257  # whole numbers from 0 that bfloat16 can hold, one after the other
MOST_CROPS = 1024
AHEAD = 4  # batches of pictures that are decoded in advance
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Encoding:
    """The source, the store and the settings of an encoding.

    Args:
        source: the captioned pictures.
        store: the folder of the store.
        side: of a square picture, in pixels; other buckets have at most as many pixels (`data.raw.buckets`).
        step: heights and widths are multiples of it.
        max_aspect: largest ratio of a bucket's longer side to its shorter side.
        latents: mean of the VAE's posterior; draw: one draw from it; posterior: mean and log-variance, twice as large,
            from which training draws each time.
        text: encoded: token and pooled vectors; captions: only captions, which training encodes. Tokens take the most
            space: at SD3's size ten times that of the latents.
        filters: which inputs are used.
        duplicates: of pictures whose perceptual hashes differ in at most so many of 64 bits, 0 to 8, only the first is
            used; None keeps all.
        hint: a second picture beside each, for a network that works from pictures (`data.raw.hints`).
        masks: how much each place of a picture counts in the loss; a latent has the mean of its pixels. A picture
            without a mask is left out.
        mirror: encodes each picture twice, the second time with left and right exchanged. No latents are flipped, which
            would not be the same. Not for captions that name sides, writing or faces.
        crops: encodes each picture so many times: its centre and other parts, each as large as its bucket. A picture
            that has the shape of its bucket has no other part.
        batch_size: of pictures.
        threads: that read and decode pictures.
        seed: of the draws, and of the places of crops.
        device: of codec and text encoders; None is a GPU if there is one.
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
    hint: Hint | None = None
    masks: Masks | None = None
    mirror: bool = False
    crops: int = 1
    batch_size: int = 16
    threads: int = 4
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.threads < 1:
            raise ValueError(f"batch_size and threads must be at least 1, got {self.batch_size} and {self.threads}")
        if self.duplicates is not None and not 0 <= self.duplicates <= 8:
            raise ValueError(f"duplicates must be from 0 to 8 bits, got {self.duplicates}")
        if not 1 <= self.crops <= MOST_CROPS:
            raise ValueError(f"crops must be from 1 to {MOST_CROPS}, got {self.crops}")
        if self.crops > 1 and self.duplicates is not None:
            raise ValueError("crops of a picture are near-duplicates: leave encode.duplicates or encode.crops out")
        Buckets(self.side, self.step, self.max_aspect)


class Picture(NamedTuple):
    """An input that is ready to be encoded."""

    raw: Raw
    bucket: int
    pixels: Tensor  # (C, H, W) uint8; for a choice or with a hint both pictures, (2, C, H, W)
    size: tuple[int, int]  # original height and width
    crop: tuple[int, int]  # top and left of the crop in the scaled picture
    phash: int
    unprofiled: bool  # its colour profile was ignored
    mask: Tensor | None  # of the loss, (1, H, W) uint8


class StoreEncoder:
    """Encodes one rank's shards of a store. Finished parts are not encoded again.

    Args:
        settings: of the encoding.
        codec: encodes pictures.
        text: encodes captions.

    Raises:
        ValueError: sizes do not fit the codec, the store cannot hold its codes or the text's token numbers, or the
            folder holds a store of another plan.
    """

    def __init__(self, settings: Encoding, codec: Codec, text: TextEncoder) -> None:
        self.settings, self.codec, self.text = settings, codec, text
        self.source = settings.source
        if settings.crops > 1:
            self.source = Cropped(self.source, settings.crops, settings.seed)
        if settings.mirror:
            self.source = Mirrored(self.source)
        self.buckets = Buckets(settings.side, settings.step, settings.max_aspect)
        if settings.step % codec.factor:
            raise ValueError(
                f"encode.step must be a multiple of {codec.factor}, the codec's factor, got {settings.step}"
            )
        if codec.vocabulary > EXACT:
            raise ValueError(f"a store is exact for codes below {EXACT}, and this codec has {codec.vocabulary}: take a "
                             "smaller codebook, with more depth")  # fmt: skip
        if settings.text == "encoded" and text.vocabulary:
            raise ValueError("a store holds no token numbers: set encode.text to captions")
        if self.source.choices and settings.hint:
            raise ValueError("a choice between two pictures has no hint: leave encode.hint out")
        if settings.masks and (self.source.choices or not codec.decodes):
            whole = "a choice between two pictures" if self.source.choices else "a latent of this codec"
            raise ValueError(f"{whole} is learned as a whole and not place by place: leave encode.masks out")
        self.two = CHOICE if self.source.choices else HINT if settings.hint else None  # what two pictures are
        if self.two and settings.latents != "mean":
            raise ValueError(f"encode.latents must be mean for two pictures each, got {settings.latents}")
        if settings.latents != "mean":  # raises for a codec without a posterior
            codec.posterior(torch.zeros(1, codec.pixel_channels, settings.step, settings.step))
        self.with_text = settings.text == "encoded"
        self.cut = self.unprofiled = 0  # number of captions that were cut, and of profiles that were ignored
        null = None
        text.keep(True)
        if self.with_text:
            tokens, pooled = text.encode([""])
            null = Text(tokens[0].cpu(), pooled[0].cpu())
        self.writer = Writer(settings.store, self.plan(), null)

    def plan(self) -> dict[str, Any]:
        """Everything that the content of the store depends on."""
        settings, buckets = self.settings, self.buckets
        filters = {name: getattr(settings.filters, name) for name in Filters.__dataclass_fields__}
        return {
            "version": VERSION,
            "codec": self.codec.fingerprint(),
            "text": self.text.fingerprint() if self.with_text else None,
            "tokens": self.with_text,
            "latents": self.two or settings.latents,
            "seed": settings.seed if settings.latents == "draw" else None,
            "factor": self.codec.factor,
            "channels": self.codec.channels * (2 if self.two or settings.latents == "posterior" else 1)
            + bool(settings.masks),
            "buckets": {
                "side": buckets.side,
                "step": buckets.step,
                "max_aspect": buckets.max_aspect,
                "sizes": [list(size) for size in buckets.sizes],
            },
            "crop": "cover, centre",
            "source": self.source.describe(),
            "filters": filters,
            "duplicates": settings.duplicates,
            **({"hint": settings.hint.describe()} if settings.hint else {}),
            **({MASKS: settings.masks.describe()} if settings.masks else {}),
        }

    def run(self, rank: int = 0, world: int = 1) -> dict[str, Any] | None:
        """Encodes this rank's shards. Returns the report, or None if a shard of another rank is not finished."""
        own = range(rank, self.source.shards, world)
        done = inputs = 0  # number of finished shards, and of their inputs
        with (
            ThreadPoolExecutor(self.settings.threads) as pool,
            tqdm(
                desc="encoding",
                unit="picture",
                total=len(own) * UNIT,
                smoothing=0.02,
                mininterval=0.2 if sys.stderr.isatty() else 15,
            ) as bar,
        ):
            for shard in own:
                with self.writer.hold(shard):
                    bar.update(self.writer.position(shard)[1])
                    for count in self._shard(shard, pool):
                        bar.update(count)
                done, inputs = done + 1, inputs + self.writer.position(shard)[1]
                bar.total = round(inputs / done * len(own))  # for the time left: assumes that all shards are alike
        if self.cut:
            warnings.warn(f"{self.cut} captions were too long for a text encoder: their tails were cut", stacklevel=2)
        if self.unprofiled:
            faults = "are broken or of another colour space: they were ignored"
            warnings.warn(f"the colour profiles of {self.unprofiled} pictures {faults}", stacklevel=2)
        return self.writer.finish(self.source.shards, self.settings.duplicates)

    def _shard(self, shard: int, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Encodes the rest of a shard, unit by unit; yields the number of inputs done since the last yield."""
        _, start, finished = self.writer.position(shard)
        if finished:
            return
        found = self.source.read(shard, start)
        ready = ahead(pool, self.prepare, found, min(AHEAD * self.settings.batch_size, UNIT))
        following = next(ready, None)
        while True:
            samples: dict[int, Sample] = {}
            drops: list[Drop] = []
            waiting: dict[int, list[tuple[int, Picture]]] = {}  # by bucket, until there is a batch
            count = 0
            while following is not None and count < UNIT:
                if isinstance(following, Drop):
                    drops.append(following)
                else:
                    self.unprofiled += following.unprofiled
                    queue = waiting.setdefault(following.bucket, [])
                    queue.append((count, following))
                    if len(queue) == self.settings.batch_size:
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
        """Reads, filters, scales and crops an input; or says why it is dropped."""
        masks, mask = self.settings.masks, None
        if masks and masks.is_mask(found.id):
            return Drop(found.id, "mask", "it is the mask of a picture")
        if isinstance(found, Fault):
            return Drop(*found)
        try:
            size = size_of(found.picture)
            if reason := self.settings.filters.reason(size, found.captions):
                return Drop(found.id, *reason)
            bucket = self.buckets.of(*size)
            if found.crop is not None and not any(room(size, *self.buckets.sizes[bucket])):
                raise PictureError("same crop", "the picture has the shape of its bucket: its centre is all of it")
            image = self._open(found.picture, bucket, found.mirrored)
            phash = perceptual_hash(image) if self.settings.duplicates is not None else 0
            image, top, left = cover(image, *self.buckets.sizes[bucket], found.crop)
            pixels = levels(image)
            if found.worse is not None:
                other = self._open(found.worse, bucket, found.mirrored)
                pixels = torch.stack([pixels, levels(cover(other, *self.buckets.sizes[bucket], found.crop)[0])])
            elif self.settings.hint:
                pixels = torch.stack([pixels, levels(self.settings.hint(found, image))])
            if masks:
                mask = levels(cover(masks(found, size), *self.buckets.sizes[bucket], found.crop)[0])
        except PictureError as error:
            return Drop(found.id, error.reason, str(error))
        raw = self.settings.filters.trimmed(found)
        return Picture(raw, bucket, pixels, size, (top, left), phash, BROKEN in image.info, mask)

    def _open(self, picture: bytes | Path | Image.Image, bucket: int, mirrored: bool) -> Image.Image:
        """A picture, large enough for a bucket."""
        image = open_picture(picture, self.codec.pixel_channels, needed=self.buckets.sizes[bucket])
        return ImageOps.mirror(image) if mirrored else image

    def _encode(self, shard: int, start: int, batch: list[tuple[int, Picture]]) -> dict[int, Sample]:
        """Samples of pictures of one bucket: number in the unit → sample."""
        pictures = [picture for _, picture in batch]
        pixels = torch.stack([picture.pixels for picture in pictures]).to(torch.float32).div(255)
        if self.settings.latents == "mean":
            latents = self.codec.encode(pixels.flatten(0, -4)).unflatten(0, pixels.shape[:-3])
            latents = latents.flatten(1, -3)  # of two pictures along the channels
        else:
            mean, logvar = self.codec.posterior(pixels)
            if self.settings.latents == "draw":
                numbers = np.array([start + i for i, _ in batch])
                noise = normal(self.settings.seed, Use.POSTERIOR, shard, numbers, tuple(mean.shape[1:]))
                latents = mean + (logvar / 2).exp() * noise.to(mean)
            else:
                latents = torch.cat([mean, logvar], dim=1)
        if self.settings.masks:
            masks = torch.stack([picture.mask for picture in pictures if picture.mask is not None]) / 255
            latents = torch.cat([latents, avg_pool2d(masks, self.codec.factor).to(latents)], dim=1)
        counts = [len(picture.raw.captions) for picture in pictures]
        pooled: list[Any] = [None] * len(batch)
        tokens: list[Any] = [None] * len(batch)
        if self.with_text:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", CutCaptions)
                text = self.text.encode([caption for picture in pictures for caption in picture.raw.captions])
            cut = [warning.message.captions for warning in caught if isinstance(warning.message, CutCaptions)]
            self.cut += len(set().union(*cut))
            tokens, pooled = (list(part.to(torch.bfloat16).cpu().split(counts)) for part in text)
        rows = zip(batch, latents.to(torch.bfloat16).cpu(), pooled, tokens, strict=True)
        return {
            i: Sample(p.raw.id, p.raw.captions, p.raw.weights, p.bucket, p.size, p.crop, p.phash, *encoded)
            for (i, p), *encoded in rows
        }


def levels(image: Image.Image) -> Tensor:
    """A picture as (C, H, W) uint8."""
    return torch.from_numpy(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1).copy())


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Made], items: Iterable[Item], depth: int
) -> Iterator[Made]:
    """The function's results for the items, in order, with up to `depth` calls in progress."""
    source = iter(items)
    waiting: deque[Future[Made]] = deque(pool.submit(function, item) for item in islice(source, depth))
    while waiting:
        made = waiting.popleft().result()
        waiting.extend(pool.submit(function, item) for item in islice(source, 1))
        yield made
