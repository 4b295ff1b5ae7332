"""The guard against losses that are not finite, and against spikes."""

import math

import pytest
import torch

from engine.guard import MEMORY, SPIKE, Guard, spread_nonfinite


def test_the_guard_counts_streaks_and_spikes() -> None:
    guard, usual = Guard(), 0.0
    row = longest = total = spikes = 0
    norms = [1.0, 2.0, math.nan, math.inf, 1.5, 100.0, 1.0, -math.inf, math.nan, math.nan, 50.0, 0.5]
    for norm in norms:
        bad = guard.check(torch.tensor(norm))
        assert bad == (0.0 if math.isfinite(norm) else 1.0)
        row, total = (0, total) if math.isfinite(norm) else (row + 1, total + 1)
        longest = max(longest, row)
        if math.isfinite(norm):
            spikes += usual > 0 and norm > SPIKE * usual
            usual = MEMORY * usual + (1 - MEMORY) * norm if usual else norm
        assert guard.usual.item() == pytest.approx(usual, rel=1e-5)
        assert guard.counts.tolist() == [row, longest, total, spikes]
    assert guard.skipped_steps() == (longest, total) == (3, 5)  # a streak that is over is told, too
    assert guard.skipped_steps() == (0, 5)
    assert guard.spikes() == spikes == 2
    assert guard.spikes() == 0
    for _ in range(4):
        guard.check(torch.tensor(math.nan))
    guard.reset(4)
    assert guard.skipped_steps() == (4, 9)
    guard.reset(3)
    assert guard.skipped_steps() == (0, 9)


def test_the_guard_does_not_synchronize_with_the_device() -> None:
    """On one that holds no numbers, whoever asks for a number fails."""
    guard = Guard().to("meta")
    assert guard.check(torch.ones((), device="meta")).is_meta
    with pytest.raises(RuntimeError):
        guard.skipped_steps()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_nonfinite_loss_makes_all_gradients_nonfinite(value: float) -> None:
    weights = torch.tensor([1.0, 2.0], requires_grad=True)
    spread_nonfinite(weights[0] * 3 + value).backward()  # whose own gradient would be 3 and 0
    assert weights.grad is not None
    assert weights.grad[0].isnan()


@pytest.mark.parametrize("value", [0.0, 1.3, 1e30, -1e-30])
def test_a_finite_loss_keeps_its_value_and_gradient(value: float) -> None:
    weights = torch.tensor([value], requires_grad=True)
    loss = (weights * 3).sum()
    spread_nonfinite(loss).backward()
    assert torch.equal(spread_nonfinite(loss), loss)
    assert torch.equal(weights.grad, torch.tensor([3.0]))
