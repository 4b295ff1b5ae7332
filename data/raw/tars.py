"""Captioned pictures in WebDataset tars."""

import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

from data.raw.base import (
    EXTENSIONS,
    FOREIGN,
    LARGEST_CAPTION,
    LARGEST_FILE,
    LIKELY,
    Fault,
    Input,
    Place,
    Source,
    choose_captions,
    one_line,
    to_input,
)
from storage.text import LINE_LIMIT, decode, parse_json

PACKED = {  # how compressed files begin
    "gzip": rb"\x1f\x8b", "bzip2": rb"BZh[1-9]1AY&SY", "xz": rb"\xfd7zXZ\0", "zstd": rb"\x28\xb5\x2f\xfd",
}  # fmt: skip
SCANNED = 100  # inputs of a tar, and tars, that are searched at most for the names of fields
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key and field, as WebDataset splits a name


@final
class Tars(Source):
    """WebDataset tars, read by Python's tarfile; no member is ever unpickled."""

    def __init__(self, place: Place, captions: dict[str, float] | None, image: str | None) -> None:
        self.place, self.image = place, image
        there: set[str] = set()
        faults: list[str] = []
        for name in place.files[:SCANNED]:
            for group in islice(groups(place.root / name), SCANNED):
                if isinstance(group, Fault):
                    faults.append(group.detail)
                else:
                    there |= group[1].keys()
                    with suppress(KeyError, ValueError):
                        there |= {f"json.{column}" for column in group[1]["json"].parse()}
            if not there.isdisjoint(captions or LIKELY):
                break
        if captions and there & captions.keys():
            there |= captions.keys()  # a rare field may be absent from the first inputs
        self.captions = choose_captions(captions, there, str(place.root), faults[:1])
        self.shards = len(place.files)

    def read(self, shard: int, start: int = 0) -> Iterator[Input]:
        name = self.place.files[shard][: -len(".tar")]
        for group in islice(groups(self.place.root / self.place.files[shard]), start, None):
            if isinstance(group, Fault):
                yield group._replace(id=name)
            else:
                yield self._input(f"{name}/{group[0]}", group[1])

    def _input(self, name: str, members: dict[str, "Member"]) -> Input:
        wanted = [{self.image}] if self.image else [EXTENSIONS, FOREIGN]
        fields = next((found for kind in wanted if (found := [field for field in members if field in kind])), [])
        if len(fields) > 1:
            return Fault(name, "several pictures", f"{', '.join(fields)}: name one with image")
        row: dict[str, Any] = {}
        for column in self.captions:
            field, _, key = column.partition(".")
            try:
                if field == "json" and key and field in members:
                    row[column] = members[field].parse().get(key)
                elif column in members:
                    row[column] = decode(members[column].read(LARGEST_CAPTION), "it")
            except ValueError as error:
                return Fault(name, "unreadable caption", f"{column}: {one_line(error)}")
        if not fields:
            return to_input(name, None, dict.fromkeys(members), self.captions)
        picture = members[fields[0]]
        if picture.info.size > LARGEST_FILE:
            return Fault(name, "too large", f"{fields[0]} has more than {LARGEST_FILE:,} bytes")
        try:
            return to_input(name, picture.read(LARGEST_FILE), row, self.captions)
        except ValueError as error:
            return Fault(name, "no picture", one_line(error))

    def describe(self) -> dict[str, Any]:
        return {"kind": "tar", "captions": self.captions, "image": self.image, "files": self.place.sizes()}


class Member(NamedTuple):
    """A file in a tar."""

    tar: tarfile.TarFile
    info: tarfile.TarInfo

    def read(self, limit: int) -> bytes:
        """Its content; ValueError for a link, or for more bytes than the limit, as a sparse file may have."""
        if self.info.size > limit:
            raise ValueError(f"{self.info.name} has more than {limit:,} bytes")
        stream = self.tar.extractfile(self.info) if self.info.isreg() else None
        if stream is None:
            raise ValueError(f"{self.info.name} is a link, not a file")
        try:
            return stream.read()
        except tarfile.TarError as error:
            raise ValueError(f"{self.info.name} is not whole: {error}") from None

    def parse(self) -> dict[str, Any]:
        """Its content as a JSON object; ValueError if it is something else."""
        content = parse_json(self.read(LINE_LIMIT), self.info.name)
        if not isinstance(content, dict):
            raise ValueError(f"{self.info.name} holds no JSON object")
        return content


def groups(file: Path) -> Iterator[tuple[str, dict[str, Member]] | Fault]:
    """The inputs of a tar as (key, field → member); a truncated or damaged tar ends with a Fault without an id."""
    size = file.stat().st_size
    key, members = "", dict[str, Member]()
    tar: tarfile.TarFile | None = None
    with Stream(file.open("rb", buffering=0)) as stream:
        try:
            start = stream.peek()
            if kind := next((kind for kind, mark in PACKED.items() if re.match(mark, start)), None):
                yield Fault("", "damaged shard", f"{file.name} is compressed by {kind}: unpack it first")
                return
            tar = tarfile.TarFile(fileobj=stream)
            for info in tar:
                if info.size < 0:  # some versions of tarfile would read it again and again
                    raise tarfile.ReadError(f"{info.name} has a size below zero")
                found = None if info.isdir() else MEMBER.fullmatch(info.name.removeprefix("./"))
                if found and members and (found[1] != key or found[2].lower() in members):
                    yield key, members
                    members = {}
                if info.isreg() and not info.issparse() and info.offset_data + info.size > size:
                    if members and not found:  # an input with a truncated member is left out
                        yield key, members
                    yield Fault("", "truncated shard", f"{file.name} ends within {info.name}")
                    return
                if found:
                    key = found[1]
                    members[found[2].lower()] = Member(tar, info)
            fault = ending(stream, tar.offset)
        except Exception as error:  # tarfile may raise anything for damaged headers
            cut = (tar.offset if tar else 0) + tarfile.BLOCKSIZE > size
            fault = Fault("", "truncated shard" if cut else "damaged shard", f"{file.name}: {one_line(error)}")
        if members:
            yield key, members
        if fault:
            yield fault


class Stream(io.BufferedReader):
    """A file that is never read in pieces that are larger than a picture may be."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LARGEST_FILE + tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"a header has {size} bytes")
        return super().read(size)


def ending(stream: BinaryIO, offset: int) -> Fault | None:
    """The fault at the end of a tar, at which tarfile stops silently: only zeros may follow."""
    stream.seek(offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return Fault("", "truncated shard", f"there is no end mark at byte {offset}")
    while block:
        if block.count(0) != len(block):
            return Fault("", "damaged shard", f"what follows byte {offset} is no member and no end")
        block = stream.read(2**20)
    return None
