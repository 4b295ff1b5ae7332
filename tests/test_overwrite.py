"""What each command replaces: its own result of the same purpose, on demand one of another, and nothing else."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import compare
import evaluate
import sample
from pipeline.__main__ import main as pipeline
from storage.files import LOCK
from tools import photographs

ROOT = Path(__file__).parents[1]
JUDGE = ["--features", f"judge:{ROOT / 'assets/digits/judge'}"]


def content(folder: Path) -> dict[str, bytes]:
    """All files in a folder, but for locks."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != LOCK)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., str]:
    """A call that must end in one line with status 2 and change no file."""

    def call(command: Callable, argv: list[str]) -> str:
        before = content(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command(argv)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2
        assert content(tmp_path) == before
        return line

    return call


def test_evaluate(model: Path, tmp_path: Path, refused: Callable) -> None:
    out = tmp_path / "out"
    argv = ["--model", str(model), "--steps", "1", "--out", str(out)]
    real, counted = [*argv, "--per-digit", "7", *JUDGE], [*argv, "--by", "category", "--per-category", "1"]
    evaluate.main(real)
    evaluate.main([*real, "--batch-size", "7"])  # for the same purpose
    for other in ([*real, "--seed", "1"], counted):
        assert "is for other settings" in refused(evaluate.main, other)
    (out / "notes.txt").write_text("mine")
    evaluate.main([*counted, "--overwrite"])
    names = {"purpose.json", "results.json", "sheet-0.png", "pictures-0.json", "notes.txt"}
    assert {file.name for file in out.iterdir()} == names


def test_evaluate_among_the_pictures_of_sample(model: Path, tmp_path: Path, refused: Callable) -> None:
    argv = ["--model", str(model), "--steps", "1", "--out", str(tmp_path / "out")]
    sample.main([*argv, "--prompt", "7"])
    said = refused(evaluate.main, [*argv, "--per-digit", "7", *JUDGE, "--overwrite"])
    assert "sheet.png is not what evaluate.py wrote" in said


def test_grid(model: Path, tmp_path: Path, refused: Callable, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "prompts.txt").write_text("the digit 3\n")
    argv = ["grid", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--num", "2", "--fine", "4"]
    argv += ["--steps", "2", "--out"]
    sample.main([*argv, str(tmp_path / "grid.json")])
    sample.main([*argv, str(tmp_path / "grid.json")])
    other = [*argv, str(tmp_path / "grid.json"), "--seed", "1"]
    assert "grid.json is for other settings (seed)" in refused(sample.main, other)
    sample.main([*other, "--overwrite"])
    assert "is not what sample.py grid writes" in refused(sample.main, [*argv, str(tmp_path), "--overwrite"])
    foreign = [*argv, str(model / "model_index.json"), "--overwrite"]
    assert "is not what sample.py grid writes" in refused(sample.main, foreign)


def test_pairs(model: Path, tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "prompts.txt").write_text("the digit 3\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text("mine")
    argv = ["pairs", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--num", "2"]
    assert "is not empty and holds no store" in refused(sample.main, [*argv, "--out", str(tmp_path / "out")])


def test_export(model: Path, tmp_path: Path, refused: Callable) -> None:
    out = tmp_path / "out"
    argv = ["export", str(model), "--out", str(out)]
    pipeline(argv)
    assert "--overwrite" in refused(pipeline, argv)
    pipeline([*argv, "--overwrite", "--format", "single-file"])
    assert {file.name for file in out.iterdir()} == {"README.md", "out.safetensors"}
    pipeline([*argv, "--overwrite"])
    assert "holds the model" in refused(pipeline, ["export", str(out), "--out", str(out), "--overwrite"])
    (out / "checkpoints").mkdir()
    assert "also holds checkpoints" in refused(pipeline, [*argv, "--overwrite"])


@pytest.mark.parametrize("place", ["model", "run", "file"])
def test_export_over_something_else(model: Path, tmp_path: Path, refused: Callable, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    out = {"model": model, "run": model.parent, "file": tmp_path / "file"}[place]
    for more in (["--overwrite"], ["--push-to-hub", "someone/else"]):
        assert "is no export" in refused(pipeline, ["export", str(model), "--out", str(out), *more])


def test_compare(tmp_path: Path) -> None:
    names, command = compare.FILES["compare"], "python compare.py a.yaml"
    compare.check_place(tmp_path, names, command, False)
    (tmp_path / "compare.md").write_text(f"Written by `{command}` from its results alone.\n")
    for name in names[1:]:
        (tmp_path / name).touch()
    compare.check_place(tmp_path, names, command, False)
    with pytest.raises(ValueError, match=r"the document of another study than .*b\.yaml`: .*--overwrite"):
        compare.check_place(tmp_path, names, "python compare.py b.yaml", False)
    compare.check_place(tmp_path, names, "python compare.py b.yaml", True)
    for text in ("# Mine\n", None):
        (tmp_path / "compare.md").unlink() if text is None else (tmp_path / "compare.md").write_text(text)
        with pytest.raises(ValueError, match="no document of a study"):
            compare.check_place(tmp_path, names, command, True)


@pytest.mark.parametrize("study", ["digits", "fewstep"])
def test_the_committed_documents_are_those_of_their_studies(study: str) -> None:
    file = f"configs/studies/{study}.yaml"
    names = compare.FILES[compare.read(ROOT / file).document]
    assert all((ROOT / "docs" / name).exists() for name in names)
    compare.check_place(ROOT / "docs", names, f"python compare.py {file}", False)


def test_a_study_refuses_before_it_trains(tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "compare.png").write_text("mine")
    argv = [str(ROOT / "configs/studies/digits.yaml"), "--docs", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "compare.png is no document of a study" in refused(compare.main, argv)


def test_photographs(tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat.jpg").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["photographs", str(tmp_path)])
    assert "is not empty" in refused(lambda _: photographs.main(), [])
