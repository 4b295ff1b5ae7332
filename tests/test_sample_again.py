"""sample.py in a folder that holds pictures: none is lost."""

import json
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import pytest
from PIL import Image

import sample
from pipeline import Pipeline
from pipeline.drawing import Drawing, draw_files


def entries(out: Path) -> list[dict]:
    return json.loads((out / "samples.json").read_text())


def test_numbers_go_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    argv = ["--model", str(model), "--prompt", "a seven", "--num-images", "2", "--out", str(out), "--steps"]
    held: dict[str, bytes] = {}
    for turn, steps in enumerate(("1", "2", "3"), start=1):
        sample.main([*argv, steps])
        tail = "" if turn == 1 else f"-{turn}"
        assert {file.name for file in out.glob("*.png")} == {
            *held, f"a-seven_0{tail}.png", f"a-seven_1{tail}.png", f"sheet{tail}.png",
        }  # fmt: skip
        assert capsys.readouterr().out.strip().splitlines()[-1].endswith(f"side by side in {out / f'sheet{tail}.png'}")
        assert [entry["steps"] for entry in entries(out)] == [i for i in range(1, turn + 1) for _ in range(2)]
        assert all((out / name).read_bytes() == content for name, content in held.items())
        held = {file.name: file.read_bytes() for file in out.glob("*.png")}
    assert len(set(held.values())) == 9
    assert [(out / entry["file"]).is_file() for entry in entries(out)] == [True] * 6
    assert not list(out.glob("*.part"))


def test_prompts_of_one_name_have_a_picture_each(model: Path, tmp_path: Path) -> None:
    """Long ones that begin alike, of four bytes a letter, of signs alone, and none."""
    out, prompts = tmp_path / "out", ["𝒳" * 60, "𝒳" * 60 + " tail", "🚀", "", "⛵"]
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    for seed in (str(2**62 - 9), "0"):
        sample.main(["--model", str(model), *given, "--steps", "1", "--seed", seed, "--out", str(out)])
    found = entries(out)
    assert len({entry["file"] for entry in found}) == 10
    assert {entry["file"] for entry in found} >= {"rocket_2.png", "unconditional_3.png", "sailboat_4.png"}
    assert all(Image.open(out / entry["file"]).size == (8, 8) for entry in found)
    assert [entry["prompt"] for entry in found] == prompts * 2


def draw(pipe: Pipeline, out: Path, first: int) -> None:
    arguments = {"negative": "", "sampling": pipe.sampling}
    notes = {"negative": "", **asdict(pipe.sampling), "shift": 1.5, "model": "digits"}
    times = pipe.plan(pipe.sampling)[2]
    draw_files(Drawing(pipe, ["a seven"] * 8, [first] * 8, arguments, times, 1, 4, notes), out)


def test_two_at_once_lose_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    processes = [get_context("fork").Process(target=draw, args=(pipe, tmp_path, 7)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len({entry["file"] for entry in entries(tmp_path)}) == 16
    assert len(list(tmp_path.glob("a-seven_7*.png"))) == 16
    assert {file.name for file in tmp_path.glob("sheet*")} == {"sheet.png", "sheet-2.png"}


@pytest.mark.parametrize(("content", "said"), [("{}", "is no list of samples"), ("[1", "is no JSON")])
def test_another_samples_json_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, content: str, said: str
) -> None:
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        sample.main(["--model", str(model), "--prompt", "7", "--out", str(tmp_path)])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "samples.json").read_text() == content
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(("level", "said"), [(0, "selects nothing: all of"), (255, "selects everything: nothing of")])
def test_a_mask_that_selects_nothing_or_everything_is_said_once(
    model: Path, tmp_path: Path, level: int, said: str
) -> None:
    Image.new("L", (8, 8), 99).save(tmp_path / "photo.png")
    Image.new("L", (8, 8), level).save(tmp_path / "mask.png")
    files = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    with pytest.warns(UserWarning, match=said) as warned:
        sample.main(["--model", str(model), "--prompt", "7", *files, "--out", str(tmp_path / "out")])
    assert [said in str(warning.message) for warning in warned] == [True]


def test_weights_in_a_prompt_are_text_and_it_is_said_once(model: Path, tmp_path: Path) -> None:
    argv = ["--model", str(model), "--prompt", "a (big:1.3) seven", "--prompt", "(a:0.5) six"]
    with pytest.warns(UserWarning, match="weights") as warned:
        sample.main([*argv, "--num-images", "2", "--steps", "1", "--out", str(tmp_path / "out")])
    assert [str(warning.message) for warning in warned if "weights" in str(warning.message)] == [
        "weights as in 'a (big:1.3) seven' are text like any other: no word is stressed"
    ]
