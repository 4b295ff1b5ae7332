"""A training on a regressor's residuals, from the YAML file to the sample."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuned import faulty_after
from networks import inputs, plain, stirred
from PIL import Image
from trials import ROOT, assert_same, fit, refused, small, state, under

import sample
from data import digits
from data.batch import Batch
from data.degrade import Degrade
from data.latents import Pixels
from data.module import Digits
from data.raw.pictures import sheet, to_image
from data.text.clip import CLIPText
from engine.flops import forward_flops
from flow.objective import Objective
from flow.target import X0
from mmdit.model import MMDiT
from mmdit.network import Condition
from pipeline import Pipeline
from pipeline.residual import Regressor
from storage.text import read_json
from training.cost import StepCost

CODEC = Pixels(1, 0.3, 2.66)
PICTURE = ROOT / "configs/picture"
BLURRED = ["--config", str(PICTURE / "deblurring.yaml")]
REFINED = [*BLURRED, "--config", str(PICTURE / "residual.yaml"), "--residual.regressor"]


DEGRADE = Degrade(1, blur=1.5)  # as deblurring.yaml has it


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def saved(folder: Path, text: CLIPText, objective: Objective, codec: Pixels = CODEC, **changes: Any) -> str:
    """A small random model with a picture, on disk."""
    sizes: dict[str, Any] = {"in_channels": 1, "depth": 1, "width": 16, "heads": 1, "text_dim": 64, "pooled_dim": 64}
    network = MMDiT(**(sizes | {"sample_size": 8, "pos_embed_max_size": 8, "picture_channels": 1} | changes))
    Pipeline(stirred(network), objective, codec, text).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def regressor(tmp_path_factory: pytest.TempPathFactory, text: CLIPText) -> str:
    return saved(tmp_path_factory.mktemp("regressor") / "model", text, Objective(target=X0()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, regressor: str) -> Path:
    folder = tmp_path_factory.mktemp("refined")
    fit(small(folder), *REFINED, regressor)
    return folder / "run"


def test_the_model_draws_what_the_training_drew(run: Path, tmp_path: Path, text: CLIPText) -> None:
    shutil.copytree(run / "model", tmp_path / "alone")
    pipe = Pipeline.load(tmp_path / "alone")
    best = min((line["val/loss"], line["step"]) for line in log(run) if "val/loss" in line)[1]
    shown = Digits(text, CODEC, degrade=DEGRADE).examples(2)
    assert shown
    drawn = pipe(shown.captions, [0, 1], height=8, width=8, picture=shown.pictures)
    with Image.open(run / f"samples/step-{int(best):07d}.png") as there:
        expected = np.asarray(sheet(torch.cat([shown.enlarged(), drawn, shown.real]), 2)).astype(int)
        assert np.abs(np.asarray(there).astype(int) - expected).max() <= 1


def test_it_learns_residuals_of_unit_variance(run: Path, regressor: str, text: CLIPText) -> None:
    kept = scale_of(run / "model")
    pipe, network = Pipeline.load(run), Pipeline.load(Path(regressor)).network
    assert pipe.regressor
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), pipe.regressor.network.parameters(), strict=True)
    )
    data = Digits(text, CODEC, 0, 8, degrade=DEGRADE)
    squares = []
    for batch, _ in zip(data.train_dataloader(), range(32), strict=False):
        left = Regressor(network).residual(Condition(**batch.condition()), batch.x0.shape).of(batch.x0)
        squares.append(left.square().mean().item())
    assert kept == pytest.approx(np.mean(squares) ** -0.5, rel=1e-5)
    assert log(run)[-1]["val/loss"] < 4  # 2 for a network that predicts zero


def scale_of(model: Path) -> float:
    return read_json(model / "regressor/config.json")["scale"]


def test_the_scale_is_measured_once(run: Path, tmp_path: Path, regressor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on, its averages and a run that begins at its checkpoint keep it to the bit."""
    averages = ["--ema.widths", "[0.1]", "--ema.snapshot_every", "3"]
    config, flags = small(tmp_path), [*REFINED, regressor, *averages]
    with faulty_after(6):
        fit(config, *flags)
    monkeypatch.setattr("training.residual.MEASURED", 8)  # pictures: another measurement
    fit(config, *flags)
    scale = scale_of(run / "model")
    assert scale_of(tmp_path / "run/model") == scale == state(tmp_path / "run")["numbers"]["residual_scale"]
    assert_same(under(tmp_path / "run", "network."), under(run, "network."))
    fit(config, *flags, "--width", "0.1", command="average")
    assert scale_of(tmp_path / "run/model-0.1") == scale
    begun = [*REFINED, regressor, "--from", str(run), "--run.steps", "9", "--run.folder"]
    fit(config, *begun, str(tmp_path / "begun"))
    assert scale_of(tmp_path / "begun/model") == scale
    fit(config, *begun, str(tmp_path / "given"), "--residual.scale", "2")
    assert scale_of(tmp_path / "given/model") == 2
    fit(config, *flags, "--run.folder", str(tmp_path / "new"))
    assert scale_of(tmp_path / "new/model") != scale


