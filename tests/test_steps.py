"""Studies of steps: names, placeholders, what is refused, the committed study, and a real one in miniature."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import Any

import pytest
import yaml
from commands import Forked
from trials import ENV, small, state

import compare
import evaluate
import sample
from studies import runner
from studies.steps import Steps
from tools import train_vae
from training import experiment

ROOT = Path(__file__).parents[1]
TEACHER = "train.py fit --config configs/digits.yaml --run.folder {out} --run.seed 1"
EVALUATION = "evaluate.py --out {out} --model"


def words(study: Steps, name: str) -> str:
    return " ".join(study.build(Path("/study"))[name].command)


def test_a_step_may_name_itself_and_those_beside_it() -> None:
    study = Steps({"a/measured": f"{EVALUATION} {{teacher}}/model", "a/teacher": TEACHER, "b/teacher": TEACHER})
    built = study.build(Path("/study"))
    assert words(study, "a/measured") == "evaluate.py --out /study/a/measured --model /study/a/teacher/model"
    assert built["a/measured"].needs == (built["a/teacher"],)
    assert (built["b/teacher"].folder, built["b/teacher"].needs) == (Path("/study/b/teacher"), ())


def test_any_step_has_a_whole_name_and_the_one_beside_comes_first() -> None:
    study = Steps({"teacher": TEACHER, "a/teacher": TEACHER, "a/measured": f"{EVALUATION} {{teacher}}",
                   "b/measured": f"{EVALUATION} {{teacher}} --model {{a/teacher}}"})  # fmt: skip
    assert words(study, "a/measured").endswith("--model /study/a/teacher")
    assert words(study, "b/measured").endswith("--model /study/teacher --model /study/a/teacher")


def test_a_name_with_a_seed_stands_for_a_step_of_each() -> None:
    study = Steps({"{seed}/teacher": f"{TEACHER}{{seed}}", "{seed}/measured": f"{EVALUATION} {{teacher}}",
                   "4/first": f"{EVALUATION} {{teacher}}"}, seeds=(4, 5))  # fmt: skip
    assert list(study.build(Path("o"))) == ["4/teacher", "5/teacher", "4/measured", "5/measured", "4/first"]
    assert words(study, "5/teacher").endswith("--run.folder /study/5/teacher --run.seed 15")
    assert words(study, "5/measured").endswith("--model /study/5/teacher")
    assert words(study, "4/first").endswith("--model /study/4/teacher")


def test_a_command_may_have_a_folder_of_its_own_and_quoted_words() -> None:
    study = Steps(
        {"teacher": "train.py fit --config configs/digits.yaml", "grid": "sample.py grid --out {out}/grid.json "
         "--prompts 'my prompts' --model {teacher}"}, folders={"teacher": "runs/digits"}
    )  # fmt: skip
    built = study.build(Path("/study"))
    assert built["teacher"].folder == ROOT / "runs/digits"
    assert built["grid"].command[-4:] == ("--prompts", "my prompts", "--model", "runs/digits")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"steps": {"a": f"{EVALUATION} {{b}}"}}, "step a: the command contains {b}, but there is no step b"),
        ({"steps": {"a": f"{EVALUATION} {{b}}", "b": f"{TEACHER} {{a}}"}}, "these steps need each other in a circle: "),
        ({"steps": {"a": f"{EVALUATION} {{a}}"}}, "each other in a circle: a → a"),
        ({"steps": {"a": "rm -r {out}"}}, "step a: `rm -r` is no command of a study: take train.py fit"),
        ({"steps": {"a": "train.py fit --config nowhere.yaml {out}"}}, "step a: the command names nowhere.yaml"),
        ({"steps": {"a": "train.py fit --config configs/digits.yaml"}}, "step a: the command must contain {out}"),
        ({"steps": {"a": f"{TEACHER} {{seed}}"}, "seeds": [1]}, "the command contains {seed}, so the name must"),
        ({"steps": {"a": f"{TEACHER} 'b"}}, "step a: the command cannot be read: No closing quotation"),
        ({"steps": {"{seed}": TEACHER}, "seeds": [1, 1]}, "there are two steps 1: seeds and names must differ"),
        ({"steps": {"{seed}": TEACHER, "1": TEACHER}, "seeds": [1]}, "there are two steps 1"),
        ({"steps": {"a/out": TEACHER}}, "a step cannot be called a/out"),
        ({"steps": {"../a": TEACHER}}, "a step cannot be called ../a"),
        ({"steps": {"{a}": TEACHER}}, "a step cannot be called {a}"),
        ({"steps": {"{seed}": TEACHER}}, "a study needs steps, and seeds if"),
        ({"steps": {}}, "a study needs steps"),
        ({"steps": {"a": TEACHER}, "folders": {"b": "runs/b"}}, "folders names the step b, which does not exist"),
        ({"steps": {"a": TEACHER}, "sedes": [1]}, "sedes"),
        ({"steps": {"a": TEACHER}, "document": "nothing"}, "fewstep"),
        ({"steps": {"a": [TEACHER]}}, "steps"),
    ],
)
def test_bad_studies_end_in_one_line_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: dict, message: str
) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_study_of_steps_has_no_quick_version(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"steps": {"a": TEACHER}}))
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path / "study.yaml"), "--quick"])
    assert end.value.code == 2
    assert "--quick is for studies of recipes" in capsys.readouterr().err


def parser_of(command: tuple[str, ...]) -> tuple[Any, list[str]]:
    """The parser of a command, and what it reads."""
    match command[:2]:
        case ("sample.py", "pairs"):
            return sample.pairs_parser(), list(command[2:])
        case ("sample.py", "grid"):
            return sample.grid_parser(), list(command[2:])
        case ("-m", "tools.train_vae"):
            return train_vae.parser(), list(command[2:])
        case ("evaluate.py", _):
            return evaluate.parser(), list(command[1:])
        case (verb, _):
            return experiment.parser(""), list(command[1 + (verb == "train.py") :])


@pytest.fixture(scope="module")
def committed() -> Steps:
    study = compare.read(ROOT / "configs/studies/fewstep.yaml")
    assert isinstance(study, Steps)
    return study


def test_the_committed_study_trains_what_its_students_and_measurements_need(committed: Steps) -> None:
    built = committed.build(Path("/study"))
    names = {step: name for name, step in built.items()}
    needs = {name: {names[need] for need in step.needs} for name, step in built.items()}
    for seed in committed.seeds:
        digits = f"digits/{seed}/"
        assert needs[f"{digits}distilled"] == {f"{digits}straight-pairs", f"{digits}2-rectified"}
        assert needs[f"{digits}straight-pairs"] == {f"{digits}2-rectified"}
        assert needs[f"{digits}2-rectified"] == {f"{digits}pairs", f"{digits}teacher"}
        measured = {
            f"{digits}{name}" for name in ("teacher", "ddim", "2-rectified", "distilled", "meanflow", "matched")
        }
        assert needs[f"{digits}measured"] == measured
    assert needs["digits/1/grid"] == {"digits/1/teacher"}
    assert needs["shapes/teacher"] == {"shapes/store"}
    students = {f"shapes/{name}" for name in ("2-rectified", "meanflow", "matched-1", "matched-2")}
    assert needs["shapes/judged"] == students
    assert needs["shapes/measured"] == students
    assert needs["shapes/measured-20"] == {"shapes/teacher"}
    for step in built.values():
        if step.command[0] == "train.py" and step is not built["shapes/teacher"]:
            flags = dict(zip(step.command, step.command[1:], strict=False))
            assert flags["--run.steps"] == flags["--run.validate_every"]  # the last model counts
            assert flags["--run.folder"] == str(step.folder)


@pytest.mark.parametrize("name", ["fewstep", "likelihood"])
def test_every_command_of_the_committed_studies_can_be_read(name: str) -> None:
    study = compare.read(ROOT / f"configs/studies/{name}.yaml")
    assert isinstance(study, Steps)
    for place, step in study.build(Path("/study")).items():
        if place.startswith(("digits/1/", "shapes/")):  # the other seeds' are alike
            parser, argv = parser_of(step.command)
            parser.parse_args(argv)  # ends the program if it cannot


def test_a_study_trains_a_teacher_and_its_student(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "Popen", Forked)
    config = small(tmp_path)
    (tmp_path / "prompts.txt").write_text("zero\na seven\n")
    teach = "--run.folder {out} --run.steps 3"
    study = {
        "seeds": [7],
        "steps": {
            "{seed}/measured": f"{EVALUATION} {{teacher}} --model {{student}} --steps 1,2 --per-digit 7",
            "{seed}/student": f"train.py fit --config {config} --config configs/fewstep/reflow.yaml {teach} "
            "--data.store {pairs} --data.teacher {teacher} --network.path {teacher} --data.held_out 8 "
            "--optimization.warmup 1",
            "{seed}/pairs": f"sample.py pairs --model {{teacher}} --prompts {tmp_path}/prompts.txt --num 24 --steps 2 "
            "--seed {seed} --out {out}",
            "{seed}/teacher": f"train.py fit --config {config} {teach} --run.seed {{seed}}",
        },
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    argv = [str(tmp_path / "study.yaml"), "--out", str(out), "--jobs", "2"]
    compare.main(argv)
    assert capsys.readouterr().out == f"All results are in {out}\n"
    rows = json.loads((out / "7/measured/results.json").read_text())["rows"]
    assert [(Path(row["folder"]).name, row["steps"]) for row in rows] == [
        ("teacher", 1), ("teacher", 2), ("student", 1), ("student", 2),
    ]  # fmt: skip
    notes = {file: os.stat(file).st_mtime_ns for file in out.rglob("*.command.json")}
    assert len(notes) == 4
    (out / "7/measured/results.json").unlink()
    compare.main(argv)  # does again only what is missing
    again = {file for file in notes if os.stat(file).st_mtime_ns != notes[file]}
    assert again == {out / "7/measured.command.json"}
    assert json.loads((out / "7/measured/results.json").read_text())["rows"][0]["distance"] == rows[0]["distance"]


def test_a_stopped_study_stops_its_commands(tmp_path: Path) -> None:
    study = {"steps": {"teacher": f"train.py fit --config {small(tmp_path)} --run.folder {{out}} --run.steps 999999"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    argv = [sys.executable, "compare.py", str(tmp_path / "study.yaml"), "--out", str(out)]
    with (tmp_path / "said").open("wb") as said:
        process = Forked(argv, DEVNULL, said, STDOUT, ROOT, ENV)
    while process.poll() is None and not list(out.glob("teacher/checkpoints/*")):
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 128 + signal.SIGINT
    assert (tmp_path / "said").read_text().splitlines()[-1] == "error: stopped; the same command resumes"
    step = state(out / "teacher")["step"]  # the training has written a last checkpoint before it ended
    time.sleep(0.5)
    assert state(out / "teacher")["step"] == step
    assert not (out / "teacher.command.json").exists()
