"""evaluate.py as a user calls it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
from data.examined import Digits
from flow.objective import Objective
from flow.path import Cosine
from flow.target import V
from metrics.straightness import path_length, straightness
from pipeline import Pipeline
from pipeline.sampling import Sampling
from studies.measure import Setting, draw, short_names

ROOT = Path(__file__).parents[1]
JUDGE = ["--features", f"judge:{ROOT / 'assets/digits/judge'}"]


def rows(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["rows"]


def test_measures_every_model_sampler_and_step_count(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    argv = ["--model", str(model), "--model", str(model.parent), "--steps", "1,3", "--per-digit", "7", *JUDGE]
    evaluate.main([*argv, "--sampler", "euler", "--sampler", "heun", "--out", str(out)])
    found = rows(out)
    expected = [(str(m), s, n) for m in (model, model.parent) for s in ("euler", "heun") for n in (1, 3)]
    assert [(r["folder"], r["sampler"], r["steps"]) for r in found] == expected
    assert [r["evaluations"] for r in found[:4]] == [2, 6, 2, 10]  # guidance doubles n and 2n − 1
    same = ({k: v for k, v in found[i].items() if k not in ("model", "folder", "seconds_per_picture")} for i in (1, 5))
    assert next(same) == next(same)  # the run's folder holds the same model
    assert found[0]["distance_ratio"] != found[1]["distance_ratio"]
    assert all(0 <= r["accuracy"] < 0.5 for r in found)  # its weights are random
    assert found[0]["straightness"] == pytest.approx(0, abs=1e-9)  # one step is a straight line
    assert found[1]["straightness"] > 0
    assert {file.name for file in out.iterdir()} == {
        "purpose.json", "results.json", "results.csv", "quality.png", "report.html", "sheet.png",
    }  # fmt: skip
    assert Image.open(out / "sheet.png").size[0] > 8 * 32
    assert capsys.readouterr().out.count("\n") == 2 + 8 + 2


def test_a_walk_on_any_path_is_measured_in_straight_coordinates(pipe: Pipeline) -> None:
    curved = Pipeline(pipe.network, Objective(Cosine(), V()), pipe.codec, pipe.text)
    sampling, examined = Sampling(3, 1.0), Digits(1)
    drawn = draw(Setting("", "", curved, sampling), examined, 0, 4)
    a, b = curved.objective.path(curved.plan(sampling)[2])
    states: list[torch.Tensor] = []
    curved(examined.prompts, range(10), sampling=sampling, callback=lambda done, z, x0: states.append(z))
    walk = [z / scale for z, scale in zip(states, a + b, strict=True)]
    assert drawn.path_length == pytest.approx(path_length(walk).mean().item(), rel=1e-4)
    assert drawn.straightness == pytest.approx(straightness(walk, b / (a + b)).mean().item(), rel=1e-4)


def test_the_pictures_do_not_depend_on_the_batch_and_references_differ(model: Path, tmp_path: Path) -> None:
    argv = ["--model", str(model), "--steps", "2", "--per-digit", "7", *JUDGE]
    evaluate.main([*argv, "--out", str(tmp_path / "a")])
    evaluate.main([*argv, "--out", str(tmp_path / "b"), "--batch-size", "33"])
    evaluate.main([*argv, "--out", str(tmp_path / "c"), "--reference", "train"])
    a, b, c = (rows(tmp_path / name)[0]["distance"] for name in "abc")
    assert a == pytest.approx(b, rel=1e-3)
    assert a != pytest.approx(c, rel=1e-3)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["runs/a/seed-1", "runs/b/seed-1"], ["a", "b"]),
        (["runs/a/seed-1", "runs/a/seed-2"], ["seed-1", "seed-2"]),
        (["runs/a", "b"], ["runs/a", "b"]),
        (["runs/a/model"], ["runs/a/model"]),
        (["x/m", "x/m/m"], ["m", "m/m"]),
    ],
)
def test_models_are_named_by_what_tells_them_apart(paths: list[str], expected: list[str]) -> None:
    assert short_names([Path(p) for p in paths]) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "nowhere is no model folder"),
        (["--model", "MODEL", "--steps", "1,zero"], "whole numbers of at least 1"),
        (["--model", "MODEL", "--steps", "0"], "whole numbers of at least 1"),
        (["--model", "MODEL", "--features", "judge:nowhere"], "nowhere"),
        (["--model", "MODEL", "--features", "oracle:nowhere"], "oracle"),
        (["--model", "MODEL", "--features", "inception:nowhere"], "nowhere"),
        (["--model", "MODEL", "--clip", "nowhere"], "nowhere"),
        (["--model", "MODEL", "--per-digit", "0"], "at least 1"),
        (["--model", "MODEL", "--per-digit", "6"], "more than 64 samples, got 60"),
        (["--model", "MODEL", "--sampler", "ddpm"], "RectifiedFlow is continuous"),
        (["--model", "MODEL", "--sampler", "edm"], "use karras"),
        (["--model", "MODEL", "--skip-layers", "7"], "skip_layers must be blocks"),
        (["--model", "MODEL", "--text-cache", "cache"], "has no encoders of Stable Diffusion 3"),
        (["--model", "MODEL", "--device", "abacus"], "no device abacus"),
        (["--model", "MODEL", "--model", "OTHER"], "8×8"),
        (["--model", "MODEL", "--model", "MODEL"], "given twice"),
    ],
)
def test_bad_input_ends_in_one_line(
    pipe: Pipeline, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str
) -> None:
    other = tmp_path / "other"
    if "OTHER" in argv:
        pipe.save(other)
        config = json.loads((other / "transformer/config.json").read_text())
        (other / "checksums.json").unlink()
        (other / "transformer/config.json").write_text(json.dumps(config | {"sample_size": 12}))
    places = {"MODEL": str(model), "OTHER": str(other)}
    with pytest.raises(SystemExit) as end:
        evaluate.main([*JUDGE, *(places.get(arg, arg) for arg in argv), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_larger_pictures_are_averaged_to_digits(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save(tmp_path / "model")
    config = json.loads((tmp_path / "model/transformer/config.json").read_text())
    (tmp_path / "model/checksums.json").unlink()
    (tmp_path / "model/transformer/config.json").write_text(json.dumps(config | {"sample_size": 16}))
    large = Pipeline.load(tmp_path / "model")
    sampling = replace(pipe.sampling, steps=1)
    examined = Digits.held_out(10)
    drawn = draw(Setting("m", "m", large, sampling), examined, first_seed=3, batch_size=10).pictures
    whole = large(examined.prompts, range(3, 13), sampling=sampling)
    assert whole.shape == (10, 1, 16, 16)
    expected = whole.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    torch.testing.assert_close(drawn, expected, atol=0.51 / 255, rtol=0)


def test_a_chain_has_only_so_many_steps_and_its_own_samplers(pipe: Pipeline) -> None:
    from flow.path import DDPMLinear
    from flow.target import Epsilon

    chain = Pipeline(pipe.network, Objective(DDPMLinear(), Epsilon()), pipe.codec, pipe.text, Sampling())
    for flags, message in ((["--steps", "1001"], "at most the 1000"), (["--spacing", "karras"], "continuous path")):
        args = evaluate.parser().parse_args(["--model", "m", *flags])
        with pytest.raises(ValueError, match=message):
            evaluate.settings_of(args, {"m": chain})


def test_measures_shapes(drawer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    features = ["--features", f"shapes:{ROOT / 'assets/shapes/judge'}"]
    argv = ["--data", "shapes", "--model", str(drawer), "--steps", "1", "--samples", "70", *features]
    evaluate.main([*argv, "--out", str(tmp_path)])
    (row,) = rows(tmp_path)
    assert row["samples"] == 70
    assert row["accuracy"] < 0.1  # its weights are random
    assert row["distance_ratio"] > 3
    assert row["pairwise_distance"] > 0
    assert row["inception_score"] is None
    record = json.loads((tmp_path / "results.json").read_text())
    assert (record["settings"]["data"], record["settings"]["scenes"]) == ("shapes", 1000)
    assert 1 < record["floor"] < row["distance_ratio"]
    assert "FD ratio of real training scenes, 70 of them" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheet.png").size[1] > 2 * 64  # two rows of five, as large as they are


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "DIGITS"], "draws pictures of 1 × 8 × 8 numbers, but the shapes have 3 × 64 × 64"),
        (["--model", "SHAPES", "--per-digit", "10"], "--per-digit counts digits; with --data shapes give --samples"),
        (["--model", "SHAPES", "--samples", "64"], "more than 64 samples, got 64"),
        (["--model", "SHAPES", "--samples", "70", "--per-digit", "7"], "not allowed with"),
        (["--model", "SHAPES", *JUDGE], "judge needs pictures of (1, 8, 8), got (3, 64, 64)"),
        (["--model", "DIGITS", "--data", "digits", "--samples", "75"], "take a multiple of 10"),
        (["--model", "DIGITS", "--data", "letters"], "letters"),
    ],
)
def test_bad_input_of_shapes_ends_in_one_line(
    drawer: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str
) -> None:
    places = {"DIGITS": str(model), "SHAPES": str(drawer)}
    features = [] if "--features" in argv else ["--features", f"shapes:{ROOT / 'assets/shapes/judge'}"]
    given = [places.get(arg, arg) for arg in argv]
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--data", "shapes", *features, *given, "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_samples_and_per_digit_are_two_ways_to_say_the_same() -> None:
    both = [
        evaluate.parser().parse_args(["--model", "m", *flags]) for flags in (["--samples", "70"], ["--per-digit", "7"])
    ]
    a, b = (evaluate.examined_of(args) for args in both)
    assert a.prompts == b.prompts
    assert len(a.prompts) == 70
    assert len(evaluate.examined_of(evaluate.parser().parse_args(["--model", "m"])).prompts) == 1000
