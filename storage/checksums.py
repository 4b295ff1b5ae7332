"""Checksums of the files of a folder, beside them: a flipped bit in a weight is otherwise seen by nobody."""

from collections.abc import Iterable
from pathlib import Path

from storage.files import commit_json, file_checksum
from storage.text import read_json

FILE = "checksums.json"  # name → xxh3, which other programs ignore


def write_checksums(folder: Path, files: Iterable[Path]) -> None:
    """Writes the checksums of files of a folder. OSError on failure."""
    commit_json(folder / FILE, {file.relative_to(folder).as_posix(): file_checksum(file) for file in sorted(files)})


def verify(folder: Path, *parts: str) -> None:
    """Reads the files of a folder and compares their checksums. A folder without checksums is not verified.

    Args:
        folder: the folder.
        parts: the files and subfolders to read; by default all.

    Raises:
        ValueError: a file is missing or is not as it was written. The message says how a change is accepted.
    """
    if not (folder / FILE).is_file():
        return
    for name, checksum in read_json(folder / FILE).items():
        if parts and name.partition("/")[0] not in parts:
            continue
        file = folder / name
        if not file.is_file() or file_checksum(file) != checksum:
            fault = "is not as it was written: it is damaged or was edited" if file.is_file() else "is missing"
            raise ValueError(f"{file} {fault}; get it again, or accept the folder as it is: delete {folder / FILE}")
