"""Whole trainings from stores: stages and buckets, bad input, damage, and another store in the place of the first."""

import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from painted import HELD_OUT, ROOT, TEXT
from store_files import replan
from trials import ENV, assert_same, ended, fit, lines, shell, state

from pipeline import Pipeline
from training.generator import Generator


@pytest.fixture
def config(tmp_path: Path, stores: dict[str, str]) -> Path:
    content = yaml.safe_load((ROOT / "configs/shapes.yaml").read_text())
    del content["encode"]
    content["run"] = {"folder": str(tmp_path / "run"), "steps": 6, "validate_every": 3, "checkpoint_every": 3,
                      "log_every": 1, "accelerator": "cpu"}  # fmt: skip
    content["text"] = {"class_path": "CLIPText", "init_args": {"folder": str(TEXT)}}
    content["codec"] = {"class_path": "Pixels", "init_args": {"channels": 3}}
    content["data"]["init_args"] |= {"store": stores["tokens"], "batch_size": 8, "held_out": HELD_OUT}
    content["network"]["init_args"] |= {
        "in_channels": 3, "patch_size": 2, "depth": 1, "width": 16, "heads": 1, "sample_size": 16,
        "pos_embed_max_size": 16,
    }  # fmt: skip
    content["strategy"]["compile"] = False
    content["optimization"]["warmup"] = 2
    content["sampling"]["steps"] = 2
    content["grid"] = {"prompts": ["a large red circle"], "columns": 1}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_bucketed_run_with_stages_goes_on_to_the_bit(
    config: Path, stores: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = json.dumps([{"store": stores["small"], "steps": 2}, {"store": stores["captions"], "steps": 2}])
    flags = ["--data.before", stages, "--data.size_conditioning", "true", "--network.pooled_dim", str(128 + 1536)]
    straight, faulty = config.parent / "straight", config.parent / "faulty"
    fit(config, *flags, "--run.folder", str(straight))
    draw = Generator.draw_samples

    def fault(self: Generator) -> None:
        if self.global_step == 6:
            raise OSError("the disk fell off")
        draw(self)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "draw_samples", fault)
        with pytest.raises(SystemExit):
            fit(config, *flags, "--run.folder", str(faulty))
    assert state(faulty)["step"] == 3  # in the middle of the second stage
    fit(config, *flags, "--run.folder", str(faulty), "--data.workers", "1")
    assert_same(state(straight), state(faulty))
    model = Pipeline.load(straight / "model")
    assert model.sized
    log = lines(straight)
    assert all(line["val/loss"] > 0 for line in log if "val/loss" in line)
    assert [line["step"] for line in log if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    fit(config, *flags, "--run.folder", str(straight), command="validate")
    assert lines(straight)[-1]["val/loss"] == pytest.approx(
        [line["val/loss"] for line in log if "val/loss" in line][-1], rel=1e-6
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.size_conditioning", "true"], "network.pooled_dim must be 1664 with data.size_conditioning, got 128"),
        (["--network.pooled_dim", "1664"], "network.pooled_dim must be 128 without data.size_conditioning, got 1664"),
        (["--network.pooled_dim", "99"], "pooled_dim is 99, but codec, text and objective need 128"),
        (["--codec.shift", "0.3"], "codec.shift_factor: there 0.5, here 0.3"),
        (["--text.folder", str(ROOT / "assets/digits/text")], "text.length: there 20, here 10"),
        (["--data.store", "nowhere"], "there is no store at nowhere"),
        (["--data.encoder_dropout", "2"], "dropouts must be from 0 to 1"),
        (["--data.before", '[{"store": "nowhere", "steps": 0}]'], "at least 1 step, got 0"),
        (["--network.pos_embed_max_size", "8"], "must be at most 16, the size of the positional table"),
        (["--data.held_out", "1", "--run.devices", "2"], "data.held_out must be at least the 2 processes, got 1"),
        (["--data.held_out", "72"], "held_out must be from 1 to below the store's 72 samples"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    config: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(config, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (config.parent / "run").exists()


@pytest.fixture
def damaged(stores: dict[str, str], tmp_path: Path) -> str:
    """A store whose tokens are not what they were."""
    folder = tmp_path / "damaged"
    shutil.copytree(stores["tokens"], folder)
    for file in (folder / "units").glob("*.tokens.safetensors"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :: 7] = bytes(len(content[len(content) // 2 :: 7]))
        file.write_bytes(content)
    return str(folder)


def test_damage_of_a_store_during_a_run_ends_it_in_one_line(
    config: Path, damaged: str, capsys: pytest.CaptureFixture
) -> None:
    told = ended(capsys, config, "--data.store", damaged, status=1)
    assert "checksum" in told
    assert len(told) < 400


def test_a_loader_process_that_finds_a_store_damaged_ends_the_run(config: Path, damaged: str) -> None:
    """With the same line. The command must not wait for its loader processes."""
    command = shell(config, "--data.store", damaged, "--data.workers", "1")
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said = process.communicate(timeout=120)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    (told,) = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert process.returncode == 1
    assert "checksum" in told
    assert len(told) < 400


def test_a_run_does_not_go_on_with_another_store_in_its_place(
    config: Path, stores: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = tmp_path / "place"
    shutil.copytree(stores["tokens"], place)
    fit(config, "--data.store", str(place))
    shutil.rmtree(place)
    shutil.copytree(stores["captions"], place)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(config, "--data.store", str(place))
    assert end.value.code == 2
    assert "holds a run on other data than" in capsys.readouterr().err


def test_a_store_of_another_version_is_refused(
    config: Path, stores: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(stores["tokens"], newer)
    replan(newer, version=2)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(config, "--data.store", str(newer))
    assert end.value.code == 2
    assert "version: there 2, here 1" in capsys.readouterr().err
