"""The cache of encoded captions."""

import hashlib
import json
from pathlib import Path
from uuid import uuid4

from data.text.encoder import Text
from storage.weights import check_tensors, open_file, write_tensors

KEPT = 256  # captions whose results stay in memory: 0.7 GB in half precision at the released sizes


class Rows:
    """The cache of encoded captions: the last ones in memory, and all of them in a folder, if one is given.

    Args:
        shapes: of a caption's `tokens` and `pooled`.
        folder: for the files; made if necessary.
        key: everything that the encoding depends on except the caption.

    Raises:
        ValueError: the path is not a folder.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], folder: Path | None = None, key: str = "") -> None:
        self.shapes, self.folder, self.key = shapes, folder, key
        self.memory: dict[str, Text] = {}  # the latest comes last
        if folder and folder.exists() and not folder.is_dir():
            raise ValueError(f"the cache {folder} is no folder: give another path")

    def get(self, caption: str) -> Text | None:
        row = self.memory.pop(caption, None)
        if self.folder and not row:
            try:
                kept = open_file(self._file(self.folder, caption))
                check_tensors(kept, self.shapes, "the cache")
                row = Text(kept["tokens"].clone(), kept["pooled"].clone())
            except (FileNotFoundError, ValueError):  # a damaged file is written again
                return None
        if row:
            self._remember(caption, row)
        return row

    def put(self, caption: str, row: Text) -> None:
        self._remember(caption, row)
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            own = self.folder / uuid4().hex  # another process may write the same caption
            write_tensors(row._asdict(), own)
            own.replace(self._file(self.folder, caption))

    def _remember(self, caption: str, row: Text) -> None:
        self.memory[caption] = row
        if len(self.memory) > KEPT:
            del self.memory[next(iter(self.memory))]

    def _file(self, folder: Path, caption: str) -> Path:
        return folder / f"{hashlib.sha256(json.dumps([self.key, caption]).encode()).hexdigest()}.safetensors"
