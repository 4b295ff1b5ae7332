"""Captioned pictures in folders, Parquet files, WebDataset tars and data sets of Hugging Face's hub."""

import glob
import math
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from data.raw.base import EXTENSIONS, FOREIGN, Fault, Input, Place, Source
from data.raw.folder import METADATA, Folder, kinds_of
from data.raw.tables import Table
from data.raw.tars import Tars

SPLITS = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}
SPLIT = re.compile(r"(?<![a-z])(train|training|validation|valid|val|dev|test|testing)(?![a-z])")


@final
class Pictures(Source):
    """Captioned pictures in one of these formats.

    - A folder of pictures, at any depth. Captions are columns of a `metadata.jsonl`, `.csv` or `.parquet` beside or
      above them, whose `file_name` is relative to it, as in Hugging Face's imagefolder; or column `prompt`, if
      sample.py drew them; or column `txt`, which is the file `NAME.txt` beside `NAME.jpg`. Where a picture has none of
      the others, column `folder` is the name of its folder, without the number of kohya's `10_sks dog`. Every picture,
      of whatever format, and every row is an input; with column `txt` also every `.txt` without a picture.
    - A folder, glob or file of `.parquet`: each row is an input.
    - A folder, glob or file of `.tar`, in WebDataset's layout: members with the same path up to the first dot of the
      base name are an input; the rest of the name is a field. Compressed tars are refused.
    - The name of a data set on Hugging Face's hub, as "user/name".

    Names that start with a dot are ignored, and files that img2dataset adds to its pictures or tars (Parquet tables and
    statistics).

    Args:
        path: one of the above.
        captions: column (in a tar a field, as `txt`, or a value in a JSON member, as `json.caption`) → weight above 0.
            A column of lists holds several captions that share its weight. None takes the first of text, caption,
            captions, prompt and txt that exists.
        image: the column or field of the picture; None if there is only one candidate.
        split: of a hub's data set, or of a folder whose `.parquet` or `.tar` files have names of several splits.
        streaming: reads `.parquet` and hub in the order of their files, one shard per file, and does not copy them into
            the cache of `datasets`. Tars are always read so, folders never.

    Raises:
        FileNotFoundError: there is nothing at this path.
        ValueError: it is empty or ambiguous, lacks the columns, or cannot be read.
    """

    def __init__(
        self,
        path: str,
        captions: dict[str, float] | None = None,
        image: str | None = None,
        split: str = "train",
        streaming: bool = False,
    ) -> None:
        if captions is not None and (not captions or not all(0 < w < math.inf for w in captions.values())):
            raise ValueError(f"captions must be columns with finite weights above 0, got {captions}")
        place = locate(path, split)
        # Not for files on disk: the same data may be moved, or mounted elsewhere.
        self.given = {"path": path, "split": split} if place is None else {}
        self.source: Source
        if place is None:
            self.source = Table(path, None, captions, image, split, streaming)
        elif place.kind == "tar":
            self.source = Tars(place, captions, image)
        elif place.kind == "parquet":
            self.source = Table(path, place, captions, image, split, streaming)
        else:
            self.source = Folder(place, captions)
        self.shards = self.source.shards

    def read(self, shard: int, start: int = 0) -> Iterator[Input]:
        if not 0 <= shard < self.shards or start < 0:
            raise ValueError(f"there are shards 0 to {self.shards - 1}, not {shard} from input {start} on")
        # Names that are not Unicode contain lone surrogates, which UTF-8 cannot encode.
        for entry in self.source.read(shard, start):
            if isinstance(entry, Fault):
                entry = entry._replace(detail=" ".join(writable(entry.detail).split()))
            yield entry._replace(id=writable(entry.id))

    def describe(self) -> dict[str, Any]:
        return {**self.given, **self.source.describe()}


