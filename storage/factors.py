"""The two factors of a LoRA's update, read and written under the names of tools."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from storage.updates import Scale
from storage.weights import Weights


class Factors(NamedTuple):
    """The update s·B·A of a layer."""

    down: Tensor  # A (r, inputs)
    up: Tensor  # B (rows, r)
    scale: float


def read_factors(weights: Weights, keys: Mapping[str, str], layer: str, scale: Scale) -> Factors | None:
    """The update of a layer; None if the tensors are anything but A and B of a matrix, perhaps with alpha.

    Args:
        weights: the file.
        keys: kind → tensor (`storage.updates.by_layer`).
        layer: the layer as PEFT's settings name it.
        scale: the file's.
    """
    if set(keys) - {"alpha"} != {"down", "up"}:
        return None
    down, up = weights[keys["down"]].float(), weights[keys["up"]].float()
    if down.dim() != 2 or up.dim() != 2 or up.shape[1] != len(down):
        return None
    alpha = weights[keys["alpha"]] if "alpha" in keys else None
    return Factors(down, up, scale(layer, alpha, len(down)))


def named(layer: str, update: Factors, flat: bool) -> dict[str, Tensor]:
    """An update's tensors. Flat names, which are kohya's, have alpha. For the others s is put into B."""
    down, up, scale = update.down.clone(), update.up, update.scale
    if flat:
        alpha = torch.tensor(scale * len(down))
        return {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up.clone(), f"{layer}.alpha": alpha}
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": scale * up}
