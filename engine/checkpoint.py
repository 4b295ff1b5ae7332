"""Checkpoints on disk: everything that a run needs to go on, written whole or not at all, divided or in one piece.

A checkpoint is a folder of one or more parts. Each is a safetensors file with rows of the run's tensors, and a mark of
the same name that is written after it: its size and hash, which rows of what it holds, and a hash of all that. A
checkpoint is there once all its marks are. Any number of processes may read it, however they divide the tensors.
"""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from engine.strategy import local, whole
from storage.files import commit_json, file_checksum, sync
from storage.weights import misfit, read_json, write_tensors

KEPT = 2  # whole checkpoints, so that there is one before the newest
FORMAT = 1
T = TypeVar("T")


class CheckpointError(ValueError):
    """Checkpoints that cannot be used: in one line, what is wrong with them."""


class Rows(NamedTuple):
    """Which rows of a tensor a process holds."""

    first: int
    held: int
    shape: list[int]  # of the whole tensor


class Part(NamedTuple):
    """A file of a checkpoint."""

    file: Path
    bytes: int
    hash: str
    rows: dict[str, Rows]


class Checkpoint(NamedTuple):
    """A checkpoint that is whole: all its marks are there."""

    folder: Path
    step: int
    numbers: dict[str, Any]  # what is no tensor
    parts: list[Part]

    def intact(self, part: Part) -> bool:
        """Whether a part has the size and hash that its mark tells."""
        return part.file.is_file() and part.file.stat().st_size == part.bytes and file_checksum(part.file) == part.hash

    def compare(self, shapes: Mapping[str, Sequence[int]], under: str = "") -> None:
        """Checks that the checkpoint holds these tensors and no others.

        Args:
            shapes: of each by its name.
            under: only those are looked at whose names start so.

        Raises:
            CheckpointError: in one line, naming what differs.
        """
        rows = [(name, rows) for part in self.parts for name, rows in part.rows.items()]
        found = {name: held.shape for name, held in rows if name.startswith(under)}
        if told := misfit(found, shapes):
            raise CheckpointError(f"{self.folder} is a checkpoint of another network or training: {told}")

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies into tensors what the checkpoint holds under their names; of divided ones, what this process has."""
        with ExitStack() as stack, torch.no_grad():
            files = [(part, stack.enter_context(safe_open(part.file, framework="pt"))) for part in self.parts]
            for name, tensor in tensors.items():
                mine, target = rows_of(tensor), local(tensor)
                for there, file in ((part.rows[name], file) for part, file in files if name in part.rows):
                    first = max(mine.first, there.first)
                    last = min(mine.first + mine.held, there.first + there.held)
                    if tensor.ndim == 0:
                        target.copy_(file.get_tensor(name))
                    elif first < last:
                        rows = file.get_slice(name)[first - there.first : last - there.first]
                        target[first - mine.first : last - mine.first].copy_(rows)


def rows_of(tensor: Tensor) -> Rows:
    """The rows that this process holds. FSDP2 divides as `torch.chunk` does: the last processes may hold fewer."""
    total = tensor.shape[0] if tensor.ndim else 1
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                assert placement.dim == 0, "`Strategy.shard` divides along rows"
                size = -(-total // tensor.device_mesh.size(dimension))
                first = min(tensor.device_mesh.get_local_rank(dimension) * size, total)
                return Rows(first, min(size, total - first), list(tensor.shape))
    return Rows(0, total, list(tensor.shape))


def writes(tensor: Tensor) -> bool:
    """Whether this process is the one, of all that hold these rows, that writes them into a divided checkpoint."""
    if not isinstance(tensor, DTensor):
        return rank() == 0
    copies = [i for i, placement in enumerate(tensor.placements) if not isinstance(placement, Shard)]
    return all(tensor.device_mesh.get_local_rank(i) == 0 for i in copies)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def signed(mark: Mapping[str, Any]) -> str:
    """xxh3 of a mark's content."""
    return xxhash.xxh3_64_hexdigest(json.dumps(mark, sort_keys=True).encode())


