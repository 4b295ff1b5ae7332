"""Weights on disk: safetensors files, read tensor by tensor, and refused if any tensor does not fit."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage import float8
from storage.files import commit_path
from storage.seal import BLANK, seal
from storage.text import read_json

DType: TypeAlias = Literal["float32", "float16", "bfloat16"]  # of weights in memory
STORED = {  # of weights on disk
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
METADATA = {"format": "pt", "seal": BLANK}
HEADER_LIMIT = 2**25  # bytes of a safetensors header; the largest released one has less than 1 MB
PICKLE = "a pickle, which can run code when it is opened: convert it to safetensors first"
LFS = "a pointer of Git LFS and not the file itself: run `git lfs pull` in its folder, or download it again"
PAGE = "a web page, saved instead of the file: download the file itself (on the hub its address has /resolve/)"
SIGNS = {  # what begins with these bytes is no safetensors file
    b"PK": PICKLE, b"\x80\x02": PICKLE, b"\x80\x03": PICKLE, b"\x80\x04": PICKLE, b"\x80\x05": PICKLE,
    b"GGUF": "a GGUF file, packed for other programs: get the model as safetensors",
    b"version https://git-lfs": LFS, b"<!doctype": PAGE, b"<html": PAGE, b"<?xml": PAGE,
    b"\x1f\x8b": "compressed by gzip: unpack it first",
}  # fmt: skip
WRAPPERS = ("module.", "ema.", "_orig_mod.", "diffusion_model.", "net.")  # put before all names by trainers
SAMPLE = 1024  # numbers at each of three places of a tensor that a digest reads


class Place(NamedTuple):
    """Where a tensor is stored, and the scale by which its values are multiplied, if it has one."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: "Place | None" = None

    def read(self) -> Tensor:
        """The tensor. With a scale it is decoded: value × scale, in float32. ValueError if the scale is not finite."""
        with safe_open(self.file, framework="pt") as file:
            stored = file.get_tensor(self.name)
        if self.scale is None:
            return stored
        scale = self.scale.read().float()
        if not scale.isfinite().all():
            raise ValueError(f"{self.scale.file} is damaged: {self.scale.name} is not finite; download it again")
        return stored.float() * (scale.reshape(()) if scale.numel() == 1 else scale)


