"""sample.py rerank: the best pictures of each prompt, with their settings."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample

INK = ["--rewards", '[{"class_path": "Ink"}]']
LEVELS = {"zero": [51, 204, 102, 153], "one": [90, 80], "two": [9]}


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A folder as sample.py leaves it, of grey pictures."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    entries = []
    for caption, levels in LEVELS.items():
        for i, level in enumerate(levels):
            Image.new("L", (8, 8), level).save(folder / f"{caption}_{i}.png")
            entries.append({"file": f"{caption}_{i}.png", "prompt": caption, "seed": i})
    (folder / "samples.json").write_text(json.dumps(entries))
    return folder


def rerank(*flags: object) -> None:
    sample.main(["rerank", *map(str, flags)])


def test_the_best_of_each_prompt_come_first_as_they_were(drawn: Path, capsys: pytest.CaptureFixture) -> None:
    (drawn / "two_1.png").write_bytes((drawn / "two_0.png").read_bytes())
    entries = json.loads((drawn / "samples.json").read_text())
    entries.append({"file": "two_1.png", "prompt": "two", "seed": 1})
    (drawn / "samples.json").write_text(json.dumps(entries))
    rerank(drawn, *INK, "--keep", 2)
    best = drawn / "best"
    entries = json.loads((best / "samples.json").read_text())
    assert [entry["file"] for entry in entries] == [
        "zero_1.png",
        "zero_3.png",
        "one_0.png",
        "one_1.png",
        "two_0.png",
        "two_1.png",
    ]
    assert [entry["seed"] for entry in entries] == [1, 3, 0, 1, 0, 1]
    assert sorted(file.name for file in best.iterdir()) == sorted(
        ["samples.json", "sheet.png", *(entry["file"] for entry in entries)]
    )
    for entry in entries:
        assert (best / entry["file"]).read_bytes() == (drawn / entry["file"]).read_bytes()
    with Image.open(best / "sheet.png") as image:
        levels = set(np.unique(np.asarray(image.convert("L"))).tolist())
    assert {204, 153, 90, 80} <= levels
    assert "6 of 8 pictures" in capsys.readouterr().out


def test_one_is_kept_by_default_and_the_folder_can_be_named(drawn: Path, tmp_path: Path) -> None:
    rerank(drawn, "--rewards", '[{"class_path": "Ink", "init_args": {"weight": -1}}]', "--out", tmp_path / "few")
    assert {file.name for file in (tmp_path / "few").glob("*_*.png")} == {"zero_0.png", "one_1.png", "two_0.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "0"], "--keep must be at least 1, got 0"),
        (["--keep", "2"], "there are 1 pictures of 'two': give --keep up to that"),
        (["--out", "."], "exists: remove it, or give another --out"),
    ],
)
def test_what_cannot_be_is_one_line(drawn: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str) -> None:
    before = sorted(drawn.rglob("*"))
    with pytest.raises(SystemExit) as end:
        rerank(drawn, *INK, *flags)
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert (end.value.code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert sorted(drawn.rglob("*")) == before
