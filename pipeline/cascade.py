"""A cascade: models that enlarge what was drawn before (Ho et al. 2021), from files."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flow.sampler import Callback
from pipeline import LoadOptions, Pipeline
from storage.models import find_model


class Upscaler(NamedTuple):
    """A model that works from a picture, and how much noise that gets (conditioning augmentation, §4.2)."""

    pipe: Pipeline
    level: float = 0.0
    prompt: str | None = None  # None means those of the first pictures


class Stage(NamedTuple):
    """What a command asks of a model of a cascade."""

    path: Path
    level: float
    prompt: str | None  # None means those of the first pictures
    steps: int | None  # None means the model's own


def stages(texts: Sequence[str], prompts: Sequence[str], steps: Sequence[int]) -> list[Stage]:
    """The models of a cascade as `--upscale`, `--upscale-prompt` and `--upscale-steps` name them.

    Args:
        texts: the models in their order, each MODEL or MODEL:LEVEL.
        prompts: none, one for all models, or one for each.
        steps: the same for the numbers of steps.

    Raises:
        ValueError: in one line, if a text is not of this form, or the count of prompts or steps is another one.
    """
    for flag, count in (("--upscale-prompt", len(prompts)), ("--upscale-steps", len(steps))):
        if count and not texts:
            raise ValueError(f"{flag} needs an --upscale: give one, or leave it out")
        if count not in (0, 1, len(texts)):
            raise ValueError(f"there are {count} {flag} for {len(texts)} --upscale: give one for all, or one for each")

    def each(given: Sequence[Any]) -> Sequence[Any]:
        return given if len(given) == len(texts) else [given[0] if given else None] * len(texts)

    parts = zip(texts, each(prompts), each(steps), strict=True)
    return [Stage(*_parsed(text), prompt, count) for text, prompt, count in parts]


def upscalers(
    asked: Sequence[Stage], options: LoadOptions, base: Pipeline, size: tuple[int, int], prompts: Sequence[str]
) -> list[Upscaler]:
    """Loads the models of a cascade.

    Args:
        asked: the models in their order.
        options: how they are loaded.
        base: the model that draws the first pictures.
        size: height and width of these, in pixels.
        prompts: what the first pictures show.

    Raises:
        FileNotFoundError, ValueError: in one line, if a model is missing, does not fit the one before, or cannot take
            its prompt or number of steps.
    """
    found: list[Upscaler] = []
    channels = base.codec.pixel_channels
    for path, level, prompt, steps in asked:
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
        try:
            pipe.sampling = replace(pipe.sampling, steps=steps or pipe.sampling.steps)
            pipe.plan(pipe.sampling)
            pipe.check_prompts(pipe.sampling, prompts if prompt is None else [prompt])
        except ValueError as error:
            raise ValueError(f"--upscale {path}: {error}") from None
        found.append(Upscaler(pipe, level, prompt))
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
    """Pictures (B, C, H, W) in [0, 1] enlarged by each model in turn, with its own sampling and perhaps prompt."""
    for pipe, level, prompt in cascade:
        read = prompts if prompt is None else [prompt] * len(prompts)
        pictures = pipe(read, seeds, picture=pictures, level=level, callback=callback)
    return pictures
