"""Prompts from a command line, a text file or a store, and the file names of their pictures."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.store.reader import Store
from storage.text import read_text, split_lines

WEIGHT = re.compile(r":\s*\d*\.\d+\s*\)")  # as in (word:1.3)
LONGEST, MOST_BYTES = 60, 200  # a file name has at most 255 bytes; seed, number and suffix need up to 48


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


def weighted(prompts: Iterable[str]) -> str | None:
    """The first prompt with a weight of other programs, as in (word:1.3). Here it is text like any other."""
    return next((prompt for prompt in prompts if WEIGHT.search(prompt)), None)


def file_stem(prompt: str) -> str:
    """A prompt as part of a file name, of at most 60 characters and 200 bytes; signs without letters by their names."""

    def words(text: str) -> str:
        return re.sub(r"[^\w]+", "-", text.lower()).strip("-")

    if not prompt:
        return "unconditional"
    stem = words(prompt) or words(" ".join(unicodedata.name(sign, "sign") for sign in prompt[:LONGEST]))
    return stem[:LONGEST].encode()[:MOST_BYTES].decode(errors="ignore")
