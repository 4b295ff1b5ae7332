"""What the entry points share: a parser, faults that end in one clear line, and where the model is."""

import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import NoReturn

BAD_INPUT, MACHINE_FAULT = 2, 1  # exit statuses


def fail(message: object, status: int = BAD_INPUT) -> NoReturn:
    """Prints one line to standard error and exits."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


class Parser(ArgumentParser):
    """argparse's parser, with errors in one line."""

    def error(self, message: str) -> NoReturn:
        fail(message)


@contextmanager
def one_line_errors(*bad_input: type[Exception]) -> Iterator[None]:
    """Ends the program in one line: on the named exceptions with status 2, on other OSErrors with 1."""
    try:
        yield
    except bad_input as error:
        fail(error)
    except OSError as error:
        fail(error, MACHINE_FAULT)


def plain_warnings() -> None:
    """Lets a warning be one line that says what it is about, not where in the code it arose."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def natural(text: str, least: int = 0) -> int:
    """A whole number of at least 0, as a parser's `type`; ArgumentTypeError or ValueError otherwise."""
    number = int(text)
    if not least <= number < 2**62:
        raise ArgumentTypeError(f"must be at least {least} and below 2^62, got {number}")
    return number


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN, likewise."""
    number = float(text)
    if not isfinite(number):
        raise ArgumentTypeError(f"must be a finite number, got {text}")
    return number


def positive(text: str) -> int:
    """A whole number of at least 1, likewise."""
    return natural(text, 1)


def find_model(path: Path) -> Path:
    """The model folder at `path` or, for a run's folder, inside it. FileNotFoundError if there is none."""
    for folder in (path, path / "model", path / "model.old"):  # the last where a kill came between two renames
        if (folder / "model_index.json").is_file():
            return folder
    raise FileNotFoundError(f"{path} is no model folder: neither it nor {path / 'model'} has a model_index.json")
