"""What docs/fewstep.md makes of results, here invented ones: claims, tables, the text and the pictures."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

import compare
from data.shapes import CATEGORIES
from metrics.significance import Sample
from pipeline import Pipeline
from studies import fewstep
from studies.results import Result
from studies.steps import Steps

ROOT = Path(__file__).parents[1]
DIGITS = {"teacher": 8.0, "ddim": 9.0, "2-rectified": 1.0, "distilled": 1.02, "meanflow": 1.2, "matched": 1.05}
FD = DIGITS | {"guided": 1.04}


def row(folder: Path, steps: int, seed: int = 1, **keys: float) -> Result:
    """Invented numbers: the FD ratio is that above over the steps, and a tenth more with each seed."""
    fd = FD.get(folder.name, 1.0) / steps + 0.1 * (seed - 1)
    rest = {"distance_ratio": fd, "accuracy": 0.99, "recall": 0.9, "pairwise_distance": 5.0, "path_length": 3.0,
            "straightness": 0.02 if folder.name == "2-rectified" else 1.0, "evaluations": steps}  # fmt: skip
    return {"model": folder.name, "folder": str(folder), "steps": steps, **rest, **keys}


@pytest.fixture
def study() -> Steps:
    read = compare.read(ROOT / "configs/studies/fewstep.yaml")
    assert isinstance(read, Steps)
    return read


@pytest.fixture
def out(study: Steps, pipe: Pipeline, tmp_path: Path) -> Path:
    """The folder of a study with a result for each of its measurements."""
    out = tmp_path / "out"

    def write(name: str, rows: list[Result]) -> None:
        folder = study.folder(name, out)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"rows": rows, "floor": 0.66}))
        Image.new("RGB", (8, 8)).save(folder / "sheet.png")

    for seed in study.seeds:
        digits = out / f"digits/{seed}"
        models = [digits / name for name in DIGITS]
        write(f"digits/{seed}/measured", [row(model, n, seed) for model in models for n in (1, 2, 4, 8)])
        write(f"digits/{seed}/straightness", [row(digits / name, 50, seed) for name in ("teacher", "2-rectified")])
        guided = [row(digits / "teacher", 8, evaluations=16), row(digits / "guided", 8)]
        write(f"digits/{seed}/guidance", guided)
    for name in ("teacher", "2-rectified"):
        pipe.save(out / "digits/1" / name / "model")
    found = [{"steps": 2, "distance": {"uniform": 0.5, "searched": 0.25}, "spacing": "given:times=1/0.4"}]
    study.folder("digits/1/grid", out).mkdir()
    (study.folder("digits/1/grid", out) / "grid.json").write_text(json.dumps({"found": found}))
    teacher, two, one = Path("runs/shapes"), out / "shapes/2-rectified", out / "shapes/matched-1"
    write("shapes/measured-20", [row(teacher, n) for n in (1, 2, 4, 8, 20)])
    write("shapes/measured", [row(model, n) for model in (two, one) for n in (1, 2, 4)])
    scores = dict.fromkeys(CATEGORIES, 0.95)
    write("shapes/judged-20", [row(teacher, 20) | scores])
    write("shapes/judged", [row(model, n) | scores for model in (two, one) for n in (1, 2)])
    return out


def test_claims_compare_seed_by_seed() -> None:
    def of(recipe: str, steps: int, seed: int, **keys: float) -> Result:
        return row(Path(recipe), steps, seed, **keys) | {"recipe": recipe, "seed": seed}

    rows = [of(name, n, seed) for seed in (1, 2) for name in FD for n in (1, 2, 8, 50)]
    guided = [of("teacher", 8, 1, evaluations=16.0), of("guided", 8, 1, distance_ratio=1.06)]
    found = {claim.text.partition(",")[0]: claim for claim in fewstep.claims(rows, rows, guided)}
    straight = found["straightness S of the 2-rectified model over the teacher's"]
    assert (straight.found, straight.holds) == (Sample.of([0.02, 0.02]), True)
    assert found["one Euler step"].found == Sample.of([0.99, 0.99])
    learned = found["guidance distillation over the guided teacher"]
    assert learned.text.endswith("8 steps, at 0.5 of its evaluations: FD")
    assert (learned.low, learned.high, learned.holds) == (0.95, 1.05, False)
    assert found["recall of one step"].found == Sample.of([1.0, 1.0])


def test_the_document_holds_every_number_and_its_pictures(study: Steps, out: Path, tmp_path: Path) -> None:
    file = fewstep.write(study, out, tmp_path / "docs", "python compare.py x")
    text = file.read_text()
    assert {f.name for f in file.parent.iterdir()} == {
        "fewstep.md", "fewstep.png", "fewstep-trajectories.png", "fewstep-digits.png", "fewstep-shapes.png",
    }  # fmt: skip
    assert "`python compare.py x`, 3 seeds" in text
    assert "| teacher | 8.10 ± 0.10 | 4.10 ± 0.10 | 2.10 ± 0.10 | 1.10 ± 0.10 |" in text
    assert "≤ 0.0500 | 0.0200 ± 0.0000 | [0.0200, 0.0200] | 1.000 | undecided |" in text  # corrected, p is 8 / 4
    assert "| one Euler step, 2-rectified: FD ratio | ≤ 1.03 | 1.10 ± 0.10 | [0.85, 1.35] | 1.000 | undecided |" in text
    assert text.count("| real digits | 0.66 | 0.66 | 0.66 | 0.66 |") == 1
    assert "| real digits | – | – | 0.66 |" in text
    assert "| real scenes | – | 0.66 |" in text
    assert "| 2 | 0.5000 | 0.2500 | 1/0.4 |" in text
    assert "| teacher, 20 steps | 20 | 0.05 | 99.0% | 0.90 | 5.0 | 1.00 |" in text
    assert "| matched-1, 1 step |" + " 95% |" * len(CATEGORIES) in text
    assert not re.search(r"\{[A-Z]+\}", text)
    assert Image.open(file.with_name("fewstep-trajectories.png")).size[0] > 600


def test_a_missing_result_is_named(study: Steps, out: Path, tmp_path: Path) -> None:
    (out / "shapes/judged/results.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*shapes/judged/results.json"):
        fewstep.write(study, out, tmp_path / "docs", "x")
    assert not (tmp_path / "docs").exists()


def test_the_committed_document_is_of_the_committed_text() -> None:
    document = (ROOT / "docs/fewstep.md").read_text()
    text = fewstep.TEMPLATE.read_text().replace("{COMMAND}", "python compare.py configs/studies/fewstep.yaml")
    for part in re.split(r"\{[A-Z]+\}", text):
        assert part in document
