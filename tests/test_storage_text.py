"""Text, JSON and YAML files: what is no text, too large or too deep is refused in one line."""

import os
from pathlib import Path

import pytest

from storage.text import parse_yaml, read_json, read_lines, read_text, read_yaml, split_lines

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_a_byte_order_mark_is_no_text_and_only_lf_and_crlf_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028still\x85one\x0b\x0c\r\ntwo\n\nfour\n".encode())
    assert split_lines(read_text(tmp_path / "a.txt")) == ["one\u2028still\x85one\x0b\x0c", "two", "", "four"]
    assert split_lines("") == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"one\ntw\xff", r"no text in UTF-8: line 2 holds the byte 0xff"),
        ("zwei".encode("utf-16-le"), "no text in UTF-8: line 1 holds the byte 0x00"),
        (b"x" * 101, "more than 100 bytes"),
    ],
)
def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read_text(tmp_path / "a", limit=100)


def test_lines_are_read_one_by_one_and_a_bad_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufeffone\u2028still\x85\x0bone\r\n\ntwo".encode())
    assert [*read_lines(tmp_path / "a.csv")] == ["one\u2028still\x85\x0bone\r\n", "\n", "two"]
    for bad, told in ((b"\xff", "no text in UTF-8: line 3 holds the byte 0xff"), (b"x" * 101, "line 3 has more than")):
        (tmp_path / "a.csv").write_bytes(b"one\n\n" + bad)
        lines = read_lines(tmp_path / "a.csv", limit=100)
        assert [next(lines), next(lines)] == ["one\n", "\n"]
        with pytest.raises(ValueError, match=told):
            next(lines)


def test_an_endless_file_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_text(Path("/dev/zero"), limit=1000)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1]", "holds no JSON object"),
        ("{", "is no JSON: "),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "is no JSON: "),
    ],
)
def test_bad_json_is_refused_in_one_line(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.json .*{told}") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: [", "is no YAML: "),
        ("a: \x01", "is no YAML: "),
        ("a: 2024-13-45", "is no YAML: "),
        ("[" * 10_000, "nested too deeply"),
        (BOMB, "stands for more than 100,000 values"),
        ("a: &a [*a]", "stands for more than"),
        ("run: {steps: 2}\nother: 1\nrun: {steps: 4}", "the key run comes again in line 3"),
        ("a: [{b: 1,\n b: 1}]", "the key b comes again in line 2"),
    ],
    ids=["open", "zero", "date", "deep", "aliases", "circle", "twice", "twice inside"],
)
def test_bad_yaml_is_refused_in_one_line(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.yaml .*{told}") as error:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


def test_aliases_as_people_write_them_are_read() -> None:
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a, d: 2}", "text") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}
    assert parse_yaml("", "text") is None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no {tmp_path / 'a'}"):
        read_text(tmp_path / "a")
    assert not os.listdir(tmp_path)
