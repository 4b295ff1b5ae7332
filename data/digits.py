"""The 1,797 handwritten digits of scikit-learn, their fixed split, and captions for them.

The pictures are the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository, 1998: 8 × 8 grey values 0 … 16, white ink (16) on black (0).
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

TRAIN_TEMPLATES = (
    "{word}",
    "{numeral}",
    "a {word}",
    "the digit {numeral}",
    "the number {word}",
    "a handwritten {word}",
    "{numeral}, written by hand",
    "a small picture of a {numeral}",
)
HELD_OUT_TEMPLATES = (
    "the figure {word} in ink",
    "a drawing of a {word}",
    "please write the number {numeral}",
    "an image of a handwritten {numeral}",
)

Split = Literal["train", "held_out"]
TRAIN_SIZE = 1297
SIDE = 8  # of a picture, in pixels
LEVELS = 17  # values that a pixel can have


class Digits(NamedTuple):
    """Pictures `(N, 1, 8, 8)` float32 in [0, 1] and the digit in each, `(N,)` int64."""

    pixels: Tensor
    labels: Tensor


def load(split: Split) -> Digits:
    """The 1,297 digits for training or the 500 held-out ones; ValueError for another split.

    The order comes from numpy's legacy generator, whose stream never changes.
    """
    order = np.random.RandomState(0).permutation(1797)
    parts = {"train": order[:TRAIN_SIZE], "held_out": order[TRAIN_SIZE:]}
    if split not in parts:
        raise ValueError(f"there is no split {split!r} of the digits: choose one of {', '.join(parts)}")
    pixels, labels = load_digits(return_X_y=True)
    rows = parts[split]
    return Digits(
        pixels=torch.from_numpy(pixels[rows]).float().div(16).reshape(-1, 1, 8, 8),
        labels=torch.from_numpy(labels[rows]).long(),
    )


def captions(label: int, templates: Iterable[str]) -> list[str]:
    """One caption of the digit `label` (0 … 9) for each template, which contains `{word}` or `{numeral}`."""
    return [template.format(word=WORDS[label], numeral=label) for template in templates]


def asked_for(caption: str) -> int:
    """The digit that a caption names, as a word or a numeral. ValueError unless it names exactly one."""
    words = caption.replace(",", " ").split()
    named = [label for label in range(10) if WORDS[label] in words or str(label) in words]
    if len(named) != 1:
        raise ValueError(f"the caption {caption!r} does not name one digit: write it like 'a handwritten seven'")
    return named[0]


def resized(pixels: Tensor, side: int, channels: int) -> Tensor:
    """Digits (N, 1, 8, 8) as (N, channels, side, side): bicubic above 8, and below, for a divisor of 8, the mean."""
    if side < SIDE:
        pixels = F.avg_pool2d(pixels, SIDE // side)
    elif side > SIDE:
        pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    return pixels.expand(-1, channels, -1, -1)


def reduced(pictures: Tensor) -> Tensor:
    """Pictures (N, C, H, W) averaged over channels and pixels to the size of digits, (N, 1, 8, 8)."""
    return F.adaptive_avg_pool2d(pictures.mean(1, keepdim=True), SIDE)
