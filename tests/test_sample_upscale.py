"""Cascades: a second model enlarges what the first has drawn; what does not fit is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import stirred
from PIL import Image
from test_sample import refused

import sample
from data.drawn import OURS, recorded
from data.latents import Pixels
from data.raw.pictures import png_texts, save_png
from flow.objective import Objective
from mmdit.model import MMDiT
from pipeline import Pipeline
from pipeline.__main__ import main as pipeline_main
from pipeline.sampling import Sampling

PROMPT = "a handwritten seven"


def saved(pipe: Pipeline, folder: Path, side: int, **more: object) -> Pipeline:
    """A small random model of pictures of this side, on disk."""
    network = MMDiT(
        in_channels=1, depth=1, width=32, heads=2, text_dim=64, pooled_dim=64, sample_size=side, pos_embed_max_size=8,
        **more,  # type: ignore[arg-type]
    )  # fmt: skip
    made = Pipeline(stirred(network), Objective(), Pixels(1, 0.3, 2.66), pipe.text, Sampling(steps=3, guidance=2.0))
    made.save(folder)
    return made


@pytest.fixture
def base(pipe: Pipeline, tmp_path: Path) -> Pipeline:
    return saved(pipe, tmp_path / "base", 4)


@pytest.fixture
def upscaler(pipe: Pipeline, tmp_path: Path) -> Pipeline:
    return saved(pipe, tmp_path / "large", 8, picture_channels=1, level_embeds=True)


def flags(tmp_path: Path, *more: str) -> list[str]:
    return ["--model", str(tmp_path / "base"), "--prompt", PROMPT, "--num-images", "3", "--batch-size", "2", *more]


def test_a_cascade_is_its_models_one_after_the_other(base: Pipeline, upscaler: Pipeline, tmp_path: Path) -> None:
    sample.main(flags(tmp_path, "--upscale", f"{tmp_path / 'large'}:0.2", "--out", str(tmp_path / "out")))
    small = base([PROMPT] * 2, [0, 1])
    expected = upscaler([PROMPT] * 2, [0, 1], picture=small, level=0.2)
    with Image.open(tmp_path / "out" / "a-handwritten-seven_1.png") as drawn:
        assert np.array_equal(np.asarray(drawn), expected[1, 0].mul(255).round().byte().numpy())
    entry = json.loads((tmp_path / "out" / "samples.json").read_text())[1]
    assert (entry["height"], entry["upscale"]) == (4, [f"{tmp_path / 'large'}:0.2"])


def test_a_picture_of_a_cascade_is_drawn_again(base: Pipeline, upscaler: Pipeline, tmp_path: Path) -> None:
    sample.main(flags(tmp_path, "--upscale", str(tmp_path / "large"), "--out", str(tmp_path / "out")))
    first = tmp_path / "out" / "a-handwritten-seven_2.png"
    sample.main(["--like", str(first), "--out", str(tmp_path / "again")])
    other = ["--upscale", f"{tmp_path / 'large'}:0.5", "--out", str(tmp_path / "other")]
    sample.main(["--like", str(first), *other])
    assert json.loads((tmp_path / "other" / "samples.json").read_text())[0]["upscale"] == [other[1]]
    one, again = (np.asarray(Image.open(file)) for file in (first, tmp_path / "again" / first.name))
    assert one.shape == (8, 8)
    assert np.array_equal(one, again)
    assert not torch.equal(base([PROMPT], [0]), base([PROMPT], [1]))


def test_what_does_not_enlarge_is_refused(
    pipe: Pipeline, base: Pipeline, upscaler: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved(pipe, tmp_path / "plain", 8, picture_channels=1)
    saved(pipe, tmp_path / "same", 4, picture_channels=1)
    for text, words in (
        ("nowhere", "nowhere"),
        ("FOLDER/base", "base does not work from one picture: train one with configs/picture/superresolution.yaml"),
        ("FOLDER/large:1.5", "with a level from 0 to 1"),
        ("FOLDER/large:much", "is not MODEL or MODEL:LEVEL"),
        (":0.1", "is not MODEL or MODEL:LEVEL"),
        ("FOLDER/plain:0.1", "plain takes no noise level for its picture: leave :0.1 out"),
        ("FOLDER/same", "same draws 4×4 pixels, which does not enlarge 4×4"),
    ):
        given = text.replace("FOLDER", str(tmp_path))
        assert words in refused(capsys, *flags(tmp_path, "--upscale", given, "--out", str(tmp_path / "out")))
    twice = ["--upscale", str(tmp_path / "large")] * 2
    assert "which does not enlarge 8×8" in refused(capsys, *flags(tmp_path, *twice, "--out", str(tmp_path / "out")))
    Pipeline(*upscaler.parts[:4], replace(upscaler.sampling, guidance=0.0)).save(tmp_path / "unconditional")
    wrong = ["--upscale", str(tmp_path / "unconditional"), "--out", str(tmp_path / "out")]
    assert "guidance 0 would ignore the prompt" in refused(capsys, *flags(tmp_path, *wrong))
    assert not (tmp_path / "out").exists()
    sample.main(flags(tmp_path, *wrong, "--upscale-prompt", ""))


@pytest.fixture
def largest(pipe: Pipeline, tmp_path: Path) -> Pipeline:
    return saved(pipe, tmp_path / "largest", 16, picture_channels=1)


def cascade(tmp_path: Path, *more: str, last: str = "largest") -> list[str]:
    """A picture by three models."""
    first = ["--model", str(tmp_path / "base"), "--prompt", PROMPT, "--upscale", f"{tmp_path / 'large'}:0.2"]
    return [*first, "--upscale", str(tmp_path / last), "--out", str(tmp_path / "out"), *more]


def pixels(pictures: torch.Tensor) -> np.ndarray:
    return pictures[0, 0].mul(255).round().byte().numpy()


@pytest.mark.parametrize(
    ("prompts", "steps"),
    [
        ((), ()),
        (("",), ()),
        (("a seven: 0.5, :", ""), ()),
        ((), (2,)),
        ((), (1, 4)),
        (("-", "a: b"), (5,)),
    ],
)
def test_each_model_of_a_cascade_has_its_prompt_and_its_steps(
    base: Pipeline, upscaler: Pipeline, largest: Pipeline, tmp_path: Path, prompts: tuple, steps: tuple
) -> None:
    """The picture is that of three calls by hand; it is drawn again to the bit."""
    given = [f"--upscale-prompt={text}" for text in prompts] + [f"--upscale-steps={count}" for count in steps]
    sample.main(cascade(tmp_path, *given))
    first, last = ((prompts or (PROMPT,))[i] for i in (0, -1))
    settings = [replace(upscaler.sampling, steps=(steps or (3,))[i]) for i in (0, -1)]
    small = base([PROMPT], [0])
    middle = upscaler([first], [0], picture=small, level=0.2, sampling=settings[0])
    expected = pixels(largest([last], [0], picture=middle, sampling=settings[1]))
    file = tmp_path / "out" / "a-handwritten-seven_0.png"
    assert np.array_equal(np.asarray(Image.open(file)), expected)
    if given:
        plain = largest([PROMPT], [0], picture=upscaler([PROMPT], [0], picture=small, level=0.2))
        assert not np.array_equal(pixels(plain), expected)
    entry = json.loads((tmp_path / "out" / "samples.json").read_text())[0]
    found = {name: entry.get(f"upscale_{name}", []) for name in ("prompt", "steps")}
    assert found == {"prompt": list(prompts), "steps": list(steps)}
    sample.main(["--like", str(file), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_command_replaces_the_recorded_prompts_and_steps(
    base: Pipeline, upscaler: Pipeline, largest: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sample.main(cascade(tmp_path, "--upscale-prompt", "", "--upscale-steps", "2", "--upscale-steps", "1"))
    file = tmp_path / "out" / "a-handwritten-seven_0.png"
    more = ["--upscale-prompt", "a", "--upscale-prompt", "(b:1.3)", "--upscale-steps", "4"]
    with pytest.warns(UserWarning, match=r"\(b:1.3\).* no word is stressed"):
        sample.main(["--like", str(file), *more, "--out", str(tmp_path / "more")])
    capsys.readouterr()
    found = recorded(tmp_path / "more" / file.name)
    assert (found["upscale_prompt"], found["upscale_steps"]) == (["a", "(b:1.3)"], [4])
    one = ["--like", str(file), "--upscale", str(tmp_path / "large"), "--out", str(tmp_path / "one")]
    assert "there are 2 --upscale-steps for 1 --upscale" in refused(capsys, *one)
    with pytest.raises(SystemExit) as end:
        pipeline_main(["workflow", str(file), "--out", str(tmp_path / "workflow.json")])
    assert end.value.code == 2
    assert "was drawn with --upscale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--upscale-prompt", ""] * 3, "3 --upscale-prompt for 2 --upscale: give one for all, or one for each"),
        (["--upscale-steps", "2"] * 3, "there are 3 --upscale-steps for 2 --upscale"),
        (["--upscale-steps", "0"], "--upscale-steps: must be at least 1"),
        (["--upscale-steps", "many"], "--upscale-steps: invalid"),
        (["--upscale-steps", "10001"], "large: steps must be at least 1 and at most 10,000, got 10001"),
        (["--upscale-steps", "2", "--upscale-steps", "3"], "given: given spacing has 2 times for 3 steps"),
        (["--upscale-prompt", "\udcff"], "is no text in UTF-8"),
    ],
)  # fmt: skip
def test_prompts_and_steps_that_do_not_fit_are_refused(
    base: Pipeline, upscaler: Pipeline, largest: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture,
    more: list[str], said: str,
) -> None:  # fmt: skip
    """Before anything is drawn. The last model has a fixed number of steps."""
    given = Sampling(steps=2, guidance=2.0, spacing="given:times=1/0.5")
    Pipeline(*largest.parts[:4], given).save(tmp_path / "given")
    assert said in refused(capsys, *cascade(tmp_path, *more, last="given"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--upscale-prompt", "--upscale-steps"])
def test_without_a_cascade_its_flags_are_refused(
    base: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture, flag: str
) -> None:
    argv = flags(tmp_path, flag, "7", "--out", str(tmp_path / "out"))
    assert f"{flag} needs an --upscale: give one, or leave it out" in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"upscale_steps": [-1]}, "--upscale-steps: must be at least 1"),
        ({"upscale_steps": ["x"]}, "--upscale-steps: invalid"),
        ({"upscale_steps": [2, 2, 2]}, "there are 3 --upscale-steps for 2 --upscale"),
        ({"upscale": [3]}, "error: 3 is no model folder"),
    ],
)
def test_a_wrong_record_is_refused(
    base: Pipeline, upscaler: Pipeline, largest: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture,
    changes: dict, said: str,
) -> None:  # fmt: skip
    sample.main(cascade(tmp_path))
    capsys.readouterr()
    file = tmp_path / "out" / "a-handwritten-seven_0.png"
    entry = json.loads(png_texts(file)[OURS]) | changes
    save_png(Image.open(file), tmp_path / "wrong.png", {OURS: json.dumps(entry)})
    assert said in refused(capsys, "--like", tmp_path / "wrong.png", "--out", tmp_path / "none")
