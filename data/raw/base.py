"""Captioned pictures before encoding: an input, a source of inputs, and filters."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, final

from PIL import Image
from xxhash import xxh3_64_intdigest

from data.order import Use, stream

UNIT = 1024  # inputs in a shard of a source with numbered rows
MIRRORED, CROPPED = "#mirrored", "#crop"
LARGEST_FILE = 2**30  # bytes of a picture
LARGEST_CAPTION = 2**20  # bytes of a caption
NAMES = ("text", "caption", "captions", "prompt", "txt")  # of caption columns, the most likely first
LIKELY = NAMES + tuple(f"json.{name}" for name in NAMES)
EXTENSIONS = frozenset([
    "avif", "bmp", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg",
    "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp",
])  # fmt: skip
FOREIGN = frozenset([  # pictures that Pillow reads with a plugin, or that are counted as unreadable
    "apng", "arw", "cr2", "cr3", "dds", "dng", "eps", "exr", "hdr", "heic", "heif", "hif", "ico", "jxl", "jxr",
    "nef", "orf", "pcx", "psb", "psd", "qoi", "raf", "rw2", "svg", "svgz", "tga", "xcf",
])  # fmt: skip


class Raw(NamedTuple):
    """An input whose picture is not decoded yet."""

    id: str  # independent of the path of the data; repeated if the data repeat it
    picture: bytes | Path | Image.Image
    captions: tuple[str, ...]  # stripped, none empty
    weights: tuple[float, ...]  # of the captions
    mirrored: bool = False  # left and right are to be exchanged
    crop: float | None = None  # place of what is cut out, from left or top at 0 to right or bottom at 1; none: centre
    worse: bytes | Path | None = None  # a picture to which the other one was preferred


class Fault(NamedTuple):
    """An input, or the rest of a shard, that could not be read.

    The reasons are "no picture", "several pictures", "too large", "no caption", "unreadable caption", "unreadable row"
    of metadata, "truncated shard" and "damaged shard".
    """

    id: str
    reason: str
    detail: str


Input: TypeAlias = Raw | Fault


class Source(ABC):
    """Inputs in shards, which processes can read independently and in any order.

    Attributes:
        shards: their number.
        choices: all inputs have two pictures.
    """

    shards: int
    choices: bool = False

    @abstractmethod
    def read(self, shard: int, start: int = 0) -> Iterator[Input]:
        """The inputs of a shard from number `start` on (faults count), always in the same order.

        Raises:
            ValueError: there is no such shard, or it cannot be read.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """A description of the data, as JSON. It changes if names, sizes or number of the files change."""


class Variants(Source):
    """A source and, in further shards, the same again: each time its pictures are taken in another way.

    Args:
        source: the inputs.
        times: how often each comes.
    """

    def __init__(self, source: Source, times: int) -> None:
        self.source, self.shards, self.choices = source, times * source.shards, source.choices

    @abstractmethod
    def mark(self, number: int) -> str:
        """The end of the ids of variant `number`, from 1 on."""

    @abstractmethod
    def vary(self, raw: Raw, number: int) -> Raw:
        """An input as variant `number`, from 1 on."""

    def read(self, shard: int, start: int = 0) -> Iterator[Input]:
        if not 0 <= shard < self.shards:
            raise ValueError(f"there are shards 0 to {self.shards - 1}, not {shard}")
        number, own = divmod(shard, self.source.shards)
        for found in self.source.read(own, start):
            if not number:
                yield found
            else:
                other = self.vary(found, number) if isinstance(found, Raw) else found
                yield other._replace(id=found.id + self.mark(number))


