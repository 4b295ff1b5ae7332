"""Commands of studies as processes forked from one that has imported everything, which saves the time of imports."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import IO, Any

from studies import runner


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

    method = "forkserver"

    def __init__(self, command: list[str], stdin: int, stdout: IO, stderr: int, cwd: Path, env: dict[str, str]) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context: Any = multiprocessing.get_context(self.method)
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


class ForkedHere(Forked):
    """The same, forked from this process, for one that has been forked itself."""

    method = "fork"


def _main(words: list[str], log: str, cwd: Path, env: dict[str, str]) -> None:
    with open(log, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(env)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as usual
    if words[0] == "compare.py":
        runner.Popen = ForkedHere  # its own commands, too
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
