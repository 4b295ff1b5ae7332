"""Filters say why, and hashes find pictures that look alike."""

import pytest
from captioned import PHOTOS
from PIL import Image

from data.raw.base import Filters, Raw, perceptual_hash


def test_filters_give_their_reason() -> None:
    filters = Filters(min_side=64, max_aspect=2, min_caption=3, max_caption=5)
    assert filters.reason((64, 128), ["abcd"]) is None
    for size, captions, reason in (((63, 90), ["abcd"], "too small"), ((64, 129), ["abcd"], "aspect ratio"),
                                   ((64, 64), ["ab", "abcdef"], "caption length")):  # fmt: skip
        assert (filters.reason(size, captions) or ("",))[0] == reason
        assert (filters.reason(size[::-1], captions) or ("",))[0] == reason
    kept = filters.trimmed(Raw("x", b"", ("ab", "abc", "abcdef"), (1.0, 2.0, 3.0)))
    assert (kept.captions, kept.weights) == (("abc",), (2.0,))
    assert Filters(max_aspect=None).reason((1, 10_000), ["a"]) is None
    for wrong in ({"min_side": -1}, {"max_aspect": 0.5}, {"min_caption": 0}, {"min_caption": 5, "max_caption": 4}):
        with pytest.raises(ValueError, match="must"):
            Filters(**wrong)


def test_pictures_that_look_alike_have_hashes_that_are_near() -> None:
    first, *others = (perceptual_hash(Image.fromarray(photo)) for photo in PHOTOS)
    small = perceptual_hash(Image.fromarray(PHOTOS[0]).resize((200, 133)))
    assert 0 <= first < 2**64
    assert (first ^ small).bit_count() <= 4
    assert all((first ^ other).bit_count() > 16 for other in others)
