"""An endless sequence of drawn scenes of coloured shapes with captions, and a judge that reads a picture by rules.

A proving ground for text-to-image models in the manner of GenEval (Ghosh et al. 2023): pictures of 64 × 64 pixels,
captions over objects, colours, counts, positions and the binding of attributes ("two small red circles above a large
blue square").
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, final

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from scipy import ndimage

from data.order import Use, stream
from data.raw.base import UNIT, Raw, Source

SIDE = 64  # of a picture, in pixels
FINER = 4  # supersampling factor of the drawing, for smooth edges
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (35, 150, 60),
    "blue": (40, 80, 215),
    "purple": (135, 45, 175),
    "pink": (240, 90, 170),
    "black": (30, 30, 35),
}
SIZES = {"small": 12, "large": 20}  # sides of the box around a shape, in pixels
NUMBERS = ("no", "one", "two", "three", "four")
RELATIONS = {"above": (1, 0), "below": (-1, 0), "to the left of": (0, 1), "to the right of": (0, -1)}  # (down, right)
OPENINGS = ("", "a picture of ", "a drawing of ", "an image of ")
CATEGORIES = ("one object", "two objects", "counting", "colours", "position", "binding")
STEP = 4  # pixels: the grid of boxes, and the least distance between them and to the edge
BACKGROUND = (240, 240, 240)


@dataclass(frozen=True)
class Group:
    """A number of equal shapes; a size or colour of None was not asked for."""

    count: int
    shape: str
    colour: str | None = None
    size: str | None = None

    def words(self) -> str:
        """The group in words, as "two small red circles"."""
        described = " ".join(filter(None, (self.size, self.colour, self.shape)))
        if self.count == 1:
            return f"{'an' if described[0] in 'aeiou' else 'a'} {described}"
        return f"{NUMBERS[self.count]} {described}{'es' if self.shape == 'cross' else 's'}"


@dataclass(frozen=True)
class Request:
    """The shapes that a caption asks for, exactly these and no others.

    Args:
        groups: one group, or two of different shapes.
        relation: of the first to the second group, a key of RELATIONS, or None.
        opening: words at the start of the caption.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    opening: str = ""

    def caption(self) -> str:
        return self.opening + f" {self.relation or 'and'} ".join(group.words() for group in self.groups)


class Placed(NamedTuple):
    """A shape with its position: top and left of its box in the picture, in pixels."""

    shape: str
    colour: str
    side: int
    top: int
    left: int


class Scene(NamedTuple):
    """The content of a picture, with the request that describes it in full."""

    request: Request
    objects: tuple[Placed, ...]


