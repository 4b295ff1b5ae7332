"""The processes of a training that train.py itself starts on one machine: none waits for one that has failed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from threading import Thread

import torch.distributed as dist
from lightning.pytorch.strategies.launchers import subprocess_script

from cli import MACHINE_FAULT
from data.loaders import end_loaders

GRACE = 10.0  # seconds in which a process may end by itself once another has failed
LOST = "lost contact with another process, which has ended or hangs; the same command resumes"
PARENT = "TRAIN_STARTED_BY"  # environment variable: the process that started this one


def watch_children() -> None:
    """Lets this process end in one line if one that it starts fails. Lightning's own observer would kill it."""

    def watch(children: Sequence[subprocess.Popen[bytes]]) -> None:
        _end_when(lambda: any(child.poll() for child in children), children)

    os.environ[PARENT] = str(os.getpid())
    setattr(subprocess_script, "_launch_process_observer", watch)  # noqa: B010


def watch_parent() -> None:
    """Lets a process end in one line if the one that started it fails before they are connected."""
    if parent := os.environ.get(PARENT):
        _end_when(lambda: str(os.getppid()) != parent and not dist.is_initialized())


def _end_when(failed: Callable[[], bool], children: Sequence[subprocess.Popen[bytes]] = ()) -> None:
    def wait() -> None:
        while not failed():
            time.sleep(0.2)
        time.sleep(GRACE)
        for child in children:
            child.kill()
        end_loaders()
        print("error:", LOST, file=sys.stderr, flush=True)
        os._exit(MACHINE_FAULT)

    Thread(target=wait, daemon=True).start()
