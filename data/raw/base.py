"""Captioned pictures as they were found: an input, what reads inputs, and which of them are used."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image

UNIT = 1024  # inputs in a shard, where rows are found by their number
NAMES = ("text", "caption", "captions", "prompt", "txt")  # of captions, the likeliest first
LIKELY = NAMES + tuple(f"json.{name}" for name in NAMES)
EXTENSIONS = frozenset([
    "avif", "bmp", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg",
    "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp",
])  # fmt: skip


class Raw(NamedTuple):
    """An input as it was found, its picture not decoded."""

    id: str  # independent of where the data lie; the same one twice if the data name it twice
    picture: bytes | Path | Image.Image
    captions: tuple[str, ...]  # those that are there, stripped, none of them empty
    weights: tuple[float, ...]  # of the captions


class Fault(NamedTuple):
    """An input that could not be read at all, or the rest of a shard that could not.

    The reasons are "no picture", "several pictures", "no caption", "unreadable caption", "unreadable row" of metadata,
    "truncated shard" and "damaged shard".
    """

    id: str
    reason: str
    detail: str


Input: TypeAlias = Raw | Fault


class Source(ABC):
    """Inputs in shards, which any process can read in any order.

    Attributes:
        shards: how many there are.
    """

    shards: int

    @abstractmethod
    def read(self, shard: int, start: int = 0) -> Iterator[Input]:
        """The inputs of a shard from number `start` on, faults counted, always in the same order.

        Raises:
            ValueError: there is no such shard, or it cannot be read on.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What this is, for JSON: equal for equal data, and another for data of other names, sizes or number."""


@dataclass(frozen=True)
class Filters:
    """Which inputs are used.

    Args:
        min_side: least length of a picture's shorter side, before any scaling, in pixels.
        max_aspect: largest quotient of its longer and its shorter side, at least 1; none for no limit.
        min_caption: least length of a caption, in characters.
        max_caption: largest length of a caption, in characters; none for no limit.

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
        """The input with those of its captions that fit."""
        kept = [(c, w) for c, w in zip(raw.captions, raw.weights, strict=True) if self.fits(c)]
        return raw._replace(captions=tuple(c for c, _ in kept), weights=tuple(w for _, w in kept))

    def reason(self, size: tuple[int, int], captions: Collection[str]) -> tuple[str, str] | None:
        """Why an input is dropped, as (reason, detail): too small, aspect ratio or caption length; none if it is used.

        Args:
            size: height and width of the picture as it was found, in pixels.
            captions: all of it; one that fits is enough.
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
    """64 bits that are nearly the same for pictures that look the same: imagehash's phash."""
    import imagehash

    return int(str(imagehash.phash(image)), 16)


class Place(NamedTuple):
    """What was found on disk."""

    kind: str  # pictures, parquet or tar
    root: Path
    files: list[str]  # relative to it, sorted; of pictures, all files that there are

    def sizes(self) -> list[tuple[str, int]]:
        """Names and lengths in bytes; a link to nothing has -1."""
        files = [(name, self.root / name) for name in self.files]
        return [(name, file.stat().st_size if file.exists() else -1) for name, file in files]


def choose_captions(captions: dict[str, float] | None, there: Collection[str], where: str) -> dict[str, float]:
    """The caption columns; ValueError if one of them is not there, or if none is known and none is likely."""
    if captions is None:
        captions = dict.fromkeys(islice((name for name in LIKELY if name in there), 1), 1.0)
    if not captions or not captions.keys() <= set(there):
        absent = ", ".join(captions.keys() - set(there)) or f"named one of {', '.join(NAMES)}"
        raise ValueError(f"{where} has no caption column {absent}; there are: {', '.join(sorted(there)) or 'none'}")
    return captions


def to_input(name: str, picture: bytes | Path | None, row: Mapping[str, Any], captions: dict[str, float]) -> Input:
    """The input of that id, with the captions that its row has."""
    if picture is None:
        return Fault(name, "no picture", f"there is none beside {', '.join(key for key in row) or 'nothing'}")
    texts: list[str] = []
    weights: list[float] = []
    for column, weight in captions.items():
        value = row.get(column)
        values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
        if not all(isinstance(v, str) for v in values):
            return Fault(name, "unreadable caption", f"{column} is no text: {str(value)[:40]!r}")
        own = [v.strip() for v in values if v.strip()]
        texts += own
        weights += [weight / len(own) for _ in own]
    if not all(text.isascii() or text.encode("utf-8", "ignore").decode() == text for text in texts):
        return Fault(name, "unreadable caption", "it has half of a surrogate pair, which no file can hold")
    if not texts:
        return Fault(name, "no caption", f"nothing in {', '.join(captions)}")
    return Raw(name, picture, tuple(texts), tuple(weights))


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
