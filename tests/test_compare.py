"""compare.py as a user calls it with a study of recipes: a real one in miniature, and what is refused."""

import json
import os
from pathlib import Path

import pytest
import yaml
from commands import Forked

import compare
from studies import runner
from studies.recipes import Recipes

ROOT = Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A study of two recipes, each a few steps long."""
    small = {"depth": 1, "width": 16, "heads": 1}
    base = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    base["network"]["init_args"] |= small
    base["optimization"]["warmup"] = 1
    base["grid"]["prompts"] = []
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    content = {
        "base": str(tmp_path / "base.yaml"),
        "flags": {"run.steps": 4, "run.validate_every": 4},
        "seeds": [1],
        "tuning": {"seed": 0, "learning_rates": [0.001, 0.002], "steps": 1},
        "recipes": {
            "rf-lognorm": {},
            "eps-linear": {"overlays": ["configs/objective/eps-linear.yaml"], "tuned_as": "rf-lognorm"},
        },
        "measurements": [{"steps": [1, 4], "samplers": ["euler"], "per_digit": 7}],
        "budgets": {"seed": 1, "steps": [8], "recipes": {"eps-linear": {"sampler": "ddpm", "steps": 2}}},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "study.yaml"


def test_a_study_trains_measures_writes_and_goes_on(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "Popen", Forked)
    argv = [str(file), "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs"), "--jobs", "2"]
    compare.main(argv)
    text = (tmp_path / "docs/compare.md").read_text()
    assert "| eps-linear |" in text
    assert "after more training" in text
    assert {f.name for f in (tmp_path / "docs").iterdir()} == {"compare.md", "compare.png", "compare-sheet.png"}
    runs = {str(f.parent.parent.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("model_index.json")}
    assert runs == {
        "tuning/rf-lognorm/lr-0.001", "tuning/rf-lognorm/lr-0.002", "rf-lognorm/seed-1", "eps-linear/seed-1",
        "budgets/eps-linear/steps-8",
    }  # fmt: skip
    lost = tmp_path / "out/eps-linear/seed-1-evaluation-0/results.json"
    others = {f: os.stat(f).st_mtime_ns for f in (tmp_path / "out").rglob("*.safetensors")}
    before = json.loads(lost.read_text())["rows"]
    lost.unlink()
    for name in compare.FILES["compare"]:
        (tmp_path / "docs" / name).unlink()
    compare.main(argv)  # does again only what is missing, with the same result
    assert (tmp_path / "docs/compare.md").read_text() == text
    after = json.loads(lost.read_text())["rows"]
    assert [r["distance"] for r in after] == [r["distance"] for r in before]
    assert others == {f: os.stat(f).st_mtime_ns for f in (tmp_path / "out").rglob("*.safetensors")}
    file.write_text(file.read_text().replace("seeds:\n- 1", "seeds:\n- 1\n- 2"))
    kept = {f: os.stat(f).st_mtime_ns for f in (tmp_path / "out").rglob("*results.json")}
    compare.main(argv)  # goes on with another seed: nothing of the first is done again
    assert kept.items() < {f: os.stat(f).st_mtime_ns for f in (tmp_path / "out").rglob("*results.json")}.items()
    assert others.items() < {f: os.stat(f).st_mtime_ns for f in (tmp_path / "out").rglob("*.safetensors")}.items()
    file.write_text(file.read_text().replace("run.steps: 4", "run.steps: 5").replace("every: 4", "every: 5"))
    with pytest.raises(SystemExit) as end:  # a result of other settings is not taken for this one's
        compare.main(argv)
    assert end.value.code == 2
    assert "holds the result of another command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("distances", "chosen"), [((3.0, 2.0, 4.0), 0.002), ((3.0, None, 2.0), 0.004), ((None, 9.0, None), 0.002)]
)
def test_the_rate_with_the_least_distance_is_chosen(
    file: Path, tmp_path: Path, distances: tuple[float | None, ...], chosen: float
) -> None:
    """A training that diverged, or pictures without a distance, are the worst of all."""
    content = yaml.safe_load(file.read_text())
    content["tuning"]["learning_rates"] = [0.001, 0.002, 0.004]
    file.write_text(yaml.safe_dump(content))
    study = compare.read(file)
    assert isinstance(study, Recipes)
    for step, found in zip(study.tuning_steps(tmp_path / "out").values(), distances, strict=True):
        step.folder.mkdir(parents=True)
        step.note.write_text(json.dumps(step.command))
        (step.folder / step.result).write_text(json.dumps({"rows": [{"distance": found}]}))
    assert study.chosen_rates(tmp_path / "out") == {"rf-lognorm": chosen, "eps-linear": chosen}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
        ({"recipes": {"a": {"overlay": []}}}, "overlay"),
        ({"recipes": {"a": {"tuned_as": "b"}}}, "there is no recipe b"),
        ({"recipes": {"a": {"overlays": ["no.yaml"]}}}, "no.yaml"),
        ({"seeds": [0]}, "tuning.seed"),
        ({"seeds": []}, "needs recipes, seeds"),
        ({"measurements": [{"steps": [1], "samplers": ["euler", "rk45"]}]}, "there is no sampler 'rk45'"),
        ({"measurements": [{"steps": [0], "samplers": ["euler"]}]}, "at least 1"),
        ({"measurements": [{"steps": [1], "samplers": ["heun"]}]}, "with euler among"),
        ({"measurements": [{"steps": [1], "samplers": ["euler", "ddpm"]}]}, "recipe rf-lognorm: sampler ddpm"),
        ({"measurements": [{"steps": [1], "samplers": ["euler"], "spacing": "leading"}]}, "needs a discrete path"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"flags": {"run.steps": 4, "run.validate_every": 2}}, "equal run.validate_every"),
    ],
)
def test_bad_studies_end_in_one_line_before_any_work(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, message: str
) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"budgets": {}} | change))
    with pytest.raises(SystemExit) as end:
        compare.main([str(file), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_missing_study_ends_in_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        compare.main(["nowhere.yaml"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no study file nowhere.yaml: ")


def test_the_committed_study_is_sound_and_quick_is_smaller() -> None:
    whole = compare.read(ROOT / "configs/studies/digits.yaml")
    assert isinstance(whole, Recipes)
    whole.check()
    quick = whole.quick()
    assert quick.recipes.keys() == whole.recipes.keys()
    assert all(len(recipe.learning_rates) <= 1 for recipe in quick.recipes.values())
    assert len(quick.seeds) == 1
    assert quick.flags["run.steps"] < whole.flags["run.steps"] / 5
