"""evaluate.py as a user calls it."""

import json
from pathlib import Path

import pytest

import evaluate

ROOT = Path(__file__).parents[1]
JUDGE = ["--judge", str(ROOT / "assets/digits/judge")]


def test_measures_every_model_at_every_step_count(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    argv = ["--model", str(model), "--model", str(model.parent), "--steps", "1,3", "--per-digit", "10", *JUDGE]
    evaluate.main([*argv, "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert [(r["model"], r["steps"]) for r in results] == [(str(m), n) for m in (model, model.parent) for n in (1, 3)]
    assert results[0]["samples"] == 100
    first, second = ({k: v for k, v in r.items() if k != "model"} for r in (results[0], results[2]))
    assert first == second  # the run's folder holds the same model
    assert results[0]["distance_ratio"] != results[1]["distance_ratio"]
    assert all(0 <= r["accuracy"] < 0.5 for r in results)  # its weights are random
    assert {file.name for file in out.glob("*.png")} >= {
        "quality.png",
        "model-0-001-steps.png",
        "model-0-003-steps.png",
    }
    assert capsys.readouterr().out.count("\n") == 2 + 4 + 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "nowhere is no model folder"),
        (["--model", "MODEL", "--steps", "1,zero"], "whole numbers of at least 1"),
        (["--model", "MODEL", "--steps", "0"], "whole numbers of at least 1"),
        (["--model", "MODEL", "--judge", "nowhere"], "nowhere"),
        (["--model", "MODEL", "--per-digit", "0"], "at least 1"),
    ],
)
def test_bad_input_ends_in_one_line(model: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        evaluate.main([*JUDGE, *(str(model) if arg == "MODEL" else arg for arg in argv)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