def request(draw: Generator, category: str | None = None) -> Request:
    """A random request of a category; for None, one with all sizes and colours."""

    def one(words: Sequence[str]) -> str:
        return words[int(draw.integers(len(words)))]

    first, second = (SHAPES[i] for i in draw.permutation(len(SHAPES))[:2])
    one_colour, other_colour = (tuple(COLOURS)[i] for i in draw.permutation(len(COLOURS))[:2])
    relation, opening = one(tuple(RELATIONS)), one(OPENINGS)
    if category is None:
        double = draw.random() < 0.6
        pairs = [(1, 1), (1, 1), (1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
        counts = pairs[int(draw.integers(len(pairs)))] if double else (int(draw.integers(1, 5)),)
        if draw.random() < 0.15:
            other_colour = one_colour
        groups = tuple(
            Group(count, shape, colour, one(tuple(SIZES)))
            for count, shape, colour in zip(counts, (first, second), (one_colour, other_colour), strict=False)
        )
        return Request(groups, relation if double and draw.random() < 0.7 else None, opening)
    count = int(draw.integers(2, 5))
    groups, related = {
        "one object": ((Group(1, first),), False),
        "two objects": ((Group(1, first), Group(1, second)), False),
        "counting": ((Group(count, first),), False),
        "colours": ((Group(1, first, one_colour),), False),
        "position": ((Group(1, first), Group(1, second)), True),
        "binding": ((Group(1, first, one_colour), Group(1, second, other_colour)), False),
    }[category]
    return Request(groups, relation if related else None, opening)


_GROUP = (
    rf"(an?|{'|'.join(NUMBERS[2:])})(?: ({'|'.join(SIZES)}))?(?: ({'|'.join(COLOURS)}))? ({'|'.join(SHAPES)})(?:s|es)?"
)
_CAPTION = re.compile(rf"({'|'.join(OPENINGS)}){_GROUP}(?: ({'|'.join(('and', *RELATIONS))}) {_GROUP})?")


def asked_for(caption: str) -> Request:
    """The request that a caption of this module puts into words. ValueError for other captions."""
    found = _CAPTION.fullmatch(caption)
    if not found:
        raise ValueError(f"the caption {caption!r} is none of the shapes': write it like 'two small red circles'")
    opening, *first, joined = found.groups()[:6]
    groups = tuple(
        Group(NUMBERS.index(number) if number in NUMBERS else 1, shape, colour, size)
        for number, size, colour, shape in (first, found.groups()[6:])
        if shape
    )
    return Request(groups, joined if joined in RELATIONS else None, opening)


def requests(category: str, count: int, seed: int = 0) -> list[Request]:
    """`count` requests of a category, the same for the same seed."""
    draw = stream(seed, Use.REQUESTS, CATEGORIES.index(category))
    return [request(draw, category) for _ in range(count)]


def scene(seed: int, number: int) -> Scene:
    """Scene number `number` of a seed's endless sequence."""
    draw = stream(seed, Use.SCENE, 0, number)
    while True:
        asked = request(draw)
        if objects := place(asked, draw):
            return Scene(asked, objects)


def place(asked: Request, draw: Generator) -> tuple[Placed, ...] | None:
    """The shapes at random positions that fulfil the relation and do not touch; None if there was no room."""
    objects: list[Placed] = []
    line = int(draw.integers(SIDE * 3 // 8, SIDE * 5 // 8)) // STEP * STEP  # between two groups with a relation
    down, right = RELATIONS[asked.relation] if asked.relation else (0, 0)
    for sign, group in zip((1, -1), asked.groups, strict=False):
        side = SIZES[group.size or "large"]
        spans = []  # allowed rows and columns of the box's top left corner
        for way in (sign * down, sign * right):
            first, last = line if way < 0 else STEP, line if way > 0 else SIDE - STEP
            spans.append(range(first, last - side + 1, STEP))
        if not all(spans):
            return None
        for _ in range(group.count):
            for _ in range(20):
                top, left = (span[int(draw.integers(len(span)))] for span in spans)
                if all(apart(top, side, o.top, o.side) or apart(left, side, o.left, o.side) for o in objects):
                    break
            else:
                return None
            objects.append(Placed(group.shape, group.colour or "black", side, top, left))
    return tuple(objects)


def apart(first: int, length: int, other: int, its_length: int) -> bool:
    """Whether two intervals, given by start and length, are at least STEP apart."""
    return first + length + STEP <= other or other + its_length + STEP <= first


def picture(drawn: Scene) -> Image.Image:
    """The scene in RGB, SIDE × SIDE."""
    large = Image.new("RGB", (SIDE * FINER, SIDE * FINER), BACKGROUND)
    pen = ImageDraw.Draw(large)
    for shape, colour, side, top, left in drawn.objects:
        trace(pen, shape, top * FINER, left * FINER, side * FINER, COLOURS[colour])
    return large.reduce(FINER)


def trace(pen: ImageDraw.ImageDraw, shape: str, top: float, left: float, side: float, fill: Any) -> None:
    """Draws a shape that fills a box."""
    bottom, right, third = top + side - 1, left + side - 1, side / 3
    match shape:
        case "circle":
            pen.ellipse((left, top, right, bottom), fill)
        case "square":
            pen.rectangle((left, top, right, bottom), fill)
        case "triangle":
            pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill)
        case "cross":
            pen.rectangle((left + third, top, right - third, bottom), fill)
            pen.rectangle((left, top + third, right, bottom - third), fill)


def captions(drawn: Scene, draw: Generator) -> tuple[str, str]:
    """The full caption of a scene, and a shorter caption that leaves some of it out."""
    asked = drawn.request
    said = draw.random(3) < 0.5  # whether the short caption has sizes, colours, the relation
    short = tuple(
        replace(group, size=group.size if said[0] and said[1] else None, colour=group.colour if said[1] else None)
        for group in asked.groups
    )
    return asked.caption(), Request(short, asked.relation if said[2] else None, asked.opening).caption()


@final
class Shapes(Source):
    """Scenes as a source of captioned pictures; each has a long and a short caption, equally often used.

    Args:
        count: number of scenes.
        seed: of the sequence; the scenes are its start.
    """

    UNIT = UNIT  # scenes in a shard

    def __init__(self, count: int, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"the number of scenes must be at least 1, got {count}")
        self.count, self.seed = count, seed
        self.shards = -(-count // self.UNIT)

    def read(self, shard: int, start: int = 0) -> Iterator[Raw]:
        if not 0 <= shard < self.shards or start < 0:
            raise ValueError(f"there are shards 0 to {self.shards - 1}, not {shard} from input {start} on")
        for number in range(shard * self.UNIT + start, min((shard + 1) * self.UNIT, self.count)):
            drawn = scene(self.seed, number)
            texts = tuple(dict.fromkeys(captions(drawn, stream(self.seed, Use.CAPTION, 0, number))))
            yield Raw(f"{self.seed}-{number:08d}", picture(drawn), texts, (1.0,) * len(texts))

    def describe(self) -> dict[str, Any]:
        first = (scene(self.seed, number) for number in range(16))
        content = b"".join(picture(drawn).tobytes() + drawn.request.caption().encode() for drawn in first)
        looks = hashlib.sha256(content).hexdigest()  # so that the source changes if the drawing does
        return {"kind": "Shapes", "count": self.count, "seed": self.seed, "looks": looks}


class Found(NamedTuple):
    """A shape found in a picture; None for what cannot be recognised."""

    shape: str | None
    colour: str | None
    size: str
    centre: tuple[float, float]  # row, column


class Region(NamedTuple):
    """A connected part of a picture that differs from its background."""

    mask: np.ndarray  # which pixels of its box belong to it, (h, w) bool
    pixels: np.ndarray  # those of the box, (h, w, 3)
    centre: tuple[float, float]  # of the box: row, column

    def inside(self) -> np.ndarray:
        """The mask without its edge, whose colours are mixed; all of a small one."""
        return ndimage.binary_erosion(self.mask) if self.mask.sum() > 30 else self.mask


def read(pixels: np.ndarray) -> list[Found]:
    """The shapes in a picture (SIDE, SIDE, 3) in [0, 1], one for each region."""
    return [found_in(region) for region in regions(pixels)]


def regions(pixels: np.ndarray) -> list[Region]:
    """The regions of a picture (SIDE, SIDE, 3) in [0, 1] that differ from the colour of its edge."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.abs(pixels - np.median(edge, axis=0)).max(-1)
    labels, count = ndimage.label(distance > 0.2)
    found = []
    for box, number in zip(ndimage.find_objects(labels), range(1, count + 1), strict=True):
        inside = (labels[box] == number) & (
            distance[box] > 0.5 * np.percentile(distance[box][labels[box] == number], 80)
        )
        if inside.sum() < 8:  # a speck
            continue
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        filled = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        centre = box[0].start + (rows[0] + rows[-1]) / 2, box[1].start + (columns[0] + columns[-1]) / 2
        found.append(Region(inside[filled], pixels[box][filled], centre))
    return found


def found_in(region: Region) -> Found:
    """The shape that a region shows."""
    size = "small" if max(region.mask.shape) < 16 else "large"
    return Found(shape_of(region.mask), colour_of(region.pixels[region.inside()]), size, region.centre)


def shape_of(mask: np.ndarray) -> str | None:
    """The shape with the best overlap with a mask that fills its box; None if none is good or the box is not square."""
    height, width = mask.shape
    if not 0.75 < height / width < 1.33:
        return None
    overlaps = {
        shape: (mask & model).sum() / (mask | model).sum() for shape, model in silhouettes(height, width).items()
    }
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] > 0.65 else None


@lru_cache(maxsize=1024)
def silhouettes(height: int, width: int) -> dict[str, np.ndarray]:
    """Every shape as a mask that fills a box."""
    masks = {}
    for shape in SHAPES:
        side = FINER * 16
        large = Image.new("L", (side, side))
        trace(ImageDraw.Draw(large), shape, 0, 0, side, 255)
        masks[shape] = np.asarray(large.resize((width, height), Image.Resampling.BOX)) > 127
    return masks


def colour_of(pixels: np.ndarray) -> str | None:
    """The colour that at least 70 % of the pixels (N, 3) are nearest to; None if there is none."""
    table = np.array(list(COLOURS.values())) / 255
    distances = np.linalg.norm(pixels[:, None] - table, axis=-1)
    votes = np.bincount(distances.argmin(1)[distances.min(1) < 0.35], minlength=len(table))
    best = int(votes.argmax())
    return tuple(COLOURS)[best] if len(pixels) and votes[best] >= 0.7 * len(pixels) else None


def fulfils(found: Sequence[Found], asked: Request) -> bool:
    """Whether the shapes are exactly those of the request, each in its relation."""
    members = [[f for f in found if belongs(f, group)] for group in asked.groups]
    if len(found) != sum(group.count for group in asked.groups):
        return False
    if any(len(some) != group.count for some, group in zip(members, asked.groups, strict=True)):
        return False
    if not asked.relation:
        return True
    down, right = RELATIONS[asked.relation]
    return all(
        down * (b.centre[0] - a.centre[0]) + right * (b.centre[1] - a.centre[1]) > 0
        for a in members[0]
        for b in members[1]
    )


def agreement(found: Sequence[Found], asked: Request) -> float:
    """How far a picture shows what a request asks for: half the share of its parts, and half for all of them, 0 to 1.

    The parts are the number of all shapes, for each group the number of its shapes and the share of them that have its
    colour and size, and the relation of the groups. It is 1 only if the picture `fulfils` the request.
    """
    parts: list[float] = [len(found) == sum(group.count for group in asked.groups)]
    for group in asked.groups:
        alike = [f for f in found if f.shape == group.shape]
        parts.append(len(alike) == group.count)
        if group.colour or group.size:
            parts.append(min(1.0, sum(belongs(f, group) for f in alike) / group.count))
    if asked.relation:
        parts.append(fulfils([f for f in found if any(belongs(f, group) for group in asked.groups)], asked))
    return (sum(parts) / len(parts) + fulfils(found, asked)) / 2


def belongs(found: Found, group: Group) -> bool:
    """Whether a shape is one of a group."""
    return found.shape == group.shape and group.colour in (None, found.colour) and group.size in (None, found.size)
