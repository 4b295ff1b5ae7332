"""Checkpoints on disk: everything that a run needs to resume, written atomically, sharded or in one file.

A checkpoint is a folder of one or more parts. A part is a safetensors file with rows of the run's tensors and, written
after it, a JSON file of the same name, its mark: size and hash of the file, the rows in it, and a hash of the mark. A
checkpoint is complete once all its marks exist. Any number of processes may read it, however they shard the tensors.
"""

import re
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from engine.strategy import local, whole
from storage.files import commit_json, file_checksum, json_checksum, replace_folder, sync
from storage.text import read_json
from storage.weights import mismatch, write_tensors

KEPT = 2  # complete checkpoints, so that one is left if the newest is damaged
FORMAT = 1
STEP = re.compile("step-([0-9]{7}|[1-9][0-9]{7,})")
MARK = re.compile("part-[0-9]{5}-of-([0-9]{5})")
T = TypeVar("T")


class CheckpointError(ValueError):
    """No checkpoint can be used; the message says why, in one line."""


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
    """A complete checkpoint: all its marks exist."""

    folder: Path
    step: int
    numbers: dict[str, Any]  # everything that is not a tensor
    parts: list[Part]

    def intact(self, part: Part) -> bool:
        """Whether a part has the size and hash that its mark states."""
        try:
            return part.file.stat().st_size == part.bytes and file_checksum(part.file) == part.hash
        except OSError:  # it is missing, or cannot be read
            return False

    def compare(
        self,
        shapes: Mapping[str, Sequence[int]],
        prefix: str | tuple[str, ...] = "",
        ignored: Collection[str] = (),
    ) -> None:
        """Checks that the checkpoint holds these tensors and no others.

        Args:
            shapes: name → shape.
            prefix: compares only tensors whose names start with it, or with one of several.
            ignored: names of tensors that it may hold, too.

        Raises:
            CheckpointError: in one line, naming what differs.
        """
        rows = [(name, rows) for part in self.parts for name, rows in part.rows.items()]
        found = {name: held.shape for name, held in rows if name.startswith(prefix) and name not in ignored}
        if fault := mismatch(found, shapes):
            raise CheckpointError(
                f"{self.folder} is a checkpoint of another network or training: {fault}; use its config, or another "
                "run.folder"
            )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the checkpoint's values into tensors of the same names; of a sharded one, the rows of this process."""
        with ExitStack() as stack, torch.no_grad():
            files = [(part, stack.enter_context(safe_open(part.file, framework="pt"))) for part in self.parts]
            for name, tensor in tensors.items():
                mine, target = rows_of(tensor), local(tensor)
                for stored, file in ((part.rows[name], file) for part, file in files if name in part.rows):
                    first = max(mine.first, stored.first)
                    last = min(mine.first + mine.held, stored.first + stored.held)
                    if tensor.ndim == 0:
                        target.copy_(file.get_tensor(name))
                    elif first < last:
                        rows = file.get_slice(name)[first - stored.first : last - stored.first]
                        target[first - mine.first : last - mine.first].copy_(rows)


