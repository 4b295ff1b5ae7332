"""Folders of captioned pictures: every layout is read whole, and every picture and row is counted."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned import dot, everything, folder_of_pictures, reasons, with_csv, with_jsonl, with_texts, write_rows

from data.raw.pictures import PictureError, open_picture
from data.raw.sources import Pictures

pytestmark = pytest.mark.usefixtures("own_cache")


def with_parquet(root: Path) -> Path:
    names = ["a.jpg", "b/c.png", "b/d/e.webp", "f.png"]
    table = pa.table({"file_name": names, "text": [name.split(".")[0] for name in names]})
    pq.write_table(table, folder_of_pictures(root) / "metadata.parquet")
    return root


def with_samples(root: Path) -> Path:
    """As sample.py leaves it."""
    names = ["a.jpg", "b/c.png", "b/d/e.webp", "f.png"]
    entries = [{"file": name, "prompt": name.split(".")[0], "seed": 0} for name in names]
    (folder_of_pictures(root) / "samples.json").write_text(json.dumps(entries))
    return root


def with_img2dataset_s_tables(root: Path) -> Path:
    write_rows(with_texts(root) / "b.parquet", 0, 3)
    return root


@pytest.mark.parametrize(
    "layout", [with_texts, with_jsonl, with_csv, with_parquet, with_samples, with_img2dataset_s_tables]
)
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


def test_pictures_that_cannot_be_read_and_captions_without_a_picture_are_counted(tmp_path: Path) -> None:
    names = ["a.png", "b.HEIC", "c.jxl", "d.dng", "e.psd", "f.svg", "g.heif"]
    for name in names:
        (tmp_path / name).write_bytes(dot(1) if name == "a.png" else b"foreign")
        (tmp_path / name).with_suffix(".txt").write_text(name)
    (tmp_path / "alone.txt").write_text("a caption of nothing")
    read = everything(Pictures(str(tmp_path)))
    assert [entry.id for entry in read] == [*names, "alone.txt"]
    assert (read[-1].reason, [r.captions for r in read[:-1]]) == ("no picture", [(name,) for name in names])
    for entry in read[1:-1]:
        with pytest.raises(PictureError, match="it is of none of the formats") as told:
            open_picture(entry.picture, 3)
        assert told.value.reason == "unreadable"
    (tmp_path / "a.png").unlink()
    assert len(everything(Pictures(str(tmp_path)))) == len(names) + 1  # none is readable, and all are counted
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.HEIC", "text": "x"}')
    assert "alone.txt" not in reasons(Pictures(str(tmp_path), {"text": 1}))  # here it is no caption


SEPARATORS = "one\u2028still\x85one\x0band\x0cone"


def test_captions_keep_what_ends_no_line_and_lose_a_byte_order_mark(tmp_path: Path) -> None:
    names = ("a.png", "b.png", "c.png")
    for name in names:
        (tmp_path / name).write_bytes(dot(1))
    (tmp_path / "a.txt").write_text(f"\ufeff{SEPARATORS}\n", encoding="utf-8")
    row = json.dumps({"file_name": "b.png", "txt": SEPARATORS}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"\ufeff{row}\r\n", encoding="utf-8")
    (tmp_path / "metadata.csv").write_text(f"\ufefffile_name,txt\nc.png,{SEPARATORS}\n", encoding="utf-8")
    assert [r.captions for r in everything(Pictures(str(tmp_path)))] == [(SEPARATORS,)] * 3


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        ("metadata.jsonl", '\n{"file_name": "a.png", "text": "x"}\n\n\n[1]\n"x"\n{torn\n', (5, 6, 7)),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n' + '{"a":' * 9999, (2,)),
        ("metadata.csv", 'file_name,text\na.png,"of\ntwo\nlines"\n\na.png,x,y\n,x\n', (6, 7)),
    ],
)
def test_faults_of_rows_have_the_numbers_of_their_lines(
    tmp_path: Path, name: str, content: str, faults: tuple[int, ...]
) -> None:
    (tmp_path / "a.png").write_bytes(dot(1))
    (tmp_path / name).write_text(content)
    found = {id: reason for id, reason in reasons(Pictures(str(tmp_path))).items() if id != "a.png"}
    assert [id for id, reason in found.items() if reason == "unreadable row"] == [f"{name}:{n}" for n in faults]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a.caption": b"x", "b.caption": b"x", "a.json": b"{}"}, r"2 \.caption files, 1 \.json file$"),
        ({"metadata.jsonl": b'{"name": "a.png", "text": "x"}'}, "metadata.jsonl:1: it has no file_name$"),
    ],
)
def test_what_was_seen_is_named_when_there_is_no_caption(tmp_path: Path, files: dict[str, bytes], told: str) -> None:
    for name, content in {"a.png": dot(1), **files}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"has no caption column .*; there are: none; .*{told}"):
        Pictures(str(tmp_path))


def test_files_that_are_too_large_are_no_captions(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(dot(1))
    for name, size in (("a", 2**40), ("b", 2**20 + 1)):
        with (tmp_path / f"{name}.txt").open("wb") as file:
            file.truncate(size)  # without taking room
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "c.png", "txt": "x" * (2**20 + 1)}))
    names = ("a.png", "b.png", "c.png")
    source = Pictures(str(tmp_path))
    source.describe()
    assert reasons(source) == dict.fromkeys(names, "unreadable caption")
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(PictureError, match="1,099,511,627,776 bytes, more than") as end:
        open_picture(tmp_path / "b.png", 3)
    assert end.value.reason == "too large"


def test_a_table_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.raw.folder.LARGEST_TABLE", 1000)
    with_parquet(tmp_path)
    Pictures(str(tmp_path))
    pq.write_table(pa.table({"file_name": ["a.jpg"], "text": ["x" * 2000]}), tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match=r"metadata.parquet holds more than 1,000 bytes"):
        Pictures(str(tmp_path))


def test_the_names_of_kohya_s_folders_are_captions_where_a_picture_has_none(tmp_path: Path) -> None:
    for name in ("10_sks dog/a.png", "10_sks dog/b.png", "a dog/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(dot(0))
    (tmp_path / "10_sks dog/b.txt").write_text("sks dog on grass")
    read = everything(Pictures(str(tmp_path), {"txt": 1.0, "folder": 1.0}))
    assert [r.captions for r in read] == [("sks dog",), ("sks dog on grass",), ("a dog",)]
    (alone,) = {r.captions for r in everything(Pictures(str(tmp_path / "10_sks dog"), {"folder": 1.0}))}
    assert alone == ("sks dog",)
    with pytest.raises(ValueError, match="named one of text, caption"):  # only if it is asked for
        Pictures(str(tmp_path / "a dog"))
