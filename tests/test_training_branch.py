"""`--from RUN@STEP`: a new run that begins at a checkpoint of another."""

from pathlib import Path

import pytest
from trials import assert_same, ended, fit, lines, refused, small, state

FLAGS = ("--optimization.schedule", "Constant")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config of a run that is done."""
    config = small(tmp_path)
    fit(config, *FLAGS, "--run.folder", str(tmp_path / "first"))
    return config


@pytest.mark.parametrize(("place", "step"), [("first@3", 3), ("first", 6)])
def test_the_new_run_goes_on_as_the_old_one(config: Path, tmp_path: Path, place: str, step: int) -> None:
    longer = (*FLAGS, "--run.steps", "9")
    fit(config, *longer, "--run.folder", str(tmp_path / "straight"))
    before = state(tmp_path / "first")
    branch = (*longer, "--run.folder", str(tmp_path / "branch"), "--from", str(tmp_path / place))
    fit(config, *branch)
    assert_same(state(tmp_path / "branch")["tensors"], state(tmp_path / "straight")["tensors"])
    assert min(line["step"] for line in lines(tmp_path / "branch")) > step
    assert_same(state(tmp_path / "first")["tensors"], before["tensors"])  # which stays as it was
    fit(config, *branch)  # the same command resumes


def test_it_may_have_another_rate_and_goes_on_from_the_same_weights(config: Path, tmp_path: Path) -> None:
    fit(
        config,
        *FLAGS,
        "--run.folder",
        str(tmp_path / "other"),
        "--from",
        f"{tmp_path}/first@3",
        "--optimization.lr",
        "0",
    )
    changed, kept = (state(tmp_path / name)["tensors"]["network.patch.weight"] for name in ("first", "other"))
    assert not (changed == kept).all()
    rates = [line["train/lr"] for line in lines(tmp_path / "other") if "train/lr" in line]
    assert rates == [0.0] * len(rates)


def test_it_has_a_model_also_if_it_is_worse_than_the_other_s(config: Path, tmp_path: Path) -> None:
    fit(config, *FLAGS, "--optimization.lr", "5", "--from", f"{tmp_path}/first@3")
    losses = [
        line["val/loss"] for folder in ("first", "run") for line in lines(tmp_path / folder) if "val/loss" in line
    ]
    assert losses[-1] > max(losses[:-1])
    assert (tmp_path / "run/model/model_index.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from", "nowhere"], "--from nowhere: there is no such checkpoint; nowhere has those of the steps none"),
        (["--from", "{}/first@4"], "has those of the steps 6, 3"),
        (["--from", "{}/first", "--network.depth", "2"], "is a checkpoint of another network or training"),
        (["--from", "{}/first"], "begins at step 6: run.steps must be larger"),
    ],
)
def test_bad_places_are_one_line_and_leave_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert message in refused(capsys, config, *FLAGS, *(flag.format(tmp_path) for flag in flags))
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    start = ("--from", f"{tmp_path}/first@3")
    assert "did not begin from" in refused(capsys, config, *FLAGS, "--run.folder", f"{tmp_path}/first", *start)
    assert "--from is only for fit" in refused(capsys, config, *FLAGS, *start, command="validate")
    muon = ("--optimization.matrices", "engine.optimizer.Muon")
    assert "is a checkpoint of another network or training" in ended(capsys, config, *FLAGS, *start, *muon)
    file = next((tmp_path / "first/checkpoints/step-0000003").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert "is damaged: choose another step" in refused(
        capsys, config, *FLAGS, *start, "--run.folder", f"{tmp_path}/new"
    )
