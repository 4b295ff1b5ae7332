"""train.py as a user calls it: what a run leaves behind, how it goes on, how it refuses."""

import copy
import math
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from trials import ENV, ROOT, Change, assert_same, end, fill_at, fit, lines, refused, shell, small, start, state, under

import train
from benchmarks import plan
from pipeline import Pipeline
from training import experiment
from training.generator import Generator

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what this machine has")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return small(tmp_path)


def test_a_run_leaves_config_log_samples_checkpoint_and_model(config: Path, capsys: pytest.CaptureFixture) -> None:
    fit(config)
    run = config.parent / "run"
    names = ["checkpoints", "config.yaml", "log.jsonl", "model", "samples", "wandb-id"]
    assert sorted(file.name for file in run.iterdir()) == names
    assert sorted(file.name for file in (run / "samples").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    log = lines(run)
    assert [line["step"] for line in log if "train/loss" in line] == [2, 4, 6]
    validation = [line for line in log if "val/loss" in line]
    assert [line["step"] for line in validation] == [3, 6]
    per_t = [value for key, value in validation[0].items() if key.startswith("val/loss_t")]
    assert len(per_t) == 8
    assert sum(per_t) / 8 == pytest.approx(validation[0]["val/loss"], rel=1e-5)
    bins = [key for key in log[0] if key.startswith("train/loss_bin")]
    assert len(bins) == 8

    average, raw = under(run, "average.decay-0.999."), under(run, "network.")
    weights = dict(Pipeline.load(run / "model").network.named_parameters())
    assert average.keys() == raw.keys() < weights.keys()  # what does not learn has no average and is not saved
    assert_same({name: weights[name].data for name in average}, average)  # the folder holds the average …
    assert any(not torch.equal(raw[name], average[name]) for name in average)  # … not the raw weights
    assert under(run, "optimizer.").keys() == {
        f"{name}.{key}" for name in average for key in ("step", "exp_avg", "exp_avg_sq")
    }

    fit(config)
    assert "trained already" in capsys.readouterr().out


def test_the_average_is_the_recursion_over_the_weights(config: Path) -> None:
    flags = ["--run.checkpoint_every", "1", "--run.validate_every", "1", "--ema.decay", "0.9"]
    averages, weights = [], []
    for steps in (1, 2):
        run = config.parent / f"run{steps}"
        fit(config, "--run.folder", str(run), "--run.steps", str(steps), "--optimization.warmup", "0", *flags)
        averages.append(under(run, "average.decay-0.9.")["patch.weight"])
        weights.append(under(run, "network.")["patch.weight"])
    # Both runs start alike, and with no warm-up the cosine's first step is at the peak rate for either length.
    decay = min(0.9, 3 / 12)
    torch.testing.assert_close(averages[1], torch.lerp(weights[1], averages[0], decay))
    assert averages[1].dtype == torch.float32


def test_validation_does_not_depend_on_the_batch_of_training_or_on_time(config: Path) -> None:
    fit(config, "--run.folder", str(config.parent / "a"), "--optimization.lr", "0")
    first, second = (line["val/loss"] for line in lines(config.parent / "a") if "val/loss" in line)
    fit(config, "--run.folder", str(config.parent / "b"), "--optimization.lr", "0", "--data.batch_size", "4")
    assert first == second == lines(config.parent / "b")[-1]["val/loss"]


def test_the_validate_command_reports_the_average(config: Path, capsys: pytest.CaptureFixture) -> None:
    assert "train this config first" in refused(capsys, config, command="validate")
    fit(config)
    before = lines(config.parent / "run")
    fit(config, command="validate")
    after = lines(config.parent / "run")
    assert after[: len(before)] == before  # only appended to
    assert after[-1] == pytest.approx(before[-1], rel=1e-6)


def test_a_fault_while_validating_loses_neither_validation_nor_model(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [config.parent / name for name in ("straight", "faulty")]
    fit(config, "--run.folder", str(folders[0]))
    draw = Generator.draw_samples

    def fault(self: Generator) -> None:
        if self.global_step == 6:
            raise OSError("the disk fell off")
        draw(self)

    monkeypatch.setattr(Generator, "draw_samples", fault)
    with pytest.raises(SystemExit) as end:
        fit(config, "--run.folder", str(folders[1]))
    assert end.value.code == 1
    assert state(folders[1])["step"] == 3
    monkeypatch.undo()
    fit(config, "--run.folder", str(folders[1]))
    assert_same(state(folders[1]), state(folders[0]))
    assert (folders[1] / "samples/step-0000006.png").exists()
    weights = [Pipeline.load(folder / "model").network.state_dict() for folder in folders]
    assert_same(*weights)


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine(config: Path) -> None:
    flags = ["--run.steps", "12", "--run.log_every", "1", "--optimization.warmup", "4", "--optimization.lr", "1"]
    fit(config, *flags)
    found = [line["train/lr"] for line in lines(config.parent / "run") if "train/lr" in line]
    expected = [k / 4 if k < 4 else 0.5 * (1 + math.cos(math.pi * (k - 4) / 8)) for k in range(12)]
    assert found == pytest.approx(expected)


def test_a_training_that_diverges_ends_in_one_line(config: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(config, "--optimization.lr", "1e38", "--optimization.warmup", "0")
    assert end.value.code == 2
    assert "the validation loss is nan at step 3: try a lower lr" in capsys.readouterr().err
    assert not (config.parent / "run/model").exists()
    assert all(isinstance(line, dict) for line in lines(config.parent / "run"))  # JSON without NaN


def test_a_run_may_be_moved(config: Path, capsys: pytest.CaptureFixture) -> None:
    fit(config)
    (config.parent / "run").rename(config.parent / "moved")
    fit(config, "--run.folder", str(config.parent / "moved"))
    assert "trained already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run.stpes", "7"], "run.stpes"),
        (["--run.steps", "many"], "many"),
        (["--run.steps", "0"], "at least 1"),
        (["--run.steps", "7"], "multiple of validate_every"),
        (["--objective.density.mean", "wide"], "density"),
        (["--objective.density", "LogNormal"], "LogNormal"),
        (["--objective.density=Mode", "--objective.density.scale=2"], "Mode needs"),
        (["--text.init_args.folder", "nowhere"], "nowhere"),
        (["--network.text_dim", "77"], "text_dim is 77, but codec, text and objective need 64"),
        (["--network.heads", "3"], "multiple of heads"),
        (["--network.sample_size", "7"], "sample_size"),
        (["--data.caption_dropout", "1.5"], "caption_dropout"),
        (["--ema.decay", "1"], "ema.decay and ema.more must be at least 0 and below 1, got 1.0"),
        (["--ema.widths", "[0.1]"], "ema.widths needs ema.snapshot_every"),
        (["--ema.snapshot_every", "5"], "ema.snapshot_every needs ema.widths"),
        (["--ema.widths", "[0.4]", "--ema.snapshot_every", "5"], "width"),
        (["--sampling.steps", "0"], "steps must be at least 1"),
        (["--data.batch_size", "7", "--run.devices", "2"], "multiple of processes × accumulate_grad_batches, 2 × 1"),
        (["--data.batch_size", "0"], "batch_size from 1 to 1,048,576 and workers from 0 to 1,024, got 0 and 0"),
        (["--data.batch_size", "1000000000000"], "got 1000000000000 and 0"),
        (["--data.workers", "1025"], "got 8 and 1025"),
        (["--run.seed", "-1"], "-1"),
        (["--optimization.lr", "-1"], "optimization needs lr"),
        (["--optimization.lr", "nan"], "must be finite, got nan"),
        (["--optimization.warmup", "6"], "warmup must be below run.steps 6"),
        (["--network.patch_size", "3", "--network.sample_size", "9"], "height must be a multiple of 3"),
        (["--codec.channels", "3"], "in_channels is 1, but codec, text and objective need 3"),
        (["--data.side", "7"], "data.side must be a multiple of 1 and at least 8"),
        (["--data.side", "0"], "data.side must be a multiple of 1 and at least 8"),
        (["--lora.rank", "4"], "network.class_path must be mmdit.checkpoint.load"),
        (["--grid.columns", "0"], "grid.columns"),
        (["--objective.path", "DDPMLinear"], "is discrete and has no rate"),
        (
            ["--objective.path", "Cosine", "--objective.target", "Epsilon"],
            "at t = 1 Epsilon does not determine picture and noise",
        ),
        (["--objective", "LearnedVariance"], "LearnedVariance needs a discrete path, such as"),
        (["--objective", "LearnedVariance", "--objective.path", "Cosine"], "needs a discrete path"),
        (["--sampling.sampler", "ddpm"], "RectifiedFlow is continuous"),
        (["--sampling.spacing", "leading"], "needs a discrete path"),
        (["--network.class_path", "torch.nn.Identity"], "Network"),
        (["--objective.target", "velocity"], "there is no Target velocity: take one of Epsilon, Preconditioned, V,"),
        (["--data.held_out", "5"], "'data.module.Digits': Option 'held_out' is not accepted."),
        pytest.param(["--run.accelerator", "gpu"], "No supported gpu", marks=NO_GPU),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    config: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert message in refused(capsys, config, *flags)
    assert not (config.parent / "run").exists()


def test_a_missing_or_misspelled_config_ends_in_one_line(config: Path, capsys: pytest.CaptureFixture) -> None:
    assert "nowhere.yaml" in refused(capsys, Path("nowhere.yaml"))
    config.write_text(config.read_text().replace("validate_every", "validate_evry"))
    assert "validate_evry" in refused(capsys, config)


ALIASES = "\n".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]" for m, n in pairwise("abcdefghij"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'run:\n  folder: "\xff"\n', "is no text in UTF-8: line 2 holds the byte 0xff"),
        (b"run: " + b"[" * 2000 + b"]" * 2000, "is nested too deeply"),
        (b"a: &a [x, x, x, x, x, x, x, x, x]\n" + ALIASES.encode(), "stands for more than 100,000 values"),
    ],
)
@pytest.mark.parametrize("words", [("--config", "{}"), ("--config={}",)])
def test_a_config_that_cannot_be_read_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes, message: str, words: tuple[str, ...]
) -> None:
    """By train.py and by the plan, which have the same parser."""
    (tmp_path / "bad.yaml").write_bytes(content)
    for command, main in ((["fit"], train.main), ([], plan.main)):
        with pytest.raises(SystemExit) as end:
            main([*command, *(word.format(tmp_path / "bad.yaml") for word in words)])
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        assert message in line


