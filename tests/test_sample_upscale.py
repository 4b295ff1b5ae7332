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
from data.latents import Pixels
from flow.objective import Objective
from mmdit.model import MMDiT
from pipeline import Pipeline
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
