"""Loss terms beside the objective: LayerSync, and how a training adds it."""

from pathlib import Path

import pytest
import torch
import yaml
from trials import ROOT, fit, lines, refused, small

from training.terms import LayerSync

TERM = ["--terms", "[{class_path: LayerSync, init_args: {weak: 0, strong: 1}}]"]


def config(folder: Path, **more: object) -> Path:
    file = small(folder)
    content = yaml.safe_load(file.read_text())
    content["network"]["init_args"]["depth"] = 2
    file.write_text(yaml.safe_dump(content | more))
    return file


def test_it_is_one_minus_the_cosine_and_only_the_early_block_learns() -> None:
    draw = torch.Generator().manual_seed(0)
    weak, strong = (torch.randn(3, 5, 8, generator=draw).requires_grad_() for _ in range(2))
    term = LayerSync(weak=1, strong=2, weight=0.5)
    found = term({1: weak, 2: strong})
    cosine = (weak * strong).sum(-1) / weak.norm(dim=-1) / strong.norm(dim=-1)
    torch.testing.assert_close(found, 0.5 * (1 - cosine.mean(1)))
    found.sum().backward()
    assert weak.grad is not None
    assert weak.grad.abs().sum() > 0
    assert strong.grad is None
    assert term({1: 3 * strong, 2: strong}).abs().max() < 1e-6
    torch.testing.assert_close(term({1: -strong, 2: strong}), torch.ones(3))


@pytest.mark.parametrize(("weak", "strong", "weight"), [(2, 2, 0.2), (3, 1, 0.2), (-1, 2, 0.2), (0, 1, 0.0)])
def test_impossible_terms_are_refused(weak: int, strong: int, weight: float) -> None:
    with pytest.raises(ValueError, match="0 <= weak < strong and weight > 0"):
        LayerSync(weak, strong, weight)


def test_a_training_adds_it_and_logs_it_apart(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "synced").mkdir()
    fit(config(tmp_path / "plain"))
    fit(config(tmp_path / "synced"), *TERM)
    plain, synced = ([line for line in lines(tmp_path / name / "run") if "train/loss" in line]
                     for name in ("plain", "synced"))  # fmt: skip
    assert "train/LayerSync_0" not in plain[0]
    assert 0 < synced[-1]["train/LayerSync_0"] <= 0.4  # at first the blocks are the identity, and agree
    assert plain[-1]["train/grad_norm"] != synced[-1]["train/grad_norm"]
    assert abs(plain[0]["train/loss"] - synced[0]["train/loss"]) < 0.1  # the objective's own, without the term


def test_a_term_of_blocks_that_are_not_there_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    terms = ["--terms", "[{class_path: LayerSync, init_args: {weak: 0, strong: 5}}]"]
    assert "terms read the blocks [0, 5] of an MMDiT, and this network has 2" in refused(
        capsys, config(tmp_path), *terms
    )


def test_the_overlay_is_of_the_digits(tmp_path: Path) -> None:
    file = small(tmp_path)
    content = yaml.safe_load(file.read_text())
    content["network"]["init_args"]["depth"] = 4
    file.write_text(yaml.safe_dump(content))
    fit(file, "--config", str(ROOT / "configs/terms/layersync.yaml"))
    assert any("train/LayerSync_0" in line for line in lines(tmp_path / "run"))
