"""train.py as a user calls it: what a run leaves behind, how it goes on, how it refuses."""

import copy
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import experiment
import train
from generator import Generator
from pipeline import Pipeline
from training.checkpoint import AtomicCheckpointIO

ROOT = Path(__file__).parents[1]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what this machine has")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The digits config, made small."""
    content = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    content["run"] |= {"folder": str(tmp_path / "run"), "steps": 6, "validate_every": 3, "checkpoint_every": 3}
    content["run"]["log_every"] = 2
    content["text"]["init_args"]["folder"] = str(ROOT / "assets/digits/text")
    content["optimization"]["warmup"] = 2
    content["network"]["init_args"] |= {"depth": 1, "width": 16, "heads": 1}
    content["data"]["init_args"]["batch_size"] = 8
    content["grid"] = {"prompts": ["a handwritten seven"], "columns": 2}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def fit(config: Path, *flags: str, command: str = "fit") -> None:
    train.main([command, "--config", str(config), *flags])


def shell(config: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(config), *flags]


def refused(capsys: pytest.CaptureFixture, config: Path, *flags: str, command: str = "fit") -> str:
    """The one line with which a call ends; it must end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(config, *flags, command=command)
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line]
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def lines(run: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (run / "log.jsonl").read_text().splitlines()]


def state(run: Path) -> dict:
    """What must not depend on how often a run was interrupted."""
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    keys = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "best")
    return {key: checkpoint[key] for key in keys} | {"ema": checkpoint["callbacks"]["EMA"]}


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equality to the bit of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert a == b, where


def test_a_run_leaves_config_log_samples_checkpoint_and_model(config: Path, capsys: pytest.CaptureFixture) -> None:
    fit(config)
    run = config.parent / "run"
    names = ["config.yaml", "last.ckpt", "log.jsonl", "model", "samples"]
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

    average = state(run)["ema"]["average"]
    weights = dict(Pipeline.load(run / "model").network.named_parameters())
    assert_same({name: weights[name].data for name in average}, average)  # the folder holds the average …
    raw = state(run)["state_dict"]
    assert any(not torch.equal(raw[f"network.{name}"], average[name]) for name in average)  # … not the raw weights

    fit(config)
    assert "trained already" in capsys.readouterr().out


def test_the_average_is_the_recursion_over_the_weights(config: Path) -> None:
    flags = ["--run.checkpoint_every", "1", "--run.validate_every", "1", "--optimization.ema_decay", "0.9"]
    averages, weights = [], []
    for steps in (1, 2):
        run = config.parent / f"run{steps}"
        fit(config, "--run.folder", str(run), "--run.steps", str(steps), "--optimization.warmup", "0", *flags)
        averages.append(state(run)["ema"]["average"]["patch.weight"])
        weights.append(state(run)["state_dict"]["network.patch.weight"])
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


def test_killed_and_resumed_equals_straight_to_the_bit(config: Path) -> None:
    flags = ["--run.steps", "300", "--run.validate_every", "100", "--run.checkpoint_every", "20"]
    straight, killed = config.parent / "straight", config.parent / "killed"
    command = shell(config, *flags, "--run.folder")
    subprocess.run([*command, str(straight)], cwd=ROOT, env=ENV, check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, str(killed)], cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (killed / "last.ckpt").exists():
        assert process.poll() is None, "the run ended without a checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state(killed)["global_step"] < 300
    subprocess.run([*command, str(killed), "--data.workers", "2"], cwd=ROOT, env=ENV, check=True, capture_output=True)
    assert_same(state(killed), state(straight))


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
    assert state(folders[1])["global_step"] == 3
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


def test_two_processes_train_as_one(config: Path) -> None:
    flags = ["--run.steps", "10", "--run.validate_every", "5", "--run.checkpoint_every", "10"]
    for devices in ("1", "2"):
        folder = str(config.parent / devices)
        command = shell(config, *flags, "--run.devices", devices, "--run.folder", folder)
        done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert (config.parent / devices / "last.ckpt").exists(), done.stderr[-2000:]
    one, two = (state(config.parent / devices) for devices in ("1", "2"))
    for name, average in one["ema"]["average"].items():
        torch.testing.assert_close(two["ema"]["average"][name], average, atol=2e-5, rtol=1e-4)
    losses = [[line["val/loss"] for line in lines(config.parent / d) if "val/loss" in line] for d in ("1", "2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    logs = [[line for line in lines(config.parent / d) if "train/loss" in line] for d in ("1", "2")]
    for one_line, two_line in zip(*logs, strict=True):  # loss and bins are those of the global batch
        for name in (name for name, value in one_line.items() if name.startswith("train/loss") and value is not None):
            assert two_line[name] == pytest.approx(one_line[name], rel=1e-4), name


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
        (["--optimization.ema_decay", "1"], "ema_decay"),
        (["--sampling.steps", "0"], "steps must be at least 1"),
        (["--data.batch_size", "7", "--run.devices", "2"], "multiple of the 2 devices"),
        (["--data.batch_size", "0"], "batch_size >= 1"),
        (["--run.seed", "-1"], "-1"),
        (["--optimization.lr", "-1"], "optimization needs lr"),
        (["--optimization.warmup", "6"], "warmup must be below run.steps 6"),
        (["--network.patch_size", "3", "--network.sample_size", "9"], "height must be a multiple of 3"),
        (["--codec.channels", "3"], "in_channels is 1, but codec, text and objective need 3"),
        (["--data.side", "7"], "data.side must be a multiple of 1 and at least 8"),
        (["--lora.rank", "4"], "network.class_path must be mmdit.checkpoint.load"),
        (["--grid.columns", "0"], "grid.columns"),
        (["--objective.path", "DDPMLinear"], "is discrete and has no rate"),
        (
            ["--objective.path", "Cosine", "--objective.target", "Epsilon"],
            "at t = 1 Epsilon does not tell picture from noise",
        ),
        (["--objective.variance.weight", "0.001"], "a learned variance needs a discrete path"),
        (["--sampling.sampler", "ddpm"], "RectifiedFlow is continuous"),
        (["--sampling.spacing", "leading"], "needs a discrete path"),
        (["--network.class_path", "torch.nn.Identity"], "in_channels is None"),
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


class Bomb:
    """Writes a file if it is ever unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_a_checkpoint_with_pickled_code_is_refused_and_not_run(config: Path, capsys: pytest.CaptureFixture) -> None:
    fit(config)
    last, proof = config.parent / "run/last.ckpt", config.parent / "boom"
    torch.save({"state_dict": Bomb(proof)}, last)
    assert "pickled code" in refused(capsys, config)
    last.write_bytes(pickle.dumps(Bomb(proof)))
    assert "pickled code" in refused(capsys, config)
    assert not proof.exists()


