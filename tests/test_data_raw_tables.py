"""Tables of captioned pictures, from parquet files and from the hub."""

import json
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned import dot, everything, write_rows, write_tar
from PIL import Image

from data.raw.pictures import open_picture
from data.raw.sources import Pictures
from data.raw.tables import Table

pytestmark = pytest.mark.usefixtures("own_cache")


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
    assert [getattr(entry, "reason", entry[2:4]) for entry in read] == [
        (("x", "y", "a"), (0.5, 0.5, 2)), "no picture", (("c",), (2,)), "no caption"
    ]  # fmt: skip
    pictures = datasets.Dataset.from_dict({"photo": [Image.new("L", (5, 4))], "prompt": ["p"]})
    pictures.to_parquet(tmp_path / "theirs.parquet")
    (theirs,) = everything(Pictures(str(tmp_path / "theirs.parquet"), streaming=streaming))
    assert (theirs.captions, open_picture(theirs.picture, 1).size) == (("p",), (5, 4))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_by_name_is_read_from_the_hub(tmp_path: Path, streaming: bool) -> None:
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


def test_an_unavailable_name_on_the_hub_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^nobody/nothing: there is nothing at this path, and as a name on .*\Z"):
        Pictures("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="there is no /nowhere/at/all"):
        Pictures("/nowhere/at/all")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_damaged_pages_is_an_error(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "a.parquet", 0, 40)
    content = bytearray(file.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = b"\xa5" * (len(content) - footer - 4)
    file.write_bytes(bytes(content))
    source = Pictures(str(file), streaming=streaming)
    with pytest.raises(ValueError, match="cannot be"):
        everything(source)


def test_splits_are_recognized_by_the_names_of_files(tmp_path: Path) -> None:
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


def test_a_hub_s_data_are_described_by_their_name_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path / f"user/set/data/{split}-00000-of-00001.parquet", 0, 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.raw.sources.locate", lambda path, split: None)  # so that a folder stands for the hub
    for split in ("train", "test"):
        described = Pictures("user/set", split=split, streaming=True).describe()
        assert (described["kind"], described["path"], described["split"]) == ("hub", "user/set", split)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("empty", ["image", "text"])
def test_a_column_may_be_empty_in_the_first_file(tmp_path: Path, streaming: bool, empty: str) -> None:
    write_rows(tmp_path / "b.parquet", 0, 2)
    table = pq.read_table(tmp_path / "b.parquet")
    place = table.column_names.index(empty)
    pq.write_table(table.set_column(place, empty, pa.nulls(2)), tmp_path / "a.parquet")
    read = everything(Pictures(str(tmp_path), streaming=streaming))
    missing = "no picture" if empty == "image" else "no caption"
    assert [getattr(entry, "reason", "") for entry in read] == [missing, missing, "", ""]
    assert [r.picture for r in read[2:]] == [dot(0), dot(1)]


def test_cells_that_are_too_large_are_left_out_and_rows_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "a.parquet", 0, 2, caption=["x" * (2**20 + 1), "y"])
    found = everything(Pictures(str(tmp_path), {"caption": 1}))
    assert [getattr(entry, "reason", "") for entry in found] == ["unreadable caption", ""]
    monkeypatch.setattr("data.raw.tables.LARGEST_FILE", 2**7)
    with pytest.raises(ValueError, match=r"a.parquet holds 2 rows of [\d,]+ bytes, more than 128 a row"):
        Pictures(str(tmp_path))
