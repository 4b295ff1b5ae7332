"""A ControlNet in training: only it learns, it is a model folder, it steers its base; resume, ranks, bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trials import ROOT, assert_goes_on_to_the_bit, assert_same, assert_two_learn_as_one, fit, lines, refused, small

import encode
import sample
from engine.checkpoint import Checkpoints
from mmdit import checkpoint, control

OVERLAY = ROOT / "configs/picture/controlnet.yaml"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a model of the digits of three blocks."""
    folder = tmp_path_factory.mktemp("base")
    fit(small(folder), "--network.depth", "3")
    return folder / "run"


@pytest.fixture
def flags(base: Path) -> list[str]:
    return [
        "--config",
        str(OVERLAY),
        "--network.path",
        str(base),
        "--data.degrade.factor",
        "4",
        "--data.degrade.noise",
        "0",
    ]


def test_only_the_control_net_learns_and_steers_its_base(base: Path, flags: list[str], tmp_path: Path) -> None:
    fit(small(tmp_path), *flags, "--optimization.lr", "1e-2")
    run = tmp_path / "run"
    before, after = (checkpoint.load(folder).state_dict() for folder in (base, run))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    learned = control.load(run)
    assert learned.depth == 1
    assert all(layer.weight.abs().max() > 0 for layer in (learned.hint, *learned.outputs))
    assert not torch.equal(learned.trunk.patch.weight, before["patch.weight"])  # type: ignore[union-attr, operator]
    Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2) * 60).save(tmp_path / "hint.png")
    drawn = []
    ways = (["--model", run, "--picture", tmp_path / "hint.png"],
            ["--model", base, "--control", f"{run}:{tmp_path / 'hint.png'}"],
            ["--model", base, "--control", f"{run}:{tmp_path / 'hint.png'}:0"], ["--model", base])  # fmt: skip
    for i, way in enumerate(ways):
        out = tmp_path / str(i)
        sample.main([*map(str, way), "--prompt", "a seven", "--steps", "2", "--guidance", "2", "--out", str(out)])
        (entry,) = json.loads((out / "samples.json").read_text())
        drawn.append(np.asarray(Image.open(out / entry["file"])))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[3])
    assert np.array_equal(drawn[2], drawn[3])


def test_it_begins_as_its_base(base: Path, flags: list[str], tmp_path: Path) -> None:
    """The first loss is that of the base alone on the same batch."""
    short = ["--run.steps", "1", "--run.validate_every", "1", "--run.log_every", "1", "--optimization.warmup", "0"]
    fit(small(tmp_path), *flags, *short)
    plain = ["--network", "mmdit.checkpoint.load", "--network.path", str(base)]
    fit(small(tmp_path), *plain, *short, "--run.folder", str(tmp_path / "plain"))
    first, other = (next(line for line in lines(tmp_path / name) if "train/loss" in line) for name in ("run", "plain"))
    assert first["train/loss"] == pytest.approx(other["train/loss"], rel=1e-6)


def test_a_stopped_run_goes_on_to_the_bit(flags: list[str], tmp_path: Path) -> None:
    assert_goes_on_to_the_bit(small(tmp_path), *flags, stopped=4)


def test_its_checkpoints_hold_no_base_and_older_ones_may(base: Path, flags: list[str], tmp_path: Path) -> None:
    config, run = small(tmp_path), tmp_path / "run"
    fit(config, *flags)
    learned, found = control.load(run), Checkpoints(run / "checkpoints").at(3)
    assert found
    rows = {name for part in found.parts for name in part.rows}
    assert any(name.startswith("network.controls.0.") for name in rows)
    assert not any(name.startswith("network.base.") for name in rows)
    older = {name: torch.zeros(tuple(held.shape)) for part in found.parts for name, held in part.rows.items()}
    found.restore(older)
    for left in ("checkpoints", "model"):
        shutil.rmtree(run / left)
    weights = {f"network.base.{name}": tensor for name, tensor in checkpoint.load(base).state_dict().items()}
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(found.step, weights | older, found.numbers)
    checkpoints.wait()
    fit(config, *flags)
    assert_same(control.load(run).state_dict(), learned.state_dict())


