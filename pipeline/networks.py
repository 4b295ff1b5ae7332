"""The networks that a model folder can hold, and how each is loaded and saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from baselines.dit import KINDS as TRANSFORMERS
from mmdit import checkpoint
from mmdit.network import Network
from storage.text import read_json
from storage.weights import DType, dtype_of, open_folder


class Format(NamedTuple):
    """How a kind of network is stored.

    Args:
        subfolder: its folder in the model folder.
        save: writes config and weights there; OSError on failure.
        index_entry: returns library and class of a network, for `model_index.json`.
    """

    subfolder: str
    save: Callable[[Any, Path], None]
    index_entry: Callable[[Any], list[str]]


def _mmdit(network: Any) -> list[str]:
    own = checkpoint.extensions(network)
    return ["mmdit.model", checkpoint.OUR_CLASS] if own else ["diffusers", checkpoint.DIFFUSERS_CLASS]


def _save(network: Any, folder: Path) -> None:
    network.save(folder)


FORMATS = {  # by the network's class
    "MMDiT": Format("transformer", checkpoint.save, _mmdit),
    "UNet": Format("unet", _save, lambda _: ["diffusers", "UNet2DConditionModel"]),
    **{
        name: Format("transformer", _save, lambda network: ["baselines.dit", type(network).__name__])
        for name in TRANSFORMERS
    },
}


def format_of(network: Network) -> Format:
    """How this network is stored."""
    return FORMATS[type(network).__name__]


def load(folder: Path, device: str, dtype: Callable[[torch.dtype], DType]) -> tuple[Network, DType]:
    """Loads the network of a model folder. Returns it and the type of its weights in memory.

    Args:
        folder: the model folder.
        device: the device of the network.
        dtype: stored type of the weights → type in memory.

    Raises:
        ValueError, FileNotFoundError: in one line, if a file is missing, damaged or of another kind.
    """
    if (folder / "unet").is_dir():
        from baselines.unet import UNet  # diffusers is slow to import

        if dtype(torch.float32) != "float32":
            raise ValueError(f"{folder} holds a UNet, which can only be loaded in float32: give --dtype float32")
        return UNet.load(folder / "unet").to(device), "float32"
    place = folder / "transformer"
    held = dtype(open_folder(place, checkpoint.STEM).dtype)
    kind = read_json(place / checkpoint.CONFIG).get("_class_name")
    if isinstance(kind, str) and kind in TRANSFORMERS:
        return TRANSFORMERS[kind].load(place).to(device, dtype_of(held)), held
    return checkpoint.load(place, held, device), held
