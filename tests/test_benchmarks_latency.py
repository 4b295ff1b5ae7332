"""The benchmark of one picture: its parts, what warm means, and its table."""

import copy
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import latency
from data.text.encoder import Text
from data.text.tower import Tower
from pipeline import Pipeline

ROOT = Path(__file__).parents[1]


def owner(pipe: Pipeline, part: str) -> tuple[Any, str]:
    return {"text": (pipe.text, "encode"), "network": (pipe.network.blocks[0], "forward"),
            "decoding": (pipe.codec, "decode"), "rest": (pipe.objective, "denoise")}[part]  # fmt: skip


@pytest.mark.parametrize("part", ["text", "network", "decoding", "rest"])
def test_what_becomes_slower_is_seen_in_its_own_column(
    pipe: Pipeline, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second is added to each call, so that the machine's noise does not count."""
    pipe = copy.deepcopy(pipe)
    clock, late = time.perf_counter, 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late)
    thing, method = owner(pipe, part)
    work = getattr(thing, method)

    def slow(*args: Any, **more: Any) -> Any:
        nonlocal late
        late += 1
        return work(*args, **more)

    monkeypatch.setattr(thing, method, slow)
    timed = latency.Timed(pipe, steps=3)
    first = timed.draw(0)
    calls = late
    assert calls >= (3 if part in ("network", "rest") else 1)
    expected = dict.fromkeys(first, 0.0) | {"picture": calls, part: calls}
    assert first == pytest.approx(expected, abs=0.5)
    assert timed.draw(1) == pytest.approx(expected, abs=0.5)  # those of the picture before are not added


def test_encoders_are_read_once_and_encode_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = latency.Timed(Pipeline.load(ROOT / "assets/shapes/model"), steps=1)
    loads, captions = [], []
    load, run = Tower.load, timed.pipe.text._run  # type: ignore[attr-defined]

    def counted(self: Tower, *rest: Any) -> Any:
        loads.append(self)
        return load(self, *rest)

    def encoded(ids: Sequence[Any]) -> Text:
        captions.append([numbers.tolist() for numbers in ids])
        return run(ids)

    monkeypatch.setattr(Tower, "load", counted)
    monkeypatch.setattr(timed.pipe.text, "_run", encoded)
    for turn in range(3):
        timed.draw(turn)
    assert len(loads) == 3
    assert len(captions) == 4  # with the empty prompt of guidance, once
    assert captions[0] == captions[2] == captions[3]  # the same tokens


def test_it_prints_a_row_for_each_model(pipe: Pipeline, model: Path, capsys: pytest.CaptureFixture) -> None:
    """Of one turn the parts add up to the whole. Guidance evaluates the network twice a step."""
    plain = model.parent / "plain"
    Pipeline(*pipe.parts[:4], replace(pipe.sampling, guidance=1.0)).save(plain)
    given = [str(model), f"{model}:1", f"{plain}:3"]
    latency.main([*(word for name in given for word in ("--model", name)), "--turns", "1", "--threads", "1"])
    said, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert ", 1 threads, " in said
    assert head == "| ms | steps | evaluations | picture | text | network | decoding | rest |"
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [row[:3] for row in cells] == [[str(model), "4", "8"], [str(model), "1", "2"], [str(plain), "3", "3"]]
    for row in cells:
        whole, *parts = ([float(number) for number in re.findall(r"[\d.]+", cell)] for cell in row[3:])
        assert whole[0] == whole[1] == whole[2] > 0
        assert sum(part[0] for part in parts) == pytest.approx(whole[0], abs=0.3)


def test_median_and_quartiles_are_in_milliseconds() -> None:
    assert latency.shown([0.005, 0.001, 0.002, 0.009, 0.003]) == "3.0 (2.0–5.0)"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere", "nowhere is no model folder"),
        ("MODEL:0", "is not MODEL or MODEL:STEPS, such as"),
        ("MODEL:two", "is not MODEL or MODEL:STEPS"),
        (":2", "is not MODEL or MODEL:STEPS"),
        ("", "is not MODEL or MODEL:STEPS"),
        ("MODEL:20000", "steps must be at least 1 and at most 10,000"),
    ],
)
def test_what_cannot_be_timed_is_refused(given: str, said: str, model: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        latency.main(["--model", given.replace("MODEL", str(model)), "--turns", "1"])
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert said in printed
    assert printed.count("\n") == 1
