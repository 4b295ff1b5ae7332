"""Models in 8 bits, written as ComfyUI's files have them, and the numbers that they stand for."""

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Narrow(NamedTuple):
    """A file in 8 bits: its tensors, its header's metadata, and the weights it stands for, in float32."""

    tensors: Tensors
    metadata: dict[str, str]
    wanted: Tensors


def chosen(name: str, value: Tensor) -> bool:
    """The matrices of blocks, as in released files; the rest stays as it is."""
    return value.ndim == 2 and name.endswith(".weight") and "block" in name


def plain(tensors: Tensors, dtype: torch.dtype) -> Narrow:
    """All numbers rounded to 8 bits."""
    stored = {name: value.to(dtype) for name, value in tensors.items()}
    return Narrow(stored, {"format": "pt"}, {name: value.float() for name, value in stored.items()})


def scaled(tensors: Tensors, dtype: torch.dtype, rows: bool = False) -> tuple[Tensors, Tensors, Tensors]:
    """The tensors with the chosen ones as W/s; their scales s by layer; and the weights these stand for."""
    stored, scales = dict(tensors), {}
    for name, value in tensors.items():
        if chosen(name, value):
            peak = value.abs().amax(1, keepdim=True) if rows else value.abs().max()
            scale = scales[name.removesuffix(".weight")] = peak / torch.finfo(dtype).max
            stored[name] = (value / scale).to(dtype)
    wanted = {
        name: value.float() * scales[layer] if (layer := name.removesuffix(".weight")) in scales else value
        for name, value in stored.items()
    }
    assert scales
    return stored, scales, wanted


def marked(tensors: Tensors, dtype: torch.dtype, prefixes: tuple[str, ...] = ("",)) -> Narrow:
    """With `scale_weight`, `scale_input` and a marker for each model in the file."""
    stored, scales, wanted = scaled(tensors, dtype)
    stored |= {f"{prefix}scaled_fp8": torch.empty(0, dtype=dtype) for prefix in prefixes}
    stored |= {f"{layer}.scale_weight": scale for layer, scale in scales.items()}
    stored |= {f"{layer}.scale_input": torch.ones(1) for layer in scales}
    return Narrow(stored, {"format": "pt"}, wanted)


def named(tensors: Tensors, dtype: torch.dtype) -> Narrow:
    """With `weight_scale`, one a row, and each layer's format beside it."""
    stored, scales, wanted = scaled(tensors, dtype, rows=True)
    note = json.dumps({"format": str(dtype).removeprefix("torch."), "full_precision_matrix_mult": True}).encode()
    stored |= {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    stored |= {f"{layer}.comfy_quant": torch.tensor(list(note), dtype=torch.uint8) for layer in scales}
    return Narrow(stored, {"format": "pt"}, wanted)


def headed(tensors: Tensors, dtype: torch.dtype) -> Narrow:
    """With `weight_scale`, and the formats in the header."""
    stored, scales, wanted = scaled(tensors, dtype)
    stored |= {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    stored |= {f"{layer}.input_scale": torch.ones(()) for layer in scales}
    layers = {layer: {"format": str(dtype).removeprefix("torch.")} for layer in scales}
    header = {"format": "pt", "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return Narrow(stored, header, wanted)


FORMS: dict[str, Callable[[Tensors, torch.dtype], Narrow]] = {
    form.__name__: form for form in (plain, marked, named, headed)
}
