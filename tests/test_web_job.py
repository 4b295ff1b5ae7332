"""Drawings of the page without a browser: what a job tells, what it keeps, and the walk that it records."""

import os
import threading
from pathlib import Path

import pytest
import torch

import sample
from flow.path import RectifiedFlow
from flow.sampler import euler
from pipeline import LoadOptions, Pipeline
from web.job import SHARE, Ended, Job, Picture, Preview, Progress
from web.shelf import Shelf, models_in
from web.walk import Walk, figure

FLAGS = ["--prompt", "a seven", "--num-images", "3", "--steps", "4", "--batch-size", "2"]


def job(tmp_path: Path, *argv: str, shelf: Shelf | None = None, stop: threading.Event | None = None) -> Job:
    load = (shelf or Shelf()).load
    return Job([list(argv)], load, tmp_path / "page", "cpu", stop or threading.Event())


def test_its_files_are_those_of_the_command(model: Path, tmp_path: Path) -> None:
    sample.main(["--model", str(model), *FLAGS, "--out", str(tmp_path / "command")])
    *steps, picture, ended = job(tmp_path, "--model", str(model), *FLAGS).events()
    assert ended == Ended(None, [])
    assert isinstance(picture, Picture)
    assert all(isinstance(step, Progress) for step in steps)
    for file in (*picture.drawn.pictures, picture.drawn.sheet):
        assert file.read_bytes() == (tmp_path / "command" / file.name).read_bytes()
    assert steps[-1][1:3] == (8, 8)  # two batches of four steps


def test_it_records_the_walk_of_the_first_picture(model: Path, tmp_path: Path) -> None:
    (picture,) = (e for e in job(tmp_path, "--model", str(model), *FLAGS).events() if isinstance(e, Picture))
    walk, pipe = picture.walk, Pipeline.load(model)
    states: list[torch.Tensor] = []
    pipe(["a seven"], [0], sampling=sample.replace(pipe.sampling, steps=4), callback=lambda i, z, x0: states.append(z))
    torch.testing.assert_close(torch.cat(walk.z), torch.cat(states), atol=1e-5, rtol=1e-5)
    assert len(walk.x0) == 4


def test_a_stop_ends_it_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    """Pressed while the model is loaded."""
    stop = threading.Event()

    def load(path: Path, options: LoadOptions) -> Pipeline:
        stop.set()
        return Pipeline.load(path, options)

    argv = ["--model", str(model), *FLAGS]
    *_, ended = Job([argv], load, tmp_path / "page", "cpu", stop).events()
    assert ended == Ended("stopped: nothing more was drawn", [])
    assert not list((tmp_path / "page").glob("*.png"))


