"""Captioned pictures in a folder, with captions in metadata files or text files."""

import csv
import json
import math
import posixpath
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_128

from data.raw.base import EXTENSIONS, UNIT, Fault, Input, Place, Source, choose_captions, one_line, to_input

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # in a folder of pictures


@final
class Folder(Source):
    """A folder of pictures, with captions in metadata files or beside the pictures."""

    def __init__(self, place: Place, captions: dict[str, float] | None) -> None:
        self.place = place
        rows: dict[str, list[dict[str, Any]]] = {}
        faults: list[Fault] = []
        self.metadata = [name for name in place.files if posixpath.basename(name) in METADATA]
        for name in self.metadata:
            for number, row in enumerate(read_metadata(place.root / name), start=1):
                target = row.get("file_name") if isinstance(row, dict) else None
                if not isinstance(row, dict) or not isinstance(target, str):
                    detail = row if isinstance(row, str) else "it has no file_name"
                    faults.append(Fault(f"{name}:{number}", "unreadable row", detail))
                    continue
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
                if target.startswith(("/", "../")):
                    faults.append(Fault(f"{name}:{number}", "unreadable row", f"{target} lies outside of the folder"))
                else:
                    rows.setdefault(target, []).append(row)
        texts = {name[: -len(".txt")] for name in place.files if name.endswith(".txt")}
        pictures = {name for name in place.files if posixpath.splitext(name)[1][1:].lower() in EXTENSIONS}
        columns = {column for same in rows.values() for row in same for column in row} - {"file_name"}
        beside = sorted({f"{stem}.txt" for name in pictures if (stem := posixpath.splitext(name)[0]) in texts})
        if beside:
            columns.add("txt")
        self.captions = choose_captions(captions, columns, str(place.root))
        self.texts = beside if "txt" in self.captions else []
        self.inputs: list[tuple[str, dict[str, Any]] | Fault] = [
            (name, {column: row[column] for column in self.captions if column in row})
            for name in sorted(pictures | rows.keys())
            for row in rows.get(name, [{}])
        ]
        self.inputs += faults
        self.shards = math.ceil(len(self.inputs) / UNIT)

    def read(self, shard: int, start: int = 0) -> Iterator[Input]:
        for entry in self.inputs[shard * UNIT + start : (shard + 1) * UNIT]:
            yield entry if isinstance(entry, Fault) else self._input(*entry)

    def _input(self, name: str, row: dict[str, Any]) -> Input:
        file = self.place.root / name
        if not file.is_file():
            return Fault(name, "no picture", "there is no such file")
        beside = file.with_suffix(".txt")
        if "txt" in self.captions and "txt" not in row and beside.is_file():
            try:
                row = {**row, "txt": beside.read_text(encoding="utf-8-sig")}
            except (OSError, ValueError) as error:
                return Fault(name, "unreadable caption", f"{beside.name}: {error}")
        return to_input(name, file, row, self.captions)

    def describe(self) -> dict[str, Any]:
        """As `Source.describe`; depends on the content of metadata and captions and on names and sizes of pictures."""
        digest = xxh3_128(json.dumps(self.place.sizes()).encode())
        for name in (*self.metadata, *self.texts):
            with suppress(OSError):  # a file that cannot be read is reported with its picture
                digest.update((self.place.root / name).read_bytes())
        return {
            "kind": "pictures",
            "captions": self.captions,
            "inputs": len(self.inputs),
            "files": digest.hexdigest(),
        }


def read_metadata(file: Path) -> Iterator[dict[str, Any] | str]:
    """The rows of a metadata file; of a damaged row, the fault. ValueError if the file cannot be read."""
    try:
        if file.suffix == ".parquet":
            yield from pq.read_table(file).to_pylist()
            return
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if file.suffix == ".csv":
                for row in csv.DictReader(stream):
                    yield "it has more values than there are columns" if None in row else row
                return
            for line in filter(str.strip, stream):
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError) as error:
                    content = f"it is no JSON: {error}"
                yield content if isinstance(content, (dict, str)) else "it is no JSON object"
    except (pa.ArrowException, csv.Error, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {one_line(error)}") from None
