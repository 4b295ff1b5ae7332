"""Choices between drawn pictures: which pairs are open, and the file that encode.py reads."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from data.raw.choices import Choices
from web.choices import FILE, Pair, choose, open_pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of one prompt, two of another and one of a third."""
    names = ["a_0.png", "a_1.png", "b_0.png", "a_2.png", "b_1.png", "c_0.png"]
    entries = [{"file": name, "prompt": f"the letter {name[0]}"} for name in names]
    (tmp_path / "samples.json").write_text(json.dumps(entries))
    for name in names:
        Image.new("L", (8, 8)).save(tmp_path / name)
    return tmp_path


def test_pictures_of_a_prompt_are_paired_until_they_are_chosen(folder: Path) -> None:
    pairs = [Pair("the letter a", "a_0.png", "a_1.png"), Pair("the letter b", "b_0.png", "b_1.png")]
    assert open_pairs(folder) == pairs
    assert choose(folder, "the letter a", "a_1.png", "a_0.png") == 1
    assert open_pairs(folder) == pairs[1:]
    assert choose(folder, "the letter b", "b_0.png", "b_1.png") == 2
    assert open_pairs(folder) == []


def test_pairs_with_a_lost_picture_and_empty_folders_have_none(folder: Path, tmp_path: Path) -> None:
    (folder / "b_1.png").unlink()
    assert [pair.caption for pair in open_pairs(folder)] == ["the letter a"]
    assert open_pairs(tmp_path / "nothing") == []


def test_a_pair_is_chosen_from_once(folder: Path) -> None:
    choose(folder, "the letter a", "a_1.png", "a_0.png")
    (folder / "b_0.png").unlink()
    for better, worse in (("a_0.png", "a_1.png"), ("a_1.png", "a_0.png"), ("b_1.png", "b_0.png")):
        with pytest.raises(ValueError, match="have a choice already, or one of them is gone"):
            choose(folder, "the letter", better, worse)
    assert len((folder / FILE).read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("samples.json", "{nonsense", "samples.json is no JSON"),
        ("samples.json", "[1, 2]", "samples.json is no list of samples"),
        ("samples.json", '[{"file": "a_0.png"}]', "samples.json is no list of samples"),
        (FILE, "oops", f"{FILE}, line 1 is no JSON"),
        (FILE, '{"caption": "a", "better": 3}', f"{FILE}, line 1: a choice needs caption, better, worse"),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_pairs(folder)


def test_the_file_is_a_source_of_choices(folder: Path) -> None:
    choose(folder, "the letter a", "a_1.png", "a_0.png")
    (row,) = Choices(folder / FILE).read(0)
    assert (row.captions, row.picture, row.worse) == (("the letter a",), folder / "a_1.png", folder / "a_0.png")
