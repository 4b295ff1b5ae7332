"""The data sets that `evaluate.py` examines models on: what to ask for, what counts as right, and real pictures."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from data import digits, shapes

Half = Literal["train", "held_out"]


class Verdict(NamedTuple):
    """Whether a sample shows exactly what was asked for, and what it shows, as JSON holds it."""

    right: bool
    found: Any


class Examined(ABC):
    """A data set, with prompts for some samples of a model.

    Attributes:
        name: of the data set.
        features: the network of features unless the user names another, as `metrics.features.load_features` reads it.
        side: of a picture on the sheet, in pixels.
        categories: the kinds of prompts that `by_category` gives.
        levels: how many values a number of a real picture can have.
        by_rule: whether `verdicts` reads the pictures by rule; if not, it needs the classes that a network sees.
        prompts: of the samples.
        labels: `(N,)` int64, what the prompts ask for; samples that are asked for the same form a group.
        shown: which of the samples are on the sheet.
        settings: what to write down of all that.
        amount: how many real pictures `alike` gives, in words.
    """

    name: ClassVar[str]
    features: ClassVar[str]
    side: ClassVar[int]
    categories: ClassVar[tuple[str, ...]]
    levels: ClassVar[int] = 256
    by_rule: ClassVar[bool]
    prompts: list[str]
    labels: Tensor
    shown: slice
    settings: dict[str, Any]
    amount: str

    @classmethod
    @abstractmethod
    def held_out(cls, samples: int) -> Self:
        """Prompts that no training uses, for as many samples. ValueError if there cannot be so many."""

    @classmethod
    @abstractmethod
    def by_category(cls, each: int, seed: int) -> Self:
        """Prompts for `each` samples of every category, category after category; the same for the same seed."""

    @property
    @abstractmethod
    def real(self) -> dict[Half, Tensor]:
        """Pictures `(M, C, H, W)` in [0, 1] that models may have seen, and others that they have not."""

    @abstractmethod
    def check(self, name: str, size: tuple[int, int], channels: int) -> None:
        """ValueError in one line unless a model of that name draws pictures of a size (H, W) that can be compared."""

    @abstractmethod
    def compared(self, pictures: Tensor) -> Tensor:
        """What a model drew, `(N, C, H, W)`, in the real pictures' size and colours."""

    @abstractmethod
    def alike(self, half: Half) -> Tensor:
        """Real pictures of a half, as far as there are as many of each kind as there are samples."""

    @abstractmethod
    def captions(self, half: Half) -> list[str]:
        """A caption of each real picture of a half, in words that no training uses."""

    @abstractmethod
    def verdicts(self, pictures: Tensor, classes: Sequence[int] = ()) -> list[Verdict]:
        """What to say of each sample.

        Args:
            pictures: one for each prompt, as `compared` gives them.
            classes: what a network takes each picture for; not used `by_rule`.
        """


