"""Learning rates: the formulas, timm's as the measure, and runs that are made longer."""

import math
import signal
from pathlib import Path

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from trials import Change, assert_same, end, fit, lines, refused, send_at, small, start, state

from training.optimization import Optimization
from training.schedule import Constant, Cosine, Schedule, WarmupStableDecay


def test_the_cosine_is_timm_s_to_the_bit() -> None:
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3) for _ in range(2)]
    rates = Optimization(lr=2e-3, warmup=7).rates(optimizers[0], 100)
    theirs = CosineLRScheduler(optimizers[1], 93, warmup_t=7, warmup_prefix=True, t_in_epochs=False)
    for k in (0, 1, 3, 6, 7, 8, 50, 99, 100):
        rates.set(k)
        theirs.step_update(k)
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"], k


@pytest.mark.parametrize(
    ("schedule", "shares"),  # at 0, 40, 80, 90 and 100 of 100 steps
    [
        (Constant(), [1, 1, 1, 1, 1]),
        (Cosine(0.1), [1, 0.1 + 0.45 * (1 + math.cos(0.4 * math.pi)), 0.1 + 0.45 * (1 + math.cos(0.8 * math.pi)),
                       0.1 + 0.45 * (1 + math.cos(0.9 * math.pi)), 0.1]),
        (WarmupStableDecay(0.2), [1, 1, 1, 0.5, 0]),
        (WarmupStableDecay(0.2, "sqrt"), [1, 1, 1, 1 - math.sqrt(0.5), 0]),
        (WarmupStableDecay(1.0), [1, 0.6, 0.2, 0.1, 0]),
    ],
)  # fmt: skip
def test_shares_of_the_peak(schedule: Schedule, shares: list[float]) -> None:
    assert [schedule(k, 100) for k in (0, 40, 80, 90, 100)] == pytest.approx(shares)
    optimization = Optimization(lr=0.5, warmup=10, schedule=schedule)
    assert [optimization.rate(0.5, k, 110) for k in (0, 5, 10, 90)] == pytest.approx(
        [0, 0.25, 0.5 * shares[0], 0.5 * shares[2]]
    )


@pytest.mark.parametrize(
    ("schedule", "done", "allowed"),
    [(Constant(), 50, True), (None, 50, False), (None, 10, True), (WarmupStableDecay(0.2), 80, True),
     (WarmupStableDecay(0.2), 90, False)],
)  # fmt: skip
def test_a_run_may_last_longer_if_the_steps_done_had_the_same_rates(
    schedule: Schedule | None, done: int, allowed: bool
) -> None:
    assert Optimization(warmup=10, schedule=schedule).same_rates(done, 100, 200) is allowed


@pytest.mark.parametrize("kind", ["Constant", "WarmupStableDecay"])
def test_a_longer_run_is_the_straight_one(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    """Here the cool-down of six steps would begin after four of them, that of twelve after ten."""
    config = small(tmp_path)
    flags = ["--optimization.schedule", kind, "--run.log_every", "1", "--run.validate_every", "2"]
    flags += ["--run.checkpoint_every", "1"]
    if kind != "Constant":
        flags += ["--optimization.schedule.decay", "0.2"]
    longer = ["--run.steps", "12"]
    fit(config, *flags, *longer, "--run.folder", str(tmp_path / "straight"))
    if kind == "Constant":
        fit(config, *flags)
    else:
        stopped_at(5, config, *flags)
    capsys.readouterr()
    fit(config, *flags, *longer)
    assert "warning: the run resumes, but run.steps is 6 there and 12 now" in capsys.readouterr().err
    assert_same(state(tmp_path / "run")["tensors"], state(tmp_path / "straight")["tensors"])
    rates = {line["step"]: line["train/lr"] for line in lines(tmp_path / "run") if "train/lr" in line}
    validated = [line["step"] for line in lines(tmp_path / "run") if "val/loss" in line]
    assert validated == [2, 4, 6, 8, 10, 12]  # once each: also that of the step from which the run went on
    assert rates == {line["step"]: line["train/lr"] for line in lines(tmp_path / "straight") if "train/lr" in line}
    fit(config, *flags, *longer)  # the folder's config has the new length
    assert "run.steps is 12 there and 6 now" in refused(capsys, config, *flags)


def stopped_at(step: int, config: Path, *flags: str) -> None:
    process = start(config, *flags, change=Change(send_at, (signal.SIGTERM, step - 1)))
    assert end(process) == 128 + signal.SIGTERM


def test_a_cosine_cannot_be_made_longer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = small(tmp_path)
    fit(config)
    assert "run.steps is 6 there and 12 now" in refused(capsys, config, "--run.steps", "12")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimization.schedule", "Cosine", "--optimization.schedule.floor", "2"], "floor must be from 0 to 1"),
        (["--optimization.schedule", "WarmupStableDecay", "--optimization.schedule.decay", "0"], "above 0 and at most"),
        (["--optimization.schedule", "Square"], "Square"),
        (["--optimization.warmup", "6"], "warmup must be below run.steps 6"),
    ],
)
def test_bad_schedules_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert message in refused(capsys, small(tmp_path), *flags)
    assert not (tmp_path / "run").exists()
