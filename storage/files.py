"""Files and folders written atomically: after a crash each is complete or absent. Folders held by one process.

What is written is made in a hidden *stage* in the same folder and moved to its place. The writer holds a lock on its
stage, so that the stage of a killed process is known by its free lock, and `sweep` removes it.
"""

import ctypes
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from xxhash import xxh3_64, xxh3_64_hexdigest

LOCK = ".lock"  # begins the name of the file in a folder, or in a part of one, that one process holds
STAGE = re.compile(r"\.[0-9a-f]{16}\.part")
OLD_PART = re.compile(r"\..+\.([0-9a-f]{8}|safetensors)\.part")  # the temporary files of earlier versions
PREVIOUS = ".previous"  # ends the name of a folder that is just being replaced
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux' renameat2
_held: set[Path] = set()  # the locks that this process holds


class BusyError(OSError):
    """Another process works in this folder; the message names it."""


@contextmanager
def hold(folder: Path, part: str = "") -> Iterator[None]:
    """Holds a folder, which is made if it does not exist: no other process can hold it at the same time.

    The lock ends with the process, also if it is killed. A process may hold a folder several times. Where the file
    system has no locks, nothing is held.

    Args:
        folder: the folder.
        part: holds only a part of this name, such as one shard of a store that several processes write.

    Raises:
        BusyError: another process holds it.
        OSError: the folder cannot be written.
    """
    path = folder.absolute() / (f"{LOCK}-{part}" if part else LOCK)
    if path in _held:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _take(path):
        _held.add(path)
        try:
            for other in folder.iterdir():
                if OLD_PART.fullmatch(other.name) and other.is_file():
                    other.unlink(missing_ok=True)
            sweep(folder)
            yield
        finally:
            _held.discard(path)
            path.unlink(missing_ok=True)


def _take(path: Path) -> BinaryIO:
    """An open file with a lock and this process's name; BusyError if another process has it."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with file:
                file.seek(0)
                other = file.read(256).decode(errors="replace").strip() or "an unknown process"
            raise BusyError(f"{path.parent} is in use by {other}: wait until that ends, or stop it") from None
        except OSError:  # no locks here
            pass
        try:
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                file.flush()
                return file
        except FileNotFoundError:  # another process has just removed it
            pass
        file.close()


@contextmanager
def stage(folder: Path) -> Iterator[Path]:
    """A new hidden folder in a folder, to make something in; it is removed in the end. OSError if it cannot be made."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        path = folder / f".{secrets.token_hex(8)}.part"
        path.mkdir()
        descriptor = _lock(path)
        if descriptor is not None:
            break
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """An open descriptor of a stage, locked; None if another process holds or removes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # this file system has no locks on folders
        return descriptor
    if path.exists():
        return descriptor
    os.close(descriptor)
    return None


def is_ours(path: Path) -> bool:
    """Whether our own writing makes files or folders of this name and removes them in the end."""
    return bool(STAGE.fullmatch(path.name) or OLD_PART.fullmatch(path.name)) or path.name.startswith(LOCK)


def sweep(folder: Path) -> None:
    """Removes what killed processes left in a folder. A folder that was just being replaced returns to its place."""
    for path in folder.glob(".*.part"):
        if not STAGE.fullmatch(path.name) or (descriptor := _lock(path)) is None:
            continue
        try:
            for previous in path.glob(f"*{PREVIOUS}"):
                target = folder / previous.name.removesuffix(PREVIOUS)
                if not target.exists():
                    previous.rename(target)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def previous(folder: Path) -> list[Path]:
    """Where a folder is that a killed process was just replacing."""
    return sorted(folder.parent.glob(f".*.part/{folder.name}{PREVIOUS}"))


def commit_path(file: Path, write: Callable[[Path], object]) -> int:
    """Writes a file in a stage and moves it to its place, so that it is complete or absent, also after a crash.

    Args:
        file: the file; its folder is made if it does not exist.
        write: called with the path of the file in the stage.

    Returns:
        Its size in bytes.

    Raises:
        FileNotFoundError: by `write`, which found no file to read from.
        OSError: naming the file that could not be written; an older file stays.
    """
    written = False
    try:
        with stage(file.parent) as folder:
            part = folder / file.name
            write(part)
            written = True
            sync(part)
            size = part.stat().st_size
            part.replace(file)
            sync(file.parent)
            return size
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not written:
            raise
        raise OSError(f"could not write {file}: {error.strerror or error}") from error


def commit(file: Path, write: Callable[[BinaryIO], object]) -> int:
    """Writes a file atomically, as `commit_path`; `write` is called with the open file."""

    def fill(part: Path) -> None:
        with part.open("xb") as out:
            write(out)

    return commit_path(file, fill)


def commit_bytes(file: Path, content: bytes) -> None:
    """Writes bytes atomically, as `commit_path`."""
    commit_path(file, lambda part: part.write_bytes(content))


def commit_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, as `commit_path`."""
    commit_bytes(file, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a new folder in a stage, then puts it in the place of an old one, which is removed.

    At every moment the folder is the old or the new one. Only on a file system that cannot exchange two folders, one
    moment lies between the two: a process that is killed there leaves the old one to `sweep`.

    Args:
        folder: the folder to write.
        fill: called with a new, empty folder.

    Raises:
        OSError: it cannot be written; the old folder is then unchanged.
    """
    folder = folder.resolve()  # a link to a folder stays a link
    try:
        with stage(folder.parent) as place:
            sweep(folder.parent)
            new = place / folder.name
            new.mkdir()
            fill(new)
            for path in (*new.rglob("*"), new):
                sync(path)
            try:
                new.rename(folder)
            except OSError:  # there is one that is not empty
                if not _exchange(new, folder):
                    folder.rename(place / f"{folder.name}{PREVIOUS}")
                    new.rename(folder)
            sync(folder.parent)
    except OSError as error:
        raise OSError(f"could not write {folder}: {error.strerror or error}") from error


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders at once; False if this system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            return not libc.renamex_np(os.fsencode(one), os.fsencode(other), RENAME_EXCHANGE)
        return not libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    except AttributeError:
        return False


def sync(path: Path) -> None:
    """Flushes a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_checksum(content: Mapping[str, Any]) -> str:
    """The xxh3 hash of a JSON object, as 16 hexadecimal digits; the order of its keys does not matter."""
    return xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def file_checksum(file: Path) -> str:
    """The xxh3 hash of a file, as 16 hexadecimal digits."""
    digest = xxh3_64()
    with file.open("rb", buffering=0) as opened:
        add_to_hash(digest, opened)
    return digest.hexdigest()


def add_to_hash(digest: xxh3_64, opened: RawIOBase) -> None:
    """Adds the rest of an open file to a hash."""
    block = bytearray(2**18)
    while count := opened.readinto(block):
        digest.update(memoryview(block)[:count])
