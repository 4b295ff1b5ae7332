"""A run that is stopped, however, goes on as if it had not been: to the bit, with nothing lost and nothing twice."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from trials import (
    ENV,
    ROOT,
    Change,
    assert_near,
    assert_near_logs,
    assert_same,
    die_at,
    end,
    ended,
    fill_at,
    fit,
    lines,
    logged,
    refused,
    second_of,
    send_at,
    shell,
    small,
    start,
    start_ranks,
    state,
    under,
)  # fmt: skip

from engine.checkpoint import Checkpoints, read_checkpoint
from pipeline import Pipeline

STEPS, EVERY, VALIDATED = 60, 5, 30
FLAGS = ("--run.steps", str(STEPS), "--run.checkpoint_every", str(EVERY), "--run.validate_every", str(VALIDATED),
         "--run.log_every", "1")  # fmt: skip
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


@pytest.fixture(scope="module")
def stopped(config: Path) -> Path:
    """One that was asked to stop after step 32."""
    run = config.parent / "stopped"
    change = Change(send_at, (signal.SIGTERM, 31))
    assert end(start(config, *FLAGS, "--run.folder", str(run), change=change)) == 128 + signal.SIGTERM
    return run


@pytest.fixture
def half(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that."""
    shutil.copytree(stopped, tmp_path / "half")
    return tmp_path / "half"


def go_on(config: Path, run: Path, *flags: str) -> None:
    fit(config, *FLAGS, "--run.folder", str(run), *flags)


def assert_equal(run: Path, straight: Path) -> None:
    """To the bit, in everything that the runs leave."""
    assert_same(state(run), state(straight))
    assert_same(logged(run), logged(straight))
    pictures = [{file.name: file.read_bytes() for file in (r / "samples").iterdir()} for r in (run, straight)]
    assert pictures[0] == pictures[1]
    assert_same(*(Pipeline.load(r / "model").network.state_dict() for r in (run, straight)))


def newest(run: Path) -> int:
    """The step of the newest checkpoint, which must be whole."""
    found = Checkpoints(run / "checkpoints").newest()
    assert found is None or all(map(found.intact, found.parts))
    return found.step if found else 0


def unfinished(run: Path) -> bool:
    """Whether a save was under way: a checkpoint without its mark, or older ones that were to go."""
    places = list((run / "checkpoints").glob("*"))
    return len(places) > 2 or not all(map(read_checkpoint, places))


@pytest.mark.parametrize("workers", [0, 2])
def test_kills_change_nothing_and_lose_no_checkpoint(
    config: Path, straight: Path, tmp_path: Path, workers: int
) -> None:
    """At a random moment, and at those of all moments of a save that the other case leaves out."""
    run, draw, inside, saved = tmp_path / "run", random.Random(workers), 0, 0
    flags = (*FLAGS, "--run.folder", str(run), "--data.workers", str(workers))
    operations = range(2 - workers // 2, 12, 2)  # a save takes eleven
    for operation in (None, *operations):
        if operation:
            process = start(config, *flags, change=Change(die_at, (operation,)))
        else:
            process = start(config, *flags)
            log, seen = run / "log.jsonl", len(lines(run)) if run.exists() else 0
            more = seen + draw.randint(1, 6)
            while process.is_alive() and (not log.exists() or log.read_bytes().count(b"\n") < more):
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.03))
            os.kill(process.pid or 0, signal.SIGKILL)
        assert end(process) == SIGKILLED
        done = max(step for step, _ in logged(run))
        inside += unfinished(run)
        assert newest(run) >= max(saved, done - done % EVERY - EVERY)
        saved = newest(run)
    assert inside >= 2
    assert end(start(config, *flags)) == 0
    assert_equal(run, straight)


def test_a_kill_while_validating_loses_neither_sheet_nor_model(config: Path, straight: Path, tmp_path: Path) -> None:
    """At moments when the main process writes its config, a sheet or the model."""
    flags = (*FLAGS, "--run.folder", str(tmp_path / "run"))
    for operation in (4, 9, 14):
        assert end(start(config, *flags, change=Change(die_at, (operation, "MainThread")))) == SIGKILLED
    assert end(start(config, *flags)) == 0
    assert_equal(tmp_path / "run", straight)


