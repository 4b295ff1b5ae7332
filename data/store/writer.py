"""Writes a latent store (`data.store.reader`): unit by unit, then the index of all units."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from data.store.units import (
    LISTS,
    SCHEMA,
    Unit,
    bfloat16,
    checksum,
    differences,
    first_of,
    latent_shapes,
    near_duplicates,
    read_notes,
    read_sidecar,
    safetensors,
    unit_name,
)
from storage.files import commit, commit_json, commit_path, file_checksum, hold, is_ours, json_checksum, sweep
from storage.seal import BLANK, check_seal, seal
from storage.text import read_json
from storage.weights import write_tensors

if TYPE_CHECKING:  # transformers is slow to import
    from data.text.encoder import Text

NULL = "null.safetensors"
BATCH_ROWS, BATCH_BYTES = 2**20, 2**30  # of the index; strings of a batch must stay below 2³¹ bytes


class Sample(NamedTuple):
    """One encoded picture with its captions."""

    id: str
    captions: tuple[str, ...]
    weights: tuple[float, ...]  # of the captions, > 0
    bucket: int
    size: tuple[int, int]  # height and width of the original picture, in pixels
    crop: tuple[int, int]  # top and left in the scaled picture, in pixels
    phash: int  # perceptual hash of 64 bits
    latents: Tensor  # (C, h, w), any float type
    pooled: Tensor | None  # (captions, P)
    tokens: Tensor | None  # (captions, N, D)


class Drop(NamedTuple):
    """An input that was dropped."""

    id: str
    reason: str
    detail: str


class Part(NamedTuple):
    """A unit's sidecar without its samples."""

    inputs: int
    dropped: Counter[str]  # by reason
    last: bool  # whether it is the last part of its shard


