"""The files of a latent store (`data.store.reader`): their layout, and how they are written, read and checked."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from storage.seal import check_seal
from storage.text import parse_json

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("weights", pa.list_(pa.float32())),
        *((name, pa.int32()) for name in ("bucket", "shard", "part")),
        ("row", pa.int32()),  # in the bucket's tensor
        ("text_row", pa.int32()),  # of the first caption, in pooled and tokens
        *((name, pa.int32()) for name in ("height", "width", "top", "left")),
        ("phash", pa.uint64()),
        ("checksum", pa.uint64()),  # xxh3_64 of the latents' bytes
        ("pooled_checksum", pa.list_(pa.uint64())),  # of each caption's row; empty if there is none
        ("tokens_checksum", pa.list_(pa.uint64())),
    ]
)
LISTS = ("weights", "pooled_checksum", "tokens_checksum")  # the columns of one number per caption
HEADER_LIMIT = 2**20  # bytes; a header has a hundred for each bucket
IOVECS = 1024  # largest number of buffers of one preadv
LONG_RUN = 32  # runs of more equal values are compared one run at a time


def unit_name(shard: int, part: int) -> str:
    return f"{shard:06d}-{part:04d}"


def bfloat16(tensor: Tensor) -> Tensor:
    """The tensor as it is stored: bfloat16, contiguous, on the CPU."""
    return tensor.detach().to("cpu", torch.bfloat16).contiguous()


def checksum(tensor: Tensor) -> int:
    """xxh3_64 of the bytes of a stored tensor."""
    return xxh3_64_intdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)


def header(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """The header of a safetensors file of bfloat16 tensors in this order; it has only one form."""
    about, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        about[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(about, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def safetensors(tensors: Mapping[str, Sequence[Tensor]]) -> Iterator[Any]:
    """The bytes of a safetensors file in pieces, so that memory never holds a unit twice.

    Args:
        tensors: name → pieces (n_i, …) of each tensor along its first dimension, bfloat16.
    """
    yield header({name: [sum(map(len, pieces)), *pieces[0].shape[1:]] for name, pieces in tensors.items()})
    for pieces in tensors.values():
        for piece in pieces:
            yield piece.reshape(-1).view(torch.uint8).numpy().data


class Unit:
    """One open safetensors file, for reads of rows from any process. Closed when the object is deleted.

    Attributes:
        shapes: of its tensors.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: its header does not fit its size, as in a truncated file.
    """

    def __init__(self, file: Path) -> None:
        self._fd = -1
        try:
            self._fd = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            raise FileNotFoundError(f"{file} is missing") from None
        try:
            size = os.fstat(self._fd).st_size
            count = int.from_bytes(os.pread(self._fd, 8, 0), "little")
            head = os.pread(self._fd, 8 + min(count, HEADER_LIMIT), 0)
            self.shapes = {name: tuple(about["shape"]) for name, about in parse_json(head[8:], file).items()}
            lengths = [length for shape in self.shapes.values() for length in shape or (-1,)]
            if any(type(length) is not int or length < 0 for length in lengths) or header(self.shapes) != head:
                raise ValueError
            ends = [len(head), *(2 * math.prod(shape) for shape in self.shapes.values())]
            *starts, end = accumulate(ends)
            if end != size:
                raise ValueError
            self._starts = dict(zip(self.shapes, starts, strict=True))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is damaged or truncated: its header does not describe its {size} bytes") from None
        if hasattr(os, "posix_fadvise"):  # without it each read fetches its surroundings, up to 25 times the bytes
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, tensor: str, first: int, lines: Sequence[memoryview]) -> bool:
        """Reads rows first, first + 1, … of a tensor into buffers of one row each; False if the file ends before."""
        offset = self._starts[tensor] + first * 2 * math.prod(self.shapes[tensor][1:])
        done = 0
        rest = list(lines)
        while done < len(rest):
            some = rest[done : done + IOVECS]
            if hasattr(os, "preadv"):
                count = os.preadv(self._fd, some, offset)
            else:
                found = os.pread(self._fd, len(some[0]), offset)
                count = len(found)
                some[0][:count] = found
            if count == 0:
                return False
            offset += count
            while done < len(rest) and count >= len(rest[done]):
                count -= len(rest[done])
                done += 1
            if count:
                rest[done] = rest[done][count:]
        return True


def read_sidecar(file: Path, columns: list[str] | None = None) -> pa.Table:
    """The samples of a unit, with all columns or some.

    Raises:
        FileNotFoundError, ValueError: in one line, if the file is missing or damaged.
    """
    try:
        check_seal(file)
        schema = pa.schema([SCHEMA.field(name) for name in columns]) if columns else SCHEMA
        with pa.memory_map(str(file)) as source:
            return (
                pq.read_table(source, columns=columns, page_checksum_verification=True)
                .replace_schema_metadata(None)
                .cast(schema)
            )
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())}") from None


def read_notes(file: Path) -> dict[str, Any]:
    """A sidecar's notes: drops [(id, reason, detail)], inputs, last. ValueError if they are missing."""
    try:
        check_seal(file)
        notes = parse_json(pq.read_schema(file).metadata[b"unit"], file)
        return {name: notes[name] for name in ("drops", "inputs", "last")}
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged: remove it and run encode.py, which encodes its unit again") from None


