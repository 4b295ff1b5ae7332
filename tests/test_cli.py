"""What all commands refuse alike, in one line and before any work."""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import app
import compare
import encode
import evaluate
import sample
import train
from cli import MACHINE_FAULT, MOST, fail, find_device, one_line_errors
from data.__main__ import main as data
from metrics.__main__ import main as metrics
from pipeline.__main__ import main as pipeline
from tools import photographs

ROOT = Path(__file__).parents[1]
MODEL = ["--model", "nowhere"]
CONFIG = ["--config", str(ROOT / "configs/digits.yaml")]


def tool(argv: list[str]) -> None:
    sys.argv = ["photographs", *argv]
    photographs.main()


COMMANDS: dict[str, tuple[Callable, list[str]]] = {
    "sample": (sample.main, [*MODEL, "--prompt", "7"]),
    "pairs": (sample.main, ["pairs", *MODEL, "--prompts", "nowhere", "--num", "1"]),
    "grid": (sample.main, ["grid", *MODEL, "--prompts", "nowhere"]),
    "evaluate": (evaluate.main, MODEL),
    "export": (pipeline, ["export", "nowhere"]),
    "compare": (compare.main, ["nowhere.yaml"]),
    "app": (app.main, MODEL),
    "data": (data, ["info"]),
    "page": (metrics, ["page", "nowhere"]),
    "encode": (encode.main, CONFIG),
    "hint": (encode.main, ["hint", "--hint", "Edges", "--picture", "nowhere"]),
    "train": (train.main, ["fit", *CONFIG]),
    "photographs": (tool, []),
}
OUT = {"encode": "--encode.store", "train": "--run.folder", "photographs": None, "data": None}


def refused(capsys: pytest.CaptureFixture, command: Callable, argv: list[str]) -> str:
    """The one line with which a command ends; it must end with status 2."""
    with pytest.raises(SystemExit) as end:
        command(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command runs in an empty folder, which stays empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_argument_that_is_no_text(command: str, capsys: pytest.CaptureFixture) -> None:
    run, argv = COMMANDS[command]
    said = refused(capsys, run, [*argv, "a \udcff seven"])
    assert "the argument b'a \\xff seven' is no text in UTF-8" in said


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "data"])
def test_an_empty_name_for_what_is_written(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, argv = COMMANDS[command]
    flag = OUT.get(command, "--out")
    for given in ([flag, ""], [f"{flag}="]) if flag else ([""],):
        assert "empty" in refused(capsys, run, [*argv, *given])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        ("sample", ["--num-images", "1000000000000"], "--num-images asks for 1,000,000,000,000 pictures"),
        ("sample", ["--prompt", "8", "--num-images", str(MOST // 2 + 1)], "at most 10,000,000"),
        ("pairs", ["--num", "1000000000000"], "--num asks for"),
        ("grid", ["--num", "1000000000000"], "--num asks for"),
        ("evaluate", ["--samples", "10000000000000"], "--samples asks for"),
        ("evaluate", ["--per-digit", "1000000000000"], "--per-digit asks for"),
        ("evaluate", ["--by", "category", "--per-category", str(MOST)], "--per-category asks for"),
    ],
)
def test_more_pictures_than_one_command_makes(
    command: str, flags: list[str], said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, argv = COMMANDS[command]
    given = [str(model) if arg == "nowhere" and argv[i - 1] == "--model" else arg for i, arg in enumerate(argv)]
    assert said in refused(capsys, run, [*given, *flags, "--out", "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sample", "pairs", "grid", "evaluate"])
def test_more_steps_than_any_sampler_needs(command: str, model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts").write_text("the digit 3\n")
    run, argv = COMMANDS[command]
    given = [{"--model": str(model), "--prompts": "prompts"}.get(argv[i - 1], arg) for i, arg in enumerate(argv)]
    flag = "--fine" if command == "grid" else "--steps"
    said = refused(capsys, run, [*given, flag, "1000000000000", "--out", "out"])
    assert "steps must be at least 1 and at most 10,000, got 1000000000000" in said
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "name",
    [
        "xpu", "mkldnn", "opengl", "opencl", "hip", "ve", "fpga", "maia", "xla", "lazy", "vulkan", "meta", "hpu",
        "mtia", "privateuseone", "abacus", "cuda:-1", "cuda:99",
    ],
)  # fmt: skip
def test_a_device_that_is_not_here(name: str, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(ValueError, match=f"no device {name}"):
        find_device(name)
    assert not recwarn


def test_an_error_has_a_line_of_its_own_below_an_open_bar(capsys: pytest.CaptureFixture) -> None:
    bar = tqdm(total=3)
    bar.update(1)
    with pytest.raises(SystemExit):
        fail("the disk is full")
    assert capsys.readouterr().err.splitlines()[-1] == "error: the disk is full"
    bar.close()


def test_a_file_in_the_place_of_a_folder_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a").write_text("")
    for place in (tmp_path / "a", tmp_path / "a/b"):
        with pytest.raises(SystemExit) as end, one_line_errors():
            place.mkdir()
        assert end.value.code == 2
        assert capsys.readouterr().err == f"error: {place}: a file stands where a folder is needed, choose another\n"


def test_a_full_memory_is_one_line(capsys: pytest.CaptureFixture) -> None:
    def all_of_it() -> None:
        torch.empty(2**60, dtype=torch.uint8)

    def more() -> None:
        raise MemoryError

    for fill in (all_of_it, more):
        with pytest.raises(SystemExit) as end, one_line_errors():
            fill()
        assert end.value.code == MACHINE_FAULT
        assert "not enough memory" in capsys.readouterr().err


def test_guidance_that_ignores_the_prompt(model: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("the digit 3\n")
    argv = ["--model", str(model), "--steps", "1", "--out"]
    for command, more in (
        (sample.main, ["--prompt", "", "--prompt", "7"]),
        (sample.main, ["--prompt", "7", "--negative", "8"]),
        (evaluate.main, []),
    ):
        for scale, said in (("0", "1 is none; 0 is the unconditional model"), ("-1", "at least 0")):
            assert said in refused(capsys, command, [*argv, "out", *more, "--guidance", scale])
    few = ["--prompts", "prompts", "--num", "2", "--guidance", "0"]
    for command in ("pairs", "grid"):
        assert "1 is none" in refused(capsys, sample.main, [command, *argv, f"out-{command}", *few])
    assert not list(tmp_path.glob("out*/*"))
    sample.main([*argv, "out", "--prompt", "", "--guidance", "0"])
    assert json.loads((tmp_path / "out/samples.json").read_text())[0]["guidance"] == 0
    with pytest.warns(UserWarning, match=r"guidance 0.5 weakens the prompt"):
        sample.main([*argv, "out", "--prompt", "7", "--guidance", "0.5"])


SCRIPTS = [
    f"{folder}.{file.stem}"
    for folder in ("tools", "benchmarks")
    for file in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in file.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("--nonsense", 2)])
def test_scripts_explain_themselves_and_refuse_unknown_flags_before_any_work(
    script: str, flag: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [script, flag])
    with pytest.raises(SystemExit) as end:
        import_module(script).main()
    told = capsys.readouterr()
    assert end.value.code == status
    assert "--help" in told.out if flag == "--help" else "error: " in told.err
