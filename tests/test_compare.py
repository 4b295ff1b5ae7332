"""compare.py and what it makes of results: ranks, claims, the document, and a real study in miniature."""

import json
import os
from pathlib import Path

import pytest
import yaml
from PIL import Image

import compare
from metrics import study
from metrics.ranking import pareto_ranks

ROOT = Path(__file__).parents[1]


def test_pareto_fronts_by_hand() -> None:
    points = [(1, 4), (2, 2), (4, 1), (2, 5), (3, 3), (5, 5)]
    assert pareto_ranks(points) == [1, 1, 1, 2, 2, 3]
    assert pareto_ranks([(1, 1), (1, 1), (1, 2)]) == [1, 1, 2]  # equals do not dominate each other
    assert pareto_ranks([]) == []


def result(recipe: str, seed: int, steps: int, ratio: float, sampler: str = "euler", spacing: str = "trailing") -> dict:
    rest = dict.fromkeys(study.REST, 0.5)
    return rest | {
        "recipe": recipe, "seed": seed, "steps": steps, "evaluations": float(steps), "sampler": sampler,
        "spacing": spacing, "distance": 3 * ratio, "distance_ratio": ratio, "accuracy": 1 - ratio / 100,
        "samples": 1000, "guidance": 1.0,
    }  # fmt: skip


@pytest.fixture
def results() -> list[dict]:
    found = []
    for seed, more in ((1, 0.0), (2, 0.2)):
        for steps, fine in ((4, 2.0), (5, 1.5), (50, 1.0)):
            for recipe, factor in (("rf-lognorm", 1.0), ("rf-uniform", 1.5), ("eps-linear", 8.0), ("edm", 1.2)):
                found.append(result(recipe, seed, steps, factor * fine + more))
            found.append(result("eps-linear", seed, steps, 3 * fine + more, spacing="leading"))
        found.append(result("edm", seed, 5, 0.5 + more, "dpmpp_2m"))
        found.append(result("eps-linear", seed, 1000, 1.1, "ddpm"))
    return found


def test_the_shared_sampler_is_euler_on_each_recipe_s_own_spacing(results: list[dict]) -> None:
    plain = study.first_order(results)
    assert {r["spacing"] for r in plain} == {"trailing"}
    assert len(plain) == 2 * 3 * 4


def test_best_within_takes_the_best_mean_that_is_cheap_enough(results: list[dict]) -> None:
    assert study.best_within(results, "edm", 4) == (pytest.approx(2.5), [2.4, 2.6], "euler, trailing, 4 steps")
    found = study.best_within(results, "edm", 50)
    assert found is not None
    assert found[1:] == ([0.5, 0.7], "dpmpp_2m, trailing, 5 steps")
    assert study.best_within(results, "edm", 3) is None


def test_claims_are_ratios_of_means_over_seeds(results: list[dict]) -> None:
    longer = [
        result("eps-linear", 1, 1000, 1.0, "ddpm") | {"budget": 9000},
        result("rf-lognorm", 1, 50, 0.5) | {"budget": 9000},
    ]
    found = {claim.text.partition(":")[0]: claim for claim in study.claims(results, longer, ["eps-linear"], [])}
    four = found["4 evaluations"]
    assert (list(four.above), list(four.below)) == ([2.0, 2.2], [6.0, 6.2])  # the better spacing of DDIM
    assert four.row()[2:] == ["0.34 (2.10 ± 0.14 against 6.10 ± 0.14)", "**no**, but not for every pair of seeds"]
    fifty = found["50 evaluations"]
    assert "edm: dpmpp_2m, trailing, 5 steps" in fifty.text
    assert fifty.row()[3] == "**no**"
    (ancestral,) = (claim for text, claim in found.items() if text.startswith("DDPM's own sampler"))
    assert ancestral.row()[2:] == ["1.00 (1.10 ± 0.00 against 1.10 ± 0.14)", "yes"]
    (later,) = (claim for text, claim in found.items() if "9,000" in text)
    assert later.row()[2:] == ["2.00 (1.00 against 0.50)", "**no**"]
    assert found["5 steps"].row()[3] == "yes"


def test_ranks_average_over_steps_and_seeds(results: list[dict]) -> None:
    ranks = study.average_ranks(study.first_order(results), [4, 5, 50])
    assert ranks == {"rf-lognorm": 1.0, "edm": 2.0, "rf-uniform": 3.0, "eps-linear": 4.0}


def test_the_document_holds_every_number_and_the_plot_is_a_picture(results: list[dict], tmp_path: Path) -> None:
    tuned = {"edm": {0.001: 3.0, 0.002: 2.5}}
    facts = dict.fromkeys(["rf-lognorm", "rf-uniform", "eps-linear", "edm"], ("1,234", "0.002"))
    settings = {
        "per_digit": 100,
        "real_distance": 2.9,
        "floor": 0.66,
        "features": "judge",
        "torch": "2",
        "machine": "m",
    }
    text = study.document(results, [], tuned, facts, "python compare.py x", settings | {"threads": 1})
    assert "`python compare.py x`" in text
    assert "| edm | 2.50 ± 0.14 | 1.90 ± 0.14 | 1.30 ± 0.14 |" in text
    assert "| edm | 3.00 | **2.50** |" in text
    assert all(line.count("|") == text.splitlines()[i - 1].count("|") for i, line in enumerate(text.splitlines())
               if line.startswith("|") and text.splitlines()[i - 1].startswith("|"))  # fmt: skip
    study.curves(study.first_order(results), 0.66, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 600


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


def test_a_study_trains_measures_writes_and_goes_on(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
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
    lost = tmp_path / "out/eps-linear/evaluation-0/results.json"
    others = {f: os.stat(f).st_mtime_ns for f in (tmp_path / "out").rglob("*.safetensors")}
    before = json.loads(lost.read_text())["rows"]
    lost.with_name("sheet.png").unlink()
    (tmp_path / "docs/compare.md").unlink()
    compare.main(argv)  # does again only what is missing, with the same result
    assert (tmp_path / "docs/compare.md").read_text() == text
    after = json.loads(lost.read_text())["rows"]
    assert [r["distance"] for r in after] == [r["distance"] for r in before]
    assert others == {f: os.stat(f).st_mtime_ns for f in (tmp_path / "out").rglob("*.safetensors")}
    file.write_text(file.read_text().replace("run.steps: 4", "run.steps: 5").replace("every: 4", "every: 5"))
    with pytest.raises(SystemExit) as end:  # a result of other settings is not taken for this one's
        compare.main(argv)
    assert end.value.code == 2
    assert "holds the result of another command" in capsys.readouterr().err


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
    assert capsys.readouterr().err == "error: there is no study file nowhere.yaml\n"


def test_the_committed_study_is_sound_and_quick_is_smaller() -> None:
    whole = compare.read(ROOT / "configs/studies/digits.yaml")
    quick = compare.quickened(whole)
    assert quick.recipes.keys() == whole.recipes.keys()
    assert all(len(recipe.learning_rates) <= 1 for recipe in quick.recipes.values())
    assert len(quick.seeds) == 1
    assert quick.flags["run.steps"] < whole.flags["run.steps"] / 5
