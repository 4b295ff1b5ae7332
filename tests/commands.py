"""Commands of studies as processes forked from one that has imported everything, which saves the time of imports."""

import importlib
import multiprocessing
import os
import sys
from pathlib import Path
from typing import IO


class Forked:
    """What the runner uses of `subprocess.Popen`, for the commands of this project.

    Args:
        command: the interpreter, a Python file of the project and its arguments.
        stdin: ignored.
        stdout: the file for what it prints, errors too.
        stderr: ignored.
        cwd: where it runs.
        env: its environment.
    """

    def __init__(self, command: list[str], stdin: int, stdout: IO, stderr: int, cwd: Path, env: dict[str, str]) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train", "evaluate", "sample"])
        self.process = context.Process(target=_main, args=(command[1:], stdout.name, cwd, env))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


def _main(words: list[str], log: str, cwd: Path, env: dict[str, str]) -> None:
    with open(log, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(env)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as usual
    importlib.import_module(Path(words[0]).stem).main(words[1:])
