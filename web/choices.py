"""Choices of a person between two drawn pictures of one prompt, for `encode.py --encode.source Choices`."""

import json
from pathlib import Path
from typing import NamedTuple

from pipeline.drawing import entries_in, writing
from storage.files import commit_bytes
from storage.text import parse_json, read_text, split_lines

FILE = "chosen.jsonl"
KEYS = ("caption", "better", "worse")


class Pair(NamedTuple):
    """Two pictures of one prompt, by their names in the folder."""

    caption: str
    one: str
    other: str


def chosen(folder: Path) -> list[dict[str, str]]:
    """The choices made so far. ValueError, in one line, if the file holds anything else."""
    file, found = folder / FILE, []
    for number, line in enumerate(split_lines(read_text(file)) if file.exists() else (), start=1):
        if line.strip():
            row = parse_json(line, f"{file}, line {number}")
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in KEYS):
                raise ValueError(f"{file}, line {number}: a choice needs {', '.join(KEYS)}")
            found.append(row)
    return found


def open_pairs(folder: Path) -> list[Pair]:
    """The pairs of a folder without a choice. The pictures of a prompt are paired as they were drawn, two by two.

    ValueError, in one line, if the folder's files are damaged.
    """
    found: dict[str, list[str]] = {}
    for entry in entries_in(folder):
        found.setdefault(entry["prompt"], []).append(entry["file"])
    done = {frozenset((row["better"], row["worse"])) for row in chosen(folder)}
    pairs = [Pair(caption, *files[i : i + 2]) for caption, files in found.items() for i in range(0, len(files) - 1, 2)]
    there = [pair for pair in pairs if all((folder / file).is_file() for file in pair[1:])]
    return [pair for pair in there if frozenset(pair[1:]) not in done]


def choose(folder: Path, caption: str, better: str, worse: str) -> int:
    """Adds a choice to the folder's file; returns how many it holds. ValueError if the two were chosen from before."""
    with writing(folder):
        if not any(frozenset((better, worse)) == frozenset(pair[1:]) for pair in open_pairs(folder)):
            raise ValueError(f"{better} and {worse} have a choice already, or one of them is gone")
        rows = [*chosen(folder), {"caption": caption, "better": better, "worse": worse}]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        commit_bytes(folder / FILE, lines.encode())
    return len(rows)