def test_sampling_needs_the_blurred_picture(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    to_image(DEGRADE.smaller(digits.load("held_out").pixels[:1])[0]).save(tmp_path / "blurred.png")
    flags = ["--model", str(run), "--prompt", "", "--out", str(tmp_path / "out"), "--steps", "2"]
    sample.main([*flags, "--picture", str(tmp_path / "blurred.png")])
    assert next((tmp_path / "out").glob("*.png")).is_file()
    for more, message in (
        ([], "error: this model works from a picture: give --picture"),
        (["--picture", str(tmp_path / "blurred.png"), "--guidance", "2"], "give guidance 1, not 2"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            sample.main([*flags, *more])
        said = capsys.readouterr().err.strip()
        assert (end.value.code, said.count("\n")) == (2, 0)
        assert message in said


def test_models_that_are_no_regressor_of_the_training_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: CLIPText, regressor: str, run: Path
) -> None:
    config, learned = small(tmp_path), Objective(target=X0())
    size = saved(tmp_path / "size", text, learned, sample_size=4)
    codec = saved(tmp_path / "codec", text, learned, Pixels(1, 0.5, 2.0))
    flow = saved(tmp_path / "flow", text, Objective())
    for flags, message in (
        ([size], "the regressor's sample_size is 4, and the network's 8: make them equal"),
        ([codec], "has another codec than the training: use its codec"),
        ([flow], "is no regressor: it learned Velocity on RectifiedFlow, and one learns X0 of noise alone"),
        ([str(run)], "draws the residual of its regressor, and a model of whole pictures is needed"),
        ([str(tmp_path / "none")], "is no model folder"),
        ([regressor, "--residual.scale", "0"], "the scale of a residual must be a positive number, got 0"),
        ([regressor, "--sampling.guidance", "2"], "give guidance 1, not 2"),
        ([regressor, "--teacher.model", flow], "residual goes with no teacher, judgement or lora"),
        ([regressor, "--data.degrade", "null", "--network.picture_channels", "0"], "and the network's 0: make them"),
    ):
        assert message in refused(capsys, config, *REFINED, *flags)
    lora = ["--network", "mmdit.checkpoint.load", "--network.path", str(run / "model"), "--lora.rank", "2"]
    assert "lora trains whole pictures" in refused(capsys, config, *lora)
    assert not (tmp_path / "run").exists()


def test_another_regressor_is_another_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, text: CLIPText
) -> None:
    shutil.copytree(run, tmp_path / "run")
    other = saved(tmp_path / "other", text, Objective(target=X0()), depth=2)
    assert "residual" in refused(capsys, small(tmp_path), *REFINED, other)


def test_a_step_also_costs_the_regressor_s_pass() -> None:
    network, own = plain(picture_channels=3), plain(picture_channels=3, depth=1)
    z, t, condition = inputs(8, 12, text=5)
    batch = Batch(0, np.arange(4), z, z, condition.text, condition.pooled, picture=z)
    costs = [StepCost(network, Objective(), None, None, None, each)(batch) for each in (None, Regressor(own))]
    assert costs[1].flops - costs[0].flops == forward_flops(own, z, t, condition._replace(picture=z))