@final
class Mirrored(Variants):
    """A source and the same again with left and right exchanged.

    Args:
        source: the inputs. The mirrored ones have ids that end in MIRRORED.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source, 2)

    def mark(self, number: int) -> str:
        return MIRRORED

    def vary(self, raw: Raw, number: int) -> Raw:
        return raw._replace(mirrored=True)

    def describe(self) -> dict[str, Any]:
        return {"kind": "Mirrored", "source": self.source.describe()}


@final
class Cropped(Variants):
    """A source and the same again with other parts of the pictures cut out than their centres.

    The first variant lies in the first of equal parts of the room that a picture leaves to its bucket, the next one in
    the next part, each at a place drawn from (seed, id).

    Args:
        source: the inputs. The other crops have ids that end in CROPPED and a number.
        crops: of each picture, with the centre.
        seed: of the places.
    """

    def __init__(self, source: Source, crops: int, seed: int) -> None:
        super().__init__(source, crops)
        self.crops, self.seed = crops, seed

    def mark(self, number: int) -> str:
        return f"{CROPPED}{number}"

    def vary(self, raw: Raw, number: int) -> Raw:
        u = stream(self.seed, Use.CROP, number, xxh3_64_intdigest(raw.id.encode())).random()
        return raw._replace(crop=(number - 1 + u) / (self.crops - 1))

    def describe(self) -> dict[str, Any]:
        return {"kind": "Cropped", "crops": self.crops, "seed": self.seed, "source": self.source.describe()}


def original(name: str) -> str:
    """The id of the picture of which this is the id, or that of a variant."""
    return re.sub(f"({CROPPED}[0-9]+)?({MIRRORED})?$", "", name)


@dataclass(frozen=True)
class Filters:
    """Which inputs are used.

    Args:
        min_side: smallest length of a picture's shorter side, before scaling, in pixels.
        max_aspect: largest ratio of its longer to its shorter side, at least 1; None for no limit.
        min_caption: smallest length of a caption, in characters.
        max_caption: largest length of a caption, in characters; None for no limit.

    Raises:
        ValueError: an argument is out of its range.
    """

    min_side: int = 0
    max_aspect: float | None = 3.0
    min_caption: int = 1
    max_caption: int | None = None

    def __post_init__(self) -> None:
        if self.min_side < 0:
            raise ValueError(f"min_side must be at least 0, got {self.min_side}")
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise ValueError(f"max_aspect must be at least 1, got {self.max_aspect}")
        if self.min_caption < 1 or (self.max_caption is not None and self.max_caption < self.min_caption):
            raise ValueError(f"captions must have from 1 character on, got {self.min_caption} to {self.max_caption}")

    def fits(self, caption: str) -> bool:
        """Whether the caption's length is within the limits."""
        return self.min_caption <= len(caption) and (self.max_caption is None or len(caption) <= self.max_caption)

    def trimmed(self, raw: Raw) -> Raw:
        """The input with only the captions that fit."""
        kept = [(c, w) for c, w in zip(raw.captions, raw.weights, strict=True) if self.fits(c)]
        return raw._replace(captions=tuple(c for c, _ in kept), weights=tuple(w for _, w in kept))

    def reason(self, size: tuple[int, int], captions: Collection[str]) -> tuple[str, str] | None:
        """Why an input is dropped, as (reason, detail): too small, aspect ratio or caption length; None if it is used.

        Args:
            size: height and width of the picture before scaling, in pixels.
            captions: all captions; one that fits is enough.
        """
        height, width = size
        if min(size) < self.min_side:
            return "too small", f"{height}×{width} pixels, with min_side {self.min_side}"
        if self.max_aspect is not None and max(size) > self.max_aspect * min(size):
            return "aspect ratio", f"{height}×{width} pixels, with max_aspect {self.max_aspect}"
        if not any(map(self.fits, captions)):
            limits = f"from {self.min_caption}" + (f" to {self.max_caption}" if self.max_caption else "")
            return "caption length", f"{', '.join(str(len(c)) for c in captions)} characters, not {limits}"
        return None


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit perceptual hash of imagehash (phash): similar pictures have similar hashes."""
    import imagehash

    return int(str(imagehash.phash(image)), 16)


class Place(NamedTuple):
    """The files of a source on disk."""

    kind: str  # pictures, parquet or tar
    root: Path
    files: list[str]  # relative to root, sorted; for pictures, all files of the folder

    def sizes(self) -> list[tuple[str, int]]:
        """Names and sizes in bytes; -1 for a broken link."""
        files = [(name, self.root / name) for name in self.files]
        return [(name, file.stat().st_size if file.exists() else -1) for name, file in files]


def choose_captions(
    captions: dict[str, float] | None, columns: Collection[str], where: str, seen: Collection[str] = ()
) -> dict[str, float]:
    """The caption columns → weights: those given, or else the most likely one.

    Raises:
        ValueError: a column is missing. Names the columns, and what else was seen that may be meant.
    """
    if captions is None:
        captions = dict.fromkeys(islice((name for name in LIKELY if name in columns), 1), 1.0)
    if not captions or not captions.keys() <= set(columns):
        absent = ", ".join(captions.keys() - set(columns)) or f"named one of {', '.join(NAMES)}"
        there = "; ".join([", ".join(sorted(columns)) or "none", *seen])
        raise ValueError(f"{where} has no caption column {absent}; there are: {there}")
    return captions


def to_input(name: str, picture: bytes | Path | None, row: Mapping[str, Any], captions: dict[str, float]) -> Input:
    """The input with this id and the captions of its row; a Fault if picture or captions are missing."""
    if picture is None:
        return Fault(name, "no picture", f"there is none beside {', '.join(key for key in row) or 'nothing'}")
    texts: list[str] = []
    weights: list[float] = []
    for column, weight in captions.items():
        value = row.get(column)
        values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
        if not all(isinstance(v, str) for v in values):
            return Fault(name, "unreadable caption", f"{column} is no text: {str(value)[:40]!r}")
        if any(len(v) > LARGEST_CAPTION for v in values):
            return Fault(name, "unreadable caption", f"{column} has more than {LARGEST_CAPTION:,} characters")
        own = [v.strip() for v in values if v.strip()]
        texts += own
        weights += [weight / len(own) for _ in own]
    if not all(text.isascii() or text.encode("utf-8", "ignore").decode() == text for text in texts):
        return Fault(name, "unreadable caption", "it has half of a surrogate pair, which no file can hold")
    if not texts:
        return Fault(name, "no caption", f"nothing in {', '.join(captions)}")
    return Raw(name, picture, tuple(texts), tuple(weights))


def one_line(error: BaseException) -> str:
    """An error's message in one line; its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