# Damage


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": lambda part, mark: flip(part, -99),
    "flipped header": lambda part, mark: flip(part, 20),
    "truncated": lambda part, mark: part.write_bytes(part.read_bytes()[:-1]),
    "empty": lambda part, mark: part.write_bytes(b""),
    "missing": lambda part, mark: part.unlink(),
    "mark truncated": lambda part, mark: mark.write_bytes(mark.read_bytes()[:-2]),
    "mark empty": lambda part, mark: mark.write_bytes(b""),
    "mark flipped": lambda part, mark: flip(mark, mark.read_bytes().index(b'"step": ') + 9),
    "mark nested": lambda part, mark: mark.write_bytes(b'{"mark":' * 50_000),
    "mark a folder": lambda part, mark: (mark.unlink(), mark.mkdir()),
}


def damage(run: Path, how: str, step: int) -> None:
    part, mark = (run / f"checkpoints/step-{step:07d}/part-00000-of-00001.{end}" for end in ("safetensors", "json"))
    DAMAGES[how](part, mark)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    config: Path, straight: Path, half: Path, capsys: pytest.CaptureFixture, how: str
) -> None:
    damage(half, how, 32)
    capsys.readouterr()

    with pytest.warns(UserWarning, match="step-0000032 is damaged; the one before it is used"):
        go_on(config, half)
    assert "error" not in capsys.readouterr().err
    assert_equal(half, straight)


@pytest.mark.parametrize("how", ["flipped", "missing", "mark flipped", "mark nested", "mark a folder"])
def test_if_all_are_damaged_the_run_is_refused_and_left_alone(
    config: Path, half: Path, capsys: pytest.CaptureFixture, how: str
) -> None:
    for step in (30, 32):
        damage(half, how, step)
    before = {file: file.read_bytes() for file in half.rglob("*") if file.is_file()}
    with pytest.warns(UserWarning, match="damaged"):
        message = ended(capsys, config, *FLAGS, "--run.folder", str(half))
    assert "all checkpoints in" in message
    assert "are damaged" in message
    assert {file: file.read_bytes() for file in half.rglob("*") if file.is_file()} == before


def test_folders_and_files_of_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, {"w": torch.ones(2)}, {})
    checkpoints.wait()
    for name in ("step-²", "step-٣", "step-9", "step-00000009", "step-", "step-last", "step-0000008.old"):
        (tmp_path / name).mkdir()
    for name in ("part-00000-of-²", "part-00000-of-99999999999", "part-x-of-00001", "part-00000-of-00000"):
        (tmp_path / f"step-0000007/{name}.json").write_text("{}")
    found = checkpoints.find()
    assert found
    assert found.step == 7


# Being asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_that_step_and_the_run_goes_on(
    config: Path, straight: Path, tmp_path: Path, number: int
) -> None:
    """Loader processes get it, too, as from a terminal."""
    run = tmp_path / "run"
    flags = (*FLAGS, "--run.folder", str(run), "--data.workers", "2")
    asked = {signal.SIGTERM: 0, signal.SIGUSR1: 12, signal.SIGINT: 43}[signal.Signals(number)]
    assert end(start(config, *flags, change=Change(send_at, (number, asked)))) == 128 + number
    assert newest(run) == asked + 1
    assert (asked + 1, False) in logged(run)
    go_on(config, run)
    assert_equal(run, straight)


@pytest.mark.parametrize(("where", "step"), [("training_step", 29), ("validation_step", 30), ("training_step", 59)])
def test_a_signal_at_a_validation_leaves_it_for_later(
    config: Path, straight: Path, tmp_path: Path, where: str, step: int
) -> None:
    """One that was due is made up for, once; after the last step nothing is left to go on with, so it is not left."""
    run = tmp_path / "run"
    flags = (*FLAGS, "--run.folder", str(run))
    status = end(start(config, *flags, change=Change(send_at, (signal.SIGTERM, step, where))))
    assert (status, newest(run)) == ((0, 60) if step == 59 else (143, 30))
    if status:
        assert not (run / "samples").exists()
        go_on(config, run)
    assert_equal(run, straight)
    assert [line["step"] for line in lines(run) if "val/loss" in line] == [30, 60]


