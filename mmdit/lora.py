"""LoRA: low-rank updates W + s·B·A of linear layers (Hu et al. 2021, eq. 3), made by peft, saved in diffusers' layout.

One of our linear layers may be several of diffusers' layers concatenated. To save an update, B is cut into the rows of
these layers and A is repeated for each. To merge one, each part is added to its own rows.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mmdit.checkpoint import parts, swap
from mmdit.model import MMDiT
from storage.checksums import verify, write_checksums
from storage.files import commit_json
from storage.weights import Weights, open_file, shorten, write_tensors

FILE, CONFIG, PREFIX = "pytorch_lora_weights.safetensors", "adapter_config.json", "transformer."


@dataclass(frozen=True)
class LoRA:
    """Which layers get an update, and how large it may be.

    Args:
        rank: rows of A and columns of B.
        alpha: the update is scaled by alpha / rank; none means rank.
        targets: ends of the names of the linear layers; by default those of the joint attention.
    """

    rank: int = 16
    alpha: int | None = None
    targets: tuple[str, ...] = ("image.qkv", "image.proj", "text.qkv", "text.proj")

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets or not (self.alpha is None or self.alpha > 0):
            raise ValueError(f"lora needs rank >= 1, alpha > 0 and targets, got {self}")


def add(network: MMDiT, lora: LoRA) -> None:
    """Adds updates in float32, which start at zero, and freezes all other weights. ValueError for unknown targets."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(f"lora.targets: no linear layer's name ends in {target!r}; there are {shorten(linear)}")
    if any(name.startswith("patch") and f".{name}".endswith(f".{t}") for name in linear for t in lora.targets):
        raise ValueError("lora.targets: the patch embedding is a convolution in other tools: remove it")
    alpha = lora.rank if lora.alpha is None else lora.alpha
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets))
    inject_adapter_in_model(config, network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small steps would round to nothing in half precision


def layers(network: MMDiT) -> Iterator[tuple[str, Any]]:
    """The layers with updates, peft's `LoraLayer`s, and their names."""
    from peft.tuners.lora import LoraLayer

    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def export(network: MMDiT) -> dict[str, Tensor]:
    """The network's updates under the names of diffusers' SD3 pipelines, with the scale s inside B."""
    theirs = {}
    for name, layer in layers(network):
        down, up = (cast(nn.Linear, side["default"]).weight.detach() for side in (layer.lora_A, layer.lora_B))
        up = up * layer.scaling["default"]
        sections = parts(network, name, len(up), "diffusers")
        for part, rows in zip(sections, up.split([part.rows for part in sections]), strict=True):
            theirs[f"{PREFIX}{part.name}.lora_A.weight"] = down.clone()
            theirs[f"{PREFIX}{part.name}.lora_B.weight"] = swap(rows) if part.swapped else rows.clone()
    return theirs


def save(network: MMDiT, folder: Path, base: str) -> None:
    """Writes the updates so that diffusers' `load_lora_weights(folder)` reads them. OSError on failure.

    Args:
        network: a network with updates.
        folder: the output folder.
        base: path or name of the model that the updates belong to, stored in the folder's config.
    """
    commit_json(folder / CONFIG, {"peft_type": "LORA", "base_model_name_or_path": base})
    write_tensors(export(network), folder / FILE)
    write_checksums(folder, [folder / CONFIG, folder / FILE])


class Update(NamedTuple):
    """An update of some rows of a layer's weight."""

    rows: slice
    down: Tensor  # A (r, inputs)
    up: Tensor  # s·B (rows, r)


def find(path: Path) -> Path:
    """The file of a LoRA, given the file or its folder. FileNotFoundError if there is none."""
    for file in (path, path / FILE, path / "lora" / FILE):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{path} is not a LoRA: give a safetensors file or a folder with {FILE}")


@torch.no_grad()
def merge(network: MMDiT, path: Path) -> None:
    """Adds a LoRA in diffusers' layout to the network's weights. The sums are float32.

    Raises:
        FileNotFoundError, ValueError: in one line that names all that does not fit, before anything is changed.
    """
    file = find(path)
    verify(file.parent, file.name)
    updates = read(network, open_file(file))
    modules = dict(network.named_modules())
    for name, pieces in updates.items():
        weight = modules[name].weight
        for rows, down, up in pieces:
            delta = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
            weight[rows] = (weight[rows].float() + delta).to(weight.dtype)


def read(network: MMDiT, weights: Weights) -> dict[str, list[Update]]:
    """The updates of each layer.

    Raises:
        ValueError: the file holds anything but updates of this network's linear layers.
    """
    scale = _scales(weights)
    left, misfits = set(weights), []
    updates: dict[str, list[Update]] = {}
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear) or name == "patch":
            continue
        start = 0
        for part in parts(network, name, module.out_features, "diffusers"):
            keys = [f"{PREFIX}{part.name}.lora_{side}.weight" for side in "AB"]
            rows, start = slice(start, start + part.rows), start + part.rows
            if not all(key in left for key in keys):
                continue
            left -= {*keys, f"{PREFIX}{part.name}.alpha"}
            shapes = [weights.shape(key) for key in keys]
            rank = shapes[0][0] if shapes[0] else 0
            if shapes != [(rank, module.in_features), (part.rows, rank)] or not rank:
                misfits.append(f"{keys[0]} {shapes[0]} and {keys[1]} {shapes[1]}")
                continue
            up = weights[keys[1]].float() * scale(part.name, rank)
            if not (up.isfinite().all() and weights[keys[0]].isfinite().all()):
                misfits.append(f"{part.name} is not finite")
            updates.setdefault(name, []).append(Update(rows, weights[keys[0]], swap(up) if part.swapped else up))
    if left or misfits or not updates:
        problems = [f"{len(left)} left over ({shorten(sorted(left))})"] * bool(left)
        problems += [f"{len(misfits)} damaged ({shorten(misfits)})"] * bool(misfits)
        raise ValueError(f"{weights.source} is not a LoRA of this network: {', '.join(problems) or 'it is empty'}")
    return updates


def _scales(weights: Weights) -> Any:
    """A function (layer, rank) → s = alpha / rank. alpha is a tensor in the file or in the file's metadata."""
    try:
        content = json.loads(weights.metadata.get("lora_adapter_metadata", "{}"))
        metadata = {key.removeprefix(PREFIX): value for key, value in content.items() if value is not None}
        float(metadata.get("lora_alpha", 1)), [float(alpha) for alpha in metadata.get("alpha_pattern", {}).values()]
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{weights.source} has broken adapter metadata: save the LoRA again") from None
    if metadata.get("use_dora"):
        raise ValueError(f"{weights.source} is a DoRA, which cannot be merged: use a LoRA without use_dora")

    def scale(name: str, rank: int) -> float:
        alpha = metadata.get("lora_alpha", rank)
        for pattern, value in metadata.get("alpha_pattern", {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                alpha = value
        key = f"{PREFIX}{name}.alpha"
        if key in weights:
            alpha = float(weights[key])
        return alpha / (math.sqrt(rank) if metadata.get("use_rslora") else rank)

    return scale
