"""Captioned pictures as users bring them: what is read, what is refused, and that the counts add up."""

import csv
import io
import json
import os
import pickle
import runpy
import shutil
import struct
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage.data import astronaut
from sklearn.datasets import load_sample_images

from data.raw.base import Fault, Filters, Raw, perceptual_hash
from data.raw.pictures import LARGEST, PictureError, cover, open_picture, size_of
from data.raw.sources import Pictures
from data.raw.tables import Table

PHOTOS = [*load_sample_images().images, astronaut()]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def coded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def dot(level: int) -> bytes:
    return coded(Image.new("RGB", (8, 8), (level % 256, level // 256, 0)))


def everything(source: Any) -> list[Raw | Fault]:
    return [entry for shard in range(source.shards) for entry in source.read(shard)]


def reasons(source: Any) -> dict[str, str]:
    return {entry.id: entry.reason if isinstance(entry, Fault) else "" for entry in everything(source)}


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def write_rows(file: Path, start: int, count: int, **more: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = range(start, start + count)
    table = pa.table(
        {"image": [{"bytes": dot(i), "path": None} for i in rows], "text": [f"row {i}" for i in rows], **more}
    )
    pq.write_table(table, file, row_group_size=7)
    return file


def folder_of_pictures(root: Path) -> Path:
    for i, name in enumerate(("a.jpg", "b/c.png", "b/d/e.webp", "f.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name)
    return root


# Every layout


def with_texts(root: Path) -> Path:
    for name in ("a", "b/c", "b/d/e", "f"):
        folder_of_pictures(root).joinpath(f"{name}.txt").write_text(f" {name} \n")
    return root


def with_jsonl(root: Path) -> Path:
    folder_of_pictures(root)
    rows = [{"file_name": n, "text": n.split(".")[0], "n": 1} for n in ("a.jpg", "b/c.png", "f.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (root / "b/d/metadata.jsonl").write_text(json.dumps({"file_name": "e.webp", "text": "b/d/e"}))
    return root


def with_csv(root: Path) -> Path:
    folder_of_pictures(root)
    with (root / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        names = ["a.jpg", "b/c.png", "b/d/e.webp", "f.png"]
        csv.writer(stream).writerows([["file_name", "text"], *([name, name.split(".")[0]] for name in names)])
    return root


def with_parquet(root: Path) -> Path:
    names = ["a.jpg", "b/c.png", "b/d/e.webp", "f.png"]
    table = pa.table({"file_name": names, "text": [name.split(".")[0] for name in names]})
    pq.write_table(table, folder_of_pictures(root) / "metadata.parquet")
    return root


def with_img2dataset_s_tables(root: Path) -> Path:
    write_rows(with_texts(root) / "b.parquet", 0, 3)
    return root


@pytest.mark.parametrize("layout", [with_texts, with_jsonl, with_csv, with_parquet, with_img2dataset_s_tables])
def test_a_folder_is_read_whole_in_any_layout(tmp_path: Path, layout: Any) -> None:
    source = Pictures(str(layout(tmp_path / "here")))
    read = everything(source)
    assert [(r.id, r.captions, r.weights) for r in read] == [
        (name, (name.split(".")[0],), (1.0,)) for name in ("a.jpg", "b/c.png", "b/d/e.webp", "f.png")
    ]
    assert [open_picture(r.picture, 3).size for r in read] == [(8, 8)] * 4
    assert [r.id for r in everything(Pictures(str(layout(tmp_path / "far/away"))))] == [r.id for r in read]


@pytest.mark.parametrize("layout", [with_jsonl, with_csv])
def test_what_imagefolder_reads_is_read_alike(tmp_path: Path, layout: Any) -> None:
    layout(tmp_path)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    ours = everything(Pictures(str(tmp_path)))
    assert sorted((row["image"]["path"], row["text"]) for row in theirs) == [
        (str(r.picture), r.captions[0]) for r in ours
    ]


def test_links_are_followed_once(tmp_path: Path) -> None:
    with_texts(tmp_path / "far")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to(tmp_path / "far")
    (tmp_path / "far/b/loop").symlink_to(tmp_path / "far")
    (tmp_path / "here/nothing.png").symlink_to(tmp_path / "nowhere")
    source = Pictures(str(tmp_path / "here"))
    names = ["link/a.jpg", "link/b/c.png", "link/b/d/e.webp", "link/f.png"]
    assert reasons(source) == {**dict.fromkeys(names, ""), "nothing.png": "no picture"}
    assert source.describe()["inputs"] == 5


def test_a_folder_s_every_picture_and_row_is_counted(tmp_path: Path) -> None:
    folder_of_pictures(tmp_path)
    rows = [
        {"file_name": "a.jpg", "text": "one", "tags": ["two", " three ", ""]},
        {"file_name": "a.jpg", "text": "again"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "../out.png", "text": "x"},
        {"file_name": "f.png", "text": 7},
        {"text": "of nothing"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*map(json.dumps, rows), "{torn"]))
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "b/c.txt").write_text("beside")
    source = Pictures(str(tmp_path), {"text": 1.0, "tags": 0.5, "txt": 2.0})
    found = [(entry.id, getattr(entry, "reason", "")) for entry in everything(source)]
    assert found == [
        ("a.jpg", ""),
        ("a.jpg", ""),  # two rows, whose ids tell of it
        ("b/c.png", ""),
        ("b/d/e.webp", "no caption"),
        ("f.png", "unreadable caption"),
        ("gone.png", "no picture"),
        ("metadata.jsonl:4", "unreadable row"),
        ("metadata.jsonl:6", "unreadable row"),
        ("metadata.jsonl:7", "unreadable row"),
    ]
    first = next(iter(source.read(0)))
    assert (first.captions, first.weights) == (("one", "two", "three"), (1.0, 0.25, 0.25))
    assert source.describe()["inputs"] == 9


def test_captions_that_no_file_can_hold_or_that_are_no_text_are_faults(tmp_path: Path) -> None:
    for name, content in (("a", b"\xff\xfe\x00"), ("b", b" \n"), ("c", "é".encode())):
        (tmp_path / f"{name}.png").write_bytes(dot(1))
        (tmp_path / f"{name}.txt").write_bytes(content)
    assert reasons(Pictures(str(tmp_path))) == {"a.png": "unreadable caption", "b.png": "no caption", "c.png": ""}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "\\ud800"}')
    assert reasons(Pictures(str(tmp_path), {"text": 1}))["a.png"] == "unreadable caption"


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_is_read_row_by_row(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.raw.tables.UNIT", 16)
    for k, (start, count) in enumerate(((0, 30), (30, 0), (30, 11))):
        write_rows(tmp_path / f"set [1]/part-{k}.parquet", start, count)
    source = Pictures(str(tmp_path / "set [1]"), streaming=streaming)
    assert source.shards == 3  # three files, or 41 rows by 16
    read = everything(source)
    assert [r.captions[0] for r in read] == [f"row {i}" for i in range(41)]
    assert [r.picture for r in read] == [dot(i) for i in range(41)]
    assert [r.id for r in read] == [f"part-0/{i}" for i in range(30)] + [f"part-2/{i}" for i in range(11)]
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy.read(2)) == list(source.read(2))
    for shard in range(3):
        whole = list(source.read(shard))
        for start in (0, 1, 5, len(whole), len(whole) + 3):
            assert list(source.read(shard, start)) == whole[start:]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_pictures_and_captions_of_other_kinds(tmp_path: Path, streaming: bool) -> None:
    table = {
        "jpg": [dot(0), None, b"", dot(3)],
        "caption": ["a", "b", "c", None],
        "many": [["x", "y", None], [], None, None],
        "n": [1, 2, 3, 4],
    }
    pq.write_table(pa.table(table), tmp_path / "img2dataset.parquet")
    source = Pictures(str(tmp_path / "*.parquet"), {"many": 1, "caption": 2}, streaming=streaming)
    read = everything(source)
    assert [getattr(entry, "reason", entry[2:]) for entry in read] == [
        (("x", "y", "a"), (0.5, 0.5, 2)), "no picture", (("c",), (2,)), "no caption"
    ]  # fmt: skip
    pictures = datasets.Dataset.from_dict({"photo": [Image.new("L", (5, 4))], "prompt": ["p"]})
    pictures.to_parquet(tmp_path / "theirs.parquet")
    (theirs,) = everything(Pictures(str(tmp_path / "theirs.parquet"), streaming=streaming))
    assert (theirs.captions, open_picture(theirs.picture, 1).size) == (("p",), (5, 4))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_by_name_goes_the_way_of_the_hub(tmp_path: Path, streaming: bool) -> None:
    write_rows(tmp_path / "set/data/train-00000-of-00001.parquet", 0, 3)
    write_rows(tmp_path / "set/data/test-00000-of-00001.parquet", 3, 2)
    source = Table(str(tmp_path / "set"), None, None, None, "test", streaming)
    assert [r.captions[0] for r in everything(source)] == ["row 3", "row 4"]
    assert [r.id for r in everything(source)] == (["0/0", "0/1"] if streaming else ["0", "1"])
    assert list(pickle.loads(pickle.dumps(source)).read(0, 1)) == list(source.read(0))[1:]
    json.dumps(source.describe())
    write_tar(tmp_path / "tars/a.tar", [("a.png", dot(0)), ("a.txt", b"a")])
    with pytest.raises(ValueError, match="it is a webdataset, which is read from disk"):
        Table(str(tmp_path / "tars"), None, None, None, "train", streaming)
    assert not datasets.are_progress_bars_disabled()


def test_a_hub_s_name_that_cannot_be_had_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^nobody/nothing: there is nothing at this path, and as a name on .*\Z"):
        Pictures("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="there is no /nowhere/at/all"):
        Pictures("/nowhere/at/all")


# Tars


def test_photographs_come_out_of_a_webdataset_as_they_went_in(tmp_path: Path) -> None:
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


# What is refused as a whole


def test_what_is_empty_ambiguous_or_foreign_is_told_in_one_line(tmp_path: Path) -> None:
    def refused(message: str, *arguments: Any, **more: Any) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            Pictures(*arguments, **more)
        assert "\n" not in str(caught.value)

    (tmp_path / "empty").mkdir()
    refused("there is no picture, .parquet or .tar in", str(tmp_path / "empty"))
    refused("must stand for .parquet files or for .tar files, found none", str(tmp_path / "*.tar"))
    rows = str(write_rows(tmp_path / "rows/a.parquet", 0, 40, url=["u"] * 40))
    refused("has no caption column named one of text.*there are: url", str(no_text(tmp_path / "none.parquet")))
    refused("no caption column nope; there are: text, url", rows, {"nope": 1})
    refused("no column url with pictures; there are: image", rows, image="url")
    refused("finite weights above 0", rows, {"text": 0})
    refused("finite weights above 0", rows, {})
    content = Path(rows).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-100])
    refused("cut.parquet is no whole Parquet file", str(tmp_path / "cut.parquet"))
    (tmp_path / "foreign.parquet").write_bytes(b"<html>" * 100)
    refused("foreign.parquet is no whole Parquet file", str(tmp_path / "foreign.parquet"))
    write_rows(tmp_path / "rows/b.parquet", 0, 1).write_bytes(no_text(tmp_path / "none.parquet").read_bytes())
    refused("column text of b.parquet is not as in a.parquet", str(tmp_path / "rows"))
    folder_of_pictures(tmp_path / "mixed")
    write_tar(tmp_path / "mixed/x.tar", [("a.png", dot(0))])
    refused("holds 4 pictures .* 1 tar .* of one kind", str(tmp_path / "mixed"))
    folder_of_pictures(tmp_path / "bare")
    refused("has no caption column .*; there are: none", str(tmp_path / "bare"))
    refused("taken as one split", str(tmp_path / "bare"), split="test")
    two = pa.table({"image": [dot(0)], "png": [dot(0)], "text": ["x"]})
    pq.write_table(two, tmp_path / "two.parquet")
    refused("has no one column with pictures", str(tmp_path / "two.parquet"))


def no_text(file: Path) -> Path:
    pq.write_table(pa.table({"image": [{"bytes": dot(0), "path": None}], "url": ["u"]}), file)
    return file


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_damaged_pages_is_told(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "a.parquet", 0, 40)
    content = bytearray(file.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = b"\xa5" * (len(content) - footer - 4)
    file.write_bytes(bytes(content))
    source = Pictures(str(file), streaming=streaming)
    with pytest.raises(ValueError, match="cannot be"):
        everything(source)


def test_splits_are_told_apart_by_the_names_of_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-00000-of-00001.parquet", 0, 2)
    assert Pictures(str(tmp_path)).describe()["inputs"] == 2
    write_rows(tmp_path / "validation/0.parquet", 2, 3)
    assert Pictures(str(tmp_path)).describe()["inputs"] == 2
    assert Pictures(str(tmp_path), split="validation").describe()["inputs"] == 3
    assert Pictures(str(tmp_path / "**/*.parquet")).describe()["inputs"] == 5  # a glob means what it says
    with pytest.raises(ValueError, match="has no split test, only train, validation"):
        Pictures(str(tmp_path), split="test")
    write_rows(tmp_path / "more.parquet", 5, 1)
    with pytest.raises(ValueError, match="and files of none: give a glob"):
        Pictures(str(tmp_path))


def test_shards_cover_everything_once_and_data_that_changed_are_described_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.raw.folder.UNIT", 3)
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(dot(i))
        (tmp_path / f"{i}.txt").write_text(str(i))
    first, second = Pictures(str(tmp_path)), Pictures(str(tmp_path))
    assert first.shards == 3
    assert [len(list(first.read(shard))) for shard in range(3)] == [3, 3, 2]
    assert everything(first) == everything(second)
    assert sorted(entry.id for entry in everything(first)) == [f"{i}.png" for i in range(8)]
    assert list(first.read(1, 2)) == list(first.read(1))[2:]
    assert list(first.read(1, 3)) == []
    assert json.loads(json.dumps(first.describe())) == json.loads(json.dumps(second.describe()))
    before = first.describe()
    (tmp_path / "3.txt").write_text("4")  # another caption of the same length
    changed = Pictures(str(tmp_path)).describe()
    assert changed != before
    (tmp_path / "4.txt").write_text("longer")
    assert Pictures(str(tmp_path)).describe() not in (before, changed)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "3.png", "text": "a"}')
    unused = Pictures(str(tmp_path), {"text": 1}).describe()
    (tmp_path / "3.txt").write_text("3")
    assert Pictures(str(tmp_path), {"text": 1}).describe() == unused  # texts that are not asked for are no captions


def a_tar(root: Path) -> Path:
    return write_tar(root / "0.tar", [("a.png", dot(0)), ("a.txt", b"a")]).parent


def a_table(root: Path) -> Path:
    return write_rows(root / "0.parquet", 0, 3).parent


@pytest.mark.parametrize("layout", [with_texts, with_jsonl, a_tar, a_table])
def test_data_that_were_moved_are_the_same(tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    described = Pictures(str(layout(tmp_path / "here"))).describe()
    shutil.move(tmp_path / "here", tmp_path / "far/there")
    monkeypatch.chdir(tmp_path / "far")
    for path in (str(tmp_path / "far/there"), "there", "there/", "../far/there"):
        assert Pictures(path).describe() == described
    assert str(tmp_path) not in json.dumps(described)


def test_a_hub_s_data_are_described_by_their_name_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path / f"user/set/data/{split}-00000-of-00001.parquet", 0, 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.raw.sources.locate", lambda path, split: None)  # so that a folder stands for the hub
    for split in ("train", "test"):
        described = Pictures("user/set", split=split, streaming=True).describe()
        assert (described["kind"], described["path"], described["split"]) == ("hub", "user/set", split)


# Pictures


def test_each_picture_of_the_list_has_its_outcome(tmp_path: Path) -> None:
    still, frames = Image.new("RGB", (20, 10), "red"), [Image.new("RGB", (20, 10), c) for c in ("red", "blue")]
    photo = coded(Image.fromarray(PHOTOS[2]), "JPEG")
    animated = {f: coded(frames[0], f, save_all=True, append_images=frames[1:]) for f in ("GIF", "WEBP", "PNG")}
    outcomes: list[tuple[bytes, str]] = [
        (b"", "empty file"), (b"no picture", "unreadable"), (photo[: len(photo) // 2], "unreadable"),
        (coded(still)[:50], "unreadable"), (coded(still, "TGA"), "unreadable"),
        (animated["GIF"], "animated"), (animated["WEBP"], "animated"), (animated["PNG"], "animated"),
        (coded(Image.new("F", (3, 3)), "TIFF"), "unreadable"), (coded(still, "GIF"), ""), (coded(still, "WEBP"), ""),
        (coded(still, "MPO", save_all=True, append_images=frames[1:]), ""), (photo, ""),
    ]  # fmt: skip
    for content, reason in outcomes:
        (tmp_path / "x").write_bytes(content)
        for source in (content, tmp_path / "x"):
            assert outcome(source) == reason
    assert outcome(tmp_path / "nowhere") == "unreadable"
    with pytest.raises(PictureError, match="20×10 pixels, more than 199"):
        open_picture(coded(still), 3, largest=199)
    again = pickle.loads(pickle.dumps(PictureError("animated", "it has 2 frames")))
    assert (again.reason, str(again)) == ("animated", "it has 2 frames")


def outcome(source: Any) -> str:
    try:
        image = open_picture(source, 3)
    except PictureError as error:
        return error.reason
    assert image.mode == "RGB"
    assert size_of(source) == (image.height, image.width)
    return ""


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM", "JPEG2000"])
def test_no_format_is_read_when_it_is_cut(format: str) -> None:
    content = coded(Image.fromarray(PHOTOS[2][:128, :128]), format)
    assert outcome(content) == ""
    assert {outcome(content[: int(part * len(content))]) for part in (0.01, 0.3, 0.7, 0.98)} == {"unreadable"}


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    wanted = np.round(levels / 257).astype(int)
    for format in ("PNG", "TIFF"):
        grey = np.asarray(open_picture(coded(Image.fromarray(levels), format), 1)).astype(int)
        assert np.array_equal(grey, wanted)
    triple = np.stack([levels, levels[::-1], levels.T], axis=-1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in triple)
    colour = np.asarray(open_picture(png(16, 16, 16, 2, rows), 3)).astype(int)
    assert np.abs(colour - triple / 257).max() <= 1
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    holes = open_picture(png(16, 16, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 65535))), 1)
    assert holes.getpixel((15, 15)) == 0
    assert holes.getpixel((14, 15)) == 254


def test_grey_cmyk_and_holes_look_as_they_should() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert np.array_equal(np.asarray(open_picture(coded(grey), 3))[..., 1], np.asarray(grey))
    assert np.array_equal(open_picture(grey, 1), grey)
    for colour in ("red", "white", "black"):
        printed = open_picture(coded(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=100), 3)
        assert np.abs(np.asarray(printed).astype(int) - Image.new("RGB", (16, 16), colour)).max() < 8
    half = Image.new("RGBA", (8, 8), (200, 100, 50, 255))
    half.paste((255, 255, 255, 0), (0, 0, 4, 8))
    palette = half.convert("RGB").quantize(4)
    index = palette.getpixel((0, 0))
    for content in (coded(half), coded(half, "WEBP", lossless=True), coded(palette, transparency=index),
                    coded(palette, "GIF", transparency=index), coded(half.convert("LA"))):  # fmt: skip
        shown = np.asarray(open_picture(content, 3)).astype(int)
        assert shown[:, :4].max() == 0
        assert shown[:, 4:].min() > 40
    keyed = open_picture(coded(half.convert("RGB"), transparency=(255, 255, 255)), 3)
    assert [keyed.getpixel((0, 0)), keyed.getpixel((7, 0))] == [(0, 0, 0), (200, 100, 50)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_whatever_its_exif_says(orientation: int) -> None:
    upright = Image.fromarray(PHOTOS[2][:64, :96])
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that brings upright into this orientation
    turned = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = coded(turned, exif=exif)
    assert np.array_equal(open_picture(content, 3), upright)
    assert size_of(content) == (64, 96)
    assert np.array_equal(open_picture(Image.open(io.BytesIO(content)), 3), upright)
    deep = Image.fromarray(np.asarray(turned.convert("L")).astype(np.uint16) * 257)
    assert np.array_equal(open_picture(coded(deep, exif=exif), 1), upright.convert("L"))


def test_what_is_too_large_is_never_decoded_but_long_strips_are() -> None:
    bomb = png(30_000, 30_000, 8, 2, b"")  # without a pixel: decoding it would be another error
    assert outcome(bomb) == "too large"
    assert outcome(png(2**14, LARGEST // 2**14 + 1, 8, 0, b"")) == "too large"
    strip = png(30_000, 100, 8, 0, b"".join(b"\0" + bytes(30_000) for _ in range(100)))
    assert open_picture(strip, 1).size == (30_000, 100)
    shape = cover(open_picture(strip, 1), 64, 64)
    assert (shape[0].size, shape[1:]) == ((64, 64), (0, (19_200 - 64) // 2))


def test_the_state_of_all_threads_is_left_alone_while_a_picture_is_read(tmp_path: Path) -> None:
    class Watched(type(tmp_path)):
        def open(self, *args: Any, **more: Any) -> Any:
            seen.append(warnings.filters)
            return super().open(*args, **more)

    seen: list[Any] = []
    (tmp_path / "x.ppm").write_bytes(b"P5 16384 8191 255\n")  # enough pixels for Pillow to warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = runpy.run_path(str(Path(__file__).parents[1] / "data/raw/pictures.py"))
        assert fresh["size_of"](Watched(tmp_path / "x.ppm")) == (2**13 - 1, 2**14)
        assert [filters is warnings.filters for filters in seen] == [True]


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_reduced_but_stays_large_enough(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.fromarray(PHOTOS[0]).resize((1600, 1000), Image.Resampling.LANCZOS)
    content = coded(photo, "JPEG", quality=95, exif=exif)
    wanted = (200, 320) if orientation == 1 else (320, 200)
    full, reduced = open_picture(content, 3), open_picture(content, 3, needed=wanted)
    assert reduced.size == (full.width // 2, full.height // 2)  # 1/4 would be less than twice as large as wanted
    a, b = (np.asarray(cover(image, *wanted)[0]).astype(int) for image in (full, reduced))
    assert np.abs(a - b).mean() < 1
    assert open_picture(content, 3, needed=(full.height, full.width)).size == full.size
    assert size_of(content) == (full.height, full.width)


# Geometry


def test_covering_at_its_own_scale_is_a_crop_and_in_general_a_resize_of_a_box() -> None:
    photo = Image.fromarray(PHOTOS[0])
    assert np.array_equal(cover(photo, photo.height, photo.width)[0], photo)
    same, top, left = cover(photo, photo.height, 200)
    assert (top, left) == (0, 220)
    assert np.array_equal(same, photo.crop((220, 0, 420, photo.height)))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((427, 640), (192, 320)), ((3001, 997), (128, 96)), ((33, 47), (64, 64)), ((300, 3000), (96, 64))],
)
def test_every_pixel_comes_from_where_one_factor_puts_it(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """A filter that is symmetric and sums to 1 takes a ramp to a ramp, so that levels tell places."""
    for axis in (0, 1):
        ramp = np.indices(size)[axis].astype(np.float32) + 0.5
        picture, *corner = cover(Image.fromarray(ramp), *wanted)
        scale = max(wanted[0] / size[0], wanted[1] / size[1])
        assert (picture.height, picture.width) == wanted
        for margin, side, target in zip(corner, size, wanted, strict=True):
            assert abs(margin - (side * scale - target) / 2) < 1  # in the centre, up to a pixel
        places = (np.indices(wanted)[axis] + 0.5 + corner[axis]) / scale
        inside = (slice(6, -6), slice(6, -6))  # what the filter meets at the picture's border is no ramp
        assert np.abs(np.asarray(picture) - places)[inside].max() < 0.05 / scale


# Filters


def test_filters_say_why() -> None:
    filters = Filters(min_side=64, max_aspect=2, min_caption=3, max_caption=5)
    assert filters.reason((64, 128), ["abcd"]) is None
    for size, captions, reason in (((63, 90), ["abcd"], "too small"), ((64, 129), ["abcd"], "aspect ratio"),
                                   ((64, 64), ["ab", "abcdef"], "caption length")):  # fmt: skip
        assert (filters.reason(size, captions) or ("",))[0] == reason
        assert (filters.reason(size[::-1], captions) or ("",))[0] == reason
    kept = filters.trimmed(Raw("x", b"", ("ab", "abc", "abcdef"), (1.0, 2.0, 3.0)))
    assert (kept.captions, kept.weights) == (("abc",), (2.0,))
    assert Filters(max_aspect=None).reason((1, 10_000), ["a"]) is None
    for wrong in ({"min_side": -1}, {"max_aspect": 0.5}, {"min_caption": 0}, {"min_caption": 5, "max_caption": 4}):
        with pytest.raises(ValueError, match="must"):
            Filters(**wrong)


def test_pictures_that_look_alike_have_hashes_that_are_near() -> None:
    first, *others = (perceptual_hash(Image.fromarray(photo)) for photo in PHOTOS)
    small = perceptual_hash(Image.fromarray(PHOTOS[0]).resize((200, 133)))
    assert 0 <= first < 2**64
    assert (first ^ small).bit_count() <= 4
    assert all((first ^ other).bit_count() > 16 for other in others)
