"""Drawn scenes: what their captions say is there, and the judge reads it back, and nothing else."""

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from benchmarks.following import OPPOSITE
from data import shapes
from data.order import Use, stream
from data.raw.base import Raw
from data.shapes import Found, Group, Placed, Request, Scene, Shapes, fulfils, picture, read, scene
from data.text.sd3 import SD3Text

ROOT = Path(__file__).parents[1]
COUNT = 2000
SMALL = shapes.SIZES["small"]
SCENES = [scene(11, number) for number in range(COUNT)]
CAPTIONS = [shapes.captions(drawn, stream(11, Use.CAPTION, 0, i)) for i, drawn in enumerate(SCENES)]
WORD = {"one": 1, "two": 2, "three": 3, "four": 4}


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image) / 255


def right(drawn: Scene) -> bool:
    """Whether a drawn scene, read back, is what was asked for."""
    return fulfils(read(levels(picture(drawn))), drawn.request)


def truth(drawn: Scene) -> list[Found]:
    """What a perfect reader would find."""
    return [
        Found(o.shape, o.colour, "small" if o.side <= SMALL else "large", (o.top + o.side / 2, o.left + o.side / 2))
        for o in drawn.objects
    ]


def parsed(caption: str) -> Request:
    """A caption as a person reads it, with its grammar checked."""
    found = re.fullmatch(r"((?:a picture|a drawing|an image) of )?(.*)", caption)
    assert found
    relation = re.search(r" (above|below|to the left of|to the right of|and) ", found[2])
    groups = []
    for part in re.split(f" {relation[1]} ", found[2]) if relation else [found[2]]:
        first, *described, noun = part.split()
        count = 1 if first in ("a", "an") else WORD[first]
        if count == 1:
            assert first == ("an" if part.split()[1][0] in "aeiou" else "a"), caption
            assert noun in shapes.SHAPES, caption
        else:
            plurals = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
            noun = plurals[noun]
        sizes = [word for word in described if word in shapes.SIZES]
        colours = [word for word in described if word in shapes.COLOURS]
        assert described == sizes + colours, caption
        groups.append(Group(count, noun, *(words[0] if words else None for words in (colours, sizes))))
    told = relation[1] if relation and relation[1] != "and" else None
    return Request(tuple(groups), told, found[1] or "")


def test_a_scene_is_a_function_of_seed_and_number() -> None:
    assert [scene(11, number) for number in (70, 3, 4)] == [SCENES[number] for number in (70, 3, 4)]
    assert scene(12, 3) != SCENES[3]
    assert len({drawn.objects for drawn in SCENES}) > 0.98 * COUNT
    assert picture(SCENES[0]).tobytes() == picture(scene(11, 0)).tobytes()


def test_scenes_hold_what_is_asked_for_apart_from_each_other_and_inside() -> None:
    for drawn in SCENES:
        for o in drawn.objects:
            assert min(o.top, o.left) >= shapes.STEP
            assert max(o.top, o.left) + o.side <= shapes.SIDE - shapes.STEP
        for a, b in combinations(drawn.objects, 2):
            apart = [max(x, y) - min(x + a.side, y + b.side) for x, y in ((a.top, b.top), (a.left, b.left))]
            assert max(apart) >= shapes.STEP, drawn
        asked = drawn.request
        first = [o for o in drawn.objects if o.shape == asked.groups[0].shape]
        assert [len(first), len(drawn.objects) - len(first)] == [*(g.count for g in asked.groups), 0][:2]
        for group in asked.groups:
            own = [o for o in drawn.objects if o.shape == group.shape]
            assert {o.colour for o in own} == {group.colour}
            assert {o.side for o in own} == {shapes.SIZES[group.size or ""]}
        for a in first if asked.relation else ():
            for b in drawn.objects[len(first) :]:
                assert {
                    "above": a.top + a.side <= b.top,
                    "below": b.top + b.side <= a.top,
                    "to the left of": a.left + a.side <= b.left,
                    "to the right of": b.left + b.side <= a.left,
                }[asked.relation], drawn
    used = {(o.shape, o.colour) for drawn in SCENES for o in drawn.objects}
    assert used == {(shape, colour) for shape in shapes.SHAPES for colour in shapes.COLOURS}
    assert {drawn.request.relation for drawn in SCENES} == {None, *shapes.RELATIONS}


