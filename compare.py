"""Runs a study and writes its document: `python compare.py configs/studies/digits.yaml`. The same command resumes.

Every training and every measurement is a separate command. It runs only if its result does not exist yet. The document
is written from the results alone.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from cli import Parser, fail, one_line_errors, positive
from storage.files import hold
from storage.text import read_yaml
from studies import document, fewstep
from studies.recipes import Recipes
from studies.runner import ROOT
from studies.steps import Steps

WRITERS: dict[str | None, Callable[[Any, Path, Path, str], Path]] = {
    Recipes.document: document.write,
    "fewstep": fewstep.write,
}


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("study", type=Path, help="a YAML file, such as configs/studies/digits.yaml")
    p.add_argument("--out", type=Path, help="folder of models and results; default: runs/studies/NAME")
    p.add_argument(
        "--docs", type=Path, help="folder of the document and its pictures; default: docs, with --quick --out"
    )
    p.add_argument("--jobs", type=positive, default=1, help="commands that run at the same time and share the cores")
    p.add_argument("--quick", action="store_true", help="a short version of about ten minutes, too short for results")
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


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        study = read(args.study)
        study = study.quick() if args.quick else study
        study.check()
        out = (args.out or ROOT / "runs" / "studies" / (args.study.stem + "-quick" * args.quick)).resolve()
        with hold(out):
            study.run(out, args.jobs)
        if study.document is None:
            print(f"All results are in {out}")
            return
        docs = args.docs or (out if args.quick else Path("docs"))
        command = f"python compare.py {args.study}{' --quick' * args.quick}"
        print(f"Look at {WRITERS[study.document](study, out, docs, command)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, SIGTERM also ends the running commands
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; the same command resumes", 128 + signal.SIGINT)
