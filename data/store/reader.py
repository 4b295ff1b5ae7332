"""The latent store: pictures and captions encoded once, on disk, to train from.

    store.json                        the plan: everything that the content depends on
    null.safetensors                  the null condition: tokens (N, D) and pooled (P)
    units/SSSSSS-PPPP.safetensors     part PPPP of shard SSSSSS: latents.<bucket> (n, C, h, w) and pooled (captions, P)
    units/SSSSSS-PPPP.tokens.safetensors    tokens (captions, N, D), in their own file: ten times the latents' size
    units/SSSSSS-PPPP.parquet         the unit's samples and dropped inputs; written last: it commits the unit
    index.arrow, report.json          all samples, and their counts; written once every shard is finished

All tensors are bfloat16. Files are written atomically and hold no times or names of machines: a store that was killed
and resumed equals that of a straight run, byte for byte. Any flipped bit is found: the index has a checksum of every
sample's bytes, the report the hashes of index, plan, null condition and itself, and a sidecar its own (`storage.seal`).
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
from data.store.writer import NULL, Drop, Sample, Writer
from storage.files import commit, file_checksum, json_checksum
from storage.text import parse_json, read_json
from storage.weights import open_file

if TYPE_CHECKING:  # transformers is slow to import and not needed to look into a store
    from data.text.encoder import Text

__all__ = ["Drop", "Sample", "Store", "StoreError", "Writer"]
VERSION = 1  # of the plan
MASKS = "masks"  # in the plan of a store whose latents have masks of the loss as their last channel
LAZY = ("null", "_table", "_columns", "_lists", "_open")  # made again in each process
OPEN_FILES = 128
BLOCK = 32  # samples or captions in one read of `verify`
REBUILD = "remove index.arrow and report.json, and run encode.py again"
CURES = {
    "store.json": "restore it from a copy, or run encode.py into a new folder",
    NULL: "remove it, index.arrow and report.json, and run encode.py again",
}
REPORTED = {"inputs": int, "kept": int, "dropped": dict, "buckets": dict, "captions": int, "index": str}


class StoreError(ValueError):
    """A store is damaged; the message names the file, unit or sample."""


class Store:
    """Reads a finished store. It can be pickled and used in forked or spawned loader processes.

    To open it reads the whole index once, which is then in the page cache for all processes of the machine. Forked and
    pickled copies do not read it again.

    Args:
        path: its folder, or a URL that fsspec knows ("s3://…"): the index is fetched at once, the files of each unit
            when they are first read.
        cache: folder for fetched files; default: `~/.cache/mmdit/stores/`. Each state of each store has its own
            subfolder, so that a store with another index is fetched again.

    Attributes:
        plan: what it was encoded with.
        report: as `Writer.finish` returned it.
        buckets: height and width of each bucket, in pixels.
        null: the null condition, tokens (N, D) and pooled (P); None if the store holds no text.
        has_pooled: whether it has pooled vectors.
        has_tokens: whether it has tokens.
        has_masks: whether it has masks of the loss.

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
        self.has_masks = MASKS in self.plan
        if not all((self.folder / name).is_file() for name in ("index.arrow", "report.json")):
            raise ValueError(f"the store {self.source} is not finished: run encode.py again")
        self.report = read_json(self.folder / "report.json")
        if absent := [name for name, kind in REPORTED.items() if not isinstance(self.report.get(name), kind)]:
            raise ValueError(f"{self.source} is damaged: its report.json lacks {', '.join(absent)}; {REBUILD}")
        self._check()
        self._shapes = latent_shapes(self.plan, f"{self.source}/store.json")
        self.buckets: tuple[tuple[int, int], ...] = tuple((h, w) for h, w in self.plan["buckets"]["sizes"])
        size = self._columns["row"].size
        if size != self.report["kept"]:
            kept = self.report["kept"]
            raise ValueError(f"{self.source} is damaged: its index has {size} samples, its report {kept}; {REBUILD}")
        self.has_pooled, self.has_tokens = (len(self._lists[name][1]) > 0 for name in LISTS[1:])
        null = self.folder / NULL
        if self.has_pooled and not null.is_file():
            raise FileNotFoundError(f"{self.source} is damaged: its {NULL} is missing; run encode.py again")
        tensors = open_file(null) if null.is_file() else {}
        self._caption_shapes = {name: tuple(tensors[name].shape) for name in tensors}
        if {name: len(shape) for name, shape in self._caption_shapes.items()} not in ({}, {"tokens": 2, "pooled": 1}):
            raise ValueError(f"{null} holds no tokens (N, D) and pooled (P): remove it and run encode.py again")

    def _check(self) -> None:
        """Compares report, index, plan and null condition with their hashes; ValueError if one differs.

        Copies of the object, as in loader processes, are not checked again. Stores of earlier versions have only the
        hash of the index.
        """
        rest = {name: value for name, value in self.report.items() if name != "hash"}
        if self.report.keys() & {"files", "hash"} and self.report.get("hash") != json_checksum(rest):
            raise StoreError(f"{self.source} is damaged: its report.json was changed; {REBUILD}")
        for name in ("index.arrow", "store.json", NULL):
            if fault := self._fault(name):
                if self._url:
                    (self.folder / name).unlink(missing_ok=True)  # the next start fetches it again
                raise StoreError(fault)

    def _fault(self, name: str) -> str:
        """Why a file does not have the hash in the report, in one line; empty if it has."""
        expected = {"index.arrow": self.report["index"], **self.report.get("files", {})}.get(name)
        try:
            if expected is None or file_checksum(self._local(name)) == expected:
                return ""
            state = "does not have the hash in its report"
        except FileNotFoundError:
            state = "is missing"
        return f"{self.source} is damaged: its {name} {state}; {CURES.get(name, REBUILD)}"

    def __len__(self) -> int:
        return self._columns["row"].size

    def __getstate__(self) -> dict[str, Any]:
        """Without open files and the index, which are opened again when needed."""
        return {name: value for name, value in self.__dict__.items() if name not in LAZY}

    def members(self, bucket: int) -> np.ndarray:
        """The numbers of the samples in a bucket, ascending."""
        return np.flatnonzero(self._columns["bucket"] == bucket)

    def latents(self, rows: np.ndarray) -> Tensor:
        """Latents of samples of one bucket: (n, C, h, w) bfloat16. Errors as `latents_and_masks`."""
        return self.latents_and_masks(rows)[0]

    def latents_and_masks(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Latents of samples of one bucket, (n, C, h, w), and masks of the loss, (n, 1, h, w), in bfloat16.

        The masks of a store that has none are 1.

        Raises:
            StoreError: naming the file, or the unit, row and sample, that is missing or damaged.
            ValueError: the samples are of several buckets, or there are none.
            IndexError: there is no such sample.
        """
        rows = self._rows(rows)
        buckets = np.unique(self._columns["bucket"][rows])
        if len(buckets) != 1:
            raise ValueError(f"latents are read from one bucket at once, got samples of {len(buckets)}")
        bucket = int(buckets[0])
        places, checksums = self._columns["row"][rows], self._columns["checksum"][rows]
        found = self._read("", f"latents.{bucket}", rows, places, checksums, self._shapes[bucket])
        return (found[:, :-1], found[:, -1:]) if self.has_masks else (found, found.new_ones(()).expand_as(found[:, :1]))

    def pooled(self, rows: np.ndarray, choice: np.ndarray) -> Tensor:
        """The pooled vector of each sample's caption number `choice`: (n, P) bfloat16. Errors as `text`."""
        if not self.has_pooled:
            raise ValueError(f"the store {self.source} holds no encoded text")
        return self._read_captions("", "pooled", rows, choice)

    def text(self, rows: np.ndarray, choice: np.ndarray) -> "Text":
        """Each sample's caption number `choice`, encoded: tokens (n, N, D) and pooled (n, P), bfloat16.

        Raises:
            StoreError: as `latents`.
            ValueError: the store holds no tokens.
            IndexError: there is no such sample or caption.
        """
        from data.text.encoder import Text

        return Text(self._tokens(rows, choice), self.pooled(rows, choice))

    def captions(self, row: int) -> list[str]:
        """A sample's captions."""
        return self._table["captions"][int(self._rows(np.array([row]))[0])].as_py()

    def weights(self, row: int) -> list[float]:
        """The weights of a sample's captions, > 0."""
        offsets, weights = self._lists["weights"]
        (row,) = self._rows(np.array([row]))
        return weights[offsets[row] : offsets[row + 1]].tolist()

    def ids(self) -> pa.ChunkedArray:
        """The ids of all samples; `ids()[i].as_py()` is that of sample i."""
        return self._table["id"]

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Height and width of the original pictures, top and left of the crops, in pixels: (n, 4)."""
        rows = self._rows(rows)
        return np.stack([self._columns[name][rows] for name in ("height", "width", "top", "left")], axis=1)

    @cached_property
    def null(self) -> "Text | None":
        from data.text.encoder import Text

        if not self._caption_shapes:
            return None
        tensors = open_file(self.folder / NULL)
        return Text(tensors["tokens"].clone(), tensors["pooled"].clone())

    def size(self) -> int:
        """Bytes of all files of the store."""
        system, root = fsspec.core.url_to_fs(self._url or str(self.folder))
        return system.du(root)

    def expect(self, **sections: Any) -> None:
        """Checks sections of the store's plan, as in `expect(codec=…)`.

        Raises:
            ValueError: a section differs; names each field that does.
        """
        here = json.loads(json.dumps(sections))
        if found := differences({name: self.plan.get(name) for name in here}, here):
            fields = "; ".join(f"{path}: there {there}, here {now}" for path, there, now in found)
            raise ValueError(f"the store {self.source} was encoded otherwise: {fields}")

    def verify(self, progress: bool = True) -> list[str]:
        """Reads everything and checks every checksum, every shape, and that latents are finite.

        To repair a unit, remove its sidecar (.parquet) and run encode.py: it makes this unit and all later parts of the
        shard again.

        Returns:
            The faults, one line each.
        """
        faults = [fault for name in ("index.arrow", *self.report.get("files", ())) if (fault := self._fault(name))]
        bounds = [0, *(np.flatnonzero(np.diff(self._unit_keys(np.arange(len(self))))) + 1), len(self)]
        with tqdm(total=len(self), desc="verifying", unit="sample", disable=not progress) as bar:
            for start, end in pairwise(bounds):
                if start < end:
                    faults += self._unit_faults(np.arange(start, end))
                    bar.update(end - start)
        return list(dict.fromkeys(faults))

    def _unit_faults(self, rows: np.ndarray) -> Iterator[str]:
        """The faults of one unit's samples, a line each."""
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
        buckets = self._columns["bucket"][rows]
        groups: dict[str, list[tuple[Callable[..., Any], tuple[np.ndarray, ...]]]] = {
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
                    except ValueError:  # find out which
                        for i in range(len(block[0])):
                            try:
                                read(*(argument[i : i + 1] for argument in block))
                            except ValueError as error:
                                yield str(error)

    def _finite_latents(self, rows: np.ndarray) -> None:
        if not all(part.isfinite().all() for part in self.latents_and_masks(rows)):
            raise ValueError(f"{self._where(rows[0])}: its latents are not finite")

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """The rows as an array; IndexError unless they are numbers of samples."""
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
        places = self._columns["text_row"][rows] + choice
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
        """Rows `places` of a tensor in each sample's unit, read in the order on disk, neighbours in one read."""
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
                    f"{self._where(rows[run[-1]])}: the file's {tensor} lacks row {places[run[-1]]} of {shape}"
                )
            if not unit.read(tensor, first, [lines[i] for i in run]):
                raise StoreError(f"{self._where(rows[run[-1]])}: the file ends within {tensor}, row {places[run[-1]]}")
        for row, place, line, expected in zip(rows, places, lines, checksums.tolist(), strict=True):
            if xxh3_64_intdigest(line) != expected:
                raise StoreError(f"{self._where(row)}: {tensor}, row {place}, does not have its checksum")
        return out

    def _where(self, row: int) -> str:
        """The location of a damaged sample, for messages."""
        stem = _stem(self._unit_keys(np.array([row]))[0])
        return f"{self.source} is damaged: unit {stem}, sample {self.ids()[int(row)].as_py()}"

    def _unit_keys(self, rows: np.ndarray) -> np.ndarray:
        """The shard and part of each sample as one number."""
        return (self._columns["shard"][rows].astype(np.int64) << 32) | self._columns["part"][rows]

    def _unit(self, stem: str, group: str) -> "Unit":
        """A unit's open file, of which the least recently used are closed. StoreError if it cannot be opened."""
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
            raise ValueError(f"{file} is no index of a store that this version reads: {REBUILD}")
        return table

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """The index's integer columns; views of the file if it is one batch."""
        names = [field.name for field in SCHEMA if pa.types.is_integer(field.type)]
        return {name: _joined(self._table[name]).to_numpy() for name in names}

    @cached_property
    def _lists(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The index's columns with a number per caption: the start of each sample (samples + 1), and all numbers."""
        columns = {name: _joined(self._table[name]) for name in LISTS}
        return {name: (column.offsets.to_numpy(), column.values.to_numpy()) for name, column in columns.items()}

    def _stage(self, cache: Path | None) -> Path:
        """Fetches plan, report and index of a remote store; returns the folder for its files."""
        plan = self._fetch("store.json")
        try:
            report = self._fetch("report.json")
            expected = parse_json(report, "report.json")["index"]
        except FileNotFoundError:
            raise ValueError(f"the store {self.source} is not finished: run encode.py again") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.source} is damaged: its report.json lacks index; {REBUILD}") from None
        name = sha256(f"{self._url}\n{expected}\n".encode() + plan).hexdigest()[:16]
        folder = (cache or Path.home() / ".cache/mmdit/stores") / name
        (folder / "units").mkdir(parents=True, exist_ok=True)
        commit(folder / "store.json", lambda file: file.write(plan))
        commit(folder / "report.json", lambda file: file.write(report))
        self.folder = folder
        for name in ("index.arrow", NULL):
            with suppress(FileNotFoundError):  # a store without text has no null condition
                self._local(name)
        return folder

    def _local(self, name: str) -> Path:
        """A file of the store on this machine, fetched if necessary; several processes may fetch it at once."""
        file = self.folder / name
        if self._url and not file.is_file():
            with self._remote(name) as source:
                commit(file, lambda out: shutil.copyfileobj(source, out, 2**24))
        return file

    def _fetch(self, name: str) -> bytes:
        with self._remote(name) as source:
            return source.read()

    def _remote(self, name: str) -> Any:
        """An open file of a remote store. The file system is made anew, since some do not survive a fork."""
        try:
            system, root = fsspec.core.url_to_fs(self._url)
            return system.open(f"{root}/{name}", "rb")
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no {self._url}/{name}") from None
        except (ImportError, ValueError) as error:
            raise ValueError(f"{self._url} cannot be read: {' '.join(str(error).split())}") from None


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; a view of the file if it is one batch."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _empty(shape: tuple[int, ...]) -> Tensor:
    """An empty bfloat16 tensor; in a loader's worker it is in shared memory, so that the trainer gets no copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.bfloat16)
    storage = torch.UntypedStorage._new_shared(2 * math.prod(shape))  # as in torch's default_collate
    return torch.empty(0, dtype=torch.bfloat16).set_(storage).view(shape)


def _stem(key: int) -> str:
    """The name of a unit, from a number of `Store._unit_keys`."""
    return unit_name(int(key) >> 32, int(key) & 0xFFFFFFFF)
