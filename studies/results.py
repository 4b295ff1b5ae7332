"""Reads and selects the results of evaluations.

A result is a row of `metrics.table` with two more keys: the `recipe` of the model and the `seed` of its training.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from storage.text import read_json

Result = dict[str, Any]
KEY = "distance_ratio"


def read(folder: Path) -> dict[str, Any]:
    """The results that `evaluate.py` wrote to a folder. FileNotFoundError if there are none."""
    file = folder / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: the study lacks the step that writes it; add it to the YAML")
    return read_json(file)


def select(results: Iterable[Result], **wanted: object) -> list[Result]:
    """The results whose keys have the wanted values."""
    return [r for r in results if all(r.get(key) == value for key, value in wanted.items())]


def unique(results: Iterable[Result], key: str) -> list[Any]:
    """The different values of a key, in order of first occurrence."""
    return list(dict.fromkeys(r[key] for r in results))