def test_a_run_of_another_config_is_refused_and_left_alone(config: Path, capsys: pytest.CaptureFixture) -> None:
    fit(config)
    before = copy.deepcopy(state(config.parent / "run"))
    message = refused(capsys, config, "--optimization.lr", "0.5")
    assert "optimization.lr is 0.002 there and 0.5 now" in message
    assert "another config" in refused(capsys, config, "--network.width", "32", command="validate")
    assert_same(state(config.parent / "run"), before)
    (config.parent / "letters").mkdir()
    (config.parent / "letters/dear.txt").touch()
    assert "holds no run" in refused(capsys, config, "--run.folder", str(config.parent / "letters"))


def test_bfloat16_is_for_the_network_alone(config: Path) -> None:
    folders = [str(config.parent / name) for name in ("32-true", "bf16-mixed")]
    for folder in folders:
        fit(config, "--run.folder", folder, "--run.precision", Path(folder).name)
    exact, rounded = (lines(Path(folder))[-1]["val/loss"] for folder in folders)
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=1e-2)
    kept = state(Path(folders[1]))["tensors"]
    assert {t.dtype for t in kept.values()} == {torch.float32}
    assert state(Path(folders[0]))["tensors"].keys() == kept.keys()


OVERLAYS = {  # file → path, target, density, weight
    "cosmap": "RectifiedFlow Velocity CosMap NoneType",
    "mode": "RectifiedFlow Velocity Mode NoneType",
    "uniform": "RectifiedFlow Velocity Uniform NoneType",
    "edm": "EDM Preconditioned Uniform NoneType",
    "v-cosine": "Cosine V Uniform NoneType",
    "vp": "VariancePreserving Epsilon Uniform NoneType",
    "v-linear": "LDMLinear V Uniform NoneType",
    "eps-linear": "LDMLinear Epsilon Uniform NoneType",
    "ddpm": "DDPMLinear Epsilon Uniform NoneType",
    "iddpm": "ImprovedCosine Epsilon Uniform NoneType",
    "zero-snr": "ZeroTerminalSNR V Uniform NoneType",
    "min-snr": "LDMLinear Epsilon Uniform MinSNR",
}


