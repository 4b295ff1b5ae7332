"""The training step's times, and what validation measures and keeps."""

from pathlib import Path

import pytest
import torch
from networks import stirred
from safetensors.torch import load_file
from trials import assert_same, fit, lines, small, state

import train
from data.module import Data
from data.order import NOT_COUNTED
from engine.ema import EMA
from pipeline import Pipeline
from training import experiment
from training.generator import Generator

WEIGHTS = "model/transformer/diffusion_pytorch_model.safetensors"


def built(config: Path, *flags: str) -> tuple[Generator, Data]:
    parser = experiment.parser("")
    return train.build(parser.instantiate(parser.parse_args(["--config", str(config), *flags])), None)[1:]


def test_times_are_stratified_new_at_each_step_and_independent_of_ranks(tmp_path: Path) -> None:
    generator, data = built(small(tmp_path))
    batches = iter(data.train_dataloader())
    first, second = next(batches), next(batches)
    u = generator.uniforms(first)
    assert u.shape == (4, 8)
    assert torch.equal((8 * u).floor().sort(1).values, torch.arange(8.0, dtype=u.dtype).expand(4, 8))
    later = generator.uniforms(second)
    assert not torch.isclose(u.sort(1).values, later.sort(1).values).any()
    assert torch.equal(generator.uniforms(first), u)
    for rank in (slice(4), slice(4, 8)):
        assert torch.equal(generator.uniforms(first._replace(positions=first.positions[rank])), u[:, rank])


def test_validation_is_the_loss_of_the_average_at_eight_times(tmp_path: Path) -> None:
    config = small(tmp_path)
    fit(config, "--optimization.lr", "0.05", "--run.steps", "3")
    logged = next(line for line in lines(tmp_path / "run") if "val/loss" in line)
    generator, data = built(config)
    average = Pipeline.load(tmp_path / "run/model").network
    live = {name.removeprefix("network."): x for name, x in state(tmp_path / "run")["tensors"].items()}
    found = {}
    for which in ("average", "live"):
        if which == "live":
            average.load_state_dict(live, strict=False)
        losses = torch.zeros(8, dtype=torch.float64)
        for batch in data.val_dataloader():
            for i in range(8):
                t = torch.full((len(batch.x0),), (i + 0.5) / 8)
                with torch.no_grad():
                    losses[i] += generator.lesson(batch, t).loss(generator.objective, average, t).double().sum() / 500
        found[which] = losses.tolist()
    told = [logged[f"val/loss_t{(i + 0.5) / 8:.4f}"] for i in range(8)]
    assert told == pytest.approx(found["average"], rel=1e-5)
    assert told != pytest.approx(found["live"], rel=1e-3)


def test_a_repeated_share_of_validation_does_not_count(tmp_path: Path) -> None:
    generator, data = built(small(tmp_path))
    copied = [stirred(built(small(tmp_path))[0].network)]
    generator.ema = EMA(generator.averages, copied, generator.network)
    batch = next(iter(data.val_dataloader()))
    generator.on_validation_epoch_start()
    with torch.no_grad():
        generator.validation_step(batch)
        once = generator.sums.clone()
        generator.validation_step(batch._replace(step=NOT_COUNTED))
    assert torch.equal(generator.sums, once)
    assert once[-1] == len(batch.x0)


def test_a_run_that_goes_on_keeps_its_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, draw = small(tmp_path), Generator.draw_samples

    def stop(self: Generator) -> None:
        if self.global_step == 6:
            raise OSError("the disk fell off")
        draw(self)

    monkeypatch.setattr(Generator, "draw_samples", stop)
    monkeypatch.setattr(Generator, "numbers", lambda self: {"best": 0.0})  # no later loss is lower
    with pytest.raises(SystemExit):
        fit(config)
    best = load_file(tmp_path / "run" / WEIGHTS)
    monkeypatch.undo()
    fit(config)
    assert state(tmp_path / "run")["step"] == 6
    assert state(tmp_path / "run")["numbers"]["best"] == 0.0
    assert_same(load_file(tmp_path / "run" / WEIGHTS), best)