def rows_of(tensor: Tensor) -> Rows:
    """The rows that this process holds. FSDP2 splits like `torch.chunk`: the last processes may hold fewer."""
    total = tensor.shape[0] if tensor.ndim else 1
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                assert placement.dim == 0, "`Strategy.shard` splits along rows"
                size = -(-total // tensor.device_mesh.size(dimension))
                first = min(tensor.device_mesh.get_local_rank(dimension) * size, total)
                return Rows(first, min(size, total - first), list(tensor.shape))
    return Rows(0, total, list(tensor.shape))


def is_writer(tensor: Tensor) -> bool:
    """Whether this process, of all that hold these rows, writes them into a sharded checkpoint."""
    if not isinstance(tensor, DTensor):
        return rank() == 0
    copies = [i for i, placement in enumerate(tensor.placements) if not isinstance(placement, Shard)]
    return all(tensor.device_mesh.get_local_rank(i) == 0 for i in copies)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Checkpoints:
    """The checkpoints of a run, `folder/step-0001000` and so on; the newest KEPT are kept.

    `save` returns once the tensors are copied to host memory; a thread writes them to disk. An error while writing is
    raised by the next `save` or `wait`.

    Args:
        folder: of all checkpoints.
        sharded: every process writes what it holds; else the first process gathers and writes everything.
    """

    def __init__(self, folder: Path, sharded: bool = False) -> None:
        self.folder, self.sharded = folder, sharded
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint. All processes must call it, after `remove_after` has removed an incomplete one.

        Args:
            step: names the checkpoint.
            tensors: may be sharded among the processes along their rows.
            numbers: everything else, as JSON.

        Raises:
            OSError: the previous checkpoint could not be written; older ones are kept.
        """
        self.wait()
        folder, divided = self._folder(step), self.sharded and world() > 1
        kept: dict[str, tuple[Rows, Tensor]] = {}
        for name, tensor in tensors.items():
            if divided:
                mine = rows_of(tensor)
                if is_writer(tensor) and mine.held:
                    kept[name] = mine, local(tensor).to("cpu", copy=True)
            else:
                full = whole(tensor)
                if rank() == 0:
                    kept[name] = rows_of(full), full.to("cpu", copy=True)
        if divided or rank() == 0:
            number, parts = (rank(), world()) if divided else (0, 1)
            self.writing = self.writer.submit(self._write, folder, step, number, parts, kept, dict(numbers))

    def wait(self) -> None:
        """Waits until the last checkpoint is written. OSError if it could not be written."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _write(
        self,
        folder: Path,
        step: int,
        number: int,
        parts: int,
        kept: dict[str, tuple[Rows, Tensor]],
        numbers: dict[str, Any],
    ) -> None:
        file = folder / f"part-{number:05d}-of-{parts:05d}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors({name: tensor for name, (_, tensor) in kept.items()}, file)
        mark = {
            "format": FORMAT, "step": step, "numbers": numbers,
            "bytes": file.stat().st_size, "hash": file_checksum(file),
            "rows": {name: rows for name, (rows, _) in kept.items()},
        }  # fmt: skip
        commit_json(file.with_suffix(".json"), {"mark": mark, "hash": json_checksum(mark)})
        sync(self.folder)
        if number == 0:
            self._prune()

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints after a step: after the step of `find`, these are damaged or incomplete."""
        if rank() == 0:
            for later in self.steps():
                if later > step:
                    shutil.rmtree(self._folder(later), ignore_errors=True)

    def adopt(self, other: Checkpoint) -> None:
        """Copies a checkpoint of another run. OSError if it cannot be written."""

        def fill(folder: Path) -> None:
            for file in other.folder.iterdir():
                shutil.copyfile(file, folder / file.name)

        self.folder.mkdir(parents=True, exist_ok=True)
        replace_folder(self._folder(other.step), fill)

    def at(self, step: int) -> Checkpoint | None:
        """The complete checkpoint of a step, by its marks."""
        return read_checkpoint(self._folder(step))

    def _prune(self) -> None:
        """Removes everything older than the newest KEPT complete checkpoints."""
        steps = self.steps()
        complete = [step for step in steps if read_checkpoint(self._folder(step)) is not None]
        for step in steps if len(complete) >= KEPT else []:
            if step < complete[KEPT - 1]:
                shutil.rmtree(self._folder(step), ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest first, complete or not."""
        found = (STEP.fullmatch(path.name) for path in self.folder.glob("step-*") if path.is_dir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, by its marks; its tensors are not read."""
        return next((found for step in self.steps() if (found := read_checkpoint(self._folder(step)))), None)

    def find(self) -> Checkpoint | None:
        """The newest complete and undamaged checkpoint; None before the first save. Warns of each that it skips.

        All processes must call it: each reads some of the parts.

        Raises:
            CheckpointError: all checkpoints are damaged, or not all processes see them.
        """
        damaged = False
        for step in from_first(self.steps()):
            found = read_checkpoint(self._folder(step))
            seen = gather(found is not None)
            if any(seen) and not all(seen):
                raise CheckpointError(f"{self.folder} must be on a file system that all machines share")
            if found and all(gather(all(found.intact(part) for part in found.parts[rank() :: world()]))):
                return found
            complete = bool(complete_marks(self._folder(step)))
            damaged = damaged or complete
            if rank() == 0:
                fault = "damaged" if complete else "incomplete"
                warnings.warn(f"{self._folder(step)} is {fault}; the one before it is used", stacklevel=2)
        if damaged:
            raise CheckpointError(f"all checkpoints in {self.folder} are damaged; remove it to start again")
        return None


def from_first(value: T) -> T:
    """The first process's value, on all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(here: bool) -> list[bool]:
    """The values of all processes, in the order of their ranks."""
    answers = [here] * world()
    if dist.is_initialized():
        dist.all_gather_object(answers, here)
    return answers


def complete_marks(folder: Path) -> list[list[Path]]:
    """The marks of all parts, for each number of parts of which none is missing."""
    names = {file.stem: MARK.fullmatch(file.stem) for file in folder.glob("part-*.json")}
    worlds = sorted({match[1] for match in names.values() if match})
    stems = [[f"part-{number:05d}-of-{world}" for number in range(int(world))] for world in worlds]
    return [[folder / f"{stem}.json" for stem in every] for every in stems if every and names.keys() >= set(every)]


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder, by its marks; None if one is missing or unreadable."""
    for files in complete_marks(folder):
        try:
            contents = [read_json(file) for file in files]
            marks = [content["mark"] for content in contents]
            if all(c["hash"] == json_checksum(c["mark"]) and c["mark"]["format"] == FORMAT for c in contents):
                rows = [{name: Rows(*numbers) for name, numbers in mark["rows"].items()} for mark in marks]
                found = [
                    Part(file.with_suffix(".safetensors"), mark["bytes"], mark["hash"], held)
                    for file, mark, held in zip(files, marks, rows, strict=True)
                ]
                return Checkpoint(folder, marks[0]["step"], marks[0]["numbers"], found)
        except (ValueError, KeyError, TypeError, OSError):  # damaged, or just removed
            continue
    return None
