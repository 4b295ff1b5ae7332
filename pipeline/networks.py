"""The networks that a model folder can hold, and how each is loaded and saved."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from baselines.dit import CrossDiT, DiT
from mmdit import checkpoint, control
from mmdit.control import Control, Controlled
from mmdit.model import MMDiT
from mmdit.network import Network
from mmdit.prior import Prior
from mmdit.saved import SavedNetwork
from storage.text import read_json
from storage.weights import DType, dtype_of, open_folder
from tokens.dalle import DALLE

SAVED: dict[str, type[SavedNetwork]] = {kind.__name__: kind for kind in (DiT, CrossDiT, Prior, DALLE)}


class Part(NamedTuple):
    """A part of a network, in a subfolder of the model folder.

    Args:
        save: writes config and weights there; OSError on failure.
        entry: library and class, for `model_index.json`.
    """

    save: Callable[[Path], None]
    entry: list[str]


def _mmdit(network: MMDiT) -> Part:
    own = checkpoint.extensions(network)
    entry = ["mmdit.model", checkpoint.OUR_CLASS] if own else ["diffusers", checkpoint.DIFFUSERS_CLASS]
    return Part(partial(checkpoint.save, network), entry)


def parts_of(network: Network) -> dict[str, Part]:
    """How a network is stored: subfolder → part. ValueError for several ControlNets, of which a folder holds one."""
    if isinstance(network, MMDiT):
        return {"transformer": _mmdit(network)}
    if isinstance(network, Controlled):
        if len(network.controls) > 1:
            raise ValueError("a model folder holds one ControlNet: save each of several by itself")
        steering = network.settings[0].network
        kind = control.config(steering)["_class_name"]
        library = "diffusers" if kind == control.DIFFUSERS_CLASS else "mmdit.control"
        return {
            "transformer": _mmdit(network.base),
            control.FOLDER: Part(partial(control.save, steering), [library, kind]),
        }
    own: Any = network
    if type(network).__name__ == "UNet":
        return {"unet": Part(own.save, ["diffusers", "UNet2DConditionModel"])}
    return {"transformer": Part(own.save, [type(network).__module__, type(network).__name__])}


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
    if isinstance(kind, str) and kind in SAVED:
        return SAVED[kind].load(place).to(device, dtype_of(held)), held
    network = checkpoint.load(place, held, device)
    if (folder / control.FOLDER).is_dir():
        return Controlled(network, [Control(control.load(folder / control.FOLDER, held, device))]).eval(), held
    return network, held
