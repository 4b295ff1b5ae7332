"""What a command may replace."""

import json
from pathlib import Path

import pytest

from storage.purpose import KEY, RECORD, check_result, claim_folder

OURS = {"command": "x.py", "steps": [1, 2]}
OTHER = OURS | {"steps": [1]}
FILES = ["results.json", "sheet.png"]


def filled(folder: Path, purpose: dict) -> Path:
    """A folder of results that are as long as their purpose."""
    claim_folder(folder, purpose, FILES, False)
    for name in FILES:
        (folder / name).write_text(json.dumps(purpose))
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_result_of_the_same_purpose_may_be_replaced(tmp_path: Path) -> None:
    folder = filled(tmp_path / "out", OURS)
    claim_folder(folder, OURS, FILES, False)
    assert (folder / "results.json").exists()  # until it is replaced
    assert not check_result(folder / RECORD, OURS, False)


def test_one_of_other_settings_only_on_demand_and_nothing_else_with_it(tmp_path: Path) -> None:
    folder = filled(tmp_path / "out", OURS)
    with pytest.raises(ValueError, match=r"is for other settings \(steps\): .*--overwrite"):
        claim_folder(folder, OTHER, FILES, False)
    assert (folder / "results.json").exists()
    claim_folder(folder, OTHER, [*FILES, "report.html"], True)
    assert {path.name for path in folder.iterdir()} == {RECORD, "notes.txt"}


@pytest.mark.parametrize(
    "content",
    [{"steps": [1, 2]}, {KEY: OURS | {"command": "y.py"}}, {KEY: "x.py"}, [1], None],
    ids=["no purpose", "another command", "no settings", "no object", "a folder"],
)
def test_anything_else_never(tmp_path: Path, content: object) -> None:
    file = tmp_path / "grid.json"
    file.mkdir() if content is None else file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"grid\.json is not what x\.py writes"):
        check_result(file, OURS, True)


def test_a_file_that_is_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "sheet.png").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"sheet\.png is not what x\.py wrote"):
            claim_folder(tmp_path, OURS, FILES, overwrite)
    assert (tmp_path / "sheet.png").read_text() == "mine"


def test_a_record_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    folder = filled(tmp_path / "out", OURS)
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | {"files": ["../precious", str(tmp_path / "precious")]}))
    with pytest.raises(ValueError, match=r"results\.json is not what x\.py wrote"):
        claim_folder(folder, OTHER, FILES, True)
    (folder / "results.json").unlink()
    (folder / "sheet.png").unlink()
    claim_folder(folder, OTHER, FILES, True)
    assert (tmp_path / "precious").exists()