def test_a_reader_that_goes_away_stops_it(model: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    events = job(tmp_path, "--model", str(model), *FLAGS, stop=stop).events()
    next(events)
    events.close()
    assert stop.is_set()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere", "--prompt", "a"], "nowhere is no model folder"),
        (["--model", "{}", "--prompt", "a", "--height", "7"], "height must be a multiple of"),
        (["--model", "{}", "--prompt", "a", "--sampler", "warp"], "warp"),
        (["--model", "{}", "--prompt", "a", "--steps", "none"], "--steps: invalid positive value"),
    ],
)
def test_what_does_not_fit_ends_it_in_one_line(model: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    *_, ended = job(tmp_path, *(flag.format(model) for flag in flags)).events()
    assert isinstance(ended, Ended)
    assert ended.error
    assert message in ended.error
    assert "\n" not in ended.error


def test_a_fault_of_the_program_ends_the_job_and_not_the_page(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("inner")

    monkeypatch.setattr("web.job.draw_files", broken)
    *_, ended = job(tmp_path, "--model", str(model), *FLAGS).events()
    assert ended == Ended("KeyError: 'inner' (more stands in the terminal)", [])
    assert "Traceback" in capsys.readouterr().err


def test_warnings_are_told(model: Path, tmp_path: Path) -> None:
    *_, ended = job(tmp_path, "--model", str(model), "--prompt", "a (red:1.2) seven", "--steps", "1").events()
    assert isinstance(ended, Ended)
    assert [text for text in ended.warnings if text.startswith("weights as in")]


def test_showing_costs_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch, pipe: Pipeline) -> None:
    now = [0.0]
    monkeypatch.setattr("web.job.time.perf_counter", lambda: now[0])
    preview, shown = Preview(), 0
    for _ in range(1000):
        now[0] += 0.1  # a step
        if preview.due():
            preview.show(pipe, torch.zeros(2, 1, 8, 8))
            now[0] += 0.0
            preview.spent += 0.1 - preview.cost  # as if a picture took 0.1 s
            preview.cost = 0.1
            shown += 1
    assert 0.5 * SHARE <= shown * 0.1 / now[0] <= SHARE


def test_models_are_kept_until_they_are_written_anew(pipe: Pipeline, tmp_path: Path) -> None:
    shelf, options = Shelf(), LoadOptions(device="cpu")
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        pipe.save(path)
    first = shelf.load(paths[0], options)
    assert shelf.load(paths[0], options) is first
    index = paths[0] / "model_index.json"
    index.rename(tmp_path / "old")
    index.write_bytes((tmp_path / "old").read_bytes())
    second = shelf.load(paths[0], options)
    assert second is not first
    for path in paths[1:]:
        shelf.load(path, options)
    assert len(shelf.models) == 3
    assert shelf.load(paths[0], options) is not second
    assert models_in([tmp_path]) == paths


def test_a_lora_that_was_written_anew_is_merged_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "load", lambda path, options: object())
    shelf, update, path = Shelf(), tmp_path / "style.safetensors", tmp_path / "model"
    path.mkdir()
    options = LoadOptions(device="cpu", lora=(f"{update}:0.5",))
    none = shelf.load(path, options)
    update.write_bytes(b"1")
    os.utime(update, ns=(1, 3 * 10**18))
    one = shelf.load(path, options)
    assert shelf.load(path, options) is one is not none
    os.utime(update, ns=(1, 4 * 10**18))
    assert shelf.load(path, options) is not one


def straight(model: Path, bend: float) -> Walk:
    """A walk from 0 to a picture with a bend in its middle."""
    times = torch.linspace(1, 0, 5, dtype=torch.float64)
    walk = Walk("walk", Pipeline.load(model), times)
    end, aside = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    aside[..., 0, :2] = torch.tensor([1.0, -1.0])  # at a right angle to the picture
    for i in range(5):
        walk.add(i, i / 4 * end + bend * (i == 2) * aside, end)
    return walk


def test_the_plane_of_a_walk_shows_how_far_it_leaves_its_line(model: Path) -> None:
    along, across = straight(model, 0.0).plane()
    torch.testing.assert_close(along, torch.linspace(0, 1, 5).double())
    assert across.abs().max() < 1e-12
    bent = straight(model, 2.0)
    along, across = bent.plane()
    torch.testing.assert_close(along, torch.linspace(0, 1, 5).double())
    torch.testing.assert_close(across, torch.tensor([0, 0, 2 * 2**0.5 / 8, 0, 0]).double(), atol=1e-6, rtol=1e-6)
    assert straight(model, 0.0).numbers()["length / distance"] == "1.000"
    assert float(bent.numbers()["length / distance"]) == pytest.approx(0.5 + 2 * (1 / 16 + 1 / 8) ** 0.5, abs=1e-3)
    assert figure([bent, straight(model, 0.0)]).size == (880, 352)
    assert bent.film().size == (4 * 96 + 3 * 4, 96)


def test_a_new_batch_begins_a_new_walk(model: Path) -> None:
    walk = straight(model, 0.0)
    z = torch.zeros(1, 1, 8, 8)
    walk.add(0, z, z)
    assert (len(walk.z), len(walk.x0)) == (1, 0)


def test_a_straight_flow_s_walk_is_straight(model: Path) -> None:
    """The flow to a single picture."""
    walk = Walk("walk", Pipeline.load(model), torch.linspace(1, 0, 9, dtype=torch.float64))
    noise, target, path = torch.randn(1, 1, 8, 8).double(), torch.zeros(1, 1, 8, 8).double() + 0.3, RectifiedFlow()

    def denoise(z: torch.Tensor, t: torch.Tensor) -> object:
        from flow.objective import Estimate

        a, b = path(t)
        return Estimate(target, (z - a * target) / b)

    walk.add(0, noise, noise)
    euler(denoise, path, noise, walk.times, callback=walk.add)
    assert float(walk.numbers()["straightness S"]) < 1e-10
