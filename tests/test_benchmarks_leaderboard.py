"""The plain loops of the leaderboard: their times and velocities, and that they learn."""

from pathlib import Path

import pytest
import torch

from benchmarks import leaderboard
from benchmarks.leaderboard import DiTLoop, Jury, Loop, Quality, SD3Loop, passing, worth
from data.examined import Digits
from mmdit import checkpoint
from mmdit.model import Condition


@pytest.mark.parametrize("kind", [SD3Loop, DiTLoop])
def test_a_loop_learns_and_draws(kind: type[Loop], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard, "GUIDANCE", (1.3,))
    loop, asked = kind(4e-3, seed=1), Digits(7)
    before = loop.draw(asked)
    found = list(passing(loop, [3, 60], Jury(7)))
    assert [row.steps for row in found] == [3, 60]
    assert 0 < found[0].seconds < found[1].seconds
    assert found[1].quality.fd < found[0].quality.fd
    assert found[1].guidance == 1.3
    pictures = loop.draw(asked)
    assert pictures.shape == (70, 1, 8, 8)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert not torch.equal(pictures, before)
    other = Digits(7)
    other.prompts, other.labels = asked.prompts[::-1], asked.labels.flip(0)
    assert torch.equal(loop.draw(asked, 0.0), loop.draw(other, 0.0))  # nothing of the prompt is left
    assert not torch.equal(pictures, loop.draw(other))
    assert not torch.equal(pictures, loop.draw(asked, 1.5))


def test_the_network_of_diffusers_gets_times_as_ours_does(tmp_path: Path) -> None:
    loop = SD3Loop(1e-3, seed=0)
    for parameter in loop.network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    loop.network.save_pretrained(tmp_path)  # type: ignore[operator]
    z, t = torch.randn(32, 1, 8, 8), loop.times()
    inputs = loop.training_inputs(torch.arange(32) % 10)
    with torch.no_grad():
        ours = checkpoint.load(tmp_path)(z, t, Condition(*inputs))
        torch.testing.assert_close(loop.velocity(z, t, inputs), ours, atol=1e-4, rtol=1e-4)


def test_times_of_the_script_are_thousandths_and_those_of_plain_flow_are_not() -> None:
    script, plain = (1000 * torch.stack([kind(1e-3, 0).times() for _ in range(20)]) for kind in (SD3Loop, DiTLoop))
    assert (script - script.round()).abs().max() < 1e-3
    assert script.min() >= 1
    assert script.max() <= 1000
    assert (plain - plain.round()).abs().max() > 0.1


@pytest.mark.parametrize(("fd", "accuracy", "good"), [(1.1, 0.98, True), (1.11, 0.99, False), (1.0, 0.979, False)])
def test_quality_needs_both(fd: float, accuracy: float, good: bool) -> None:
    assert Quality(fd, accuracy).good() is good


def test_accuracy_counts_only_until_it_is_enough() -> None:
    ranked = [Quality(2.0, 0.97), Quality(1.0, 0.975), Quality(1.4, 1.0), Quality(1.2, 0.98)]
    assert sorted(set(ranked), key=worth) == ranked
