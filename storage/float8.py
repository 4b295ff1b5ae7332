"""Weights in 8 bits with a scale beside each, as ComfyUI writes them: which tensors of a file are scales, and of what.

The weight of a layer is value × scale, where the values are float8_e4m3fn or float8_e5m2. The scale is `scale_weight`
in files with a marker `scaled_fp8`, and `weight_scale` in newer ones, which name the format of each layer as well: in
`comfy_quant` beside it, or in the header (ComfyUI, `QUANTIZATION.md` and `comfy/utils.py: convert_old_quants`).
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

SCALES = (".scale_weight", ".weight_scale")
UNUSED = (".scale_input", ".input_scale")  # of a layer's input, where products are computed in 8 bits
MARKER, FORMAT, HEADER = "scaled_fp8", ".comfy_quant", "_quantization_metadata"
FORMATS = ("float8_e4m3fn", "float8_e5m2")
EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = {  # end of a name → a format that is not read
    ".weight_scale_2": "nvfp4", ".pre_quant_scale": "nvfp4", ".qweight": "int4", ".weight.absmax": "bitsandbytes",
}  # fmt: skip
CURE = "get the model in float8, bfloat16 or float16"


class Stored(NamedTuple):
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Scales(NamedTuple):
    """What belongs to the weights with a scale.

    Attributes:
        of: name of the weight → name of its scale.
        beside: the names of all tensors that are no weights: scales, markers and formats.
    """

    of: dict[str, str]
    beside: set[str]


def find(tensors: Mapping[str, Stored], read: Callable[[str], bytes], header: str | None) -> Scales:
    """Finds the scales among the tensors of a model.

    Args:
        tensors: all of them by name.
        read: name → the bytes of a tensor.
        header: the file's metadata of the name HEADER.

    Raises:
        ValueError: without the file's name: weights are in another format, or a scale is missing or damaged.
    """
    for name in tensors:
        if kind := next((kind for end, kind in OTHERS.items() if name.endswith(end)), ""):
            raise ValueError(f"holds weights in {kind} ({name}), which is not read: {CURE}")
    formats = _formats(tensors, read, header)
    if layer := next((layer for layer, kind in formats.items() if kind not in FORMATS), ""):
        raise ValueError(f"holds weights in {formats[layer]!s:.80} ({layer}), which is not read: {CURE}")
    of: dict[str, str] = {}
    faults = []
    for name, (shape, dtype) in tensors.items():
        if not (end := next((end for end in SCALES if name.endswith(end)), "")):
            continue
        weight = f"{name.removesuffix(end)}.weight"
        if weight not in tensors or weight in of:
            faults.append(f"{name} is {'a second scale' if weight in of else 'a scale'} of no weight")
            continue
        scaled = tensors[weight]
        if not (scaled.dtype.is_floating_point and dtype.is_floating_point):
            raise ValueError(f"holds weights in {scaled.dtype} with scales in {dtype} ({weight}): {CURE}")
        if shape not in ((), (1,), (*scaled.shape[:1], *(1 for _ in scaled.shape[1:]))):
            faults.append(f"{name} has the shape {shape} instead of one number, or one a row")
        of[weight] = name
    faults += [f"{name} has no scale" for name in _without(tensors, of, formats)]
    markers = [name for name in tensors if name.rpartition(".")[2] == MARKER]
    for name in markers:
        if not any(weight.startswith(name.removesuffix(MARKER)) for weight in of):
            faults.append(f"{name} marks weights with scales, and none has one")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"is damaged: {faults[0]}{more}; download it again")
    layers = {weight.removesuffix(".weight") for weight in of} | formats.keys()
    ends = (*UNUSED, FORMAT)
    return Scales(of, {*of.values(), *markers, *(f"{layer}{end}" for layer in layers for end in ends)})


def _without(tensors: Mapping[str, Stored], of: Mapping[str, str], formats: Mapping[str, object]) -> list[str]:
    """Weights in 8 bits that lack a scale: their format is named, or the same weight of another block has one."""
    alike = {_pattern(weight) for weight in of} | {_pattern(f"{layer}.weight") for layer in formats}
    return [
        name for name, (_, dtype) in tensors.items() if dtype in EIGHT and name not in of and _pattern(name) in alike
    ]


def _formats(names: Mapping[str, object], read: Callable[[str], bytes], header: str | None) -> dict[str, object]:
    """Layer → format, as the file says it. ValueError if that is no JSON of this kind."""
    try:
        listed = {layer: entry["format"] for layer, entry in json.loads(header or '{"layers": {}}')["layers"].items()}
        beside = [name for name in names if name.endswith(FORMAT)]
        return listed | {name.removesuffix(FORMAT): json.loads(read(name))["format"] for name in beside}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"is damaged: {HEADER} or a {FORMAT[1:]} names no format; download it again") from None


def _pattern(name: str) -> str:
    """A name without the number of its block."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name, count=1)