class Checkpoints:
    """The checkpoints of a run: `folder/step-0001000` and so on, of which the newest KEPT stay.

    A save returns when the numbers are copied to this machine's memory; they are written meanwhile. A fault while
    writing is raised by the next `save` or by `wait`.

    Args:
        folder: of them all.
        sharded: every process writes what it holds; else the first process gathers and writes everything.
    """

    def __init__(self, folder: Path, sharded: bool = False) -> None:
        self.folder, self.sharded = folder, sharded
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint. All processes must call it. Left-overs of the step must be gone (`forget`).

        Args:
            step: names it.
            tensors: any of which may be divided among the processes along its rows.
            numbers: what else to keep, as JSON has it.

        Raises:
            OSError: if the previous one could not be written; those before it stay.
        """
        self.wait()
        place, divided = self._place(step), self.sharded and world() > 1
        kept: dict[str, tuple[Rows, Tensor]] = {}
        for name, tensor in tensors.items():
            if divided:
                mine = rows_of(tensor)
                if writes(tensor) and mine.held:
                    kept[name] = mine, local(tensor).to("cpu", copy=True)
            else:
                full = whole(tensor)
                if rank() == 0:
                    kept[name] = rows_of(full), full.to("cpu", copy=True)
        if divided or rank() == 0:
            number, parts = (rank(), world()) if divided else (0, 1)
            self.writing = self.writer.submit(self._write, place, step, number, parts, kept, dict(numbers))

    def wait(self) -> None:
        """Waits until the last checkpoint is written. OSError if it could not be."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _write(
        self,
        place: Path,
        step: int,
        number: int,
        parts: int,
        kept: dict[str, tuple[Rows, Tensor]],
        numbers: dict[str, Any],
    ) -> None:
        file = place / f"part-{number:05d}-of-{parts:05d}.safetensors"
        place.mkdir(parents=True, exist_ok=True)
        write_tensors({name: tensor for name, (_, tensor) in kept.items()}, file)
        mark = {
            "format": FORMAT, "step": step, "numbers": numbers,
            "bytes": file.stat().st_size, "hash": file_checksum(file),
            "rows": {name: rows for name, (rows, _) in kept.items()},
        }  # fmt: skip
        commit_json(file.with_suffix(".json"), {"mark": mark, "hash": signed(mark)})
        sync(self.folder)
        if number == 0:
            self._prune()

    def forget(self, step: int) -> None:
        """Removes those after a step, which are damaged or not whole if it is that of the one found."""
        if rank() == 0:
            for later in self._steps():
                if later > step:
                    shutil.rmtree(self._place(later), ignore_errors=True)

    def _prune(self) -> None:
        """Removes what is older than the newest KEPT that are whole."""
        steps = self._steps()
        whole_ones = [step for step in steps if opened(self._place(step)) is not None]
        for step in steps if len(whole_ones) >= KEPT else []:
            if step < whole_ones[KEPT - 1]:
                shutil.rmtree(self._place(step), ignore_errors=True)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def _steps(self) -> list[int]:
        """The newest first, whole or not."""
        names = (place.name.removeprefix("step-") for place in self.folder.glob("step-*") if place.is_dir())
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest that is whole by its marks; its tensors are not read."""
        return next((found for step in self._steps() if (found := opened(self._place(step)))), None)

    def find(self) -> Checkpoint | None:
        """The newest that is whole and undamaged, with a warning for each that is damaged; none before the first save.

        All processes must call it: each reads some of the parts.

        Raises:
            CheckpointError: if there are checkpoints, but all are damaged.
        """
        damaged = False
        for step in first_says(self._steps()):
            found = opened(self._place(step))
            seen = everyone(found is not None)
            if any(seen) and not all(seen):
                raise CheckpointError(f"{self.folder} must be on a file system that all machines share")
            if found and all(everyone(all(found.intact(part) for part in found.parts[rank() :: world()]))):
                return found
            damaged = damaged or found is not None
            if rank() == 0:
                fault = "damaged" if found else "not whole"
                warnings.warn(f"{self._place(step)} is {fault}; the one before it is used", stacklevel=2)
        if damaged:
            raise CheckpointError(f"all checkpoints in {self.folder} are damaged; remove it to begin anew")
        return None


def first_says(value: T) -> T:
    """The first process's value, in all of them."""
    said = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(said, src=0)
    return said[0]


def everyone(here: bool) -> list[bool]:
    """What holds in each process."""
    answers = [here] * world()
    if dist.is_initialized():
        dist.all_gather_object(answers, here)
    return answers


def opened(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder by its marks; none if one is missing or unreadable."""
    worlds = {file.stem.rpartition("-")[2] for file in folder.glob("part-*-of-*.json")}
    for parts in sorted(worlds):
        files = [folder / f"part-{number:05d}-of-{parts}.json" for number in range(int(parts))]
        try:
            told = [read_json(file) for file in files]
            marks = [one["mark"] for one in told]
            if all(one["hash"] == signed(one["mark"]) and one["mark"]["format"] == FORMAT for one in told):
                rows = [{name: Rows(*numbers) for name, numbers in mark["rows"].items()} for mark in marks]
                found = [
                    Part(file.with_suffix(".safetensors"), mark["bytes"], mark["hash"], held)
                    for file, mark, held in zip(files, marks, rows, strict=True)
                ]
                return Checkpoint(folder, marks[0]["step"], marks[0]["numbers"], found)
        except (ValueError, KeyError, TypeError, FileNotFoundError):  # not written yet, or cut short
            continue
    return None
