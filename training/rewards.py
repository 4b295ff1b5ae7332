"""Rewards: what drawn pictures are worth, by a judge. The YAML file names them in `judgement.rewards`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import digits, shapes
from metrics.features import CLIPFeatures
from metrics.judge import Judge


class RewardError(ValueError):
    """A reward cannot judge a picture."""


class Reward(ABC):
    """One reward. Several are added, each times its weight.

    Args:
        weight: factor of the reward.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @abstractmethod
    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """The reward of each picture, (B,).

        Args:
            pictures: (B, C, H, W) in [0, 1], on any device.
            captions: B of them, from which the pictures were drawn.
        """


class RightShapes(Reward):
    """How far a picture of the shapes shows what its caption says, 0 to 1, by rule: `data.shapes.agreement`.

    Args:
        weight: factor of the reward.

    Example:
        >>> from data.examined import scenes
        >>> RightShapes()(scenes(seed=0, count=1), [shapes.scene(0, 0).request.caption()])
        tensor([1.])
    """

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        pixels = pictures.double().cpu().permute(0, 2, 3, 1).numpy()
        found = [
            shapes.agreement(shapes.read(one), shapes.asked_for(caption))
            for one, caption in zip(pixels, captions, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float32)


class RightDigit(Reward):
    """The probability that a judge gives to the digit that the caption names, 0 to 1.

    Args:
        judge: folder of the judge (`tools/train_digits_judge.py`).
        weight: factor of the reward.
    """

    def __init__(self, judge: str = "assets/digits/judge", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.judge = Judge.load(judge)

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        labels = torch.tensor([digits.asked_for(caption) for caption in captions])
        with torch.no_grad():
            likely = self.judge.logits(digits.reduced(pictures.float().cpu())).softmax(1)
        return likely.gather(1, labels[:, None])[:, 0]


class Ink(Reward):
    """The mean brightness of a picture, 0 to 1: a taste that anyone can measure. Digits are white on black.

    Args:
        weight: factor of the reward; a negative one prefers dark pictures.

    Example:
        >>> Ink()(torch.full((2, 1, 8, 8), 0.25), ["three", "four"])
        tensor([0.2500, 0.2500])
    """

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        return pictures.float().mean((1, 2, 3)).cpu()


class CLIPScore(Reward):
    """The CLIP score of picture and caption over 100, 0 to 1: max(cos(image, text), 0) (Hessel et al. 2021).

    Args:
        folder: of a CLIP model with its tokenizer.
        weight: factor of the reward.
    """

    def __init__(self, folder: Path, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.clip = CLIPFeatures(folder)

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        seen = self.clip(pictures.float().cpu()).pooled
        return torch.cosine_similarity(seen, self.clip.text(captions)).clamp(min=0).float()


class Function(Reward):
    """A function of your own: pictures (B, C, H, W) in [0, 1] and B captions to any finite rewards (B,).

    Args:
        function: its import path, such as `my_rewards.symmetry`.
        weight: factor of the reward.
    """

    def __init__(self, function: Callable[..., Any], weight: float = 1.0) -> None:
        super().__init__(weight)
        self.function = function

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        return torch.as_tensor(self.function(pictures, captions), dtype=torch.float32).cpu()


def total(rewards: Sequence[Reward], pictures: Tensor, captions: Sequence[str]) -> Tensor:
    """The weighted sum of the rewards of each picture, (B,).

    Raises:
        RewardError: a reward is not finite, or cannot judge pictures of a caption.
    """
    found = torch.zeros(len(captions))
    for reward in rewards:
        try:
            own = reward(pictures, captions)
        except ValueError as error:
            raise RewardError(f"{type(reward).__name__}: {error}") from error
        if own.shape != found.shape:
            raise RewardError(
                f"{type(reward).__name__} must give {len(captions)} rewards, got the shape {tuple(own.shape)}"
            )
        if not own.isfinite().all():
            first = int((~own.isfinite()).nonzero()[0])
            raise RewardError(
                f"{type(reward).__name__} gives the reward {float(own[first])} for the caption {captions[first]!r}: "
                "a reward must be finite"
            )
        found = found + reward.weight * own
    return found
