"""Captioned pictures in a folder, with captions in metadata files or text files."""

import csv
import json
import math
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_128

from data.raw.base import (
    EXTENSIONS,
    FOREIGN,
    LARGEST_CAPTION,
    UNIT,
    Fault,
    Input,
    Place,
    Source,
    choose_captions,
    one_line,
    to_input,
)
from storage.text import parse_json, read_lines, read_text

DRAWN = "samples.json"  # what sample.py says of the pictures that it drew
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet", DRAWN)  # in a folder of pictures
FOLDER = "folder"  # the column that is the name of a picture's folder
REPEATS = re.compile(r"^\d+_")  # before kohya's names of folders: how often each picture is seen in an epoch
LARGEST_TABLE = 2**32  # bytes of a metadata.parquet in memory


@final
class Folder(Source):
    """A folder of pictures, with captions in metadata files or beside the pictures."""

    def __init__(self, place: Place, captions: dict[str, float] | None) -> None:
        self.place = place
        rows: dict[str, list[dict[str, Any]]] = {}
        faults: list[Fault] = []
        self.metadata = [name for name in place.files if posixpath.basename(name) in METADATA]
        for name in self.metadata:
            for number, row in read_metadata(place.root / name):
                target = row.get("file_name") if isinstance(row, dict) else None
                if not isinstance(row, dict) or not isinstance(target, str) or not target:
                    detail = row if isinstance(row, str) else "it has no file_name"
                    faults.append(Fault(f"{name}:{number}", "unreadable row", detail))
                    continue
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
                if target.startswith(("/", "../")):
                    faults.append(Fault(f"{name}:{number}", "unreadable row", f"{target} lies outside of the folder"))
                else:
                    rows.setdefault(target, []).append(row)
        texts = {name[: -len(".txt")] for name in place.files if name.endswith(".txt")}
        suffixes = {name: posixpath.splitext(name)[1][1:].lower() for name in place.files}
        pictures = {name for name, suffix in suffixes.items() if suffix in EXTENSIONS | FOREIGN}
        columns = {column for same in rows.values() for row in same for column in row} - {"file_name"}
        stems = {posixpath.splitext(name)[0] for name in pictures | rows.keys()}
        beside = sorted(f"{stem}.txt" for stem in texts & {posixpath.splitext(name)[0] for name in pictures})
        if beside:
            columns.add("txt")
        columns |= {FOLDER} & (captions or {}).keys()
        self.captions = choose_captions(captions, columns, str(place.root), seen(set(place.files) - pictures, faults))
        self.texts = beside if "txt" in self.captions else []
        self.inputs: list[tuple[str, dict[str, Any]] | Fault] = [
            (name, {column: row[column] for column in self.captions if column in row})
            for name in sorted(pictures | rows.keys())
            for row in rows.get(name, [{}])
        ]
        if "txt" in self.captions:
            alone = sorted(texts - stems)
            faults += [Fault(f"{stem}.txt", "no picture", "there is none of the same name") for stem in alone]
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
                row = {**row, "txt": read_text(beside, LARGEST_CAPTION)}
            except (OSError, ValueError) as error:
                return Fault(name, "unreadable caption", str(error))
        if FOLDER in self.captions and not any(row.get(column) for column in self.captions):
            row = {**row, FOLDER: REPEATS.sub("", file.resolve().parent.name)}
        return to_input(name, file, row, self.captions)

    def describe(self) -> dict[str, Any]:
        """As `Source.describe`; depends on the content of metadata and captions and on names and sizes of pictures."""
        digest = xxh3_128(json.dumps(self.place.sizes()).encode())
        for name in (*self.metadata, *self.texts):
            # A file that cannot be read is reported with its picture.
            with suppress(OSError), (self.place.root / name).open("rb") as stream:
                digest.update(stream.read(-1 if name in self.metadata else LARGEST_CAPTION + 1))
        return {
            "kind": "pictures",
            "captions": self.captions,
            "inputs": len(self.inputs),
            "files": digest.hexdigest(),
        }


def seen(others: Collection[str], faults: Sequence[Fault]) -> list[str]:
    """What may be meant as captions: the files that are no pictures, by their kinds, and the first row's fault."""
    kinds = kinds_of([name for name in others if posixpath.basename(name) not in METADATA])
    found = [f"beside the pictures {', '.join(kinds)}"] if kinds else []
    return found + [f"{fault.id}: {fault.detail}" for fault in faults[:1]]


def kinds_of(files: Collection[str]) -> list[str]:
    """The kinds of files with their numbers, such as "3 .caption files"."""
    kinds = Counter(posixpath.splitext(name)[1] for name in files)
    return [
        f"{count} {kind or 'unnamed'} file{'s' * (count > 1)}"
        for kind, count in sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
    ]


def read_metadata(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The rows of a metadata file with their numbers; of a damaged row, the fault.

    The number is that of the row's first line in the file; in Parquet, that of the row, from 1.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        if file.suffix == ".parquet":
            yield from enumerate(read_table(file), start=1)
        elif file.name == DRAWN:
            yield from enumerate(read_drawn(file), start=1)
        elif file.suffix == ".csv":
            table = csv.reader(read_lines(file))
            columns, number = next(table, []), table.line_num + 1
            for row in table:
                if row:
                    named = dict(zip(columns, row, strict=False))
                    yield number, "it has more values than there are columns" if len(row) > len(columns) else named
                number = table.line_num + 1
        else:
            for number, line in enumerate(read_lines(file), start=1):
                if line.strip():
                    yield number, read_row(line)
    except (pa.ArrowException, csv.Error, OSError) as error:
        raise ValueError(f"{file} cannot be read: {one_line(error)}") from None


def read_row(line: str) -> dict[str, Any] | str:
    """A JSON object, or why it is none."""
    try:
        content = parse_json(line, "it")
    except ValueError as error:
        return str(error)
    return content if isinstance(content, dict) else "it is no JSON object"


def read_drawn(file: Path) -> list[dict[str, Any] | str]:
    """The prompts of the pictures that sample.py drew, each a row. ValueError if the file is no list."""
    entries = parse_json(read_text(file), file)
    if not isinstance(entries, list):
        raise ValueError(f"{file} is no list of samples")
    return [
        {"file_name": entry.get("file"), "prompt": entry.get("prompt")}
        if isinstance(entry, dict)
        else "it is no JSON object"
        for entry in entries
    ]


def read_table(file: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file. ValueError if it is too large to be held in memory."""
    with pq.ParquetFile(file) as opened:
        groups = [opened.metadata.row_group(i) for i in range(opened.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > LARGEST_TABLE:
            raise ValueError(f"{file} holds more than {LARGEST_TABLE:,} bytes, too many for metadata")
        return opened.read().to_pylist()
