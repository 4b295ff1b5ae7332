"""The page of a training: what it shows of a log, also of one that is being written, and what it refuses."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import Page

from metrics import page
from metrics.__main__ import main


def run(folder: Path, steps: int = 200, sheets: int = 3) -> Path:
    """A run as the training leaves it."""
    (folder / "samples").mkdir(parents=True)
    lines = []
    for step in range(10, steps + 1, 10):
        bins = {f"train/loss_bin{i}": 1 + i / step for i in range(8)}
        speed = {"perf/images_per_s": 50.0 + step, "perf/data_wait": 0.013, "train/skipped": 0.0}
        lines.append({"step": step, "train/loss": 10 / step, "train/accuracy": step / steps, **bins, **speed})
        if step % 100 == 0:
            lines.append({"step": step, "val/loss": 5 / step, "val/loss_t0.0625": 1.0, "val/loss_t0.5625": 2.0 / step})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(sheets):
        Image.new("RGB", (40, 20), (i, 0, 0)).save(folder / f"samples/step-{100 * i:07d}.png")
    (folder / "config.yaml").write_text("run: {folder: <here>}\n")
    return folder


def shown(file: Path) -> dict[str, Image.Image]:
    """The pictures of a page, by their descriptions."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]*)"', file.read_text())
    return {alt: Image.open(io.BytesIO(base64.b64decode(content))) for content, alt in found}


def test_a_page_has_the_numbers_the_figures_and_the_film(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["page", str(run(tmp_path / "one"))])
    file = tmp_path / "one/page.html"
    assert f"look at {file}" in capsys.readouterr().out
    read = Page(file.read_text())
    assert read.rows[1] == ["one", "200", "0.05", "0.025 at step 200", "155", "1.3%", "0"]
    pictures = shown(file)
    assert list(pictures) == [
        "step 0", "step 100", "step 200", "Loss", "Training loss by t", "Validation loss by t", "accuracy",
        "images per s",
    ]  # fmt: skip
    assert [pictures[f"step {100 * i}"].getpixel((3, 3)) for i in range(3)] == [(i, 0, 0) for i in range(3)]
    assert "&lt;here&gt;" in file.read_text()
    assert not [source for source in read.sources if not source.startswith("data:")]
    main(["page", str(tmp_path / "one")])  # again: it replaces its own page


def test_runs_are_compared(tmp_path: Path) -> None:
    main(["page", str(run(tmp_path / "one")), str(run(tmp_path / "two", 400)), "--out", str(tmp_path / "both.html")])
    assert [row[:2] for row in Page((tmp_path / "both.html").read_text()).rows[1:]] == [["one", "200"], ["two", "400"]]
    wide, single = (shown(tmp_path / "both.html")[name].width for name in ("Validation loss by t", "accuracy"))
    assert wide > 1.8 * single  # a panel for each run


def test_a_step_that_was_logged_twice_counts_once_and_what_is_not_whole_yet_not_at_all(tmp_path: Path) -> None:
    log = run(tmp_path / "one") / "log.jsonl"
    lines = log.read_text().splitlines()
    again = {"step": 200, "train/loss": 7.0, "val/loss": float("nan"), "train/skipped": None}
    log.write_text("\n".join([*lines, json.dumps(again), '{"step": 210, "train/lo']))
    read = page.read_run(tmp_path / "one")
    steps, losses = read.values["train/loss"]
    assert steps.tolist() == list(range(10, 201, 10))
    assert (losses[-1], losses[-2]) == (7.0, 10 / 190)
    assert read.values["val/loss"][1].tolist() == [0.05, 0.025]


def test_long_series_are_means_of_blocks() -> None:
    steps = np.arange(6000.0)
    few, means = page.smoothed((steps, 2 * steps))
    assert len(few) == page.BLOCKS
    assert few[0] == pytest.approx(49.5)
    assert means.tolist() == pytest.approx((2 * few).tolist())


def test_a_film_has_a_limit_and_keeps_the_first_and_the_last(tmp_path: Path) -> None:
    main(["page", str(run(tmp_path / "one", sheets=50))])
    steps = [name for name in shown(tmp_path / "one/page.html") if name.startswith("step")]
    assert len(steps) == page.MOST_SHEETS
    assert (steps[0], steps[-1]) == ("step 0", "step 4,900")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "log.jsonl").unlink(), "is no run: it has no log.jsonl"),
        (lambda run: (run / "log.jsonl").write_text(""), "is empty: the run has logged nothing yet"),
        (lambda run: (run / "log.jsonl").write_text('{"step": 1}\n[]\n{"step": 2, "a/b": 1}\n'), "line 2 is no entry"),
        (lambda run: (run / "page.html").write_text("<p>my page"), "is no page of a training: choose another --out"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, spoil, message: str) -> None:
    spoil(run(tmp_path / "one"))
    with pytest.raises(SystemExit) as end:
        main(["page", str(tmp_path / "one")])
    told = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, len(told)) == (2, 1)
    assert message in told[0]


def test_half_written_sheets_and_odd_numbers_are_left_out(tmp_path: Path) -> None:
    folder = run(tmp_path / "one")
    (folder / "samples/step-0000200.png").write_bytes(b"\x89PNG")
    with open(folder / "log.jsonl", "a") as log:
        log.write(f'{{"step": 210, "train/loss": 1{"0" * 400}, "train/loss_bin": 1, "val/loss_tx": 2}}\n')
        log.write('{"step": 220, "train/loss_bin": 2, "val/loss_tx": 3, "val/loss": NaN}\n')
    main(["page", str(folder)])
    pictures = shown(folder / "page.html")
    assert list(pictures)[:3] == ["step 0", "step 100", "Loss"]
    assert {"loss bin", "loss tx"} <= set(pictures)  # not by t
