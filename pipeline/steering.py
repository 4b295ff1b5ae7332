"""What steers a pipeline, from files: ControlNets with their pictures, and a model to move away from."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from data.raw.pictures import load_picture
from mmdit import control
from mmdit.control import Control
from pipeline import LoadOptions, Pipeline
from storage.models import find_model
from storage.weights import DType


class Steering(NamedTuple):
    """A ControlNet, the picture that it follows, and how much."""

    path: Path
    image: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """MODEL:IMAGE or MODEL:IMAGE:SCALE. ValueError in one line if it is neither."""
        parts = text.split(":")
        if len(parts) not in (2, 3) or not all(parts):
            raise ValueError(f"{text!r} is not MODEL:IMAGE or MODEL:IMAGE:SCALE, such as canny:edges.png:0.8")
        try:
            scale = float(parts[2]) if len(parts) == 3 else 1.0
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ValueError(f"{text!r} has the scale {parts[2]!r}: give a number, such as 0.8")
        return cls(Path(parts[0]), Path(parts[1]), scale)


def model_and_scale(flag: str, text: str, example: str) -> tuple[Path, float]:
    """The two parts of MODEL:SCALE. ValueError in one line, with the flag and an example, if it has another form."""
    path, _, scale = text.rpartition(":")
    try:
        number = float(scale) if path else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"--{flag} {text} is not MODEL:SCALE, such as {example}")
    return Path(path), number


def autoguided(pipe: Pipeline, text: str | None, options: LoadOptions) -> Pipeline:
    """The pipeline with the autoguidance MODEL:SCALE; itself without a text.

    Raises:
        FileNotFoundError, ValueError: in one line, if the text is of another form or the model does not fit.
    """
    if text is None:
        return pipe
    path, number = model_and_scale("autoguidance", text, "runs/small:2")
    weak = Pipeline.load(find_model(path), replace(options, lora=(), parts=None))
    return pipe.away_from(weak, number)


def interval_of(shares: tuple[float, float], times: Tensor) -> tuple[float, float]:
    """The times (from, to) of the steps that lie wholly between two shares of a walk, as in diffusers.

    An evaluation at the end of a step, as in Heun's method, counts to the next step.

    Args:
        shares: from 0, the first step, to 1, the last.
        times: of the walk, falling, (steps + 1,).

    Raises:
        ValueError: in one line, if no step lies there, or the shares are no interval.
    """
    first, last = shares
    if not 0 <= first < last <= 1:
        raise ValueError(f"--control-interval must be two numbers, 0 <= from < to <= 1, got {first:g} and {last:g}")
    steps = len(times) - 1
    inside = [i for i in range(steps) if first <= i / steps and (i + 1) / steps <= last]
    if not inside:
        raise ValueError(f"none of {steps} steps lies between the shares {first:g} and {last:g}: take more steps")
    begin, end = (times[i].float() for i in (inside[0], inside[-1] + 1))  # the model's t is float32
    return float(torch.nextafter(end, begin)), float(begin)


def steer(
    pipe: Pipeline,
    steerings: Sequence[Steering],
    interval: tuple[float, float] = (0.0, 1.0),
    height: int | None = None,
    width: int | None = None,
) -> tuple[Pipeline, Tensor]:
    """The pipeline steered by ControlNets, and the pictures for its argument `picture`, (1, C, height, width).

    Args:
        pipe: the model, of an MMDiT.
        steerings: at least one ControlNet with its picture.
        interval: the times (from, to) at which they work.
        height: of the pictures to draw, in pixels; none means the training's.
        width: the same for the width.

    Raises:
        FileNotFoundError, ValueError: in one line, if a file is missing, damaged or does not fit.
    """
    factor, channels = pipe.codec.factor, pipe.codec.pixel_channels
    height, width = (side * factor for side in pipe.latent_size(height, width))
    pictures = [load_picture(each.image, channels, height, width, 1) for each in steerings]
    dtype: DType = str(next(pipe.network.parameters()).dtype).removeprefix("torch.")  # type: ignore[assignment]
    controls = [Control(control.load(each.path, dtype, pipe.device), each.scale, interval) for each in steerings]
    steered = pipe.steered(controls)
    steered.latent_size(height, width)  # the ControlNet's positions may end before the network's
    return steered, torch.cat(pictures, dim=1)
