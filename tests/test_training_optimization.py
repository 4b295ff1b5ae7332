"""The optimizer: which weights decay, and how large a gradient it takes."""

from pathlib import Path

import pytest
import torch
from networks import plain, stirred
from trials import fit, lines, small, under

from training.optimization import Optimization


def test_matrices_alone_decay_by_lr_times_weight_decay() -> None:
    network = stirred(plain()).train()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = Optimization(lr=0.1, weight_decay=0.2).optimizer(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        kept = 1 - 0.1 * 0.2 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name], msg=name)


def test_the_whole_gradient_has_at_most_the_norm_of_clip(tmp_path: Path) -> None:
    """After one step Adam's first moment is a tenth of the gradient, as β₁ is 0.9."""
    flags = {"run.steps": 1, "run.validate_every": 1, "run.checkpoint_every": 1, "run.log_every": 1,
             "optimization.warmup": 0, "optimization.clip": 0.01}  # fmt: skip
    fit(small(tmp_path), *(part for name, value in flags.items() for part in (f"--{name}", str(value))))
    moments = under(tmp_path / "run", "optimizer.")
    norm = torch.cat([x.flatten() for name, x in moments.items() if name.endswith(".exp_avg")]).norm().item()
    logged = next(line["train/grad_norm"] for line in lines(tmp_path / "run") if "train/grad_norm" in line)
    assert logged > 0.01  # of the gradient before it is clipped
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-4)
