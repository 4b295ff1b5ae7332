"""Tars of captioned pictures: what comes out of them, and what a damaged one gives."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captioned import PHOTOS, coded, dot, everything, reasons, write_rows, write_tar
from PIL import Image

from data.raw.base import Fault, Raw
from data.raw.pictures import PictureError, open_picture
from data.raw.sources import Pictures


def test_photographs_pass_through_a_webdataset_unchanged(tmp_path: Path) -> None:
    for shard in range(2):
        members = []
        for i, photo in enumerate(PHOTOS):
            lossy = coded(Image.fromarray(photo), "JPEG", quality=90)
            members += [
                (f"{shard}{i:03}.{'png' if i else 'JPG'}", coded(Image.fromarray(photo)) if i else lossy),
                (f"{shard}{i:03}.txt", f"photo {i}".encode()),
                (f"{shard}{i:03}.json", json.dumps({"caption": f"{i} more", "width": 3}).encode()),
            ]
        write_tar(tmp_path / f"{shard:05}.tar", members)
        write_rows(tmp_path / f"{shard:05}.parquet", 0, 3)  # as img2dataset puts beside them
        (tmp_path / f"{shard:05}_stats.json").write_text("{}")
    source = Pictures(str(tmp_path), {"txt": 1, "json.caption": 3})
    assert source.shards == 2
    for shard in range(2):
        read = list(source.read(shard))
        assert [r.id for r in read] == [f"{shard:05}/{shard}{i:03}" for i in range(3)]
        assert [r.captions for r in read] == [(f"photo {i}", f"{i} more") for i in range(3)]
        assert {r.weights for r in read} == {(1, 3)}
        for r, photo in zip(read[1:], PHOTOS[1:], strict=True):
            assert np.array_equal(open_picture(r.picture, 3), photo)
        close = np.abs(np.asarray(open_picture(read[0].picture, 3)).astype(int) - PHOTOS[0])
        assert close.mean() < 4
        assert list(source.read(shard, 2)) == read[2:]
    assert list(pickle.loads(pickle.dumps(source)).read(1)) == list(source.read(1))
    assert Pictures(str(tmp_path / "0000*.tar")).describe()["captions"] == {"txt": 1.0}
    with pytest.raises(ValueError, match="shards 0 to 1, not 2"):
        list(source.read(2))


def test_inputs_of_a_tar_that_are_not_whole_are_faults(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "x/a.b.tar",
        [
            ("./d.1/good.png", dot(1)), ("./d.1/good.txt", b"good"),
            ("same.png", dot(2)), ("same.txt", b"1"), ("same.png", dot(3)), ("same.txt", b"2"),
            ("silent.png", dot(4)), ("blind.txt", b"blind"), ("README", b""), ("._good.png", b""),
            ("two.png", dot(5)), ("two.jpg", dot(5)), ("two.txt", b"two"),
            ("torn.png", dot(6)), ("torn.txt", b"\xff"), ("mask.png", dot(7)), ("mask.seg.png", dot(8)),
            ("mask.txt", b"mask"), ("empty.png", b""), ("empty.txt", b"empty"),
        ],
    )  # fmt: skip
    found = [(entry.id, getattr(entry, "reason", "")) for entry in everything(Pictures(str(tmp_path)))]
    assert found == [
        ("x/a.b/d.1/good", ""), ("x/a.b/same", ""), ("x/a.b/same", ""), ("x/a.b/silent", "no caption"),
        ("x/a.b/blind", "no picture"), ("x/a.b/two", "several pictures"), ("x/a.b/torn", "unreadable caption"),
        ("x/a.b/mask", ""), ("x/a.b/empty", ""),
    ]  # fmt: skip
    masks = {entry.id: entry for entry in everything(Pictures(str(tmp_path), image="seg.png"))}
    assert masks["x/a.b/mask"].picture == dot(8)
    assert masks["x/a.b/two"].reason == "no picture"


def test_a_link_in_a_tar_is_no_picture(tmp_path: Path) -> None:
    with tarfile.open(write_tar(tmp_path / "x.tar", [("a.txt", b"a")]), "a") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    assert reasons(Pictures(str(tmp_path))) == {"x/a": "no picture"}


def test_a_tar_cut_anywhere_gives_its_whole_inputs_and_one_fault(tmp_path: Path) -> None:
    members = [
        (f"{i}.{kind}", dot(i) if kind == "png" else f"{i}".encode()) for i in range(3) for kind in ("png", "txt")
    ]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [info.offset_data + info.size for info in tar]
        padded = tar.offset
    assert len(everything(Pictures(str(tmp_path / "whole.tar")))) == 3
    for length in [*range(1100, padded, 97), *ends, padded]:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        *read, last = Pictures(str(tmp_path / "*.tar")).read(0)  # the fields may be found in the other one
        complete = sum(end <= length for end in ends[1::2])
        assert [entry.id for entry in read if isinstance(entry, Raw)] == [f"cut/{i}" for i in range(complete)]
        assert (last.id, last.reason) == ("cut", "truncated shard")
        lost = [(entry.id, entry.reason) for entry in read if isinstance(entry, Fault)]
        assert lost in ([], [(f"cut/{complete}", "no caption")])  # cut between a picture and its caption


def test_an_input_that_lost_one_of_its_members_is_not_taken(tmp_path: Path) -> None:
    members = [
        (f"{i}.{kind}", dot(i) if kind == "png" else b"caption") for i in (0, 1) for kind in ("png", "txt", "text")
    ]
    whole = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(whole) as tar:
        last = tar.getmembers()[-1]
    whole.write_bytes(whole.read_bytes()[: last.offset_data + 3])
    read = list(Pictures(str(tmp_path), {"txt": 1, "text": 1}).read(0))
    assert [(entry.id, getattr(entry, "reason", "")) for entry in read] == [("a/0", ""), ("a", "truncated shard")]


def test_damage_in_a_tar_is_one_fault(tmp_path: Path) -> None:
    members = [(f"{i}.{kind}", dot(i) if kind == "png" else b"x") for i in range(3) for kind in ("png", "txt")]
    good = write_tar(tmp_path / "b.tar", members).read_bytes()
    for content, inputs, reason in (
        (good[:2048] + b"\x07" * 512 + good[2560:], 1, "damaged shard"),  # where the third header was
        (good + good, 3, "damaged shard"),  # tarfile would not look behind the end
        (b"<html>" * 1000, 0, "damaged shard"),
        (b"", 0, "truncated shard"),
    ):
        (tmp_path / "a.tar").write_bytes(content)
        *read, last = Pictures(str(tmp_path)).read(0)
        assert [entry.id for entry in read] == [f"a/{i}" for i in range(inputs)]
        assert (last.id, last.reason) == ("a", reason)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (str(self.file), 0o777)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    names = ("pkl", "pickle", "pyd", "pth", "npy", "npz", "cls", "txt", "png", "json")
    sprung = write_tar(tmp_path / "t" / "x.tar", [(f"a.{name}", trap) for name in names] + [("b.txt", b"b")])
    assert reasons(Pictures(str(sprung.parent), {"txt": 1, "json.text": 1, "pkl": 1}))["x/a"] == "unreadable caption"
    with pytest.raises(PictureError):
        open_picture(trap, 3)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # so the trap is one


def add_member(tar: tarfile.TarFile, name: str, content: bytes | int) -> None:
    """Adds a file, or a sparse one of this size of which all but 512 bytes are a hole."""
    info = tarfile.TarInfo(name)
    if isinstance(content, int):
        kind = {"major": "1", "minor": "0", "name": name, "realsize": str(content)}
        info.pax_headers = {f"GNU.sparse.{key}": value for key, value in kind.items()}
        content = b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("size", [2**40, 2**31])
def test_members_that_are_too_large_are_left_out_unread(tmp_path: Path, size: int) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (
            ("a.png", size), ("a.txt", b"a"), ("b.png", dot(1)), ("b.txt", size), ("c.png", dot(2)),
            ("c.json", size), ("d.png", dot(3)), ("d.json", b'{"text": "d"}'), ("e.png", dot(4)), ("e.txt", 2**20 + 1),
        ):  # fmt: skip
            add_member(tar, name, content)
    assert (tmp_path / "x.tar").stat().st_size < 30_000
    tracemalloc.start()
    read = reasons(Pictures(str(tmp_path), {"txt": 1, "json.text": 1}))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    lost = dict.fromkeys(("x/b", "x/c", "x/e"), "unreadable caption")
    assert read == {"x/a": "too large", "x/d": "", **lost}
    assert most < 2**25


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [2**40, -1024])
def test_a_header_with_an_absurd_size_is_one_fault(tmp_path: Path, kind: bytes, size: int) -> None:
    bad = tarfile.TarInfo("b.png")
    bad.type, bad.size = kind, size
    whole = write_tar(tmp_path / "x.tar", [("a.png", dot(1)), ("a.txt", b"a")]).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:2048] + bad.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    read = everything(Pictures(str(tmp_path)))
    assert [entry.id for entry in read] == ["x/a", "x"]
    assert read[1].reason in ("damaged shard", "truncated shard")


def test_captions_of_a_tar_keep_what_ends_no_line_and_lose_a_byte_order_mark(tmp_path: Path) -> None:
    told = "one\u2028still\x85one\x0band\x0cone"
    marked = b"\xef\xbb\xbf" + json.dumps({"text": told}).encode()
    write_tar(tmp_path / "x.tar", [("a.png", dot(1)), ("a.txt", f"\ufeff{told}".encode()), ("a.json", marked)])
    (read,) = everything(Pictures(str(tmp_path), {"txt": 1, "json.text": 1}))
    assert read.captions == (told, told)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_named(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    whole = write_tar(tmp_path / "a.tar", [("a.png", dot(1)), ("a.txt", b"a")]).read_bytes()
    (tmp_path / "a.tar").write_bytes(pack(whole))
    with pytest.raises(ValueError, match=r"there are: none; a.tar is compressed by \w+: unpack it first$"):
        Pictures(str(tmp_path))
    (tmp_path / "b.tar").write_bytes(whole)
    assert reasons(Pictures(str(tmp_path))) == {"a": "damaged shard", "b/a": ""}
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).rename(tmp_path / f"{name}.gz")
    for path in (tmp_path, tmp_path / "a.tar.gz"):
        with pytest.raises(ValueError, match=r"unpack compressed tars to .tar files first$"):
            Pictures(str(path))


def test_a_picture_of_a_foreign_format_is_taken_if_there_is_no_other(tmp_path: Path) -> None:
    members = [("a.heic", b"foreign"), ("a.txt", b"a"), ("b.psd", b"foreign"), ("b.png", dot(1)), ("b.txt", b"b")]
    write_tar(tmp_path / "x.tar", members)
    assert [entry.picture for entry in everything(Pictures(str(tmp_path)))] == [b"foreign", dot(1)]
