"""The grid of sizes, and which of them a picture goes to."""

import math
from itertools import product

import pytest

from data.raw.buckets import Buckets

GRIDS = [(1024, 64, 2.0), (256, 64, 2.0), (1024, 64, 4.0), (512, 16, 1.5), (64, 64, 2.0), (1024, 64, 1.0), (96, 8, 3.0)]


@pytest.mark.parametrize(("side", "step", "max_aspect"), GRIDS)
def test_the_grid_is_every_size_that_no_other_contains(side: int, step: int, max_aspect: float) -> None:
    sizes = Buckets(side, step, max_aspect).sizes
    steps = range(step, side**2 // step + 1, step)
    possible = [
        (h, w) for h, w in product(steps, steps) if h * w <= side**2 and max(h, w) <= max_aspect * min(h, w)
    ]  # by definition, not by construction
    maximal = [a for a in possible if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in possible)]
    assert list(sizes) == sorted(maximal)
    assert (side, side) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert len({h for h, _ in sizes}) == len({w for _, w in sizes}) == len(sizes)


def test_the_grid_of_sd3_s_size_gives_few_pixels_away() -> None:
    sizes = Buckets(1024).sizes
    assert (704, 1408) in sizes
    assert (832, 1216) in sizes
    assert min(h * w for h, w in sizes) > 0.94 * 1024**2


def test_a_picture_goes_to_the_nearest_ratio() -> None:
    buckets = Buckets(512, 32)
    for bucket, (height, width) in enumerate(buckets.sizes):
        assert buckets.of(height, width) == bucket
        assert buckets.of(3 * height, 3 * width) == bucket
    for height, width in product((100, 333, 512, 777, 3000), repeat=2):
        far = [abs(math.log(height / width) - math.log(h / w)) for h, w in buckets.sizes]
        assert far[buckets.of(height, width)] == pytest.approx(min(far), abs=1e-12)


def test_of_two_that_are_as_near_the_first_is_taken() -> None:
    buckets = Buckets(256, 128, max_aspect=4)
    assert buckets.sizes == ((128, 512), (256, 256), (512, 128))
    assert buckets.of(100, 200) == 0  # half as tall as wide: a factor of 2 from 1:4 and from 1:1
    assert buckets.of(200, 100) == 1
    assert buckets.of(1, 30000) == 0
    assert buckets.of(30000, 1) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 64), "side must be a multiple of step"),
        ((0, 64), "side must be a multiple of step"),
        ((64, 0), "side must be a multiple of step"),
        ((10**9, 64), "side must be at most 8192 and 1024 × step, got 1000000000"),
        ((10**9, 10**9), "side must be at most 8192"),
        ((2048, 1), "side must be at most 8192 and 1024 × step"),
        ((64, 64, 0.5), "max_aspect must be at least 1"),
        ((64, 64, math.nan), "max_aspect must be at least 1"),
        ((64, 64, math.inf), "max_aspect must be at least 1"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buckets(*arguments)
    with pytest.raises(ValueError, match="above 0 pixels"):
        Buckets(64).of(0, 10)
