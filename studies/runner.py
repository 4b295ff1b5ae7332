"""Runs the steps of a study: each after the steps that it needs, several at a time, and each only once."""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from tqdm import tqdm

from storage.files import commit_bytes
from storage.text import parse_json, read_text

ROOT = Path(__file__).parents[1]
RESULTS = {  # command → the file that it writes last into its folder, when it succeeds
    "train.py fit": "model/model_index.json",
    "sample.py pairs": "report.json",
    "sample.py grid": "grid.json",
    "evaluate.py": "results.json",
    "encode.py": "report.json",
    "-m tools.train_vae": "config.json",
}
POLL = 0.05  # seconds between two looks at the running commands


def cores() -> int:
    """The cores that this process may use; all of them where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def result_of(command: Sequence[str]) -> str:
    """The file in its folder that shows that a command succeeded. ValueError for an unknown command."""
    for words, file in RESULTS.items():
        if list(command[: len(words.split())]) == words.split():
            return file
    raise ValueError(f"`{' '.join(command[:2])}` is no command of a study: take {', '.join(RESULTS)}")


@dataclass(frozen=True, eq=False)
class Step:
    """A command whose result is a folder.

    The command is stored beside the folder as `NAME.command.json`, so that the result of another command is not taken
    for its result. `NAME.log` holds the command and its output.

    Args:
        command: the command without `python`.
        folder: folder of the result.
        result: the file in the folder that exists when the command has succeeded.
        needs: the steps whose results the command reads.
        failure: a failure with these words in its error message counts as a result; steps that need it are left out.
    """

    command: tuple[str, ...]
    folder: Path
    result: str
    needs: tuple["Step", ...] = ()
    failure: str | None = None

    @property
    def note(self) -> Path:
        """The file that holds the command of the result."""
        return self.folder.with_name(f"{self.folder.name}.command.json")

    @property
    def log(self) -> Path:
        """The file that holds the output of the command."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def is_done(self) -> bool:
        """Whether the result exists. ValueError if it is the result of another command."""
        if not (self.note.is_file() and (self.folder / self.result).is_file()):
            return False
        if parse_json(read_text(self.note), self.note) != list(self.command):
            raise ValueError(f"{self.folder} holds the result of another command: remove it, or choose another --out")
        return True

    def start(self, threads: int) -> Popen:
        """Starts the command. It resumes if it was stopped before, as all commands of this project do."""
        self.note.unlink(missing_ok=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self.log.write_text(f"$ python {shlex.join(self.command)}\n", encoding="utf-8")
        with self.log.open("ab") as log:
            command = [sys.executable, *self.command]
            return Popen(command, stdin=DEVNULL, stdout=log, stderr=STDOUT, cwd=ROOT, env=environment)

    def finish(self, status: int) -> bool:
        """Called when the command has ended with this status. Returns whether there is a result.

        Raises:
            ValueError: the command failed.
            OSError: the command failed with status 1, which is a fault of the machine.
        """
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1].removeprefix("error: ") if len(lines) > 1 else "no message"
        if status == 0:
            if (self.folder / self.result).is_file():
                commit_bytes(self.note, json.dumps(self.command).encode())
                return True
            reason = f"it left no {self.result}"
        elif self.failure and self.failure in reason:
            return False
        fault = f"{self.folder} failed with status {status}: {reason} (its command and all output: {self.log})"
        raise (OSError if status == 1 else ValueError)(fault)


def ordered(goals: Iterable[Step]) -> list[Step]:
    """The goals and all steps that they need, each after its needs. ValueError if two steps have the same folder."""
    found: dict[Path, Step] = {}

    def add(step: Step) -> None:
        for need in step.needs:
            add(need)
        if found.setdefault(step.folder, step) is not step:
            raise ValueError(f"two steps write to {step.folder}: give one of them another folder")

    for step in goals:
        add(step)
    return list(found.values())


def check_sources(steps: Iterable[Step], done: set[Step]) -> None:
    """ValueError if a result exists, but a result that it was made from does not."""
    for step in steps:
        for need in step.needs:
            if step in done and need not in done:
                raise ValueError(f"{step.folder} was made from {need.folder}, which is gone: remove the former too")


def run(goals: Iterable[Step], title: str, at_once: int) -> None:
    """Runs the goals and all steps that they need, unless they are done. The first failure stops all other commands.

    Args:
        goals: the steps whose results are wanted.
        title: title of the progress bar.
        at_once: number of commands at a time; they share the cores.

    Raises:
        ValueError: a step failed, or a folder holds the result of another command.
        OSError: a step failed by a fault of the machine.
    """
    steps = ordered(goals)
    done = {step for step in steps if step.is_done()}
    check_sources(steps, done)
    waiting = [step for step in steps if step not in done]
    running: dict[Step, Popen] = {}
    threads = max(1, cores() // at_once)
    with tqdm(total=len(steps), initial=len(done), desc=title, unit="step") as bar:
        try:
            while waiting or running:
                ready = [step for step in waiting if done.issuperset(step.needs)]
                for step in ready[: at_once - len(running)]:
                    waiting.remove(step)
                    running[step] = step.start(threads)
                bar.set_postfix_str(", ".join("/".join(step.folder.parts[-2:]) for step in running))
                step = wait_for_first(running)
                if step.finish(running.pop(step).returncode):
                    done.add(step)
                else:
                    left_out = dependents(step, waiting)
                    waiting = [other for other in waiting if other not in left_out]
                    bar.update(len(left_out))
                bar.update()
        finally:
            for process in running.values():
                process.terminate()  # a training finishes its step and writes a checkpoint
            for process in running.values():
                process.wait()


def wait_for_first(running: dict[Step, Popen]) -> Step:
    """Waits until one of the commands has ended, and returns its step."""
    while True:
        for step, process in running.items():
            if process.poll() is not None:
                return step
        time.sleep(POLL)


def dependents(step: Step, others: Iterable[Step]) -> set[Step]:
    """The steps among the others, which are in order, that need a step directly or indirectly."""
    found = {step}
    for other in others:
        if not found.isdisjoint(other.needs):
            found.add(other)
    return found - {step}
