"""Loader processes: what becomes of them when their training process is told to end, fails or is killed."""

import atexit
import multiprocessing
import os
import signal
import sys
import time
from typing import Any


def begin_loader(worker: int) -> None:
    """Lets a loader process outlive a signal to the whole group: the training process saves, then ends it.

    When the training process is killed, its loaders end without a word: a cut connection is no fault of theirs.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent, tell = os.getppid(), sys.excepthook

    def unless_alone(*fault: Any) -> None:
        time.sleep(1)  # a process that ends closes its connections before it is gone
        if os.getppid() == parent:
            tell(*fault)

    sys.excepthook = unless_alone


@atexit.register
def end_loaders() -> None:
    """Kills the loader processes that are left: they ignore SIGTERM, which Python would send and then wait for them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
