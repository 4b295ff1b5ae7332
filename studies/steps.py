"""A study of named commands that read each other's results, such as configs/studies/fewstep.yaml."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from studies.runner import ROOT, Step, result_of, run

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
    document: Literal["fewstep"] | None = None

    def commands(self) -> dict[str, str]:
        """Name → command of every step; a name with {seed} gives one step for each seed.

        Raises:
            ValueError: two steps have the same name, or a name is invalid or unknown.
        """
        found: dict[str, str] = {}
        for template, command in self.steps.items():
            for seed in self.seeds if "{seed}" in template else ("{seed}",):
                name = template.replace("{seed}", str(seed))
                if name in found:
                    raise ValueError(f"there are two steps {name}: seeds and names must differ")
                if not NAME.fullmatch(name) or PurePosixPath(name).name in ("seed", "out"):
                    raise ValueError(f"a step cannot be called {name}: take letters and digits, with / for folders")
                found[name] = command.replace("{seed}", str(seed))
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
        built: dict[str, Step] = {}

        def build(name: str, above: tuple[str, ...]) -> Step:
            if name in above:
                circle = " → ".join((*above[above.index(name) :], name))
                raise ValueError(f"these steps need each other in a circle: {circle}")
            if name not in built:
                names = {word: step_named(word, name, commands) for word in PLACEHOLDER.findall(commands[name])}
                if name not in self.folders and "out" not in names:
                    raise ValueError(f"step {name}: the command must contain {{out}}, the folder of its result")
                needs = {word: build(other, (*above, name)) for word, other in names.items() if word != "out"}
                places = {word: self.folders.get(other, str(self.folder(other, out))) for word, other in names.items()}
                words = tuple(fill_in(word, places) for word in split(name, commands[name]))
                built[name] = Step(
                    words, self.folder(name, out), result_file(name, words), tuple(dict.fromkeys(needs.values()))
                )
            return built[name]

        for name in commands:
            build(name, ())
        return built

    def check(self) -> None:
        """Checks the study before any work. Errors are those of `build`."""
        self.build(Path("out"))

    def quick(self) -> "Steps":
        """ValueError: there is no quick version."""
        raise ValueError("--quick is for studies of recipes, and a study of steps has no quick version: leave it out")

    def run(self, out: Path, at_once: int) -> None:
        """Runs all steps that are not done, `at_once` at a time. Errors are those of `build` and `runner.run`."""
        run(self.build(out).values(), "study", at_once)


def step_named(word: str, step: str, names: dict[str, str]) -> str:
    """The name of the step that a placeholder means; {out} means the step itself. ValueError if there is none."""
    if word == "out":
        return step
    if word == "seed":
        raise ValueError(f"step {step}: the command contains {{seed}}, so the name must contain it, too")
    for name in (str(PurePosixPath(step).parent / word), word):
        if name in names:
            return name
    raise ValueError(f"step {step}: the command contains {{{word}}}, but there is no step {word}: add or rename one")


def split(name: str, command: str) -> list[str]:
    """The words of a step's command, as in a shell. ValueError if a quotation has no end."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ValueError(f"step {name}: the command cannot be read: {error}") from None


def fill_in(word: str, places: dict[str, str]) -> str:
    """A word of a command in which folders replace the placeholders."""
    return PLACEHOLDER.sub(lambda match: places[match[1]], word)


def result_file(name: str, words: tuple[str, ...]) -> str:
    """The result file of a step's command. ValueError for an unknown command, FileNotFoundError for a missing file."""
    for word in words:
        if FILE.fullmatch(word) and not (ROOT / word).is_file():
            raise FileNotFoundError(f"step {name}: the command names {word}, which does not exist")
    try:
        return result_of(words)
    except ValueError as error:
        raise ValueError(f"step {name}: {error}") from None