def writable(text: str) -> str:
    """The text with backslash escapes for what UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()


def locate(path: str, split: str) -> Place | None:
    """The files at a path; None if it looks like a hub's name. Errors as `Pictures`."""
    if Path(path).is_dir():
        return classify(Path(path), split)
    if not os.path.lexists(path) and not glob.has_magic(path):
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            return None
        raise FileNotFoundError(f"there is no {path}")
    files = sorted(
        name for name in ([path] if Path(path).exists() else glob.glob(path, recursive=True)) if Path(name).is_file()
    )
    kinds = {Path(name).suffix for name in files}
    if len(kinds) != 1 or not kinds <= {".parquet", ".tar"}:
        found = ", ".join(sorted(kinds)) or "none"
        raise ValueError(f"{path} must stand for .parquet files or for .tar files, found {found}" + packed(files))
    fixed = Path(path).parts
    depth = next((i for i, part in enumerate(fixed[:-1]) if glob.has_magic(part)), len(fixed) - 1)
    root = Path(*fixed[:depth])
    return Place(kinds.pop()[1:], root, [Path(name).relative_to(root).as_posix() for name in files])


def classify(root: Path, split: str) -> Place:
    """The files of a folder with their kind. Errors as `Pictures`."""
    files = walk(root)
    by_kind: dict[str, list[str]] = {"pictures": [], "parquet": [], "tar": [], "foreign": []}
    for name in files:
        suffix = posixpath.splitext(name)[1][1:].lower()
        kind = "pictures" if suffix in EXTENSIONS else "foreign" if suffix in FOREIGN else suffix
        if kind in by_kind:
            by_kind[kind].append(name)
    foreign = by_kind.pop("foreign")
    if not by_kind["tar"] and all(posixpath.basename(name) in METADATA for name in by_kind["parquet"]):
        by_kind["pictures"] = by_kind["pictures"] or foreign
    bundles = {name[: -len(".tar")] for name in by_kind["tar"]} | {posixpath.dirname(p) for p in by_kind["pictures"]}
    by_kind["parquet"] = [
        name
        for name in by_kind["parquet"]
        if name[: -len(".parquet")] not in bundles
        and not (by_kind["pictures"] and posixpath.basename(name) in METADATA)
    ]
    present = [kind for kind, names in by_kind.items() if names]
    if not present:
        there = ", ".join(kinds_of(files)) or "nothing"
        raise ValueError(f"there is no picture, .parquet or .tar in {root}, but {there}" + packed(files))
    if len(present) > 1:
        counts = ", ".join(f"{len(by_kind[kind])} {kind} ({by_kind[kind][0]})" for kind in present)
        raise ValueError(f"{root} holds {counts}: give a folder or a glob of one kind")
    kind = present[0]
    if kind == "pictures":
        tops = {name.split("/")[0] for name in by_kind[kind] if "/" in name}
        splits = sorted(top for top in tops if SPLIT.fullmatch(top))
        if len(splits) > 1 or split != "train":
            raise ValueError(f"a folder of pictures is taken as one split: give that of {split} in {root} itself")
        return Place(kind, root, files)
    return Place(kind, root, of_split(by_kind[kind], split, root))


def packed(files: list[str]) -> str:
    """What to do if some of the files are compressed tars, as the end of a message."""
    suffixes = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
    return ": unpack compressed tars to .tar files first" if any(name.endswith(suffixes) for name in files) else ""


def of_split(files: list[str], split: str, root: Path) -> list[str]:
    """The files of a split, by the last name of a split in their names; all files if there is only one split."""
    words = [SPLIT.findall(name.lower()) for name in files]
    named = [SPLITS.get(found[-1], found[-1]) if found else None for found in words]
    splits = sorted({name for name in named if name})
    if len(splits) < 2 and SPLITS.get(split, split) in (*splits, "train"):
        return files
    chosen = [file for file, name in zip(files, named, strict=True) if name == SPLITS.get(split, split)]
    if None in named and len(splits) > 1:
        raise ValueError(f"{root} holds the splits {', '.join(splits)} and files of none: give a glob")
    if not chosen:
        raise ValueError(f"{root} has no split {split}, only {', '.join(splits) or 'train'}")
    return chosen


def walk(root: Path) -> list[str]:
    """All files below a folder, relative to it, sorted, without hidden ones. Links are followed, each folder once."""

    def refuse(error: OSError) -> None:  # otherwise os.walk skips the folder silently
        raise ValueError(f"the folder {error.filename} cannot be read: {error.strerror}")

    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            below.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        prefix = Path(folder).relative_to(root).as_posix()
        found += [posixpath.normpath(f"{prefix}/{name}") for name in names if not name.startswith(".")]
    return sorted(found)