def test_a_truncated_checkpoint_is_refused(config: Path, capsys: pytest.CaptureFixture) -> None:
    fit(config)
    last = config.parent / "run/last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    assert "truncated or no checkpoint" in refused(capsys, config)
    torch.save({"epoch": 3}, last)
    assert "no checkpoint of a run" in refused(capsys, config)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    whole: dict[str, object] = {"global_step": 1, "state_dict": {}, "callbacks": {}}
    AtomicCheckpointIO().save_checkpoint(whole, file)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk: writes beyond it fail
    try:
        with pytest.raises(OSError, match=r"could not write .*last.ckpt"):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1_000_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert AtomicCheckpointIO().load_checkpoint(file) == whole
    assert [f.name for f in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_in_training_ends_in_one_line_with_status_1(config: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(shell(config), cwd=ROOT, env=ENV, preexec_fn=small_files, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: could not write")
    assert "Traceback" not in done.stderr


def test_bfloat16_is_for_the_network_alone(config: Path) -> None:
    folders = [str(config.parent / name) for name in ("32-true", "bf16-mixed")]
    for folder in folders:
        fit(config, "--run.folder", folder, "--run.precision", Path(folder).name)
    exact, rounded = (lines(Path(folder))[-1]["val/loss"] for folder in folders)
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=1e-2)
    kept = state(Path(folders[1]))
    assert {t.dtype for t in kept["ema"]["average"].values()} == {torch.float32}
    assert {t.dtype for t in kept["state_dict"].values()} == {torch.float32}


OVERLAYS = {  # file → path, target, density, weight
    "cosmap": "RectifiedFlow Velocity CosMap NoneType",
    "mode": "RectifiedFlow Velocity Mode NoneType",
    "uniform": "RectifiedFlow Velocity Uniform NoneType",
    "edm": "EDM Preconditioned Uniform NoneType",
    "v-cosine": "Cosine V Uniform NoneType",
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
    fit(config, *(part for name in overlays for part in ("--config", str(ROOT / name))), "--run.steps", "3")
    assert type(Pipeline.load(config.parent / "run/model").network).__name__ == "UNet"


def test_wandb_offline_holds_metrics_and_samples(config: Path) -> None:
    command = shell(config, "--run.wandb", "offline")
    subprocess.run(command, cwd=ROOT, env=ENV, check=True, capture_output=True)
    (kept,) = (config.parent / "run/wandb").glob("offline-run-*")
    assert list(kept.glob("*.wandb"))
    assert len(list(kept.glob("files/media/images/*.png"))) == 2


def test_a_full_disk_while_writing_the_model_leaves_no_half_model(config: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    folder = config.parent / "other"
    command = shell(config, "--run.folder", str(folder), "--run.checkpoint_every", "6")
    done = subprocess.run(command, cwd=ROOT, env=ENV, preexec_fn=small_files, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (folder / "model").exists()
