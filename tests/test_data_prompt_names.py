"""File names of prompts."""

import pytest

from data.prompts import file_stem, weighted

SEED = 2**62 - 1
TAIL = f"_{SEED}-{10**18}.png"


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A seven!", "a-seven"),
        ("", "unconditional"),
        ("🚀", "rocket"),
        ("🌙 🚀", "crescent-moon-space-rocket"),
        ("?!", "question-mark-exclamation-mark"),
        ("\x01", "sign"),
        ("a cat 🚀", "a-cat"),
        ("Ein Überblick", "ein-überblick"),
        ("../../etc/passwd", "etc-passwd"),
        ("x" * 100, "x" * 60),
        ("é" * 100, "é" * 60),
        ("三" * 100, "三" * 60),
        ("𝒳" * 60, "𝒳" * 50),
        ("a" + "𝒳" * 60, "a" + "𝒳" * 49),
    ],
)
def test_a_name_is_readable_and_cut_between_characters(prompt: str, stem: str) -> None:
    assert file_stem(prompt) == stem
    assert len((file_stem(prompt) + TAIL).encode()) <= 255


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a (red:1.3) cat", True),
        ("((a red) cat:0.5)", True),
        ("a cat (dark : .8 )", True),
        ("a cat (red)", False),
        ("16:9 at (10:30)", False),
    ],
)
def test_weights_of_other_programs_are_seen(prompt: str, found: bool) -> None:
    assert weighted(["", prompt, "(other:1.1)"]) == (prompt if found else "(other:1.1)")
    assert weighted([""]) is None
