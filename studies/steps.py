"""A study of named commands that read each other's results, such as configs/studies/fewstep.yaml."""

import re
import shlex
from collections.abc import Container
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Literal

from studies.runner import ROOT, Step, result_of, run

SEED = "{seed}"
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
FILE = re.compile(r"[^-].*\.(py|yaml|txt)")  # a word of a command that names a file of the project


@dataclass(frozen=True)
class Steps:
    """A study of commands of this project. Each command writes its result to its own folder.

    The name of a step is its folder in the study's folder. A name with {seed} means one step for each seed. In a
    command, {seed} is the seed, {out} the folder of the step, and {NAME} the folder of another step, which runs first.
    NAME is a whole name, or for a step in the same folder its last part, such as {teacher}.

    Args:
        steps: name → command, as it is typed after `python`.
        seeds: the seeds of the steps with {seed} in their names.
        folders: name → folder in the project, for commands that write to a fixed folder instead of {out}.
        document: the document that is written from the results.
    """

    steps: dict[str, str]
    seeds: tuple[int, ...] = ()
    folders: dict[str, str] = field(default_factory=dict)
    document: Literal["fewstep", "likelihood"] | None = None

    def commands(self) -> dict[str, str]:
        """Name → command of every step; a name with {seed} gives one step for each seed.

        Raises:
            ValueError: two steps have the same name, or a name is invalid or unknown.
        """
        found: dict[str, str] = {}
        for template, command in self.steps.items():
            seeds = map(str, self.seeds) if SEED in template else [SEED]
            for seed in seeds:
                name = template.replace(SEED, seed)
                if name in found:
                    raise ValueError(f"there are two steps {name}: seeds and names must differ")
                if not NAME.fullmatch(name) or PurePosixPath(name).name in ("seed", "out"):
                    raise ValueError(f"a step cannot be called {name}: take letters and digits, with / for folders")
                found[name] = command.replace(SEED, seed)
        if unknown := sorted(self.folders.keys() - found.keys()):
            raise ValueError(f"folders names the step {unknown[0]}, which does not exist: name one of the steps")
        if not found:
            raise ValueError("a study needs steps, and seeds if their names hold {seed}")
        return found

    def folder(self, name: str, out: Path) -> Path:
        """The folder of a step: that in `folders`, or one in the study's folder `out`."""
        return ROOT / self.folders[name] if name in self.folders else out / name

    def build(self, out: Path) -> dict[str, Step]:
        """Name → step, with its result in the study's folder `out`.

        Raises:
            ValueError: an unknown command or name, steps that need each other, or a command without {out}.
            FileNotFoundError: a command names a file that does not exist.
        """
        commands = self.commands()
        named = {name: references(name, command, commands) for name, command in commands.items()}
        needs = {name: [other for word, other in found.items() if word != "out"] for name, found in named.items()}
        built: dict[str, Step] = {}
        try:
            order = list(TopologicalSorter(needs).static_order())
        except CycleError as error:
            raise ValueError(f"these steps need each other in a circle: {' → '.join(error.args[1])}") from None
        for name in order:
            if name not in self.folders and "out" not in named[name]:
                raise ValueError(f"step {name}: the command must contain {{out}}, the folder of its result")
            places = {word: self.folders.get(other, str(out / other)) for word, other in named[name].items()}
            words = filled(name, commands[name], places)
            built[name] = Step(words, self.folder(name, out), result(name, words), tuple(built[n] for n in needs[name]))
        return {name: built[name] for name in commands}

    def check(self) -> None:
        """Checks the study before any work. Errors are those of `build`."""
        self.build(Path("out"))

    def quick(self) -> "Steps":
        """ValueError: there is no quick version."""
        raise ValueError("--quick is for studies of recipes, and a study of steps has no quick version: leave it out")

    def run(self, out: Path, at_once: int) -> None:
        """Runs all steps that are not done, `at_once` at a time. Errors are those of `build` and `runner.run`."""
        run(self.build(out).values(), "study", at_once)


def references(name: str, command: str, names: Container[str]) -> dict[str, str]:
    """Each placeholder of a step's command → the step that it means; {out} means the step itself.

    Raises:
        ValueError: there is no such step.
    """
    found = {}
    for word in PLACEHOLDER.findall(command):
        beside = str(PurePosixPath(name).parent / word)
        meant = name if word == "out" else beside if beside in names else word
        if word == "seed":
            raise ValueError(f"step {name}: the command contains {{seed}}, so the name must contain it, too")
        if meant not in names:
            raise ValueError(f"step {name}: the command contains {{{word}}}, but there is no step {word}: add it")
        found[word] = meant
    return found


def filled(name: str, command: str, places: dict[str, str]) -> tuple[str, ...]:
    """The words of a step's command, as in a shell, with folders in place of the placeholders.

    Raises:
        ValueError: a quotation has no end.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"step {name}: the command cannot be read: {error}") from None
    return tuple(PLACEHOLDER.sub(lambda match: places[match[1]], word) for word in words)


def result(name: str, words: tuple[str, ...]) -> str:
    """The file that a step's command leaves. ValueError if it is no command, FileNotFoundError if it names no file."""
    for word in words:
        if FILE.fullmatch(word) and not (ROOT / word).is_file():
            raise FileNotFoundError(f"step {name}: the command names {word}, which does not exist")
    try:
        return result_of(words)
    except ValueError as error:
        raise ValueError(f"step {name}: {error}") from None