def test_a_second_interrupt_ends_the_run_at_once(config: Path, straight: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    flags = (*FLAGS, "--run.folder", str(run))
    change = Change(send_at, (signal.SIGINT, 12, "training_step", 2))
    assert end(start(config, *flags, said=said, change=change)) == 130
    assert "Traceback" not in said.read_text()
    assert newest(run) == 10
    go_on(config, run)
    assert_equal(run, straight)


# A full disk


def test_a_full_disk_ends_the_run_in_one_line_and_spares_what_is_there(
    config: Path, straight: Path, tmp_path: Path
) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    flags = (*FLAGS, "--run.folder", str(run))
    assert end(start(config, *flags, said=said, change=Change(fill_at, (12, 60_000)))) == 1
    told = said.read_text()
    assert [line[:42] for line in told.splitlines() if "rror" in line] == [f"error: could not write {run}"[:42]]
    assert newest(run) == 10
    assert not list(run.glob("checkpoints/*/*.part")) + list(run.glob("checkpoints/*/.*"))
    go_on(config, run)
    assert_equal(run, straight)


# Going on in another way


def test_a_checkpoint_holds_tensors_and_json_alone(half: Path) -> None:
    files = [file for file in (half / "checkpoints").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    assert all(json.loads(file.read_text()) for file in files if file.suffix == ".json")


def test_keys_that_do_no_harm_may_change_and_are_named(
    config: Path, straight: Path, half: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    go_on(config, half, "--data.workers", "1", "--run.checkpoint_every", "7", "--grid.columns", "3")
    told = capsys.readouterr().err
    for key, there, now in (("data.init_args.workers", 0, 1), ("run.checkpoint_every", 5, 7), ("grid.columns", 2, 3)):
        assert f"warning: the run resumes, but {key} is {there} there and {now} now" in told
    assert_same(state(half), state(straight))
    assert_same(logged(half), logged(straight))


def test_other_validations_leave_the_training_as_it_is(config: Path, straight: Path, half: Path) -> None:
    """Other validations may find another best model, but the steps are those of the straight run."""
    go_on(config, half, "--run.validate_every", "20")
    assert_same(state(half)["tensors"], state(straight)["tensors"])
    assert [line["step"] for line in lines(half) if "val/loss" in line] == [30, 40, 60]


def test_a_key_that_changes_the_training_is_refused_and_named(
    config: Path, half: Path, capsys: pytest.CaptureFixture
) -> None:
    before = state(half)
    message = refused(capsys, config, *FLAGS, "--run.folder", str(half), "--ema.decay", "0.5", "--run.devices", "2")
    assert "another config (ema.decay is 0.999 there and 0.5 now)" in message
    assert_same(state(half), before)


@pytest.mark.parametrize("flags", [("--network.width", "32"), ("--network.depth", "2"), ("--ema.more", "[0.5]")])
def test_a_checkpoint_of_another_network_is_refused_before_training(
    config: Path, half: Path, capsys: pytest.CaptureFixture, flags: tuple[str, str]
) -> None:
    other = half.with_name("other")
    fit(config, *flags, "--run.folder", str(other), "--run.steps", "3")
    shutil.rmtree(half / "checkpoints")
    shutil.copytree(other / "checkpoints", half / "checkpoints")
    before = lines(half)
    message = ended(capsys, config, *FLAGS, "--run.folder", str(half))
    expected = {"width": "mis-shaped (network.", "depth": "left over (network.blocks.", "more": "left over (average."}
    assert "is a checkpoint of another network or training" in message
    assert expected[flags[0].rpartition(".")[2]] in message
    assert len(message) < 1000
    assert lines(half) == before


@pytest.mark.parametrize("parts", [2, 4])
def test_batches_in_parts_train_as_whole_ones(config: Path, straight: Path, tmp_path: Path, parts: int) -> None:
    runs = []
    for name, flag in (("whole", "1"), ("parts", str(parts))):
        runs.append(tmp_path / name)
        fit(config, "--run.folder", str(runs[-1]), "--run.log_every", "1", "--strategy.accumulate_grad_batches", flag)
    assert_near(under(runs[1], "network."), under(runs[0], "network."))
    assert_near(under(runs[1], "average."), under(runs[0], "average."))
    assert_near_logs(runs[1], runs[0], 1e-6)


def test_a_run_goes_on_with_other_parts_and_processes(config: Path, straight: Path, half: Path) -> None:
    """From one process to two with two parts each, killed, and to one again."""
    flags = (*FLAGS, "--run.folder", str(half))
    kill = {1: Change(send_at, (signal.SIGKILL, 42))}
    ranks = start_ranks(config, *flags, "--strategy.accumulate_grad_batches", "2", changes=kill)
    assert [bool(end(rank)) for rank in ranks] == [True, True]
    assert newest(half) == 40
    go_on(config, half)
    assert_near_logs(half, straight, 1e-5)


# Two processes


def test_a_signal_to_one_of_two_processes_stops_both(config: Path, tmp_path: Path) -> None:
    """Whichever it is, and however they were started."""
    two, run = tmp_path / "two", tmp_path / "run"
    flags = (*FLAGS, "--run.folder", str(run))
    process = subprocess.Popen(shell(config, *flags, "--run.devices", "2"), cwd=ROOT, env=ENV, stderr=subprocess.PIPE)
    while process.poll() is None and not (run / "log.jsonl").exists():
        time.sleep(0.01)
    second = second_of(process.pid)
    assert second
    os.kill(second, signal.SIGTERM)
    told = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 143, told
    assert "rror" not in told
    step = newest(run) + 3
    ranks = start_ranks(config, *flags, changes={0: Change(send_at, (signal.SIGUSR1, step))})
    assert [end(rank) for rank in ranks] == [128 + signal.SIGUSR1, 0]
    assert newest(run) == step + 1
    assert [end(rank) for rank in start_ranks(config, *flags)] == [0, 0]
    assert [end(rank) for rank in start_ranks(config, *FLAGS, "--run.folder", str(two))] == [0, 0]
    assert_equal(run, two)


def send_while_asking(number: int, step: int) -> None:
    """Lets the process send itself a signal while all tell each other, after so many steps, whether they got one."""
    own, asked = dist.all_reduce, itertools.count(1)

    def reduced(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        own(tensor, *args, **kwargs)
        if tensor.dtype == torch.int64 and tensor.ndim == 0 and next(asked) == step:
            os.kill(os.getpid(), number)

    dist.all_reduce = reduced


def test_a_signal_that_comes_while_the_processes_wait_for_each_other_counts(config: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--run.folder", str(tmp_path / "run"))
    ranks = start_ranks(config, *flags, changes={1: Change(send_while_asking, (signal.SIGTERM, 12))})
    assert [end(rank) for rank in ranks] == [143, 0]
    assert newest(tmp_path / "run") in (12, 13)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_whose_fellow_was_killed_ends_soon_and_the_run_goes_on(
    config: Path, straight: Path, tmp_path: Path, killed: int
) -> None:
    flags = (*FLAGS, "--run.folder", str(tmp_path / "run"))
    kill = {killed: Change(send_at, (signal.SIGKILL, 12))}
    ranks = start_ranks(config, *flags, said=tmp_path / "said", changes=kill)
    codes = [end(rank, 60) for rank in ranks]
    assert (codes[killed], codes[1 - killed]) == (SIGKILLED, 1)
    told = (tmp_path / f"said-{1 - killed}").read_text()
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: lost contact with another process")
    assert newest(tmp_path / "run") == 10
    go_on(config, tmp_path / "run")
    assert_near_logs(tmp_path / "run", straight, 1e-5)