class Weights(Mapping[str, Tensor]):
    """Names → tensors of one or more safetensors files. Each access maps the tensor into memory again, so that a tensor
    that was copied and released takes no memory. Scales of weights in 8 bits (`storage.float8`) have no names here: the
    weights come decoded.

    Attributes:
        source: the file or folder, for messages.
        places: name → where the tensor is stored.
        metadata: the header's metadata of a single file.
    """

    def __init__(self, source: Path, places: dict[str, Place], metadata: dict[str, str] | None = None) -> None:
        self.source, self.places, self.metadata = source, places, metadata or {}

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.places[name].shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of the numbers."""
        sizes: dict[torch.dtype, int] = {}
        for place in self.places.values():
            sizes[place.dtype] = sizes.get(place.dtype, 0) + math.prod(place.shape)
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def kept(self) -> torch.dtype:
        """`dtype`, or bfloat16 for 8 bits, in which nothing is computed."""
        return torch.bfloat16 if self.dtype in float8.EIGHT else self.dtype

    def under(self, prefix: str) -> "Weights":
        """The tensors whose names start with a prefix, under the rest of their names."""
        return self.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)

    def renamed(self, rename: Callable[[str], str | None]) -> "Weights":
        """The same tensors under other names; a tensor whose new name is None is left out."""
        names = ((rename(name), place) for name, place in self.places.items())
        return Weights(self.source, {name: place for name, place in names if name is not None}, self.metadata)


def foreign(file: Path) -> str:
    """What a file is that is mistaken for weights or a tokenizer, and the cure, by its first bytes; empty if unknown.

    A safetensors file has 8 bytes of length and then a brace, whatever the length looks like.
    """
    with file.open("rb") as opened:
        start = opened.read(64)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = [kind for sign, kind in SIGNS.items() if start.startswith(sign) or text.startswith(sign)]
    return found[0] if found and start[8:9] != b"{" else ""


def open_file(file: Path, unwrap: bool = True) -> Weights:
    """The tensors of one file. A wrapper before all of the names is taken off, unless `unwrap` is false.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: in one line, for a pickle, a truncated file or another file that is not safetensors.
    """
    weights = _decoded(_open(file))
    return _unwrapped(weights) if unwrap else weights


def _open(file: Path) -> Weights:
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}")
    if kind := foreign(file):
        raise ValueError(f"{file} is {kind}")
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
        if size > HEADER_LIMIT:
            raise SafetensorError(f"its header would have {size:,} bytes")
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            places = {n: Place(file, n, tuple(s.get_shape()), STORED[s.get_dtype()]) for n, s in slices.items()}
            return Weights(file, places, tensors.metadata())
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from None
    except KeyError as error:
        known = f"which is not one of {', '.join(STORED)}: {float8.CURE}"
        raise ValueError(f"{file} holds tensors of type {error}, {known}") from None


def _decoded(weights: Weights) -> Weights:
    """The tensors without the scales of weights in 8 bits, which become part of the weights' places."""
    stored = {name: float8.Stored(place.shape, place.dtype) for name, place in weights.places.items()}
    try:
        scales = float8.find(stored, lambda name: weights[name].numpy().tobytes(), weights.metadata.get(float8.HEADER))
    except ValueError as error:
        raise ValueError(f"{weights.source} {error}") from None
    places = {
        name: place._replace(scale=weights.places[scales.of[name]]) if name in scales.of else place
        for name, place in weights.places.items()
        if name not in scales.beside
    }
    return Weights(weights.source, places, weights.metadata)


def _unwrapped(weights: Weights) -> Weights:
    """The tensors without the wrappers, such as `module.`, that stand before all of their names."""
    while wrapper := next((w for w in WRAPPERS if weights and all(name.startswith(w) for name in weights)), ""):
        weights = weights.under(wrapper)
    return weights


def open_folder(folder: Path, stem: str) -> Weights:
    """The tensors of `stem.safetensors`, or of the shards that `stem.safetensors.index.json` names.

    If there is neither, those of a variant such as `stem.fp16.safetensors`, which released folders have beside them.

    Raises:
        FileNotFoundError, ValueError: as `open_file`; also if a shard lacks a tensor that the index names, or there are
            several variants to choose from.
    """
    idle: Path | None = None  # an index without downloaded shards, perhaps beside a variant that has them
    for variant in _variants(folder, stem):
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return open_file(whole)
        for index in (folder / f"{stem}.safetensors.index{variant}.json", folder / f"{whole.name}.index.json"):
            if index.is_file():
                if any((folder / shard).is_file() for shard in _shards(index).values()):
                    return _open_shards(index)
                idle = index
    if idle:
        return _open_shards(idle)
    for kind in ("*.bin", "*.pt", "*.ckpt", "*.pth", "*.gguf"):
        for file in sorted(folder.glob(kind)):
            raise ValueError(f"{folder} holds only {file.name}, {foreign(file) or PICKLE}")
    raise FileNotFoundError(f"no weights at {folder / f'{stem}.safetensors'}")


def _variants(folder: Path, stem: str) -> list[str]:
    """The variants of a folder's weights, the best first: "" if it has none, else such as ".fp16"."""
    variant = r"(\.(?!.*-of-)[^.]+)?"
    name = re.compile(rf"{stem}{variant}\.safetensors(?:\.index{variant}\.json)?")
    found = {match[1] or match[2] or "" for file in folder.glob("*") if (match := name.fullmatch(file.name))}
    known = [best for best in ("", ".fp16", ".bf16") if best in found]
    others = sorted(found - set(known))
    if not known and len(others) > 1:
        raise ValueError(f"{folder} holds several variants of {stem}, {', '.join(others)}: leave one of them there")
    return known + others