def test_the_long_caption_says_all_and_the_short_one_nothing_wrong() -> None:
    shorter = 0
    for drawn, (long, short) in zip(SCENES, CAPTIONS, strict=True):
        assert parsed(long) == drawn.request
        assert fulfils(truth(drawn), drawn.request)
        told = parsed(short)
        assert fulfils(truth(drawn), told), (drawn, short)
        assert [(g.count, g.shape) for g in told.groups] == [(g.count, g.shape) for g in drawn.request.groups]
        assert len(short) <= len(long)
        shorter += short != long
    assert COUNT / 2 < shorter < COUNT
    assert Group(1, "square", "orange").words() == "an orange square"
    assert Group(1, "square", "orange", "large").words() == "a large orange square"
    assert Group(3, "cross", "blue").words() == "three blue crosses"


def every_caption() -> list[str]:
    asked = [request.caption() for category in shapes.CATEGORIES for request in shapes.requests(category, 100)]
    return sorted({caption for pair in CAPTIONS for caption in pair} | set(asked))


def test_no_caption_is_cut_or_has_unknown_words() -> None:
    every = every_caption()
    for part in (text := SD3Text(ROOT / "assets/shapes/text", 160, 128)).parts:
        rows = part.tokenizer(every).input_ids
        assert max(map(len, rows)) <= text.length == text.max_sequence_length == 20
        assert not any(part.tokenizer.unk_token_id in row[:-1] for row in rows)  # the last is CLIP's end, and unknown


def test_both_nouns_know_the_relation_in_t5_and_only_there() -> None:
    """What benchmarks.conditioning found to be needed: reversing the relation moves the states of the nouns."""
    text = SD3Text(ROOT / "assets/shapes/text", 160, 128)
    related = [one for one in (drawn.request for drawn in SCENES) if one.relation][:64]
    true = text.encode([one.caption() for one in related]).tokens
    false = text.encode([replace(one, relation=OPPOSITE[one.relation]).caption() for one in related]).tokens
    moved, spread = (true - false).square(), (true - true.mean(0)).square()
    clips, t5 = ((moved[:, rows].sum() / spread[:, rows].sum()).sqrt() for rows in (slice(20), slice(20, None)))
    assert clips < 0.15
    assert t5 > 1
    words = [one.caption().split() for one in related]
    nouns = [[i for i, word in enumerate(row) if any(shape in word for shape in shapes.SHAPES)] for row in words]
    of_nouns = torch.stack([row[20:].mean(1).sqrt()[at] for row, at in zip(moved, nouns, strict=True)])  # (64, 2)
    assert (of_nouns.mean(0) > 2).all()  # their states are about 2.6 long


def test_the_judge_reads_true_scenes_right() -> None:
    assert np.mean([right(drawn) for drawn in SCENES]) >= 0.995


def crowded(drawn: Scene) -> Scene | None:
    """The scene with one more of the first group's shapes, if there is room."""
    new = drawn.objects[0]
    reach = new.side + shapes.STEP
    for top in range(shapes.STEP, shapes.SIDE - shapes.STEP - new.side, 3):
        for left in range(shapes.STEP, shapes.SIDE - shapes.STEP - new.side, 3):
            if all(
                top + reach <= o.top or o.top + o.side + shapes.STEP <= top
                or left + reach <= o.left or o.left + o.side + shapes.STEP <= left
                for o in drawn.objects
            ):  # fmt: skip
                return drawn._replace(objects=(*drawn.objects, new._replace(top=top, left=left)))
    return None


def changed(fault: str, drawn: Scene) -> Scene | None:
    """The scene as a model could have got it wrong; none if this one cannot be got wrong so."""
    objects, asked = drawn.objects, drawn.request
    colours = [group.colour for group in asked.groups]

    def mirrored(o: Placed) -> Placed:
        if asked.relation in ("above", "below"):
            return o._replace(top=shapes.SIDE - o.top - o.side)
        return o._replace(left=shapes.SIDE - o.left - o.side)

    match fault:
        case "missing":
            return drawn._replace(objects=objects[1:])
        case "extra":
            return crowded(drawn)
        case "another colour":
            new = next(colour for colour in shapes.COLOURS if colour not in colours)
            return drawn._replace(objects=(objects[0]._replace(colour=new), *objects[1:]))
        case "another shape":
            new = next(s for s in shapes.SHAPES if s not in {group.shape for group in asked.groups})
            return drawn._replace(objects=(objects[0]._replace(shape=new), *objects[1:]))
        case "another size":
            if objects[0].side <= SMALL:
                return None  # a larger one could touch another
            return drawn._replace(objects=(objects[0]._replace(side=SMALL), *objects[1:]))
        case "swapped binding" if len(set(colours)) == 2:
            other = dict(zip(colours, reversed(colours), strict=True))
            return drawn._replace(objects=tuple(o._replace(colour=other[o.colour]) for o in objects))
        case "mirrored relation" if asked.relation:
            return drawn._replace(objects=tuple(map(mirrored, objects)))
    return None


