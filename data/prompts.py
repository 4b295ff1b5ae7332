"""Prompts from a command line, a text file or a store, and the file names of their pictures."""

import re
from collections.abc import Sequence
from pathlib import Path

from data.store.reader import Store
from storage.text import read_text, split_lines


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, followed by the lines of the file. Empty lines are left out.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: there is no prompt, or the file is not UTF-8 text.
    """
    if file and (file.is_dir() or not file.exists()):
        raise FileNotFoundError(f"there is no prompt file {file}: give another --prompts, or --prompt TEXT")
    lines = split_lines(read_text(file)) if file else []
    prompts = [*given, *(line.strip() for line in lines if line.strip())]
    if not prompts:
        raise ValueError("there are no prompts: give --prompt TEXT or --prompts FILE with at least one line")
    return prompts


def prompts_or_store(place: Path) -> list[str] | Store:
    """The prompts of a text file, or the store in a folder. Errors are those of `read_prompts` and `Store`."""
    return Store(place) if place.is_dir() else read_prompts([], place)


def file_stem(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "unconditional"