def test_the_base_may_be_in_half_precision(base: Path, flags: list[str], tmp_path: Path) -> None:
    losses = []
    for name, dtype in (("run", "bfloat16"), ("whole", "float32")):
        fit(small(tmp_path), *flags, "--network.dtype", dtype, "--run.folder", str(tmp_path / name))
        losses.append([line["train/loss"] for line in lines(tmp_path / name) if "train/loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]
    base_types, own_types = (
        {
            tensor.dtype
            for tensor in load_file(tmp_path / f"run/model/{part}/diffusion_pytorch_model.safetensors").values()
        }
        for part in ("transformer", "controlnet")
    )
    assert (base_types, own_types) == ({torch.bfloat16}, {torch.float32})
    kept, before = (checkpoint.load(folder).state_dict() for folder in (tmp_path / "run", base))
    assert_same(kept, {name: tensor.bfloat16().float() for name, tensor in before.items()})


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_learn_as_one(flags: list[str], tmp_path: Path, kind: str) -> None:
    assert_two_learn_as_one(small(tmp_path), *flags, kind=kind)


def test_it_is_trained_further(base: Path, flags: list[str], tmp_path: Path) -> None:
    fit(small(tmp_path), *flags)
    first = control.load(tmp_path / "run")
    fit(small(tmp_path), *flags, "--network.control", str(tmp_path / "run"), "--optimization.lr", "1e-20",
        "--run.folder", str(tmp_path / "more"))  # fmt: skip
    again = control.load(tmp_path / "more")
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_one_that_learned_without_the_shift_is_not_trained_further(base: Path, tmp_path: Path) -> None:
    old = control.JointControlNet.of(checkpoint.load(base), 1)
    old.zero_pooled = True
    control.save(old, tmp_path / "old")
    with pytest.raises(ValueError, match="which is not done here: train a new one"):
        control.attach(base, control=tmp_path / "old")


def test_samples_of_hints_have_the_size_of_their_pictures(base: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    rows = []
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}))
    (tmp_path / "pictures/metadata.jsonl").write_text("\n".join(rows))
    config = small(tmp_path)
    wide = ["--encode.source.path", str(tmp_path / "pictures"), "--encode.side", "16", "--encode.step", "8"]
    encode.main(["--config", str(config), "--encode.source", "Pictures", *wide, "--encode.store",
                 str(tmp_path / "store"), "--encode.hint", "Blur", "--encode.device", "cpu"])  # fmt: skip
    fit(config, "--config", str(OVERLAY), "--network.path", str(base), "--data", "Stored", "--data.store",
        str(tmp_path / "store"), "--data.held_out", "6", "--data.batch_size", "4", "--run.steps", "3")  # fmt: skip
    assert (tmp_path / "run/samples/step-0000003.png").is_file()  # of 16 pixels, where the base draws 8
    assert (tmp_path / "run/model/controlnet").is_dir()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--network.blocks", "3"], "a ControlNet of a network of 3 blocks can have 1 blocks, not 3"),
        (["--network.path", "nowhere"], "nowhere"),
        (["--network.blocks", "0"], "can have 1 blocks, not 0"),
        (["--network.blocks", "1", "--network.control", "x"], "network.blocks is for a new ControlNet"),
        (["--network.control", "nowhere"], "there is no ControlNet nowhere"),
        (["--data.degrade", "null"], "network.picture_channels is 1, but the data need 0"),
        (["--data.degrade.noise", "0.2"], "network.level_embeds is False, but the data need True"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], words: str
) -> None:
    assert words in refused(capsys, small(tmp_path), *flags, *more)
    assert not (tmp_path / "run").exists()