def test_every_overlay_is_listed() -> None:
    assert {file.stem for file in (ROOT / "configs/objective").glob("*.yaml")} == OVERLAYS.keys()


@pytest.mark.parametrize(("stem", "names"), OVERLAYS.items())
def test_each_process_trains_and_samples(config: Path, stem: str, names: str) -> None:
    fit(config, "--config", str(ROOT / f"configs/objective/{stem}.yaml"), "--sampling.steps", "2", "--run.steps", "3")
    parser = experiment.parser("")
    flags = ["--config", str(config), "--config", str(ROOT / f"configs/objective/{stem}.yaml")]
    built = parser.instantiate(parser.parse_args(flags))
    o = built.objective
    assert [type(x).__name__ for x in (o.path, o.target, o.density, o.weight)] == names.split()
    assert built.network.depth == 1
    model = Pipeline.load(config.parent / "run/model")
    assert type(model.objective.path) is type(o.path)
    assert all(line["val/loss"] > 0 for line in lines(config.parent / "run") if "val/loss" in line)


def test_the_unet_trains(config: Path) -> None:
    overlays = [f"configs/{name}.yaml" for name in ("objective/ddpm", "network/unet-parameters")]
    flags = [part for name in overlays for part in ("--config", str(ROOT / name))]
    fit(config, *flags, "--network.channels", "[16, 16]", "--run.steps", "3", "--sampling.steps", "2")
    assert type(Pipeline.load(config.parent / "run/model").network).__name__ == "UNet"


def test_wandb_offline_holds_metrics_and_samples(config: Path) -> None:
    command = shell(config, "--run.wandb", "offline")
    subprocess.run(command, cwd=ROOT, env=ENV, check=True, capture_output=True)
    (kept,) = (config.parent / "run/wandb").glob("offline-run-*")
    assert kept.name.endswith(f"-{(config.parent / 'run/wandb-id').read_text()}")
    assert list(kept.glob("*.wandb"))
    assert len(list(kept.glob("files/media/images/*.png"))) == 2


def test_a_full_disk_while_writing_the_model_leaves_no_half_model(config: Path, tmp_path: Path) -> None:
    """The first file that is too large is one of the model's, since the first checkpoint comes after it."""
    said = tmp_path / "said"
    assert end(start(config, said=said, change=Change(fill_at, (2, 20_000)))) == 1
    assert "Traceback" not in said.read_text()
    assert said.read_text().strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/checkpoints").exists()
