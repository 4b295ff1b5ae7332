"""The files that say what a measurement found."""

import csv
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metrics import figures, report, table

VOID = {"meta", "link", "img", "br", "input"}
NAN = float("nan")


def row(model: str = "runs/rf", steps: int = 8, **values: object) -> dict:
    given = {"model": model, "sampler": "euler", "spacing": "trailing", "steps": steps, "evaluations": float(steps)}
    return given | {"guidance": 1.0, "samples": 1000, "accuracy": 0.981, "distance_ratio": 0.95} | values


def record(*rows: dict) -> dict:
    return {"settings": {"samples": 1000, "network": "judge <1>"}, "floor": 0.66, "rows": list(rows)}


class Page(HTMLParser):
    """Cells and pictures of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.bold: list[tuple[int, int]] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "b":
            self.bold.append((len(self.rows) - 1, len(self.rows[-1]) - 1))
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def size(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_files_hold_the_record(tmp_path: Path) -> None:
    found = record(row(accuracy=NAN, distance=math.inf, clip_score=None), row(steps=50, recall=0.5))
    sheet = figures.sheet_image({("runs/rf", 8): torch.rand(2, 1, 8, 8)}, ["runs/rf"], [8, 50], 16)
    report.write(found, sheet, tmp_path / "new")

    names = {"results.json", "results.csv", "quality.png", "sheet.png", "report.html"}
    assert {file.name for file in (tmp_path / "new").iterdir()} == names

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    back = json.loads((tmp_path / "new/results.json").read_text(), parse_constant=refuse)
    first = row(accuracy=None, distance=None, clip_score=None)
    assert back == found | {"rows": [first, found["rows"][1]]}

    with (tmp_path / "new/results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [*first, "recall"]
    assert [line["recall"] for line in lines] == ["", "0.5"]
    assert lines[0]["accuracy"] == lines[0]["distance"] == ""
    assert (lines[1]["model"], float(lines[1]["distance_ratio"])) == ("runs/rf", 0.95)

    assert size((tmp_path / "new/sheet.png").read_bytes()) == sheet.size
    assert size((tmp_path / "new/quality.png").read_bytes())[0] > 1000  # two panels
    page = Page((tmp_path / "new/report.html").read_text())
    assert sum(source.startswith("data:image/png;base64,") for source in page.sources) == 2


def test_numbers_are_safe_when_the_plot_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report, "plot", fail)
    with pytest.raises(RuntimeError, match="no fonts"):
        report.write(record(row()), None, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "results.csv"}


def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        report.write(record(row(guidance=Path("x"))), None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    report.write(record(row()), None, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {"results.json", "results.csv", "quality.png", "report.html"}
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        report.write(record(row(accuracy=0.5)), None, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_in_the_way_is_an_error_and_leaves_no_part(tmp_path: Path) -> None:
    (tmp_path / "quality.png").mkdir()
    with pytest.raises(OSError, match=r"quality\.png: Is a directory"):
        report.write(record(row()), None, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"quality.png", "results.json", "results.csv"}


def test_page_asks_for_nothing_and_escapes() -> None:
    text = report.page(record(row("<b>&x"), row("</script>", accuracy=None, note='"q" & <i>')), {"<q>.png": b"123"})
    assert not re.search(r"https?://|<script src|@import|url\(", text)
    assert "<b>&x" not in text
    assert "<i>" not in text
    assert "judge &lt;1&gt;" in text
    page = Page(text)
    head, first, second = page.rows
    assert head[:2] == ["model", "sampler"]
    assert (first[0], second[0]) == ("<b>&x", "</script>")
    assert second[head.index("accuracy")] == table.MISSING
    assert second[head.index("note")] == '"q" & <i>'
    assert first[head.index("note")] == table.MISSING
    assert "CLIP score" not in head  # nobody has one
    assert not page.bold
    assert all(source.startswith("data:") for source in page.sources)
    for title in head[:-1]:
        assert f"<dt>{title}</dt>" in text


def test_bold_marks_the_best_of_equal_steps() -> None:
    rows = [
        row("a", 4, accuracy=0.9, distance_ratio=2.0, duplicates=0),
        row("b", 4, accuracy=0.8, distance_ratio=1.0, duplicates=0),
        row("c", 4, accuracy=0.90001, distance_ratio=NAN, duplicates=0),
        row("a", 8, accuracy=0.7, distance_ratio=9.0, duplicates=0),
    ]
    both = {(0, "accuracy"), (2, "accuracy")}  # 90.0% each
    assert table.best(rows) == both | {(1, "distance_ratio")}
    page = Page(report.page(record(*rows), {}))
    head = page.rows[0]
    assert [(i - 1, head[j]) for i, j in page.bold] == [(0, "accuracy"), (1, "FD ratio"), (2, "accuracy")]


def test_markdown_table() -> None:
    rows = [
        row("a|b", distance=2.7182, samples=1000, duplicates=0, evaluations=8.0, clip_score=None),
        row("c", distance=1234.56, precision=1.0, accuracy=NAN, distance_ratio=1, kernel_distance=0.00012345, other=7),
        row("d", distance=71.0, precision=0.5, duplicates=1234, kernel_distance=-1582.3, evaluations=26.43),
    ]
    columns = ["model", "samples", "evaluations", "accuracy", "precision", "distance", "distance_ratio"]
    assert table.table(rows, [*columns, "kernel_distance", "duplicates", "clip_score", "other"]) == (
        "| model | samples | evaluations | accuracy | precision | FD | FD ratio | KD | repeats | CLIP score | other |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        "| a\\|b | 1000 | 8 | 98.1% | – | 2.72 | 0.95 | – | 0 | – | – |\n"
        "| c | 1000 | 8 | – | 100.0% | 1235 | 1.00 | 0.000123 | – | – | 7 |\n"
        "| d | 1000 | 26.43 | 98.1% | 50.0% | 71.0 | 0.95 | -1582 | 1234 | – | – |\n"
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_shows_the_pictures_enlarged(channels: int) -> None:
    pictures = torch.randint(0, 256, (7, channels, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    cells = {("one", 4): pictures, ("one", 50): pictures.flip(0), ("the other", 50): pictures[:5]}
    sheet = figures.sheet_image(cells, ["one", "the other"], [4, 50], 32)
    pixels = torch.from_numpy(np.array(sheet)).movedim(-1, 0)
    large = (pictures * 255).round().byte().repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)

    def places(picture: torch.Tensor) -> list[tuple[int, int]]:
        height, width = pixels.shape[1] - 31, pixels.shape[2] - 31
        corners = (pixels[:, :height, :width] == picture[:, :1, :1]).all(0).nonzero().tolist()
        return [(y, x) for y, x in corners if torch.equal(pixels[:, y : y + 32, x : x + 32], picture)]

    found = [places(picture) for picture in large]
    (top, left), (_, right), (low, _) = found[0]  # in both cells of the first row, and in the second row
    assert right > left + 5 * 33 - 1
    for i in range(5):
        assert (top, left + 33 * i) in found[i]
        assert (low, found[0][2][1] + 33 * i) in found[i]
    assert (top + 33, left) in found[5]
    assert (top, right) not in found[0]  # the flipped cell begins with the last one
    assert any(y == top and x > left + 5 * 33 - 1 for y, x in found[6])
    assert len(found[0]) == 3
    missing = pixels[:, low : low + 65, left : left + 5 * 33 - 1]
    assert 0 < (missing < 255).any(0).sum() < 65  # a dash on white


def test_sheet_fits_odd_sizes_and_refuses_what_is_no_picture() -> None:
    def sheet(picture: torch.Tensor, side: int) -> Image.Image:
        return figures.sheet_image({("m", 1): picture[None]}, ["m"], [1], side)

    assert sheet(torch.zeros(3, 4, 9), 100).size == sheet(torch.zeros(1, 40, 90), 100).size
    grey = np.array(sheet(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]).repeat(1, 32, 32), 32))
    assert (grey == 128).all(-1).sum() == 32 * 32  # shrunk by area
    for bad, message in (
        (torch.full((1, 4, 4), NAN), r"in \[0, 1\]"),
        (torch.full((1, 4, 4), -0.1), r"in \[0, 1\]"),
        (torch.zeros(2, 4, 4), r"\(n, 1 or 3, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sheet(bad, 32)
    with pytest.raises(ValueError, match="no pictures"):
        figures.sheet_image({("m", 1): torch.zeros(1, 1, 4, 4)}, ["m"], [2], 32)


def test_plot_has_a_second_panel_only_for_what_was_measured() -> None:
    def width(*rows: dict, floor: float | None = 0.66) -> int:
        out = io.BytesIO()
        figures.plot(record(*rows) | {"floor": floor}, out)
        assert b"http" not in out.getvalue()
        return size(out.getvalue())[0]

    one = width(row(accuracy=None), row(steps=4, accuracy=None))
    assert width(row(accuracy=None, straightness=0.1)) == width(row()) == 2 * one
    assert width(row(accuracy=None, distance_ratio=0.0), row(distance_ratio=NAN, accuracy=NAN), floor=None) == one
    assert width(*(row(f"model {i}", accuracy=None) for i in range(7))) > one  # the legend stands aside
    assert width() == one


def test_lines_of_the_plot() -> None:
    rows = [row("a", 1), row("a", 2), row("b", 2), row("b", 2, sampler="heun"), row("b", 2, guidance=2.0)]
    found = figures.lines(rows)
    labels = ["a, euler", "b, euler, guidance 1", "b, heun", "b, euler, guidance 2"]
    assert [line.look["label"] for line in found] == labels
    assert [len(line.rows) for line in found] == [2, 1, 1, 1]
    colours, styles = [line.look["color"] for line in found], [line.look["linestyle"] for line in found]
    assert colours[0] != colours[1] == colours[2] == colours[3]
    assert styles[2] != styles[0] == styles[1] == styles[3]
    assert found[1].look["marker"] != found[3].look["marker"]


@pytest.mark.parametrize(("low", "high"), [(0.6, 30), (0.001, 1e4), (1e-9, 1e9), (0.85, 1.1), (0.5, 1.6)])
def test_ticks_are_few_and_in_range(low: float, high: float) -> None:
    ticks = figures.log_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert low <= ticks[0]
    assert ticks[-1] <= high


def test_points_are_sorted_and_leave_out_what_is_missing() -> None:
    rows = [row(steps=8, recall=0.5), row(steps=2, recall=0.0), row(steps=4), row(steps=1, recall=NAN)]
    assert figures.points(rows, "recall", False) == ([2, 8], [0.0, 0.5])
    assert figures.points(rows, "recall", True) == ([8], [0.5])
