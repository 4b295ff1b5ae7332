"""Choices between two pictures of one caption: by people, or by a judge (`sample.py prefer`)."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, final

from data.raw.base import UNIT, Fault, Input, Raw, Source
from data.raw.folder import read_metadata

KEYS = ("caption", "better", "worse")


@final
class Choices(Source):
    """The lines of a JSON-lines file, each a choice: {"caption": "…", "better": "a.png", "worse": "b.png"}.

    Other keys are ignored.

    Args:
        path: the file. The pictures' paths are relative to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty or cannot be read.
    """

    choices = True

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path} of choices: give a JSON-lines file")
        self.path = path
        self.rows = [self._input(number, row) for number, row in read_metadata(path)]
        if not self.rows:
            raise ValueError(f"{path} is empty: it needs a choice a line, such as "
                             '{"caption": "a red circle", "better": "1.png", "worse": "2.png"}')  # fmt: skip
        self.shards = -(-len(self.rows) // UNIT)

    def _input(self, number: int, row: dict[str, Any] | str) -> Input:
        name = f"{self.path.name}:{number}"
        if isinstance(row, str):
            return Fault(name, "unreadable row", row)
        caption, *files = (row.get(key) for key in KEYS)
        if not isinstance(caption, str) or not caption.strip():
            return Fault(name, "no caption", "it has no text as caption")
        for key, file in zip(KEYS[1:], files, strict=True):
            if not isinstance(file, str) or not (self.path.parent / file).is_file():
                return Fault(name, "no picture", f"there is no picture {file!r}, which is {key}")
        better, worse = (self.path.parent / file for file in files if file)
        return Raw(name, better, (caption.strip(),), (1.0,), worse=worse)

    def read(self, shard: int, start: int = 0) -> Iterator[Input]:
        if not 0 <= shard < self.shards or start < 0:
            raise ValueError(f"there are shards 0 to {self.shards - 1}, not {shard} from input {start} on")
        yield from self.rows[shard * UNIT + start : (shard + 1) * UNIT]

    def describe(self) -> dict[str, Any]:
        files = [file for row in self.rows if isinstance(row, Raw) for file in (row.picture, row.worse)]
        sizes = [file.stat().st_size for file in files if isinstance(file, Path)]
        content = sha256(self.path.read_bytes() + str(sizes).encode()).hexdigest()
        return {"kind": "Choices", "inputs": len(self.rows), "content": content}
