"""A cascade: models that enlarge what was drawn before (Ho et al. 2021), from files."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from flow.sampler import Callback
from pipeline import LoadOptions, Pipeline
from storage.models import find_model


class Upscaler(NamedTuple):
    """A model that works from a picture, and how much noise that gets (conditioning augmentation, §4.2)."""

    pipe: Pipeline
    level: float = 0.0


def upscalers(
    texts: Sequence[str], options: LoadOptions, base: Pipeline, size: tuple[int, int], prompts: Sequence[str]
) -> list[Upscaler]:
    """The models of a cascade, each MODEL or MODEL:LEVEL.

    Args:
        texts: the models in their order.
        options: how they are loaded.
        base: the model that draws the first pictures.
        size: height and width of these, in pixels.
        prompts: what will be drawn.

    Raises:
        FileNotFoundError, ValueError: in one line, if a model is missing or does not fit the one before.
    """
    found: list[Upscaler] = []
    channels = base.codec.pixel_channels
    for text in texts:
        path, level = _parsed(text)
        pipe = Pipeline.load(find_model(path), options)
        if pipe.network.picture_channels != pipe.codec.channels:
            raise ValueError(f"{path} does not work from one picture: "
                             "train one with configs/picture/superresolution.yaml")  # fmt: skip
        if level and not pipe.network.level_embeds:
            raise ValueError(f"{path} takes no noise level for its picture: leave :{level:g} out")
        if pipe.codec.pixel_channels != channels:
            raise ValueError(f"{path} reads pictures of {pipe.codec.pixel_channels} channels, not of {channels}")
        height, width = (side * pipe.codec.factor for side in pipe.latent_size(None, None))
        if height <= size[0] or height * size[1] != width * size[0]:
            raise ValueError(f"{path} draws {height}×{width} pixels, which does not enlarge {size[0]}×{size[1]}")
        pipe.plan(pipe.sampling)
        pipe.check_prompts(pipe.sampling, prompts)
        found.append(Upscaler(pipe, level))
        size = (height, width)
    return found


def _parsed(text: str) -> tuple[Path, float]:
    """The parts of MODEL or MODEL:LEVEL. ValueError in one line if it is neither."""
    path, colon, number = text.rpartition(":")
    try:
        level = float(number) if colon else 0.0
    except ValueError:
        level = math.nan
    if not 0 <= level <= 1 or not text or (colon and not path):
        raise ValueError(
            f"--upscale {text} is not MODEL or MODEL:LEVEL with a level from 0 to 1, such as runs/upscaler:0.1"
        )
    return Path(path if colon else text), level


def enlarge(
    pictures: Tensor, cascade: Sequence[Upscaler], prompts: Sequence[str], seeds: Sequence[int], callback: Callback
) -> Tensor:
    """Pictures (B, C, H, W) in [0, 1] enlarged by each model in turn, with its own sampling."""
    for pipe, level in cascade:
        pictures = pipe(prompts, seeds, picture=pictures, level=level, callback=callback)
    return pictures