def latent_shapes(plan: Mapping[str, Any], source: str) -> list[tuple[int, int, int]]:
    """(C, h, w) of each bucket's latents. ValueError, naming the source, if the plan is incomplete."""
    try:
        factor, channels = plan["factor"], plan["channels"]
        sizes = [(height, width) for height, width in plan["buckets"]["sizes"]]
        if not sizes or min(factor, channels, *map(min, sizes)) < 1 or any(h % factor or w % factor for h, w in sizes):
            raise ValueError
        return [(channels, height // factor, width // factor) for height, width in sizes]
    except (KeyError, TypeError, ValueError):
        fields = "channels, factor and buckets.sizes, a list of [height, width] in multiples of factor"
        raise ValueError(f"{source} lacks {fields}") from None


def differences(there: Any, here: Any, path: str = "") -> list[tuple[str, str, str]]:
    """The fields in which two JSON values differ: (dotted path, there, here)."""
    if isinstance(there, dict) and isinstance(here, dict):
        every = sorted(there.keys() | here.keys())
        pairs = [(there.get(name, ...), here.get(name, ...), f"{path}.{name}".lstrip(".")) for name in every]
        return [found for pair in pairs for found in differences(*pair)]
    values = ["nothing" if value is ... else json.dumps(value, ensure_ascii=False) for value in (there, here)]
    return [] if there == here else [(path, *values)]  # type: ignore[list-item]


def first_of(ids: pa.ChunkedArray) -> np.ndarray:
    """For each id, whether it is its first occurrence: (n,) bool."""
    codes = pa.chunked_array([part.indices for part in ids.dictionary_encode().chunks], pa.int32()).to_numpy()
    first = np.zeros(len(codes), dtype=bool)
    first[np.unique(codes, return_index=True)[1]] = True
    return first


def near_duplicates(hashes: np.ndarray, distance: int) -> np.ndarray:
    """For each hash, whether it is near an earlier hash that is not itself a near-duplicate: (n,) bool.

    Exact: hashes that differ in at most `distance` of 64 bits are equal in at least one of distance + 1 bands of bits.

    Args:
        hashes: (n,) uint64.
        distance: largest number of bits that differ.
    """
    _, first = np.unique(hashes, return_index=True)
    near = np.ones(len(hashes), dtype=bool)
    near[first] = False  # a repeated hash is near to its first occurrence, or to the hash that this one is near to
    members = np.sort(first)
    values = hashes[members]
    edges = [64 * band // (distance + 1) for band in range(distance + 2)]
    masks = [np.uint64((1 << high) - (1 << low)) for low, high in pairwise(edges)]
    empty = np.zeros(0, dtype=np.int64)
    pairs = [(empty, empty)]
    for number, mask in enumerate(masks):
        band = values & mask
        order = np.argsort(band, kind="stable")  # stable: within a run of equal bands the earlier hash comes first
        for left, right in _near_in_runs(band[order], values[order], distance):
            left, right = order[left], order[right]
            differing = values[left] ^ values[right]
            new = np.ones(len(left), dtype=bool)
            for earlier in masks[:number]:  # a pair that is equal in several bands counts in the first
                new &= differing & earlier != 0
            pairs.append((left[new], right[new]))
    left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
    by_left = np.argsort(left, kind="stable")
    left, right = left[by_left], right[by_left]
    removed = np.zeros(len(members), dtype=bool)
    keys, starts = np.unique(left, return_index=True)
    for key, others in zip(keys.tolist(), np.split(right, starts[1:]), strict=False):
        if not removed[key]:  # final by now: only earlier hashes can remove it
            removed[others] = True
    near[members[removed]] = True
    return near


def _near_in_runs(band: np.ndarray, values: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of indices (left, right), left < right, of near values within each run of equal bands."""
    if not len(band):
        return
    starts = np.flatnonzero(np.diff(band, prepend=~band[:1]))
    ends = np.append(starts[1:], len(band))
    ahead = np.repeat(ends, ends - starts) - np.arange(len(band)) - 1  # number of later values in the run
    for start, end in zip(*(bounds[ends - starts > LONG_RUN].tolist() for bounds in (starts, ends)), strict=True):
        ahead[start:end] = 0
        top = start
        while top < end:  # in tables that fit into a processor's cache
            rows = values[top : min(end, top + 1 + 2**16 // (end - top))]
            left, right = np.nonzero(np.bitwise_count(rows[:, None] ^ values[top:end]) <= distance)
            yield top + left[right > left], top + right[right > left]
            top += len(rows)
    live, step = np.flatnonzero(ahead), 1
    while len(live):  # all short runs at once
        found = live[np.bitwise_count(values[live] ^ values[live + step]) <= distance]
        yield found, found + step
        step += 1
        live = live[ahead[live] >= step]
