"""A run's folder: one process works in it, a kill at any moment spoils nothing, and nothing else is replaced."""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trials import Change, assert_same, end, ended, fit, logged, refused, small, start, state

from pipeline import Pipeline
from storage.files import hold
from training.run_folder import claim, wandb_id

FLAGS = ("--run.checkpoint_every", "1", "--run.log_every", "1", "--ema.widths", "[0.1]", "--ema.snapshot_every", "2")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod")  # Python's audit events
SIGKILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def straight(config: Path) -> Path:
    """A run that nothing happened to."""
    run = config.parent / "straight"
    assert end(start(config, *FLAGS, "--run.folder", str(run))) == 0
    return run


def die_at_change(number: int, folder: str) -> None:
    """Lets the process kill itself, as by kill -9, before this one of all system calls that change a folder's files."""
    count = itertools.count(1)

    def die() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(event: str, about: tuple[Any, ...]) -> None:
        changes = about[2] & (os.O_WRONLY | os.O_RDWR) if event == "open" else event in CHANGES
        within = event in ("os.remove", "os.rmdir") and about[1] != -1  # the path begins in an open folder
        if changes and (within or str(about[0]).startswith(folder)):
            die()

    def flushed(descriptor: int, own: Callable[[int], None] = os.fsync) -> None:
        die()
        own(descriptor)

    os.fsync = flushed
    sys.addaudithook(before)


def claimed(folder: Path, resolved: str = "run: {seed: 1}\n") -> None:
    with claim(folder, resolved, {"store": "0123"}, str, True):
        pass


def test_a_claim_killed_at_any_system_call_is_made_again_by_the_same_command(tmp_path: Path) -> None:
    for moment in itertools.count(1):
        run = tmp_path / str(moment)
        child = os.fork()
        if not child:
            die_at_change(moment, str(run))
            claimed(run)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        claimed(run)
        assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "data.json", "wandb-id"]
        assert (run / "config.yaml").read_text() == "run: {seed: 1}\n"
        if status == 0:
            break
        assert status == SIGKILLED
    assert moment > 20


def test_a_run_killed_at_any_system_call_goes_on_by_the_same_command(
    config: Path, straight: Path, tmp_path: Path
) -> None:
    """In the first process's every thread: config, log, checkpoints, snapshots, sheets and models."""
    run, draw, kills = tmp_path / "run", random.Random(0), 0
    flags = (*FLAGS, "--run.folder", str(run))
    for _ in range(8):
        process = start(config, *flags, change=Change(die_at_change, (draw.randint(1, 160), str(run))))
        kills += end(process) == SIGKILLED
    assert kills >= 4
    assert end(start(config, *flags)) == 0
    assert_same(state(run), state(straight))
    assert_same(logged(run), logged(straight))
    assert_same(*(Pipeline.load(folder / "model").network.state_dict() for folder in (run, straight)))
    assert sorted(p.name for p in (run / "snapshots").iterdir()) == sorted(
        p.name for p in (straight / "snapshots").iterdir()
    )
    assert not list(run.rglob("*.part"))


def test_one_process_works_in_a_run_and_one_that_is_killed_holds_nothing(
    config: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """Its loader processes live on for a while."""
    run = tmp_path / "run"
    flags = ("--run.folder", str(run), "--run.steps", "3000", "--data.workers", "2")
    process = start(config, *flags)
    while process.is_alive() and not (run / "log.jsonl").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    message = ended(capsys, config, *flags, status=1)
    assert f"{run} is in use by process {process.pid} on " in message
    os.kill(process.pid or 0, signal.SIGKILL)
    assert end(process) == SIGKILLED
    assert all(Path(f"/proc/{child}").exists() for child in children)
    with hold(run):
        pass


def test_what_killed_processes_left_anywhere_in_a_run_goes(tmp_path: Path) -> None:
    claimed(tmp_path)
    for place in (".", "samples", "checkpoints/step-0000003"):
        left = tmp_path / place / ".0123456789abcdef.part"
        left.mkdir(parents=True)
        (left / "half").touch()
    claimed(tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_begun_anew_is_a_new_run_for_wandb(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claimed(run)
    first = wandb_id(run)
    (run / "log.jsonl").touch()
    claimed(run)
    assert wandb_id(run) == first
    shutil.rmtree(run)
    claimed(run)
    assert wandb_id(run) != first


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("straight", "would replace the run, a part of it or the current folder"),
        ("straight/model", "would replace the run"),
        ("straight/checkpoints/step-0000006", "would replace the run"),
        (".", "would replace the run"),
        ("", "--out is empty"),
        ("letters", "exists and is no model: choose another"),
        ("other/model", "exists and holds a model: choose another, or give --overwrite"),
    ],
)
def test_an_average_replaces_nothing_that_it_did_not_make(
    config: Path, straight: Path, capsys: pytest.CaptureFixture, out: str, message: str
) -> None:
    (config.parent / "letters").mkdir(exist_ok=True)
    (config.parent / "letters/dear.txt").touch()
    shutil.copytree(straight / "model", config.parent / "other/model", dirs_exist_ok=True)
    before = {file: file.read_bytes() for file in config.parent.rglob("*") if file.is_file()}
    place = str(config.parent / out) if out.strip(".") else out
    flags = (*FLAGS, "--run.folder", str(straight), "--width", "0.1", "--out", place)
    for overwrite in ((), ("--overwrite",)):
        if not overwrite or "give --overwrite" not in message:
            assert message in refused(capsys, config, *flags, *overwrite, command="average")
    assert {file: file.read_bytes() for file in config.parent.rglob("*") if file.is_file()} == before


def test_an_average_may_replace_a_model_if_told_and_its_own(config: Path, straight: Path) -> None:
    flags = (*FLAGS, "--run.folder", str(straight), "--width", "0.1")
    other = config.parent / "replaced"
    shutil.copytree(straight / "model", other)
    (other / "old.txt").touch()
    fit(config, *flags, "--out", str(other), "--overwrite", command="average")
    for _ in range(2):
        fit(config, *flags, command="average")
    found = [Pipeline.load(folder).network.state_dict() for folder in (other, straight / "model-0.1")]
    assert_same(*found)
    assert not (other / "old.txt").exists()
