"""Folders of captioned pictures: every layout is read whole, and every picture and row is counted."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned import dot, everything, folder_of_pictures, reasons, with_csv, with_jsonl, with_texts, write_rows

from data.raw.pictures import open_picture
from data.raw.sources import Pictures

pytestmark = pytest.mark.usefixtures("own_cache")


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
def test_pictures_are_read_as_imagefolder_reads_them(tmp_path: Path, layout: Any) -> None:
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
