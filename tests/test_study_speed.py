"""What docs/speed.md makes of results, here invented ones: what a change is worth in steps of the baseline."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

import compare
from studies import speed
from studies.recipes import Recipes

ROOT = Path(__file__).parents[1]
CURVE = {100: 4.0, 200: 2.0, 400: 1.5}


@pytest.mark.parametrize(
    ("distance", "steps"),
    [(4.0, 100), (2.0, 200), (2.0 * math.sqrt(2), 100 * math.sqrt(2)), (1.5, 400), (5.0, 0), (1.4, math.inf)],
)
def test_a_distance_is_worth_the_steps_after_which_the_baseline_has_it(distance: float, steps: float) -> None:
    assert speed.worth(CURVE, distance) == pytest.approx(steps)


def test_beyond_the_baselines_lengths_only_the_limit_is_told() -> None:
    assert speed.times(300, CURVE, 0.01) == "3.00 ×"
    assert speed.times(0, CURVE, 0.01) == "< 1.00 ×"
    assert speed.times(math.inf, CURVE, 0.01) == "> 4.00 ×"


def test_the_document_is_written_from_the_results(tmp_path: Path) -> None:
    """Recipe muon has the baseline's distance of twice the steps, in steps that take half as long again."""
    study = compare.read(ROOT / "configs/studies/speed.yaml")
    assert isinstance(study, Recipes)
    study.check()
    out, docs = tmp_path / "out", tmp_path / "docs"
    docs.mkdir()
    fd = {"baseline": 2.0, "baseline-half": 4.0, "baseline-twice": 1.0, "baseline-fourfold": 0.8, "muon": 1.0}
    for (name, rate), step in study.tuning_steps(out).items():
        step.folder.mkdir(parents=True)
        step.note.write_text(json.dumps(step.command))
        rows = [{"distance": abs(rate - 4e-3) + (name == "muon")}]
        (step.folder / "results.json").write_text(json.dumps({"rows": rows}))
    plan = study.plan(out)
    for (name, seed), step in plan.trained.items():
        step.folder.mkdir(parents=True)
        seconds = 0.3 if name == "muon" else 0.2
        times = [9.0, seconds + 0.01 * seed, seconds + 0.1 * (seed != 2)]  # the least is that of seed 2
        lines = [json.dumps({"step": i, "perf/step_s": t}) for i, t in enumerate(times)]
        (step.folder / "log.jsonl").write_text("\n".join([*lines, json.dumps({"val/loss": 1.0})]))
    for (name, seed, _), step in plan.measured.items():
        step.folder.mkdir(parents=True)
        row = {"distance_ratio": fd.get(name, 2.2) + 0.01 * (seed - 2), "accuracy": 0.9, "samples": 500, "guidance": 1}
        rows = [row | {"steps": n} for n in (4, 8, 50)]
        settings = {"features": "F", "torch": "T", "machine": "M", "threads": 1}
        (step.folder / "results.json").write_text(json.dumps({"rows": rows, "floor": 0.66, "settings": settings}))
    text = speed.write(study, out, docs, "python compare.py STUDY").read_text()
    assert "{" not in text
    assert (
        "| muon | 500 | 0.004 | 1.00 ± 0.01 | 1.00 ± 0.01 | 1.00 ± 0.01 | 90.0% ± 0.0% | 1.50 | 2.00 × | 1.33 × |"
        in text
    )
    assert "| layersync | 500 | 0.004 | 2.20 ± 0.01" in text
    assert "| 0.91 × | 0.91 × |" in text  # 500 · 2 / 2.2 steps, since the FD halves where the steps double
    assert "| baseline-fourfold | 2,000 |" in text
    verdicts = {
        line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines() if ": FD over" in line
    }
    assert verdicts["muon: FD over the baseline's"] == "yes"
    assert verdicts["layersync: FD over the baseline's"] == "no"
    with Image.open(docs / "speed.png") as picture:
        assert picture.size[0] > 1000