def _shards(index: Path) -> dict[str, str]:
    """Tensor's name → file."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise ValueError(f"{index} has no weight_map of names and files: download it again")
    return table


def _open_shards(index: Path) -> Weights:
    table = _shards(index)
    shards = {name: _open(index.parent / name) for name in sorted(set(table.values()))}
    absent = [name for name, shard in table.items() if name not in shards[shard]]
    if absent:
        raise ValueError(f"{index} promises {len(absent)} tensors that its files lack ({shorten(absent)})")
    whole = Weights(index.parent, {name: shards[shard].places[name] for name, shard in table.items()})
    return _unwrapped(_decoded(whole))


def check_tensors(weights: Weights, expected: Mapping[str, tuple[int, ...]], owner: str) -> None:
    """Checks that the weights have the names and shapes of a module's tensors.

    Args:
        weights: the tensors on disk.
        expected: name → shape.
        owner: the module, for the message.

    Raises:
        ValueError: naming what is missing, left over or mis-shaped.
    """
    if fault := mismatch({name: weights.shape(name) for name in weights}, expected):
        raise ValueError(f"{weights.source}: the weights do not fit {owner}: {fault}")


def mismatch(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> str:
    """How found and expected tensors differ, both name → shape; empty if they do not."""
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "left over": sorted(found.keys() - expected.keys()),
        "mis-shaped": [
            f"{name} {tuple(found[name])} instead of {tuple(shape)}"
            for name, shape in sorted(expected.items())
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    return ", ".join(f"{len(names)} {fault} ({shorten(names)})" for fault, names in faults.items() if names)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of each tensor's name, type and shape, and of SAMPLE numbers at its start, middle and end."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        flat = tensor.flatten()
        content.update(f"{name} {tuple(tensor.shape)} {flat.dtype}".encode())
        for start in (0, len(flat) // 2, max(0, len(flat) - SAMPLE)):
            content.update(flat[start : start + SAMPLE].cpu().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def write_tensors(tensors: Mapping[str, Tensor], file: Path, notes: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file atomically, with a seal. The tensors may be views that do not overlap.

    Args:
        tensors: name → tensor.
        file: the file.
        notes: further metadata of its header, ASCII.

    Raises:
        OSError: it cannot be written; an older file stays.
    """
    metadata = METADATA | dict(notes or {})

    def write(part: Path) -> None:
        try:
            save_file(dict(tensors), part, metadata=metadata)
        except SafetensorError as error:  # its own error if the disk is full
            raise OSError(str(error)) from error
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # safetensors makes the file readable by its owner only
        with part.open("r+b") as opened:  # safetensors writes the metadata in a random order
            opened.seek(8)
            opened.write(json.dumps({"__metadata__": metadata}, separators=(",", ":")).encode()[:-1])
        seal(part)

    commit_path(file, write)


def shorten(names: list[str]) -> str:
    """Names for a message: those that differ only in their first number in one pattern; at most eight patterns."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = f"{name[: number.start()]}{{}}{name[number.end() :]}" if number else name
        groups.setdefault(pattern, []).extend([int(number[0])] if number else [])
    patterns = [
        pattern.replace("{}", str(found[0]) if len(found) == 1 else f"{{{','.join(map(str, sorted(found)))}}}", 1)
        for pattern, found in groups.items()
    ]
    return ", ".join(patterns[:8]) + (f" and {len(patterns) - 8} kinds more" if len(patterns) > 8 else "")


def dtype_of(name: str) -> torch.dtype:
    """The torch type of a name; ValueError if weights cannot be kept in it."""
    if name not in get_args(DType):
        raise ValueError(f"dtype must be one of {', '.join(get_args(DType))}, got {name}")
    return getattr(torch, name)
