"""A prior's whole training: a store of embeddings, some steps, on to the bit after a stop, and its refusals."""

from pathlib import Path

import pytest
import torch
import yaml
from encoded import run
from image_towers import written
from trials import ROOT, assert_goes_on_to_the_bit, assert_two_learn_as_one, fit, lines, refused

import evaluate
import sample
from data.clip import CLIPImage
from data.store.reader import Store
from pipeline import Pipeline
from pipeline.prior import draw


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of the prior, made small, and beside it the store of 40 scenes."""
    folder = tmp_path_factory.mktemp("prior")
    content = yaml.safe_load((ROOT / "configs/tokens/prior.yaml").read_text())
    content["run"] |= {"steps": 6, "validate_every": 3, "checkpoint_every": 3, "log_every": 2}
    content["text"]["init_args"]["folder"] = str(ROOT / "assets/shapes/text")
    content["codec"]["init_args"]["folder"] = str(written(folder / "tower"))
    content["encode"]["source"]["init_args"]["count"] = 40
    content["encode"] |= {"store": str(folder / "store"), "device": "cpu"}
    content["data"]["init_args"] |= {"store": str(folder / "store"), "batch_size": 8, "held_out": 8}
    content["network"]["init_args"] |= {"depth": 1, "width": 16, "heads": 1}
    content["optimization"]["warmup"] = 2
    content["sampling"]["steps"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    run(folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture
def config(made: Path, tmp_path: Path) -> Path:
    content = yaml.safe_load(made.read_text())
    content["run"]["folder"] = str(tmp_path / "run")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "config.yaml"


def test_the_store_holds_standardised_embeddings(made: Path) -> None:
    store = Store(made.parent / "store")
    latents = store.latents(list(range(len(store)))).float()
    assert latents.shape == (40, 64, 1, 1)
    codec = CLIPImage(made.parent / "tower")
    torch.testing.assert_close(codec.embedding(latents).norm(dim=-1), torch.ones(40))


def test_a_run_writes_a_model_that_draws_embeddings_only(config: Path, capsys: pytest.CaptureFixture) -> None:
    fit(config)
    told = lines(config.parent / "run")
    assert any("val/loss" in line for line in told)
    drawn = draw(Pipeline.load(config.parent / "run/model"), ["a large red circle"], [0])
    assert drawn.shape == (1, 64)
    out = config.parent / "out"
    flags = ["--model", str(config.parent / "run"), "--out", str(out)]
    for command in (
        lambda: sample.main([*flags, "--prompt", "a large red circle"]),
        lambda: evaluate.main([*flags, "--data", "shapes", "--by", "category"]),
    ):
        with pytest.raises(SystemExit) as end:
            command()
        assert end.value.code == 2
        assert "draws image embeddings, which have no pixels" in capsys.readouterr().err.splitlines()[-1]
        assert not out.exists()


def test_a_stopped_run_goes_on_to_the_bit(config: Path) -> None:
    assert_goes_on_to_the_bit(config, stopped=4)


def test_two_processes_learn_as_one(config: Path) -> None:
    assert_two_learn_as_one(config, "--run.precision", "32-true", kind="ddp")


def test_what_does_not_fit_is_refused_in_one_line(config: Path, capsys: pytest.CaptureFixture) -> None:
    for flags, message in (
        (["--network.text_mask", "false"], "network.text_mask is False, but the data need True"),
        (["--grid.prompts", "[a circle]"], "latents have no pixels to show: leave out grid.prompts"),
        (["--network.in_channels", "32"], "in_channels is 32, but codec, text and objective need 64"),
        (["--objective", "flow.variance.LearnedVariance", "--objective.path", "ImprovedCosine"], "out_channels is 64"),
    ):
        assert message in refused(capsys, config, *flags)