@pytest.mark.parametrize(
    "fault",
    ["missing", "extra", "another colour", "another shape", "another size", "swapped binding", "mirrored relation"],
)
def test_the_judge_reads_wrong_scenes_as_wrong(fault: str) -> None:
    wrong = [bad for drawn in SCENES[:400] if (bad := changed(fault, drawn))]
    assert len(wrong) > 60
    assert np.mean([right(bad) for bad in wrong]) <= 0.005


def test_the_judge_does_not_see_what_is_blurred_away() -> None:
    small = [drawn for drawn in SCENES[:800] if all(o.side <= SMALL for o in drawn.objects)][:100]
    blurred = [picture(drawn).filter(ImageFilter.GaussianBlur(12)) for drawn in small]
    assert not any(fulfils(read(levels(image)), drawn.request) for image, drawn in zip(blurred, small, strict=True))
    assert read(np.full((shapes.SIDE, shapes.SIDE, 3), 0.9)) == []
    noise = np.random.default_rng(0).random((shapes.SIDE, shapes.SIDE, 3))
    assert not any(fulfils(read(noise), drawn.request) for drawn in SCENES[:100])


def test_a_request_is_right_if_its_own_words_are_and_only_then() -> None:
    """What nobody asked for does not matter; what was asked for does, and no more may be there."""
    red, blue = Found("circle", "red", "large", (10.0, 10.0)), Found("square", "blue", "small", (10.0, 40.0))
    circle, square = Group(1, "circle"), Group(1, "square")
    assert fulfils([red, blue], Request((circle, square)))
    assert fulfils([blue, red], Request((circle, square), "to the left of"))
    assert not fulfils([red, blue], Request((circle, square), "to the right of"))
    assert not fulfils([red, blue], Request((circle, square), "above"))  # they stand side by side
    assert not fulfils([red, blue], Request((circle,)))
    assert not fulfils([red], Request((circle, square)))
    assert not fulfils([red, blue._replace(shape=None)], Request((circle, square)))
    assert not fulfils([red, blue], Request((Group(1, "circle", "blue"), square)))
    assert not fulfils([red, blue], Request((Group(1, "circle", None, "small"), square)))


def test_requests_are_of_their_category_and_the_same_for_a_seed() -> None:
    for category in shapes.CATEGORIES:
        asked = shapes.requests(category, 50, seed=3)
        assert asked == shapes.requests(category, 60, seed=3)[:50]
        assert asked != shapes.requests(category, 50, seed=4)
        for request in asked:
            assert all(group.size is None for group in request.groups)
            assert (request.relation is not None) == (category == "position")
            assert all((group.colour is not None) == (category in ("colours", "binding")) for group in request.groups)
            assert len(request.groups) == 1 + (category in ("two objects", "position", "binding"))
            assert sum(group.count for group in request.groups) > 1 or category in ("one object", "colours")
            assert parsed(request.caption()) == request
        if category == "binding":
            assert all(len({group.colour for group in request.groups}) == 2 for request in asked)


def same(a: list[Raw], b: list[Raw]) -> bool:
    return [(*x[:1], *x[2:]) for x in a] == [(*x[:1], *x[2:]) for x in b] and [
        x.picture.tobytes() for x in a if isinstance(x.picture, Image.Image)
    ] == [x.picture.tobytes() for x in b if isinstance(x.picture, Image.Image)]


def test_the_source_is_read_from_any_input_of_any_shard() -> None:
    source = Shapes(count=1100, seed=11)
    assert source.shards == 2
    whole = list(source.read(1))
    assert len(whole) == 1100 - 1024
    assert same(list(source.read(1, 50)), whole[50:])
    assert list(source.read(1, len(whole))) == []
    assert same(list(Shapes(count=5, seed=11).read(0)), [next(source.read(0, i)) for i in range(5)])
    ids = [raw.id for raw in [*source.read(0), *whole]]
    assert len(set(ids)) == 1100
    for number, raw in enumerate(whole, start=1024):
        assert isinstance(raw.picture, Image.Image)
        assert raw.picture.size == (shapes.SIDE, shapes.SIDE)
        assert raw.captions == tuple(dict.fromkeys(CAPTIONS[number]))
        assert len(set(raw.weights)) == 1
    assert source.describe() == Shapes(count=1100, seed=11).describe()
    assert len({str(Shapes(n, s).describe()) for n, s in ((5, 0), (5, 1), (6, 0))}) == 3
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Shapes(count=0)
