"""Text, JSON and YAML from files, read with a limit: what a file holds never costs more memory than its kind needs."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import yaml

TEXT_LIMIT = 2**28  # bytes of a text file or a JSON file
LINE_LIMIT = 2**24  # bytes of a line of a table
YAML_LIMIT = 2**20  # bytes of a YAML file
NODES = 100_000  # values of a YAML file, with each alias counted as often as it is used


def read_text(file: Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Args:
        file: any file, also a pipe.
        limit: the most bytes that it may have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8, or larger than the limit.
        OSError: it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(limit + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {file}") from None
    if len(content) > limit:
        raise ValueError(f"{file} has more than {limit:,} bytes, too many for a file of this kind")
    return decode(content, file)


def decode(content: bytes, source: object, first: int = 1) -> str:
    """UTF-8 as text, without a byte-order mark. ValueError, naming source and line, if it is no UTF-8.

    Args:
        content: the bytes.
        source: where they are from.
        first: the number of their first line there.
    """
    try:
        text, place = content.decode("utf-8-sig"), content.find(0)  # zero: UTF-16, or no text at all
    except UnicodeDecodeError as error:
        text, place = "", error.start
    if place >= 0:
        line, byte = content.count(b"\n", 0, place) + first, f"0x{content[place]:02x}"
        raise ValueError(f"{source} is no text in UTF-8: line {line} holds the byte {byte}; save it as UTF-8")
    return text


def read_lines(file: Path, limit: int = LINE_LIMIT) -> Iterator[str]:
    """The lines of a UTF-8 file of any size, each with its end, as `split_lines` finds them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no UTF-8, or has more bytes than the limit; names the line.
        OSError: it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            for number in count(1):
                line = opened.readline(limit + 1)
                if len(line) > limit:
                    raise ValueError(f"{file}: line {number} has more than {limit:,} bytes, too many for a line")
                if not line:
                    return
                yield decode(line, file, number)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {file}") from None


def split_lines(text: str) -> list[str]:
    """The lines of a text. A line ends at LF or CR LF and at nothing else, so that line n is line n of any editor."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def parse_json(text: str | bytes, source: object) -> Any:
    """The value of a JSON text. ValueError, in one line that names the source, if it is no JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is no JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{source} is no JSON that can be read: it is nested too deeply") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. FileNotFoundError if there is no such file, ValueError if it holds anything else."""
    content = parse_json(read_text(file), file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def parse_yaml(text: str, source: object) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: in one line that names the source: it is no YAML, is nested too deeply, has a key twice, or aliases
            that stand for more than NODES values.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        """Number of values in a node."""
        if id(node) not in sizes:
            sizes[id(node)] = NODES + 1  # while it is counted: a node that contains itself has no end
            entries = () if isinstance(node, yaml.ScalarNode) else node.value
            names = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            known = set[str]()
            for name in (name for name in names if isinstance(name, yaml.ScalarNode)):
                if name.value in known:
                    raise ValueError(f"the key {name.value} comes again in line {name.start_mark.line + 1}")
                known.add(name.value)
            parts = [part for entry in entries for part in (entry if isinstance(entry, tuple) else (entry,))]
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None and size(node) > NODES:
            raise ValueError(f"it stands for more than {NODES:,} values")
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{source} is no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{source} is no YAML that can be read: it is nested too deeply") from None


def read_yaml(file: Path) -> Any:
    """The value of a YAML file. Errors are those of `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(file, YAML_LIMIT), file)
