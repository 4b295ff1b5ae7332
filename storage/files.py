"""Files written atomically: after a crash a file is complete or absent."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from xxhash import xxh3_64

TRIES = 100


def commit(file: Path, write: Callable[[BinaryIO], object]) -> int:
    """Writes a file under another name and renames it, so that it is complete or absent, also after a crash.

    Returns:
        Its size in bytes.

    Raises:
        OSError: naming the file that could not be written; an older file stays.
    """
    for _ in range(TRIES):
        part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("xb") as out:
                write(out)
                out.flush()
                os.fsync(out.fileno())
                size = os.fstat(out.fileno()).st_size
            try:
                part.replace(file)
            except FileNotFoundError:  # a writer that started meanwhile removed it as a left-over
                continue
            sync(file.parent)
            return size
        except FileNotFoundError:  # what `write` reads from
            raise
        except OSError as error:
            raise OSError(f"could not write {file}: {error.strerror or error}") from error
        finally:
            part.unlink(missing_ok=True)
    raise OSError(f"could not write {file}: another process keeps removing its temporary file: stop that process")


def commit_bytes(file: Path, content: bytes) -> None:
    """Writes bytes atomically, as `commit`."""
    commit(file, lambda out: out.write(content))


def commit_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, as `commit`."""
    commit_bytes(file, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def sync(folder: Path) -> None:
    """Flushes a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_checksum(file: Path) -> str:
    """The xxh3 hash of a file, as 16 hexadecimal digits."""
    digest, block = xxh3_64(), bytearray(2**20)
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()
