"""The latent store: pictures and captions encoded once, on disk, to train from.

    store.json                        what it was encoded with: the plan
    null.safetensors                  the null condition: tokens (N, D) and pooled (P)
    units/SSSSSS-PPPP.safetensors     part PPPP of shard SSSSSS: latents.<bucket> (n, C, h, w) and pooled (captions, P)
    units/SSSSSS-PPPP.tokens.safetensors    tokens (captions, N, D), ten times the latents and so on their own
    units/SSSSSS-PPPP.parquet         its samples and what was dropped; written last, so its presence commits the unit
    index.arrow, report.json          all samples, and their counts; written once every shard is finished

All tensors are bfloat16. Files appear whole, under their names, or not at all, and hold nothing but content: a store
that was killed and gone on with is that of a straight run, byte for byte. Every sample carries checksums of its bytes.
"""

import json
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm import tqdm
from xxhash import xxh3_64_intdigest

from data.store.units import LISTS, SCHEMA, Unit, differences, latent_shapes, read_sidecar, unit_name
from data.store.writer import Drop, Sample, Writer
from storage.files import commit, file_checksum
from storage.weights import open_file, read_json

if TYPE_CHECKING:  # transformers is slow to import, and those who only look into a store need none of it
    from data.text.encoder import Text

__all__ = ["Drop", "Sample", "Store", "StoreError", "Writer"]
LAZY = ("null", "_table", "_hot", "_lists", "_open")  # opened again in each process
OPEN_FILES = 128
BLOCK = 32  # samples or captions that are verified at once
REPORTED = {"inputs": int, "kept": int, "dropped": dict, "buckets": dict, "captions": int, "index": str}


class StoreError(ValueError):
    """A store is damaged where it was read; the message says which file, unit or sample."""


