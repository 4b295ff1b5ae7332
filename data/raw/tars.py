"""Captioned pictures in WebDataset tars."""

import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

from data.raw.base import EXTENSIONS, LIKELY, Fault, Input, Place, Source, choose_captions, one_line, to_input

SCANNED = 100  # inputs of a tar, and tars, that are searched at most for the names of fields
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key and field, as WebDataset splits a name


@final
class Tars(Source):
    """WebDataset tars, read by Python's tarfile; no member is ever unpickled."""

    def __init__(self, place: Place, captions: dict[str, float] | None, image: str | None) -> None:
        self.place, self.image = place, image
        there: set[str] = set()
        for name in place.files[:SCANNED]:
            for group in islice(groups(place.root / name), SCANNED):
                if not isinstance(group, Fault):
                    there |= group[1].keys()
                    with suppress(KeyError, ValueError):
                        there |= {f"json.{column}" for column in group[1]["json"].parse()}
            if not there.isdisjoint(captions or LIKELY):
                break
        if captions and there & captions.keys():
            there |= captions.keys()  # a rare field may be absent from the first inputs
        self.captions = choose_captions(captions, there, str(place.root))
        self.shards = len(place.files)

    def read(self, shard: int, start: int = 0) -> Iterator[Input]:
        name = self.place.files[shard][: -len(".tar")]
        for group in islice(groups(self.place.root / self.place.files[shard]), start, None):
            if isinstance(group, Fault):
                yield group._replace(id=name)
            else:
                yield self._input(f"{name}/{group[0]}", group[1])

    def _input(self, name: str, members: dict[str, "Member"]) -> Input:
        fields = [field for field in members if (field == self.image if self.image else field in EXTENSIONS)]
        if len(fields) > 1:
            return Fault(name, "several pictures", f"{', '.join(fields)}: name one with image")
        row: dict[str, Any] = {}
        for column in self.captions:
            field, _, key = column.partition(".")
            try:
                if field == "json" and key and field in members:
                    row[column] = members[field].parse().get(key)
                elif column in members:
                    row[column] = members[column].read().decode("utf-8-sig")
            except ValueError as error:
                return Fault(name, "unreadable caption", f"{column}: {one_line(error)}")
        if not fields:
            return to_input(name, None, dict.fromkeys(members), self.captions)
        try:
            return to_input(name, members[fields[0]].read(), row, self.captions)
        except ValueError as error:
            return Fault(name, "no picture", one_line(error))

    def describe(self) -> dict[str, Any]:
        return {"kind": "tar", "captions": self.captions, "image": self.image, "files": self.place.sizes()}


class Member(NamedTuple):
    """A file in a tar."""

    tar: tarfile.TarFile
    info: tarfile.TarInfo

    def read(self) -> bytes:
        """Its content; ValueError for a link."""
        stream = self.tar.extractfile(self.info) if self.info.isreg() else None
        if stream is None:
            raise ValueError(f"{self.info.name} is a link, not a file")
        return stream.read()

    def parse(self) -> dict[str, Any]:
        """Its content as a JSON object; ValueError if it is something else."""
        try:
            content = json.loads(self.read())
        except RecursionError:
            content = None
        if not isinstance(content, dict):
            raise ValueError(f"{self.info.name} holds no JSON object")
        return content


def groups(file: Path) -> Iterator[tuple[str, dict[str, Member]] | Fault]:
    """The inputs of a tar as (key, field → member); a truncated or damaged tar ends with a Fault without an id."""
    size = file.stat().st_size
    key, members = "", dict[str, Member]()
    tar: tarfile.TarFile | None = None
    with file.open("rb") as stream:
        try:
            tar = tarfile.TarFile(fileobj=stream)
            for info in tar:
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