class Digits(Examined):
    """The digits of `data/digits.py`, asked for in words that no training uses. Each digit is a category.

    Args:
        each: number of samples of each digit, at least 1.
    """

    name = "digits"
    features = "judge:assets/digits/judge"
    side = 32
    categories = digits.WORDS
    levels = digits.LEVELS
    by_rule = False

    def __init__(self, each: int) -> None:
        self.each = each
        self.labels = torch.arange(10).repeat_interleave(each)
        templates = digits.HELD_OUT_TEMPLATES
        self.prompts = self.said(self.labels)
        self.shown = slice(None, None, each)  # one of each digit
        self.settings = {"per_digit": each, "captions": list(templates)}
        self.amount = f"digits, up to {each} of each"

    @classmethod
    def held_out(cls, samples: int) -> Self:
        if samples % 10:
            raise ValueError(f"{samples} samples cannot show ten digits equally often: take a multiple of 10")
        return cls(samples // 10)

    @classmethod
    def by_category(cls, each: int, seed: int) -> Self:
        return cls(each)

    @staticmethod
    def said(labels: Tensor) -> list[str]:
        """A caption for each digit, by turns in each of the held-out ways."""
        ways = digits.HELD_OUT_TEMPLATES
        return [digits.captions(int(label), ways)[i % len(ways)] for i, label in enumerate(labels)]

    @cached_property
    def halves(self) -> dict[Half, digits.Digits]:
        """The real digits with their labels."""
        return {"train": digits.load("train"), "held_out": digits.load("held_out")}

    @cached_property
    def real(self) -> dict[Half, Tensor]:
        return {half: found.pixels for half, found in self.halves.items()}

    def check(self, name: str, size: tuple[int, int], channels: int) -> None:
        if any(side % digits.SIDE for side in size):
            raise ValueError(f"{name} draws {size[0]}×{size[1]} pixels, but the digits need multiples of 8×8")

    def compared(self, pictures: Tensor) -> Tensor:
        return digits.reduced(pictures)

    def alike(self, half: Half) -> Tensor:
        pixels, labels = self.halves[half]
        return torch.cat([pixels[labels == label][: self.each] for label in range(10)])

    def captions(self, half: Half) -> list[str]:
        return self.said(self.halves[half].labels)

    def verdicts(self, pictures: Tensor, classes: Sequence[int] = ()) -> list[Verdict]:
        return [Verdict(seen == asked, seen) for seen, asked in zip(classes, self.labels.tolist(), strict=True)]


class Shapes(Examined):
    """The scenes of `data/shapes.py`. Held-out ones give both the prompts and the pictures to compare with.

    A held-out prompt is the caption that says everything of its scene. The categories are GenEval's six (Ghosh et al.
    2023), whose prompts leave some of it open. A sample is right if it shows exactly what was asked for and nothing
    else. The labels are all alike: no two scenes are asked for in the same words, so that the whole is one group.

    Args:
        asked: what the samples should show.
        scenes: number of real pictures of each half: the first scenes of the training store's seed, and of another.
    """

    name = "shapes"
    features = "shapes:assets/shapes/judge"
    side = shapes.SIDE
    categories = shapes.CATEGORIES
    by_rule = True
    SEEDS: ClassVar[dict[Half, int]] = {"train": 0, "held_out": 4}  # the first as in configs/shapes.yaml

    def __init__(self, asked: Sequence[shapes.Request], scenes: int = 1000) -> None:
        self.asked, self.scenes = asked, scenes
        self.prompts = [request.caption() for request in asked]
        self.labels = torch.zeros(len(asked), dtype=torch.int64)
        self.shown = slice(10)
        self.settings = {"scenes": scenes, "seeds": self.SEEDS}
        self.amount = f"scenes, {min(len(asked), scenes)} of them"

    @classmethod
    def held_out(cls, samples: int, scenes: int = 1000) -> Self:
        return cls([shapes.scene(cls.SEEDS["held_out"], i).request for i in range(samples)], scenes)

    @classmethod
    def by_category(cls, each: int, seed: int) -> Self:
        return cls([request for category in cls.categories for request in shapes.requests(category, each, seed)])

    @cached_property
    def real(self) -> dict[Half, Tensor]:
        return {half: scenes(seed, self.scenes) for half, seed in self.SEEDS.items()}

    def check(self, name: str, size: tuple[int, int], channels: int) -> None:
        if size != (shapes.SIDE, shapes.SIDE) or channels != 3:
            drawn = f"{channels} × {size[0]} × {size[1]} numbers"
            raise ValueError(f"{name} draws pictures of {drawn}, but the shapes have 3 × {shapes.SIDE} × {shapes.SIDE}")

    def compared(self, pictures: Tensor) -> Tensor:
        return pictures

    def alike(self, half: Half) -> Tensor:
        return self.real[half][: len(self.prompts)]

    def captions(self, half: Half) -> list[str]:
        return [shapes.scene(self.SEEDS[half], i).request.caption() for i in range(self.scenes)]

    def verdicts(self, pictures: Tensor, classes: Sequence[int] = ()) -> list[Verdict]:
        found = [shapes.read(picture.movedim(0, -1).double().cpu().numpy()) for picture in pictures]
        return [
            Verdict(shapes.fulfils(some, asked), [shape._asdict() for shape in some])
            for some, asked in zip(found, self.asked, strict=True)
        ]


def scenes(seed: int, count: int) -> Tensor:
    """Pictures `(count, 3, 64, 64)` in [0, 1] of the first scenes of a seed."""
    drawn = np.stack([np.asarray(shapes.picture(shapes.scene(seed, i))) for i in range(count)])
    return torch.from_numpy(drawn).movedim(-1, 1).contiguous() / 255


DATA: dict[str, type[Examined]] = {examined.name: examined for examined in (Digits, Shapes)}
