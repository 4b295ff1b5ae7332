"""The sizes to which pictures of different aspect ratios are cropped."""

from fractions import Fraction
from math import isqrt
from typing import final

LARGEST_SIDE, MOST_STEPS = 2**13, 2**10  # of the square, in pixels and in steps


@final
class Buckets:
    """A list of sizes with nearly the same number of pixels, from wide to tall (bucketed sampling: Esser et al. 2024).

    A size is a height and a width, multiples of `step`, with height × width ≤ side² and the longer side at most
    `max_aspect` times the shorter one. The list holds the sizes that fit into no other such size: the largest width for
    their height and the largest height for their width. So every height and every width occurs once, the transpose of
    a bucket is a bucket, and the square is always one.

    Args:
        side: of the square, in pixels, at most 8,192; a multiple of `step`, at most 1,024 times as large. With side =
            step the square is the only bucket.
        step: heights and widths are multiples of it, in pixels: a multiple of codec factor × patch size.
        max_aspect: largest ratio of the longer to the shorter side, at least 1.

    Attributes:
        sizes: (height, width) in pixels, heights ascending.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, side: int, step: int = 64, max_aspect: float = 2.0) -> None:
        if step < 1 or side < step or side % step:
            raise ValueError(f"side must be a multiple of step, and both above 0, got side {side} and step {step}")
        if side > min(LARGEST_SIDE, MOST_STEPS * step):
            raise ValueError(f"side must be at most {LARGEST_SIDE} and {MOST_STEPS} × step, got {side} and step {step}")
        if not 1 <= max_aspect < float("inf"):
            raise ValueError(f"max_aspect must be at least 1, and finite, got {max_aspect}")
        self.side, self.step, self.max_aspect = side, step, max_aspect
        sizes: list[tuple[int, int]] = []
        widest = 0
        ratio, unit = max_aspect.as_integer_ratio()
        tallest = min(side**2 // step, isqrt(side**2 * ratio // unit))
        for height in range(tallest // step * step, 0, -step):
            fits = min(side**2 // height, height * ratio // unit) // step * step
            if fits > widest and height * unit <= fits * ratio:
                sizes.append((height, fits))
                widest = fits
        self.sizes = tuple(reversed(sizes))

    def of(self, height: int, width: int) -> int:
        """The number of the bucket with the nearest aspect ratio on a logarithmic scale; of equal ones the first.

        Raises:
            ValueError: a side is not above 0.
        """
        if min(height, width) < 1:
            raise ValueError(f"a picture's sides must be above 0 pixels, got {height}×{width}")

        def factor(size: tuple[int, int]) -> Fraction:  # larger ratio over the smaller one, without rounding
            ratio = Fraction(height * size[1], width * size[0])
            return max(ratio, 1 / ratio)

        return min(range(len(self.sizes)), key=lambda bucket: factor(self.sizes[bucket]))