class Writer:
    """Writes a store, or resumes one. Several processes may write one store, each its own shards.

    Args:
        folder: of the store.
        plan: everything that the content depends on, as JSON. It has `buckets.sizes` ([height, width] of each bucket in
            pixels), `factor` (pixels per latent) and `channels` (of the latents).
        null: the null condition, tokens (N, D) and pooled (P); None for a store that holds no text.

    Raises:
        ValueError: the plan is incomplete, or the folder holds a store of another plan; names each field that differs.
        OSError: naming the file that could not be written.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], null: "Text | None") -> None:
        plan = json.loads(json.dumps(plan, allow_nan=False))
        self.folder, self.units, self.null = folder, folder / "units", null
        self.shapes = latent_shapes(plan, "the plan")
        self._parts: dict[int, list[Part]] = {}
        self._begun: set[int] = set()
        if null and (null.tokens.ndim, null.pooled.ndim) != (2, 1):
            raise ValueError("the null condition has tokens (N, D) and pooled (P), without a batch")
        self.units.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        sweep(self.units)
        if not (folder / "store.json").exists():
            if any(self.units.glob("*.parquet")):
                raise ValueError(f"{folder} holds units but no store.json that says what they are: use a new folder")
            if any(not is_ours(path) and path != self.units for path in folder.iterdir()):
                raise ValueError(f"{folder} is not empty and holds no store: use a new folder")
            commit_json(folder / "store.json", plan)
        if found := differences(read_json(folder / "store.json"), plan):
            fields = "; ".join(f"{path}: there {there}, now {now}" for path, there, now in found)
            raise ValueError(f"{folder} is a store of another plan ({fields}): use a new folder")
        if null and not (folder / NULL).exists():
            write_tensors({"tokens": bfloat16(null.tokens), "pooled": bfloat16(null.pooled)}, folder / NULL)
        if null:
            check_seal(folder / NULL)

    def position(self, shard: int) -> tuple[int, int, bool]:
        """The state of a shard: number of its parts, of the inputs that they consumed, and whether it is finished."""
        parts = self._known(shard)
        return len(parts), sum(part.inputs for part in parts), bool(parts) and parts[-1].last

    def hold(self, shard: int) -> AbstractContextManager[None]:
        """Keeps a shard from other processes; on entry BusyError if one of them writes it."""
        return hold(self.folder, f"{shard:06d}")

    def write(self, shard: int, samples: Sequence[Sample], drops: Sequence[Drop], inputs: int, last: bool) -> None:
        """Appends the next part to a shard. No other process may write this shard.

        The first call removes incomplete files of a killed writer and all later parts: if a sidecar was removed, these
        are written again.

        Args:
            shard: its number, from 0.
            samples: of the part; may be empty.
            drops: the dropped inputs.
            inputs: number of inputs that this part consumed.
            last: whether the shard ends here.

        Raises:
            ValueError: a sample does not fit the plan, or its latents are not finite; or the shard is finished.
            OSError: naming the file that could not be written; or another process writes the shard. Earlier parts stay
                valid.
        """
        before = len(self._parts[shard]) if shard in self._parts else None
        parts = self._known(shard)
        if before not in (None, len(parts)):  # the next part is there already
            raise OSError(f"another process writes {self.folder}, shard {shard}: stop it")
        if parts and parts[-1].last:
            raise ValueError(f"shard {shard} of {self.folder} is finished and takes no further part")
        if shard not in self._begun:
            self._clear(shard, len(parts))
            self._begun.add(shard)
        if len({sample.tokens is None for sample in samples}) > 1:
            raise ValueError(f"some samples of shard {shard} have tokens and some have none: encode all in one way")
        latents: dict[int, list[Tensor]] = {}
        pooled: list[Tensor] = []
        tokens: list[Tensor] = []
        rows, text_row = [], 0
        for sample in samples:
            self._check(sample)
            place = latents.setdefault(sample.bucket, [])
            place.append(bfloat16(sample.latents)[None])
            if not place[-1].isfinite().all():
                raise ValueError(f"the latents of {sample.id} are not finite: drop it")
            pooled += [] if sample.pooled is None else [bfloat16(sample.pooled)]
            tokens += [] if sample.tokens is None else [bfloat16(sample.tokens)]
            (height, width), (top, left) = sample.size, sample.crop
            rows.append(
                {"id": sample.id, "captions": sample.captions, "weights": sample.weights, "bucket": sample.bucket,
                 "shard": shard, "part": len(parts), "row": len(place) - 1, "text_row": text_row, "height": height,
                 "width": width, "top": top, "left": left, "phash": sample.phash, "checksum": checksum(place[-1]),
                 "pooled_checksum": [] if sample.pooled is None else [checksum(row) for row in pooled[-1]],
                 "tokens_checksum": [] if sample.tokens is None else [checksum(row) for row in tokens[-1]]}
            )  # fmt: skip
            text_row += len(sample.captions)
        stem = unit_name(shard, len(parts))
        tensors = {f"latents.{bucket}": latents[bucket] for bucket in sorted(latents)}
        tensors |= {"pooled": pooled} if pooled else {}
        groups = {".tokens": {"tokens": tokens}} if tokens else {}
        groups |= {"": tensors} if samples else {}
        written: dict[Path, int] = {}
        for group, content in groups.items():
            file = self.units / f"{stem}{group}.safetensors"
            written[file] = commit(file, partial(_write_tensors, content))
        notes = json.dumps({"drops": drops, "inputs": inputs, "last": last}, ensure_ascii=False)
        table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({"unit": notes, "seal": BLANK})
        if any(not file.exists() or file.stat().st_size != size for file, size in written.items()):
            raise OSError(f"another process writes {self.folder}, shard {shard}: stop it")
        commit_path(self.units / f"{stem}.parquet", lambda file: _write_sidecar(table, file))
        parts.append(Part(inputs, Counter(drop.reason for drop in drops), last))

    def finish(self, shards: int, hamming: int | None) -> dict[str, Any] | None:
        """Writes index, report and the list of dropped inputs, if all shards are finished.

        Several processes may call it at once.

        A sample with the id of an earlier sample is a "duplicate id"; a sample whose perceptual hash is near to that of
        an earlier kept sample is a "near-duplicate". Both stay in their units but are not in the index.

        Args:
            shards: number of shards.
            hamming: largest number of bits, 0 to 8, in which near hashes differ; None keeps near-duplicates.

        Returns:
            The report: inputs, kept, dropped (by reason), buckets (samples by "HEIGHTxWIDTH"), captions, and the hashes
            of `index.arrow` (index), of other files (files) and of the report itself (hash). None if a shard is not
            finished.

        Raises:
            ValueError: a unit is damaged; names it.
        """
        if shards < 1 or (hamming is not None and not 0 <= hamming <= 8):
            raise ValueError(f"shards must be at least 1 and hamming from 0 to 8, got {shards} and {hamming}")
        parts = [self._known(shard) for shard in range(shards)]
        if not all(known and known[-1].last for known in parts):
            return None
        names = [unit_name(shard, part) for shard, known in enumerate(parts) for part in range(len(known))]
        light = pa.concat_tables([self._sidecar(name, ["id", "phash", "bucket", *LISTS]) for name in names])
        counts = {name: pc.sum(pc.list_value_length(light[name])).as_py() or 0 for name in LISTS}
        for name in LISTS[1:]:
            if counts[name] not in (0, counts["weights"]):
                share = f"only {counts[name]} of {counts['weights']} captions in {self.folder}"
                raise ValueError(f"{share} have {name.split('_')[0]}: encode all of them in one way")
        unique = first_of(light["id"])
        keep = unique.copy()
        if hamming is not None:
            hashes = light["phash"].to_numpy()[unique]
            keep[np.flatnonzero(unique)[near_duplicates(hashes, hamming)]] = False
        commit(self.folder / "index.arrow", lambda file: self._write_index(file, names, keep))
        commit(self.folder / "dropped.jsonl", lambda file: self._write_drops(file, names, light["id"], unique, keep))
        found = {"duplicate id": int((~unique).sum()), "near-duplicate": int((unique & ~keep).sum())}
        dropped = sum((part.dropped for known in parts for part in known), Counter()) + Counter(found)
        members = np.bincount(light["bucket"].to_numpy()[keep], minlength=len(self.shapes))
        sizes = read_json(self.folder / "store.json")["buckets"]["sizes"]
        others = [self.folder / name for name in ("store.json", NULL, "dropped.jsonl")]
        report = {
            "inputs": sum(part.inputs for known in parts for part in known),
            "kept": int(keep.sum()),
            "dropped": dict(sorted(dropped.items())),
            "buckets": {f"{h}x{w}": int(count) for (h, w), count in zip(sizes, members, strict=True) if count},
            "captions": int(pc.list_value_length(light["weights"]).to_numpy()[keep].sum()),
            "index": file_checksum(self.folder / "index.arrow"),
            "files": {file.name: file_checksum(file) for file in others if file.exists()},
        }
        report["hash"] = json_checksum(report)
        commit_json(self.folder / "report.json", report)
        return report

    def _known(self, shard: int) -> list[Part]:
        """The parts of a shard on disk, read again, since another process may have written them."""
        known = self._parts.setdefault(shard, [])
        while not (known and known[-1].last):
            file = self.units / f"{unit_name(shard, len(known))}.parquet"
            if not file.exists():
                break
            notes = read_notes(file)
            known.append(Part(notes["inputs"], Counter(reason for _, reason, _ in notes["drops"]), notes["last"]))
        return known

    def _clear(self, shard: int, parts: int) -> None:
        """Removes the temporary files of a shard, and its files from a part on."""
        for file in self.units.iterdir():
            found = re.match(r"(\.?)(\d+)-(\d+)\.", file.name)
            if found and int(found[2]) == shard and (found[1] or int(found[3]) >= parts):
                file.unlink(missing_ok=True)

    def _check(self, sample: Sample) -> None:
        """ValueError, naming what does not fit the plan, if anything in a sample does not."""
        n = len(sample.captions)
        pooled, tokens = self.null and (n, *self.null.pooled.shape), self.null and (n, *self.null.tokens.shape)
        faults = {
            f"bucket {sample.bucket} of {len(self.shapes)}": not 0 <= sample.bucket < len(self.shapes),
            f"{n} captions with the weights {sample.weights}": n < 1
            or len(sample.weights) != n
            or not all(0 < weight < math.inf for weight in sample.weights),
            f"the perceptual hash {sample.phash}": not 0 <= sample.phash < 2**64,
            f"pooled {_shape(sample.pooled)} instead of {pooled}": _shape(sample.pooled) != pooled,
            f"tokens {_shape(sample.tokens)} instead of {tokens}": _shape(sample.tokens) not in (None, tokens),
        }
        found = [fault for fault, present in faults.items() if present]
        if not found and _shape(sample.latents) != (shape := self.shapes[sample.bucket]):
            found = [f"latents {_shape(sample.latents)} instead of {shape}"]
        if found:
            raise ValueError(f"sample {sample.id} does not fit the store: {', '.join(found)}")

    def _sidecar(self, name: str, columns: list[str]) -> pa.Table:
        """Columns of a unit's samples; ValueError if one of its files is damaged."""
        table = read_sidecar(self.units / f"{name}.parquet", columns)
        for group, there in (("", len(table)), (".tokens", pc.sum(pc.list_value_length(table[LISTS[2]])).as_py())):
            if there:
                Unit(self.units / f"{name}{group}.safetensors")
        return table

    def _write_drops(
        self, file: BinaryIO, names: Iterable[str], ids: pa.ChunkedArray, unique: np.ndarray, keep: np.ndarray
    ) -> None:
        """Writes a line of JSON for each input that is not in the index."""
        for name in names:
            for drop in read_notes(self.units / f"{name}.parquet")["drops"]:
                file.write(_line(Drop(*drop)))
        for row in np.flatnonzero(~keep).tolist():
            file.write(_line(Drop(ids[row].as_py(), "near-duplicate" if unique[row] else "duplicate id", "")))

    def _write_index(self, file: BinaryIO, names: Iterable[str], keep: np.ndarray) -> None:
        """Writes the kept samples of all units into one file, in few batches."""
        with pa.ipc.new_file(file, SCHEMA) as out:
            waiting: list[pa.Table] = []
            for name in names:
                table = read_sidecar(self.units / f"{name}.parquet")
                waiting.append(table.filter(pa.array(keep[: len(table)])))
                keep = keep[len(table) :]
                if sum(map(len, waiting)) >= BATCH_ROWS or sum(part.nbytes for part in waiting) >= BATCH_BYTES:
                    out.write_table(pa.concat_tables(waiting).combine_chunks())
                    waiting = []
            if waiting:
                out.write_table(pa.concat_tables(waiting).combine_chunks())


def _line(drop: Drop) -> bytes:
    return (json.dumps(drop._asdict(), ensure_ascii=False) + "\n").encode()


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _write_tensors(tensors: Mapping[str, Sequence[Tensor]], file: BinaryIO) -> None:
    file.writelines(safetensors(tensors))


def _write_sidecar(table: pa.Table, file: Path) -> None:
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    seal(file)
