"""evaluate.py --by category as a user calls it, on small random models of shapes and of digits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from data import digits, shapes
from data.examined import Digits, Shapes
from metrics.judge import Judge
from pipeline import Pipeline
from studies.categories import BATCH, FRAME, GREEN, RED, ByCategory, framed
from studies.measure import Drawn, Setting

ROOT = Path(__file__).parents[1]
SHAPES = ["--by", "category", "--data", "shapes"]


def read(out: Path, number: int = 0) -> tuple[dict, list[dict]]:
    """A row of the results, and the pictures behind it."""
    row = json.loads((out / "results.json").read_text())["rows"][number]
    return row, json.loads((out / f"pictures-{number}.json").read_text())["pictures"]


def test_every_picture_is_read_back_and_counted(drawer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate.main([*SHAPES, "--model", str(drawer), "--steps", "1", "--per-category", "3", "--out", str(tmp_path)])
    row, pictures = read(tmp_path)
    assert (row["model"], row["folder"], row["steps"], row["guidance"]) == (str(drawer), str(drawer), 1, 2.0)
    assert len(pictures) == 3 * len(shapes.CATEGORIES)
    for number, category in enumerate(shapes.CATEGORIES):
        some = pictures[3 * number : 3 * number + 3]
        assert [one["caption"] for one in some] == [r.caption() for r in shapes.requests(category, 3)]
        assert row[category] == pytest.approx(sum(one["right"] for one in some) / 3)
    assert row["overall"] == pytest.approx(sum(row[c] for c in shapes.CATEGORIES) / len(shapes.CATEGORIES))
    assert Image.open(tmp_path / "sheet-0.png").size[0] > 3 * shapes.SIDE
    printed = capsys.readouterr().out
    assert "binding" in printed
    assert printed.splitlines()[-1].startswith(f"Look at {tmp_path / 'sheet-0.png'}")


def test_pictures_are_the_model_s_own_for_the_requests_and_seeds(drawer: Path, tmp_path: Path) -> None:
    evaluate.main([*SHAPES, "--model", str(drawer), "--steps", "1", "--per-category", "12", "--seed", "5",
                   "--out", str(tmp_path)])  # fmt: skip
    asked = [request for category in shapes.CATEGORIES for request in shapes.requests(category, 12, 5)]
    pipe = Pipeline.load(drawer)
    sampling = evaluate.sampling_of(evaluate.parser().parse_args(["--model", "m"]), pipe.sampling, steps=1)
    captions, seeds = [request.caption() for request in asked], range(5, 5 + len(asked))
    drawn = torch.cat([pipe(captions[i : i + BATCH], seeds[i : i + BATCH], sampling=sampling) for i in (0, BATCH)])
    levels = drawn.mul(255).round().div(255)
    found = [shapes.read(picture.movedim(0, -1).double().numpy()) for picture in levels]
    _, pictures = read(tmp_path)
    assert [one["caption"] for one in pictures] == captions
    assert [one["right"] for one in pictures] == [shapes.fulfils(*pair) for pair in zip(found, asked, strict=True)]
    assert [one["found"] for one in pictures] == json.loads(json.dumps([[f._asdict() for f in some] for some in found]))


def shown(request: shapes.Request) -> torch.Tensor:
    """A picture of what is asked for, (3, 64, 64); places are tried until there is room."""
    draw = np.random.default_rng(0)
    while not (objects := shapes.place(request, draw)):
        pass
    return torch.from_numpy(np.array(shapes.picture(shapes.Scene(request, objects)))).movedim(-1, 0) / 255


def test_true_pictures_are_right_and_a_category_of_wrong_ones_is_not(pipe: Pipeline, tmp_path: Path) -> None:
    examined = Shapes.by_category(9, 0)
    pixels = torch.stack([shown(request) for request in examined.asked])
    wrong = pixels.clone()
    wrong[9:15] = 0  # six of the second category
    measured = ByCategory(examined, tmp_path)
    for pictures in (pixels, wrong):
        measured.add(Setting("m", "m", pipe, pipe.sampling), Drawn(pictures, 0.0, 0.0, 0.0, 0.0))
    measured.finish()
    (all_right, _), (some_wrong, pictures) = (read(tmp_path, number) for number in (0, 1))
    assert all_right["overall"] == 1
    assert [some_wrong[category] for category in shapes.CATEGORIES] == [1, 3 / 9, 1, 1, 1, 1]
    assert some_wrong["overall"] == pytest.approx(8 / 9)
    assert [number for number, one in enumerate(pictures) if not one["right"]] == [*range(9, 15)]
    red = (np.asarray(Image.open(tmp_path / "sheet-1.png")) == np.round(np.array(RED) * 255)).all(-1)
    assert red.sum() == 6 * (68**2 - 64**2)  # all six are among those shown


def test_every_model_and_number_of_steps_has_its_row_and_sheet(drawer: Path, tmp_path: Path) -> None:
    models = ["--model", str(drawer), "--model", str(drawer.parent)]
    evaluate.main([*SHAPES, *models, "--steps", "1,2", "--per-category", "1", "--out", str(tmp_path)])
    found = [read(tmp_path, number)[0] for number in range(4)]
    assert [(r["folder"], r["steps"]) for r in found] == [(str(m), n) for m in (drawer, drawer.parent) for n in (1, 2)]
    names = {f"{stem}-{number}.{end}" for stem, end in (("sheet", "png"), ("pictures", "json")) for number in range(4)}
    assert {file.name for file in tmp_path.iterdir()} == names | {"results.json", "purpose.json"}
    assert [(tmp_path / f"sheet-{n}.png").read_bytes() for n in (0, 1)] == [
        (tmp_path / f"sheet-{n}.png").read_bytes() for n in (2, 3)
    ]  # the run's folder holds the same model


def test_digits_are_counted_by_digit(model: Path, tmp_path: Path) -> None:
    argv = ["--by", "category", "--model", str(model), "--steps", "2", "--per-category", "4", "--out", str(tmp_path)]
    evaluate.main(argv)
    row, pictures = read(tmp_path)
    captions = [one["caption"] for one in pictures]
    seen = Judge.load(ROOT / "assets/digits/judge").classify(digits.reduced(drawn(model, captions, 2))).tolist()
    assert [one["found"] for one in pictures] == seen
    assert [one["right"] for one in pictures] == [digit == number // 4 for number, digit in enumerate(seen)]
    for number, word in enumerate(digits.WORDS):
        assert row[word] == pytest.approx(seen[4 * number : 4 * number + 4].count(number) / 4)
        for caption in captions[4 * number : 4 * number + 4]:
            assert word in caption or str(number) in caption


def drawn(model: Path, captions: list[str], steps: int) -> torch.Tensor:
    """What a model draws, in 256 levels."""
    pipe = Pipeline.load(model)
    sampling = evaluate.sampling_of(evaluate.parser().parse_args(["--model", "m"]), pipe.sampling, steps=steps)
    return pipe(captions, range(len(captions)), sampling=sampling).mul(255).round() / 255


def test_categories_are_as_large_and_in_order() -> None:
    asked = Shapes.by_category(3, 7)
    assert asked.prompts == [r.caption() for c in shapes.CATEGORIES for r in shapes.requests(c, 3, 7)]
    assert asked.prompts != Shapes.by_category(3, 8).prompts
    assert Digits.by_category(3, 7).prompts == Digits.held_out(30).prompts


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_are_green_where_right_and_red_where_wrong(channels: int) -> None:
    pictures = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    found = framed(pictures, torch.tensor([True, False]), 16)
    assert found.shape == (2, 3, 16 + 2 * FRAME, 16 + 2 * FRAME)
    inside = found[:, :, FRAME:-FRAME, FRAME:-FRAME]
    assert torch.equal(inside, pictures.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1))
    for one, colour in zip(found, (GREEN, RED), strict=True):
        edge = torch.cat([one[:, :FRAME].flatten(1), one[:, -FRAME:].flatten(1), one[:, :, :FRAME].flatten(1)], 1)
        torch.testing.assert_close(edge, torch.tensor(colour)[:, None].expand_as(edge))
    assert framed(torch.rand(1, 3, 64, 64), torch.tensor([True]), 64).shape[-1] == 64 + 2 * FRAME


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "nowhere is no model folder"),
        (["--per-category", "0"], "must be at least 1"),
        (["--sampler", "none"], "there is no sampler"),
        (["--steps", "0"], "whole numbers of at least 1"),
        (["--samples", "70"], "--samples does not go with --by category: leave one of them out"),
        (["--per-digit", "7"], "--per-digit does not go with --by category"),
        (["--reference", "held_out"], "--reference does not go with --by category"),
        (["--features", "clip:nowhere"], "--features does not go with --by category"),
        (["--clip", "nowhere"], "--clip does not go with --by category"),
        (["--samples", "70", "--per-category", "1"], "not allowed with"),
        (["--by", "colour"], "invalid choice: 'colour'"),
    ],
)
def test_bad_input_ends_in_one_line(
    drawer: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        evaluate.main([*SHAPES, "--model", str(drawer), "--out", str(tmp_path / "out"), *flags])
    lines = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, len(lines)) == (2, 1)
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_pictures_of_a_category_need_categories(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--model", str(model), "--per-category", "10", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, len(lines)) == (2, 1)
    assert "--per-category goes only with --by category: add that" in lines[0]


def test_a_model_of_other_pictures_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        evaluate.main([*SHAPES, "--model", str(model), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "draws pictures of 1 × 8 × 8 numbers, but the shapes have 3 × 64 × 64" in capsys.readouterr().err
