"""Files that hold their own hash: any change is found, wherever the file was moved to or copied.

The writer puts BLANK into the metadata, which stand at the start of a safetensors file and at the end of a Parquet
file. `seal` replaces its digits by the hash of the file as it is then. A file without a seal, as of another program or
an earlier version, is not checked.
"""

from pathlib import Path

from xxhash import xxh3_64

from storage.files import add_to_hash

NAME = b"sealed by xxh3 "
DIGITS = b"0" * 16
BLANK = (NAME + DIGITS).decode()
START, END = 2**10, 2**24  # bytes at the start and the end of a file that are searched for the seal


def seal(file: Path) -> None:
    """Completes a seal; does nothing if the file has no BLANK."""
    place = _place(file)
    if place:
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(_hash(file, place))


def check_seal(file: Path) -> None:
    """Reads the whole file and compares it with its seal.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was changed.
    """
    place = _place(file)
    if place:
        with file.open("rb") as opened:
            opened.seek(place)
            stated = opened.read(len(DIGITS))
        if stated != _hash(file, place):
            raise ValueError(f"{file} is damaged: it does not have the hash in its seal")


def _place(file: Path) -> int:
    """The offset of a seal's digits; 0 if there is no seal."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        for start, count in ((0, START), (max(0, size - END), END)):
            opened.seek(start)
            found = opened.read(count).rfind(NAME)
            if found >= 0:
                return start + found + len(NAME)
    return 0


def _hash(file: Path, place: int) -> bytes:
    """The hash of a file with a blank seal at an offset, as digits."""
    digest = xxh3_64()
    with file.open("rb", buffering=0) as opened:
        digest.update(opened.read(place))
        digest.update(DIGITS)
        opened.seek(len(DIGITS), 1)
        add_to_hash(digest, opened)
    return digest.hexdigest().encode()