class Store:
    """A finished store, to read from. It may be pickled and used in forked or spawned loader processes.

    Args:
        path: its folder, or a URL that fsspec knows ("s3://…"), from which the index is fetched at once and each unit's
            files when they are first read.
        cache: where they are kept; default: `~/.cache/mmdit/stores/`, a folder for each state of each store, so that
            one whose index changed is fetched anew.

    Attributes:
        plan: what it was encoded with.
        report: as `Writer.finish` returned it.
        buckets: height and width of each bucket, in pixels.
        null: the null condition, tokens (N, D) and pooled (P); None if the store holds no text.
        has_pooled: whether pooled vectors are there.
        has_tokens: whether tokens are there.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it is not finished or damaged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> folder = TemporaryDirectory()
        >>> plan = {"buckets": {"sizes": [[8, 8]]}, "factor": 1, "channels": 1}
        >>> writer = Writer(Path(folder.name), plan, null=None)  # a store without text
        >>> sample = Sample("0.png", ("a zero",), (1.0,), 0, (8, 8), (0, 0), 0, torch.ones(1, 8, 8), None, None)
        >>> writer.write(shard=0, samples=[sample], drops=[], inputs=1, last=True)
        >>> report = writer.finish(shards=1, hamming=None)
        >>> store = Store(folder.name)
        >>> len(store), store.captions(0), store.latents(np.array([0])).shape
        (1, ['a zero'], torch.Size([1, 1, 8, 8]))
    """

    def __init__(self, path: str | os.PathLike[str], cache: Path | None = None) -> None:
        self.source = os.fspath(path).rstrip("/")
        self._url = self.source if "://" in self.source else None
        self.folder = self._stage(cache) if self._url else Path(path)
        if not (self.folder / "store.json").is_file():
            raise FileNotFoundError(f"there is no store at {self.source}: it has no store.json")
        self.plan = read_json(self.folder / "store.json")
        self._shapes = latent_shapes(self.plan, f"{self.source}/store.json")
        self.buckets: tuple[tuple[int, int], ...] = tuple((h, w) for h, w in self.plan["buckets"]["sizes"])
        if not all((self.folder / name).is_file() for name in ("index.arrow", "report.json")):
            raise ValueError(f"the store {self.source} is not finished: go on with encode.py")
        self.report = read_json(self.folder / "report.json")
        if lacking := [name for name, kind in REPORTED.items() if not isinstance(self.report.get(name), kind)]:
            raise ValueError(f"{self.source} is damaged: its report.json does not tell {', '.join(lacking)}")
        size = self._hot["row"].size
        if size != self.report["kept"]:
            raise ValueError(f"{self.source} is damaged: {size} samples in its index, not as its report says")
        self.has_pooled, self.has_tokens = (len(self._lists[name][1]) > 0 for name in LISTS[1:])
        null = self.folder / "null.safetensors"
        if self.has_pooled and not null.is_file():
            raise FileNotFoundError(f"{self.source} is damaged: its null.safetensors is missing")
        tensors = open_file(null) if null.is_file() else {}
        self._caption_shapes = {name: tuple(tensors[name].shape) for name in tensors}
        if {name: len(shape) for name, shape in self._caption_shapes.items()} not in ({}, {"tokens": 2, "pooled": 1}):
            raise ValueError(f"{null} holds no tokens (N, D) and pooled (P)")

    def __len__(self) -> int:
        return self._hot["row"].size

    def __getstate__(self) -> dict[str, Any]:
        """Without open files and the index, which are opened again where they are needed."""
        return {name: value for name, value in self.__dict__.items() if name not in LAZY}

    def members(self, bucket: int) -> np.ndarray:
        """The numbers of all samples in a bucket, ascending."""
        return np.flatnonzero(self._hot["bucket"] == bucket)

    def latents(self, rows: np.ndarray) -> Tensor:
        """Latents of samples of one bucket: (n, C, h, w) bfloat16.

        Raises:
            StoreError: naming a unit's file that is missing or damaged, or unit, row and sample.
            ValueError: the samples are of several buckets, or none.
            IndexError: there is no such sample.
        """
        rows = self._rows(rows)
        buckets = np.unique(self._hot["bucket"][rows])
        if len(buckets) != 1:
            raise ValueError(f"latents are read from one bucket at once, got {len(buckets)}")
        bucket = int(buckets[0])
        places, checksums = self._hot["row"][rows], self._hot["checksum"][rows]
        return self._read("", f"latents.{bucket}", rows, places, checksums, self._shapes[bucket])

    def pooled(self, rows: np.ndarray, choice: np.ndarray) -> Tensor:
        """The pooled vector of each sample's caption number `choice`: (n, P) bfloat16. Errors as `text`'s."""
        if not self.has_pooled:
            raise ValueError(f"the store {self.source} holds no encoded text")
        return self._read_captions("", "pooled", rows, choice)

    def text(self, rows: np.ndarray, choice: np.ndarray) -> "Text":
        """Each sample's caption number `choice`, encoded: tokens (n, N, D) and pooled (n, P), bfloat16.

        Raises:
            StoreError: as `latents`'.
            ValueError: the store holds no tokens.
            IndexError: there is no such sample, or no such caption.
        """
        from data.text.encoder import Text

        return Text(self._tokens(rows, choice), self.pooled(rows, choice))

    def captions(self, row: int) -> list[str]:
        """A sample's captions."""
        return self._table["captions"][int(self._rows(np.array([row]))[0])].as_py()

    def weights(self, row: int) -> list[float]:
        """Their weights, > 0."""
        offsets, weights = self._lists["weights"]
        (row,) = self._rows(np.array([row]))
        return weights[offsets[row] : offsets[row + 1]].tolist()

    def ids(self) -> pa.ChunkedArray:
        """The ids of all samples; `ids()[i].as_py()` is that of sample i."""
        return self._table["id"]

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Height and width of the original pictures, top and left of their crops, in pixels: (n, 4)."""
        rows = self._rows(rows)
        return np.stack([self._hot[name][rows] for name in ("height", "width", "top", "left")], axis=1)

    @cached_property
    def null(self) -> "Text | None":
        from data.text.encoder import Text

        if not self._caption_shapes:
            return None
        tensors = open_file(self.folder / "null.safetensors")
        return Text(tensors["tokens"].clone(), tensors["pooled"].clone())

    def size(self) -> int:
        """Bytes of all its files."""
        system, root = fsspec.core.url_to_fs(self._url or str(self.folder))
        return system.du(root)

    def expect(self, **sections: Any) -> None:
        """Checks what the store was encoded with, section by section of its plan, as in `expect(codec=…)`.

        Raises:
            ValueError: naming each field that differs.
        """
        here = json.loads(json.dumps(sections))
        if told := differences({name: self.plan.get(name) for name in here}, here):
            fields = "; ".join(f"{path}: there {there}, here {now}" for path, there, now in told)
            raise ValueError(f"the store {self.source} was encoded otherwise: {fields}")

    def verify(self, progress: bool = True) -> list[str]:
        """Reads everything and checks every checksum, every shape, and that latents are finite.

        A unit is repaired by removing its sidecar and going on with encode.py, which makes it again and all later parts
        of its shard.

        Returns:
            The faults, one line each.
        """
        index = self.folder / "index.arrow"
        if file_checksum(index) != self.report["index"]:
            return [f"{index} is damaged: remove it and report.json, and go on with encode.py"]
        faults: list[str] = []
        bounds = [0, *(np.flatnonzero(np.diff(self._unit_keys(np.arange(len(self))))) + 1), len(self)]
        with tqdm(total=len(self), desc="verifying", unit="sample", disable=not progress) as bar:
            for start, end in pairwise(bounds):
                if start < end:
                    faults += self._unit_faults(np.arange(start, end))
                    bar.update(end - start)
        return list(dict.fromkeys(faults))

    def _unit_faults(self, rows: np.ndarray) -> Iterator[str]:
        """What is wrong with the samples of one unit."""
        stem = _stem(self._unit_keys(rows[:1])[0])
        try:
            sidecar = read_sidecar(self._local(f"units/{stem}.parquet"))
            kept = self._table.slice(rows[0], len(rows))
            place = [(t["bucket"].to_numpy().astype(np.int64) << 32) | t["row"].to_numpy() for t in (sidecar, kept)]
            if not sidecar.filter(pa.array(np.isin(*place))).equals(kept):
                yield f"unit {stem}: its samples are not those of the index"
        except (ValueError, OSError) as error:
            yield str(error)
        counts = np.diff(self._lists["weights"][0])[rows]
        every = np.repeat(rows, counts)
        choice = np.arange(len(every)) - np.repeat(np.cumsum(counts) - counts, counts)
        buckets = self._hot["bucket"][rows]
        groups: dict[str, list[tuple[Callable[..., Tensor], tuple[np.ndarray, ...]]]] = {
            "": [(self._finite_latents, (rows[buckets == bucket],)) for bucket in np.unique(buckets)]
            + [(self.pooled, (every, choice))] * self.has_pooled,
            ".tokens": [(self._tokens, (every, choice))] * self.has_tokens,
        }
        for group, reads in groups.items():
            if not reads:
                continue
            try:
                self._unit(stem, group)
            except (ValueError, OSError) as error:
                yield str(error)
                continue
            for read, arguments in reads:
                for start in range(0, len(arguments[0]), BLOCK):
                    block = [argument[start : start + BLOCK] for argument in arguments]
                    try:
                        read(*block)
                    except ValueError:  # which of them?
                        for i in range(len(block[0])):
                            try:
                                read(*(argument[i : i + 1] for argument in block))
                            except ValueError as error:
                                yield str(error)

    def _finite_latents(self, rows: np.ndarray) -> Tensor:
        latents = self.latents(rows)
        if not latents.isfinite().all():
            raise ValueError(f"{self._told(rows[0])}: its latents are not finite")
        return latents

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """The rows, if they are numbers of samples."""
        rows = np.asarray(rows)
        if rows.dtype.kind not in "iu" or rows.ndim != 1 or (rows < 0).any() or (rows >= len(self)).any():
            raise IndexError(f"samples are whole numbers from 0 to {len(self) - 1}")
        return rows

    def _tokens(self, rows: np.ndarray, choice: np.ndarray) -> Tensor:
        if not self.has_tokens:
            raise ValueError(f"the store {self.source} holds no tokens of captions")
        return self._read_captions(".tokens", "tokens", rows, choice)

    def _read_captions(self, group: str, name: str, rows: np.ndarray, choice: np.ndarray) -> Tensor:
        rows, choice = self._rows(rows), np.asarray(choice)
        offsets, checksums = self._lists[f"{name}_checksum"]
        if choice.shape != rows.shape or (choice < 0).any() or (choice >= offsets[rows + 1] - offsets[rows]).any():
            raise IndexError("a caption's number is at least 0 and below the number of its sample's captions")
        places = self._hot["text_row"][rows] + choice
        return self._read(group, name, rows, places, checksums[offsets[rows] + choice], self._caption_shapes[name])

    def _read(
        self,
        group: str,
        tensor: str,
        rows: np.ndarray,
        places: np.ndarray,
        checksums: np.ndarray,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Rows `places` of a tensor in each sample's unit, read in the order of the disk, neighbours at once."""
        out = _empty((len(rows), *shape))
        lines = [line.data for line in out.view(torch.uint8).numpy().reshape(len(rows), -1)]
        units = self._unit_keys(rows)
        order = np.lexsort((places, units))
        breaks = np.flatnonzero((np.diff(units[order]) != 0) | (np.diff(places[order]) != 1)) + 1
        for run in np.split(order, breaks):
            stem, first = _stem(units[run[0]]), int(places[run[0]])
            unit = self._unit(stem, group)
            count, *stored = unit.shapes.get(tensor, (0,))
            if tuple(stored) != shape or first + len(run) > count:
                raise StoreError(
                    f"{self._told(rows[run[-1]])}: the file's {tensor} lacks row {places[run[-1]]} of {shape}"
                )
            if not unit.read(tensor, first, [lines[i] for i in run]):
                raise StoreError(f"{self._told(rows[run[-1]])}: the file ends within {tensor}, row {places[run[-1]]}")
        for row, place, line, wanted in zip(rows, places, lines, checksums.tolist(), strict=True):
            if xxh3_64_intdigest(line) != wanted:
                raise StoreError(f"{self._told(row)}: {tensor}, row {place}, does not have its checksum")
        return out

    def _told(self, row: int) -> str:
        """Where a sample lies, for messages."""
        stem = _stem(self._unit_keys(np.array([row]))[0])
        return f"{self.source} is damaged: unit {stem}, sample {self.ids()[int(row)].as_py()}"

    def _unit_keys(self, rows: np.ndarray) -> np.ndarray:
        """One number for each sample's shard and part."""
        return (self._hot["shard"][rows].astype(np.int64) << 32) | self._hot["part"][rows]

    def _unit(self, stem: str, group: str) -> "Unit":
        """A unit's file, opened in this process; the longest unused one is closed. StoreError if it cannot be."""
        name = f"units/{stem}{group}.safetensors"
        try:
            unit = self._open.pop(name, None) or Unit(self._local(name))
        except (FileNotFoundError, ValueError) as error:
            raise StoreError(str(error)) from None
        self._open[name] = unit
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return unit

    @cached_property
    def _open(self) -> "OrderedDict[str, Unit]":
        return OrderedDict()

    @cached_property
    def _table(self) -> pa.Table:
        """The index, mapped into memory."""
        file = self.folder / "index.arrow"
        try:
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            table.validate()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StoreError(f"{file} is damaged: {' '.join(str(error).split())}") from None
        if not table.schema.equals(SCHEMA):
            raise ValueError(f"{file} is no index of a store that this version reads")
        return table

    @cached_property
    def _hot(self) -> dict[str, np.ndarray]:
        """The index's columns of plain numbers; views of the file where it is one batch."""
        names = [field.name for field in SCHEMA if pa.types.is_integer(field.type)]
        return {name: _joined(self._table[name]).to_numpy() for name in names}

    @cached_property
    def _lists(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Likewise those of one number per caption: where each sample's begin (samples + 1), and all of them."""
        columns = {name: _joined(self._table[name]) for name in LISTS}
        return {name: (column.offsets.to_numpy(), column.values.to_numpy()) for name, column in columns.items()}

    def _stage(self, cache: Path | None) -> Path:
        """Fetches what a remote store begins with, and tells where its files are kept."""
        plan = self._fetch("store.json")
        try:
            report = self._fetch("report.json")
            wanted = json.loads(report)["index"]
        except FileNotFoundError:
            raise ValueError(f"the store {self.source} is not finished: go on with encode.py") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.source} is damaged: its report.json does not tell the index's checksum") from None
        name = sha256(f"{self._url}\n{wanted}\n".encode() + plan).hexdigest()[:16]
        folder = (cache or Path.home() / ".cache/mmdit/stores") / name
        (folder / "units").mkdir(parents=True, exist_ok=True)
        commit(folder / "store.json", lambda file: file.write(plan))
        commit(folder / "report.json", lambda file: file.write(report))
        self.folder = folder
        index = folder / "index.arrow"
        if index.is_file() and file_checksum(index) != wanted:  # damaged here
            index.unlink(missing_ok=True)
        if file_checksum(self._local("index.arrow")) != wanted:
            raise ValueError(f"{self.source}/index.arrow does not have the checksum in its report")
        with suppress(FileNotFoundError):  # a store without text
            self._local("null.safetensors")
        return folder

    def _local(self, name: str) -> Path:
        """A file of the store on this machine, fetched if need be; several processes may do so at once."""
        file = self.folder / name
        if self._url and not file.is_file():
            with self._remote(name) as source:
                commit(file, lambda out: shutil.copyfileobj(source, out, 2**24))
        return file

    def _fetch(self, name: str) -> bytes:
        with self._remote(name) as source:
            return source.read()

    def _remote(self, name: str) -> Any:
        """An open file of a remote store. The file system is asked for anew, since some do not survive a fork."""
        try:
            system, root = fsspec.core.url_to_fs(self._url)
            return system.open(f"{root}/{name}", "rb")
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no {self._url}/{name}") from None
        except (ImportError, ValueError) as error:
            raise ValueError(f"{self._url} cannot be read: {' '.join(str(error).split())}") from None


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece, which is a view of the file where it is one batch."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Room for what is read; in a loader's worker, the shared memory in which it goes to the trainer, for otherwise all
    of it would be copied there."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.bfloat16)
    storage = torch.UntypedStorage._new_shared(2 * math.prod(shape))  # as in torch's default_collate
    return torch.empty(0, dtype=torch.bfloat16).set_(storage).view(shape)


def _stem(key: int) -> str:
    """The name of a unit, from `Store._unit_keys`."""
    return unit_name(int(key) >> 32, int(key) & 0xFFFFFFFF)
