"""Autoguidance: a worse model on disk is what guidance moves away from; what does not fit is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import refused

import sample
from data.examined import Digits
from data.latents import Pixels
from flow.objective import Objective
from flow.path import Cosine
from mmdit.model import MMDiT
from mmdit.network import Condition
from pipeline import Pipeline
from studies.measure import Setting, draw

PROMPT = "a handwritten seven"


@pytest.fixture
def weak(pipe: Pipeline) -> Pipeline:
    torch.manual_seed(9)
    network = MMDiT(1, depth=1, width=16, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(network.eval(), pipe.objective, pipe.codec, pipe.text, pipe.sampling)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_step_is_the_formula(pipe: Pipeline, weak: Pipeline, guidance: float) -> None:
    """y = y_null + g·(y_cond − y_null) + (w − 1)·(y_cond − y_weak), with w = 2.5."""
    way = replace(pipe.sampling, steps=1, guidance=guidance, sampler="euler")
    drawn = pipe.away_from(weak, 2.5)([PROMPT], [4], sampling=way)
    z = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(4))[None]
    t = torch.ones(1)
    with torch.no_grad():
        condition, null = (Condition(*pipe.text.encode([prompt])) for prompt in (PROMPT, ""))
        y, y_null, y_weak = pipe.network(z, t, condition), pipe.network(z, t, null), weak.network(z, t, condition)
        velocity = y_null + guidance * (y - y_null) + 1.5 * (y - y_weak)
    torch.testing.assert_close(drawn, pipe.codec.decode(z - velocity), atol=1e-5, rtol=0)


def test_evaluations_of_both_models_count(pipe: Pipeline, weak: Pipeline) -> None:
    asked = Digits(1)
    for guidance, each in ((1.0, 2), (2.0, 3)):
        way = replace(pipe.sampling, steps=2, guidance=guidance, sampler="euler")
        assert draw(Setting("x", "x", pipe.away_from(weak, 2.0), way), asked, 0, 10).evaluations == 2 * each


def test_a_model_does_not_move_away_from_itself(pipe: Pipeline) -> None:
    way = replace(pipe.sampling, steps=3, guidance=2.0)
    torch.testing.assert_close(
        pipe.away_from(pipe, 3.0)([PROMPT], [1], sampling=way), pipe([PROMPT], [1], sampling=way)
    )


def test_the_command_does_it_and_repeats_it(model: Path, weak: Pipeline, tmp_path: Path) -> None:
    weak.save(tmp_path / "weak")
    flags = ["--model", str(model), "--prompt", PROMPT, "--steps", "2", "--guidance", "2"]
    sample.main([*flags, "--out", str(tmp_path / "plain")])
    sample.main([*flags, "--autoguidance", f"{tmp_path / 'weak'}:2.5", "--out", str(tmp_path / "away")])
    sample.main(["--like", str(next((tmp_path / "away").glob("a-*.png"))), "--out", str(tmp_path / "again")])
    plain, away, again = (np.asarray(Image.open(tmp_path / name / "sheet.png")) for name in ("plain", "away", "again"))
    assert not np.array_equal(plain, away)
    assert np.array_equal(away, again)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("weak", "is not MODEL:SCALE"),
        (":2", "is not MODEL:SCALE"),
        ("FOLDER/weak:much", "is not MODEL:SCALE"),
        ("FOLDER/weak:1", "finite scale above 1, which is none, got 1"),
        ("FOLDER/weak:inf", "finite scale above 1"),
        ("FOLDER/none:2", "none is no model folder"),
    ],
)
def test_flags_that_do_not_fit(
    model: Path, weak: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture, named: str, words: str
) -> None:
    weak.save(tmp_path / "weak")
    given = ["--autoguidance", named.replace("FOLDER", str(tmp_path)), "--out", str(tmp_path / "out")]
    assert words in refused(capsys, "--model", str(model), "--prompt", "x", *given)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(pipe: Pipeline, weak: Pipeline) -> None:
    with pytest.raises(ValueError, match="the weak model has another path"):
        pipe.away_from(Pipeline(weak.network, Objective(Cosine()), pipe.codec, pipe.text), 2.0)
    with pytest.raises(ValueError, match="the weak model has another codec"):
        pipe.away_from(Pipeline(weak.network, pipe.objective, Pixels(1, 0.1, 3.0), pipe.text), 2.0)
    grown = MMDiT(1, depth=1, width=16, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=4,
                  picture_channels=1)  # fmt: skip
    with pytest.raises(ValueError, match="the weak model has another picture_channels"):
        pipe.away_from(Pipeline(grown, pipe.objective, pipe.codec, pipe.text), 2.0)
    small = MMDiT(1, depth=1, width=16, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=4)
    with pytest.raises(ValueError, match="the weak model draws smaller pictures"):
        pipe.away_from(Pipeline(small, pipe.objective, pipe.codec, pipe.text), 2.0)
    with pytest.raises(ValueError, match="skip-layer guidance and autoguidance exclude each other"):
        pipe.away_from(weak, 2.0).plan(replace(pipe.sampling, steps=20, skip_layers=(0,)))
