"""Sources as a whole: what is refused, what their shards cover, and how they are described."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned import dot, everything, folder_of_pictures, with_jsonl, with_texts, write_rows, write_tar

from data.raw.sources import Pictures

pytestmark = pytest.mark.usefixtures("own_cache")


def test_empty_ambiguous_or_foreign_input_ends_in_one_line(tmp_path: Path) -> None:
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
    refused("column text of b.parquet is not as in the other files", str(tmp_path / "rows"))
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
