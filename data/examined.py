"""The data sets that `evaluate.py` examines models on: what to ask for, what counts as right, and real pictures."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from data import digits, shapes

Half = Literal["train", "held_out"]


class Examined(ABC):
    """A data set, with prompts for some samples of a model.

    Attributes:
        features: the network of features unless the user names another, as `metrics.features.load_features` reads it.
        side: of a picture on the sheet, in pixels.
        prompts: of the samples.
        labels: `(N,)` int64, what the prompts ask for; samples that are asked for the same form a group.
        real: pictures `(M, C, H, W)` in [0, 1] that models may have seen, and others that they have not.
        shown: which of the samples are on the sheet.
        settings: what to write down of all that.
        amount: how many real pictures `alike` gives, in words.
    """

    features: ClassVar[str]
    side: ClassVar[int]
    prompts: list[str]
    labels: Tensor
    real: dict[Half, Tensor]
    shown: slice
    settings: dict[str, Any]
    amount: str

    @abstractmethod
    def check(self, name: str, size: tuple[int, int], channels: int) -> None:
        """ValueError in one line unless a model of that name draws pictures of a size (H, W) that can be compared."""

    @abstractmethod
    def compared(self, pictures: Tensor) -> Tensor:
        """What a model drew, `(N, C, H, W)`, in the real pictures' size and colours."""

    @abstractmethod
    def alike(self, half: Half) -> Tensor:
        """Real pictures of a half, as far as there are as many of each kind as there are samples."""

    def accuracy(self, pictures: Tensor) -> float | None:
        """The share of the samples that show what was asked for; None where the network of features tells it."""
        return None


class Digits(Examined):
    """The digits of `data/digits.py`, asked for in words that no training uses; as many samples of each.

    Args:
        samples: number of samples. ValueError unless it is a multiple of ten.
    """

    features = "judge:assets/digits/judge"
    side = 32

    def __init__(self, samples: int) -> None:
        if samples % 10:
            raise ValueError(f"there are as many samples of each of ten digits, so no {samples}: take a multiple of 10")
        self.halves = {"train": digits.load("train"), "held_out": digits.load("held_out")}
        self.real = {"train": self.halves["train"].pixels, "held_out": self.halves["held_out"].pixels}
        self.each = samples // 10
        self.labels = torch.arange(10).repeat_interleave(self.each)
        templates = digits.HELD_OUT_TEMPLATES
        self.prompts = [
            digits.captions(int(label), templates)[i % len(templates)] for i, label in enumerate(self.labels)
        ]
        self.shown = slice(None, None, self.each)  # one of each digit
        self.settings = {"per_digit": self.each, "captions": list(templates)}
        self.amount = f"digits, up to {self.each} of each"

    def check(self, name: str, size: tuple[int, int], channels: int) -> None:
        if any(side % digits.SIDE for side in size):
            raise ValueError(f"{name} draws {size[0]}×{size[1]} pixels, which are no multiples of the digits' 8×8")

    def compared(self, pictures: Tensor) -> Tensor:
        return digits.reduced(pictures)

    def alike(self, half: Half) -> Tensor:
        pixels, labels = self.halves[half]
        return torch.cat([pixels[labels == label][: self.each] for label in range(10)])


class Shapes(Examined):
    """The scenes of `data/shapes.py`. Held-out ones give both the prompts and the pictures to compare with.

    A prompt is the caption that says everything of its scene. A sample is right if it shows exactly that. The labels
    are all alike: no two scenes are asked for in the same words, so that the whole is one group.

    Args:
        samples: number of samples.
        real: number of real pictures of each half: the first scenes of the training store's seed, and of another.
    """

    features = "shapes:assets/shapes/judge"
    side = shapes.SIDE
    SEEDS: ClassVar[dict[Half, int]] = {"train": 0, "held_out": 4}  # the first as in configs/shapes.yaml

    def __init__(self, samples: int, real: int = 1000) -> None:
        self.real = {half: scenes(seed, real) for half, seed in self.SEEDS.items()}
        self.asked = [shapes.scene(self.SEEDS["held_out"], i).request for i in range(samples)]
        self.prompts = [request.caption() for request in self.asked]
        self.labels = torch.zeros(samples, dtype=torch.int64)
        self.shown = slice(10)
        self.settings = {"scenes": real, "seeds": self.SEEDS}
        self.amount = f"scenes, {min(samples, real)} of them"

    def check(self, name: str, size: tuple[int, int], channels: int) -> None:
        if size != (shapes.SIDE, shapes.SIDE) or channels != 3:
            drawn = f"{channels} × {size[0]} × {size[1]} numbers"
            raise ValueError(f"{name} draws pictures of {drawn}, but the shapes have 3 × {shapes.SIDE} × {shapes.SIDE}")

    def compared(self, pictures: Tensor) -> Tensor:
        return pictures

    def alike(self, half: Half) -> Tensor:
        return self.real[half][: len(self.prompts)]

    def accuracy(self, pictures: Tensor) -> float:
        found = [shapes.read(picture.movedim(0, -1).double().cpu().numpy()) for picture in pictures]
        return float(np.mean([shapes.fulfils(some, asked) for some, asked in zip(found, self.asked, strict=True)]))


def scenes(seed: int, count: int) -> Tensor:
    """Pictures `(count, 3, 64, 64)` in [0, 1] of the first scenes of a seed."""
    drawn = np.stack([np.asarray(shapes.picture(shapes.scene(seed, i))) for i in range(count)])
    return torch.from_numpy(drawn).movedim(-1, 1).contiguous() / 255


DATA: dict[str, type[Digits] | type[Shapes]] = {"digits": Digits, "shapes": Shapes}
