"""A LoRA of an MMDiT under the names of another tool (`pipeline.convert`).

q, k and v are one layer in some tools. To part their update, B is cut and A is repeated. To join three, B goes on the
diagonal of blocks and A below A, which takes three times the rank; equal A are joined without that.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.adapters import DIALECTS
from mmdit.checkpoint import IN_BLOCK, OUTSIDE_BLOCKS, Naming, swap
from storage.checksums import write_checksums
from storage.factors import Factors, named, read_factors
from storage.files import commit_json, replace_folder
from storage.updates import CONFIG, FILES, Scale, by_layer
from storage.weights import Weights, write_tensors

TARGETS = {"diffusers": "diffusers", "kohya": "kohya", "peft": "PEFT"}  # name of a flag → dialect
BLOCKS = {"diffusers": "transformer_blocks", "original": "joint_blocks"}


def convert(weights: Weights, to: str, settings: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], set[str]]:
    """The LoRA of an MMDiT's linear layers in a file under the names of another tool, and what it came from.

    No network is needed.

    Args:
        weights: the file, in any of `DIALECTS`.
        to: one of `TARGETS`.
        settings: PEFT's settings from outside the file.
    """
    layers, read = _read(weights, settings or {})
    prefix, naming, flat = DIALECTS[TARGETS[to]]
    state: dict[str, Tensor] = {}
    for (block, layer), parts in layers.items():
        names = _names(layer, naming)
        for name, update in zip(names, _fitted(parts, len(names)), strict=True):
            if update is None:
                continue
            inside = name if block is None else f"{BLOCKS[naming]}.{block}.{name}"
            full = prefix + (inside.replace(".", "_") if flat else inside)
            state |= named(full, update._replace(up=_ordered(update, layer, naming)), flat)
    return state, read


def write_lora(state: Mapping[str, Tensor], to: str, out: Path, notes: Mapping[str, str] | None = None) -> None:
    """Writes the tensors of a LoRA, and notes in its metadata: a file, for PEFT a folder. OSError on failure."""
    if to != "peft":
        write_tensors(state, out, notes)
        return
    ranks = {
        name.removeprefix(DIALECTS["PEFT"].prefix).removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in state.items()
        if name.endswith("lora_A.weight")
    }
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = {
        "peft_type": "LORA", "r": most, "lora_alpha": most, "target_modules": sorted(ranks), "rank_pattern": others,
        "alpha_pattern": others, "base_model_name_or_path": None,
    }  # fmt: skip

    def fill(folder: Path) -> None:
        commit_json(folder / CONFIG, config)
        write_tensors(state, folder / FILES[1], notes)
        write_checksums(folder, [folder / CONFIG, folder / FILES[1]])

    replace_folder(out, fill)


def _read(
    weights: Weights, settings: Mapping[str, Any]
) -> tuple[dict[tuple[str | None, str], list[Factors | None]], set[str]]:
    """(block, our layer) → the update of each of its parts in the file, and the tensors of all of these."""
    scale = Scale(weights, settings, DIALECTS["diffusers"].prefix)
    read: set[str] = set()
    layers: dict[tuple[str | None, str], list[Factors | None]] = {}
    for name, keys in by_layer(weights).items():
        if (place := _place(name)) is None:
            continue
        block, layer, index, dialect = place
        prefix, naming, _ = DIALECTS[dialect]
        if found := read_factors(weights, keys, name.removeprefix(prefix), scale):
            parts = layers.setdefault((block, layer), [None] * len(_names(layer, naming)))
            parts[index] = found._replace(up=_ordered(found, layer, naming))
            read.update(keys.values())
    return layers, read


def _place(name: str) -> tuple[str | None, str, int, str] | None:
    """Block, our layer, number of the part and dialect of a name in a file; None if it is no layer of an MMDiT."""
    for dialect, (prefix, naming, flat) in DIALECTS.items():
        if not name.startswith(prefix):
            continue
        dot = "_" if flat else "."
        block = re.fullmatch(rf"{BLOCKS[naming]}{re.escape(dot)}(\d+){re.escape(dot)}(.+)", name.removeprefix(prefix))
        table, rest = (IN_BLOCK, block[2]) if block else (OUTSIDE_BLOCKS, name.removeprefix(prefix))
        for layer in table:
            names = [part.replace(".", dot) for part in _names(layer, naming)]
            if rest in names and layer != "patch":
                return block and block[1], layer, names.index(rest), dialect
    return None


def _names(layer: str, naming: Naming) -> tuple[str, ...]:
    """The parts of our layer in a naming, without the block."""
    return (IN_BLOCK | OUTSIDE_BLOCKS)[layer][0 if naming == "diffusers" else 1]


def _ordered(update: Factors, layer: str, naming: Naming) -> Tensor:
    """B with shift before scale, from or to diffusers, which has scale before shift where there are only these two."""
    two = layer.endswith("modulation") and len(update.up) == 2 * update.down.shape[1]
    return swap(update.up) if two and naming == "diffusers" else update.up


def _fitted(parts: list[Factors | None], count: int) -> list[Factors | None]:
    """The updates of `count` parts of a layer, from those of all its parts in another naming."""
    if len(parts) == count:
        return parts
    if len(parts) == 1:
        (whole,) = parts
        assert whole is not None
        return [Factors(whole.down, up, whole.scale) for up in whole.up.chunk(count)]
    there = [part for part in parts if part is not None]
    rows = len(there[0].up)
    first = there[0]
    if all(torch.equal(part.down, first.down) and part.scale == first.scale for part in there):
        ups = [first.up.new_zeros(rows, len(first.down)) if part is None else part.up for part in parts]
        return [Factors(first.down, torch.cat(ups), first.scale)]
    ups = [first.up.new_zeros(rows, 0) if part is None else part.scale / first.scale * part.up for part in parts]
    return [Factors(torch.cat([part.down for part in there]), torch.block_diag(*ups), first.scale)]
