"""Runs a study and writes its document: `python compare.py configs/studies/digits.yaml`. The same command resumes.

Every training and every measurement is a separate command. It runs only if its result does not exist yet. The document
is written from the results alone.
"""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from cli import Parser, add_overwrite_flag, fail, one_line_errors, output, positive
from storage.files import hold
from storage.text import read_text, read_yaml
from studies import bits, document, fewstep, speed
from studies.recipes import Recipes
from studies.runner import ROOT
from studies.steps import Steps

WRITERS: dict[str | None, Callable[[Any, Path, Path, str], Path]] = {
    "compare": document.write,
    "speed": speed.write,
    "fewstep": fewstep.write,
    "likelihood": bits.write,
}
FILES = {  # document → the files that are written with it
    "compare": ("compare.md", "compare.png", "compare-sheet.png"),
    "speed": ("speed.md", "speed.png"),
    "fewstep": ("fewstep.md", "fewstep.png", "fewstep-trajectories.png", "fewstep-digits.png", "fewstep-shapes.png"),
    "likelihood": ("likelihood.md",),
}


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("study", type=Path, help="a YAML file, such as configs/studies/digits.yaml")
    p.add_argument("--out", type=output, help="folder of models and results; default: runs/studies/NAME")
    p.add_argument(
        "--docs", type=output, help="folder of the document and its pictures; default: docs, with --quick --out"
    )
    p.add_argument("--jobs", type=positive, default=1, help="commands that run at the same time and share the cores")
    p.add_argument("--quick", action="store_true", help="a short version of about ten minutes, too short for results")
    add_overwrite_flag(p)
    return p


def read(file: Path) -> Recipes | Steps:
    """The study in a YAML file: one of steps if it has the key `steps`, otherwise one of recipes.

    ValueError or FileNotFoundError in one line if the file holds no study.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no study file {file}: give one, such as configs/studies/digits.yaml")
    p = ArgumentParser(exit_on_error=False)
    try:
        content = read_yaml(file)
        p.add_argument("--study", type=Steps if "steps" in (content or ()) else Recipes, required=True)
        return p.instantiate(p.parse_object({"study": content})).study
    except ArgumentError as error:
        raise ValueError(f"{file}: {error}") from None


def check_place(docs: Path, names: Sequence[str], command: str, overwrite: bool) -> None:
    """Checks that a document can be written, before any work.

    Args:
        docs: its folder.
        names: its files, the text first.
        command: the command that writes it, which its text names.
        overwrite: the document of another study may be replaced.

    Raises:
        ValueError: there is something that may not be replaced.
    """
    there = [docs / name for name in names if (docs / name).exists()]
    if not there:
        return
    text = read_text(there[0]) if there[0].name == names[0] else ""
    if "`python compare.py " not in text:
        raise ValueError(f"{there[0]} is no document of a study: move it away, or choose another --docs")
    if f"`{command}`" not in text and not overwrite:
        cure = "choose another --docs, or replace it with --overwrite"
        raise ValueError(f"{there[0]} is the document of another study than `{command}`: {cure}")


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        study = read(args.study)
        study = study.quick() if args.quick else study
        study.check()
        command = f"python compare.py {args.study}{' --quick' * args.quick}"
        out = (args.out or ROOT / "runs" / "studies" / (args.study.stem + "-quick" * args.quick)).resolve()
        docs = args.docs or (out if args.quick else Path("docs"))
        if study.document:
            check_place(docs, FILES[study.document], command, args.overwrite)
        with hold(out):
            study.run(out, args.jobs)
        if study.document is None:
            print(f"All results are in {out}")
            return
        print(f"Look at {WRITERS[study.document](study, out, docs, command)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, SIGTERM also ends the running commands
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; the same command resumes", 128 + signal.SIGINT)
