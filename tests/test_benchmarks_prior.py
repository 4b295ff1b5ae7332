"""The benchmark of a prior: what its columns mean, and its table."""

from pathlib import Path

import pytest
import torch
from dits import weighted_by_name
from image_towers import SIZE, written

from benchmarks import prior as benchmark
from data.clip import CLIPImage
from data.text.clip import CLIPText
from flow.objective import Objective
from flow.path import Cosine
from flow.target import X0
from mmdit.prior import Prior
from pipeline import Pipeline
from pipeline.sampling import Sampling

ROOT = Path(__file__).parents[1]


def test_the_columns_are_own_cosine_that_of_the_next_and_the_share_of_nearest() -> None:
    real = torch.eye(4)
    assert benchmark.measured(real, real) == (1.0, 0.0, 1.0)
    assert benchmark.measured(real.roll(-1, 0), real) == (0.0, 1.0, 0.0)
    found = torch.tensor([[0.8, 0.6, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 0.6, 0.8], [0, 0, 0, 1.0]])
    assert benchmark.measured(found, real) == pytest.approx(((0.8 + 0.6 + 0.6 + 1) / 4, (0.6 + 0.8) / 4, 0.5))


def test_mean_and_deviation_are_those_over_the_trainings() -> None:
    assert benchmark.averaged([(0.5, 0.1, 0.25), (0.7, 0.1, 0.75)]) == "0.600 ± 0.141 | 0.100 ± 0.000 | 50.0% ± 35.4%"


def test_it_prints_a_row_for_each_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(benchmark, "TRAINED", 300)
    monkeypatch.setattr(benchmark, "STEPS", 3)
    codec, text = CLIPImage(written(tmp_path / "tower")), CLIPText(ROOT / "assets/shapes/text")
    for name in ("a", "b"):
        sizes = {"in_channels": SIZE, "depth": 1, "width": 16, "heads": 1, "text_dim": 160, "pooled_dim": 128}
        network = weighted_by_name(Prior(**sizes))
        assert isinstance(network, Prior)
        Pipeline(network, Objective(Cosine(), X0()), codec, text, Sampling(2, 1.0)).save(tmp_path / name)
    benchmark.main(["--runs", str(tmp_path / "a"), str(tmp_path / "b"), "--count", "20"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 1 + 2 + 2 * len(benchmark.GUIDANCE)
    assert all("± 0.000" in row for row in rows if "prior" in row)  # both are the same
    assert sum("best of two gains" in line for line in lines) == len(benchmark.GUIDANCE)
