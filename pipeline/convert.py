"""A LoRA under the names of another tool: `python -m pipeline convert LORA --to kohya --out FILE`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from data.text import adapters as text
from mmdit import convert as network
from mmdit.adapters import guess
from storage.weights import Weights, shorten


def convert(weights: Weights, to: str, settings: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors of a LoRA of a network and text encoders. No model is needed.

    Args:
        weights: the file, under the names of any tool.
        to: one of `mmdit.convert.TARGETS`.
        settings: PEFT's settings from outside the file.

    Raises:
        ValueError: in one line, if the file holds anything but LoRA of linear layers of a Stable Diffusion 3, or the
            other tool has no names for it.
    """
    state, read = network.convert(weights, to, settings)
    more, also = text.convert(weights, to)
    left = set(weights) - read - also
    if left or not (state or more):
        what = f"it holds {shorten(sorted(left))}" if left else "it is empty"
        raise ValueError(
            f"{weights.source} is not a LoRA of Stable Diffusion 3's linear layers alone: {what}{guess(left)}"
        )
    if more and to == "peft":
        raise ValueError(f"{weights.source} updates text encoders, and a folder of PEFT holds the updates of one "
                         "network: convert it to diffusers or kohya")  # fmt: skip
    return state | more
