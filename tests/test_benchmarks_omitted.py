"""benchmarks/omitted.py: its captions say more and more of one scene, and what it calls wrong."""

import pytest

from benchmarks import omitted
from data.shapes import COLOURS, SHAPES, Found, Group, Request, fulfils


def found(shape: str | None, colour: str = "red", row: float = 10) -> Found:
    return Found(shape, colour, "large", (row, 30.0))


def test_a_request_without_some_facts_allows_the_whole_one() -> None:
    """Nothing else is changed: what fulfils the whole request fulfils each vaguer one."""
    for asked in omitted.whole(20, 3):
        rows = {"above": (10, 50), "below": (50, 10)}.get(asked.relation or "", (30, 30))
        columns = {"to the left of": (10.0, 50.0), "to the right of": (50.0, 10.0)}.get(asked.relation or "", (30, 30))
        drawn = [
            Found(group.shape, group.colour, group.size or "", (row, column))
            for group, row, column in zip(asked.groups, rows, columns, strict=True)
        ]
        assert fulfils(drawn, asked)
        captions = [omitted.less(asked, *said) for said in omitted.SAID.values()]
        assert captions[-1] == asked
        assert all(fulfils(drawn, one) for one in captions)
        assert len({one.caption() for one in captions}) == len(captions)


def test_omitted_facts_are_not_said() -> None:
    asked = Request((Group(1, "circle", "red", "small"), Group(1, "cross", "blue", "large")), "above")
    captions = {name: omitted.less(asked, *said).caption() for name, said in omitted.SAID.items()}
    assert captions["shapes"] == "a circle and a cross"
    assert captions["shapes, relation"] == "a circle above a cross"
    assert captions["shapes, colours"] == "a red circle and a blue cross"
    assert captions["shapes, colours, sizes"] == "a small red circle and a large blue cross"
    assert captions["all"] == "a small red circle above a large blue cross"


def test_every_kind_of_scene_is_asked_for() -> None:
    asked = omitted.whole(200, 7)
    assert {group.shape for one in asked for group in one.groups} == set(SHAPES)
    assert {group.colour for one in asked for group in one.groups} == set(COLOURS)
    assert len({one.relation for one in asked}) == 4
    assert len({(one.groups[0].size, one.groups[1].size) for one in asked}) == 4


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ([found("circle"), found("cross", "blue", 50)], None),
        ([found("circle"), found(None)], "unreadable"),
        ([found("circle")], "too few"),
        ([], "too few"),
        ([found("circle"), found("cross", "blue", 50), found("cross", "blue", 50)], "too many"),
        ([found("circle"), found("circle", "blue", 50)], "the same twice"),
        ([found("square"), found("square", "blue", 50)], "another shape"),
        ([found("circle"), found("square", "blue", 50)], "another shape"),
        ([found("circle", row=50), found("cross", "blue", 10)], "another colour, size or place"),
        ([found("circle", "blue"), found("cross", "red", 50)], "another colour, size or place"),
    ],
)
def test_the_kind_of_an_error(drawn: list[Found], expected: str | None) -> None:
    asked = Request((Group(1, "circle", "red"), Group(1, "cross", "blue")), "above")
    assert omitted.error(drawn, asked) == expected


def test_the_table_is_of_the_steps_and_captions_that_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """In one step the teacher draws no scene, and in eight the student draws most."""
    shares = {}
    for model, steps in (("model", 1), ("student", 8)):
        omitted.main(["--model", f"assets/shapes/{model}", "--steps", str(steps), "--captions", "4"])
        rows = capsys.readouterr().out.splitlines()[2:]
        assert len(rows) == len(omitted.SAID)
        cells = [[float(cell.strip(" %")) for cell in row.split("|")[2:-1]] for row in rows]
        assert all(sum(row) == pytest.approx(100, abs=0.3) for row in cells)
        shares[model] = sum(row[0] for row in cells) / len(cells)
    assert shares["model"] == 0
    assert shares["student"] >= 60
