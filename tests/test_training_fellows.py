"""A process that dies takes the others along, in one line, and the same command resumes."""

import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from trials import ENV, ROOT, Change, end, lines, second_of, shell, small, start, start_ranks

import train
from data.batch import Batch
from data.loaders import begin_loader
from data.module import TrainingDigits
from data.order import Share

FLAGS = ("--run.log_every", "1")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return small(tmp_path)


def errors(told: str) -> list[str]:
    assert "Traceback" not in told, told
    # An error may stand behind a progress bar that had no time to end its line.
    found = [line.partition("error: ") for line in told.replace("\r", "\n").splitlines()]
    return [word + rest for _, word, rest in found if word]


def loader_dies(step: int) -> None:
    """Lets a loader process die at this step, as by the kernel when the memory is full."""
    own, parent = TrainingDigits.__getitem__, os.getpid()

    def item(self: TrainingDigits, share: Share) -> Batch:
        if share.step == step and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, share)

    TrainingDigits.__getitem__ = item  # type: ignore[method-assign]


@pytest.mark.parametrize("world", [1, 2])
def test_a_loader_process_that_dies_ends_the_run_in_one_line(config: Path, tmp_path: Path, world: int) -> None:
    said, change = tmp_path / "said", {0: Change(loader_dies, (4,))}
    flags = (*FLAGS, "--data.workers", "1")
    assert [end(rank) for rank in start_ranks(config, *flags, world=world, said=said, changes=change)] == [1] * world
    for rank in range(world):
        (line,) = errors((tmp_path / f"said-{rank}").read_text())
        assert ("a loader process died (DataLoader worker" if rank == 0 else "lost contact") in line
        assert "the same command resumes" in line
    assert [end(rank) for rank in start_ranks(config, *flags, world=world)] == [0] * world


def caught_elsewhere() -> None:
    """torch raises in a handler of signals, wherever the process is, as in `inspect`, which makes a TypeError of it."""
    try:
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")
    except RuntimeError as error:
        raise TypeError("unsupported callable") from error


def test_a_dead_loader_is_told_also_where_other_code_has_caught_it(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end, train.one_line_faults(1):
        caught_elsewhere()
    assert end.value.code == 1
    (line,) = errors(capsys.readouterr().err)
    assert line.startswith("error: a loader process died (DataLoader worker (pid 3) is killed by signal: Killed.)")
    with pytest.raises(TypeError), train.one_line_faults(2):
        raise TypeError("a fault of our own, about a peer")


def loader_fails(parent_ends: bool) -> None:
    """In a process of its own: its loader meets a cut connection after, or before, the process has ended."""
    if os.fork() == 0:
        begin_loader(0)
        time.sleep(0.3)
        sys.excepthook(EOFError, EOFError("the connection was cut"), None)
        os._exit(0)
    if not parent_ends:
        os.wait()
    os._exit(0)


@pytest.mark.parametrize("parent_ends", [True, False])
def test_a_loader_says_nothing_when_its_training_process_is_gone(
    parent_ends: bool, capfd: pytest.CaptureFixture
) -> None:
    process = get_context("fork").Process(target=loader_fails, args=(parent_ends,))
    process.start()
    process.join()
    time.sleep(1.5)
    assert ("the connection was cut" in capfd.readouterr().err) is not parent_ends


@pytest.mark.parametrize(("number", "training"), [(signal.SIGTERM, False), (signal.SIGKILL, True)])
def test_the_first_process_ends_in_one_line_when_the_second_is_killed(
    config: Path, number: int, training: bool
) -> None:
    """While it starts, and in training."""
    flags = (*FLAGS, "--run.devices", "2", "--run.steps", "3000", "--data.workers", "1")
    process = subprocess.Popen(
        shell(config, *flags), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    second = None
    while process.poll() is None and second is None:
        second = second_of(process.pid)
        time.sleep(0.01)
    assert second is not None
    while training and process.poll() is None and not (config.parent / "run/log.jsonl").exists():
        time.sleep(0.01)
    os.kill(second, number)
    told = process.communicate(timeout=90)[1].decode()
    assert process.returncode == 1, told
    (line,) = errors(told)
    assert line.startswith("error: lost contact with another process, which has ended or hangs; the same command resu")


def test_tasks_of_srun_train_together(config: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
              "SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    ranks = [
        start(config, *FLAGS, "--run.devices", "2", env=common | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in "01"
    ]
    assert [end(rank) for rank in ranks] == [0, 0]
    assert len(lines(tmp_path / "run")) == 8  # once each
