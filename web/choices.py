"""Choices of a person between two drawn pictures of one prompt, for `encode.py --encode.source Choices`."""

import json
from pathlib import Path
from typing import NamedTuple

from pipeline.drawing import drawn_by_prompt, writing
from storage.files import commit_bytes
from storage.text import read_text, split_lines

FILE = "chosen.jsonl"


class Pair(NamedTuple):
    """Two pictures of one prompt, by their names in the folder."""

    caption: str
    one: str
    other: str


def chosen(folder: Path) -> list[dict[str, str]]:
    """The choices made so far."""
    file = folder / FILE
    return [json.loads(line) for line in split_lines(read_text(file)) if line.strip()] if file.exists() else []


def open_pairs(folder: Path) -> list[Pair]:
    """The pairs of a folder without a choice. The pictures of a prompt are paired as they were drawn, two by two."""
    try:
        found = drawn_by_prompt(folder)
    except (FileNotFoundError, ValueError):
        return []
    done = {frozenset((row["better"], row["worse"])) for row in chosen(folder)}
    pairs = [Pair(caption, *files[i : i + 2]) for caption, files in found.items() for i in range(0, len(files) - 1, 2)]
    there = [pair for pair in pairs if all((folder / file).is_file() for file in pair[1:])]
    return [pair for pair in there if frozenset(pair[1:]) not in done]


def choose(folder: Path, caption: str, better: str, worse: str) -> int:
    """Adds a choice to the folder's file; returns how many it holds."""
    with writing(folder):
        rows = [*chosen(folder), {"caption": caption, "better": better, "worse": worse}]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        commit_bytes(folder / FILE, lines.encode())
    return len(rows)
