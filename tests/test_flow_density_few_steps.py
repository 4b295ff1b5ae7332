"""Densities for few-step students: U-shaped, and the times of a sampler with k steps."""

import pytest
import torch
from torch import Tensor

from flow.density import Steps, UShaped
from flow.grid import trailing
from flow.objective import Objective
from flow.path import Cosine, DDPMLinear, Path, RectifiedFlow
from flow.stepmap import StepMap
from flow.target import V


def uniform(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("a", [0.1, 4.0, 12.0])
def test_u_shaped_is_its_pdf_and_symmetric(a: float) -> None:
    density, u = UShaped(a), uniform(200_000)
    share = torch.histogram(density(u), torch.linspace(0, 1, 41, dtype=torch.float64))[0] / len(u)
    fine = uniform(40 * 200)
    torch.testing.assert_close(share, density.pdf(fine).reshape(40, 200).mean(1) / 40, atol=2e-5, rtol=2e-3)
    torch.testing.assert_close(density(1 - u), 1 - density(u))
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(density.pdf(t), density.pdf(1 - t))
    named = torch.exp(a * t) + torch.exp(a * (1 - t))  # what it is in the paper, but for a factor
    torch.testing.assert_close(density.pdf(t) / named, (density.pdf(t) / named)[0].expand(21))
    assert density(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == pytest.approx([0, 1], abs=1e-12)
    assert density.pdf(t).argmin() == 10


def test_u_shaped_is_uniform_in_the_limit() -> None:
    u = uniform(100)
    torch.testing.assert_close(UShaped(1e-3)(u), u, atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 10])
def test_k_steps_are_drawn_as_the_times_of_a_sampler_equally_often(k: int, alpha: float) -> None:
    u = uniform(60 * k)
    grid = trailing(RectifiedFlow(), k, alpha)[:-1].flip(0)
    times, counts = StepMap(k=k, shift=alpha).training_time(u, 64).unique(return_counts=True)
    torch.testing.assert_close(times, grid.float(), atol=0, rtol=1.2e-7)  # one bit of float32
    assert counts.tolist() == [60] * k
    if alpha == 1:
        assert torch.equal(Steps(k)(u).unique(), torch.arange(1, k + 1, dtype=torch.float64) / k)


def test_steps_end_at_the_noise_and_never_touch_the_data() -> None:
    ends = torch.tensor([0.0, 1 - 1e-12, 1.0], dtype=torch.float64)
    assert Steps(4)(ends).tolist() == [0.25, 1.0, 1.0]


def test_k_steps_have_probability_only_at_their_times() -> None:
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    probability = Steps(5).pdf(t)
    assert probability.sum().item() == pytest.approx(1)
    assert t[probability > 0].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert probability[probability > 0].tolist() == [0.2] * 5


@pytest.mark.parametrize(
    ("make", "bad", "said"),
    [(UShaped, 0.0, "a > 0"), (UShaped, -1.0, "a > 0"), (Steps, 0, "k >= 1"), (Steps, -2, "k >= 1")],
)
def test_impossible_densities_are_refused(make: type, bad: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(bad)


@pytest.mark.parametrize("path", [DDPMLinear(), Cosine()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_on_any_path_a_map_in_k_steps_learns_at_its_sampler_s_times(path: Path, k: int) -> None:
    times = StepMap(path, V(), k=k, shift=2.0).training_time(uniform(60 * k), 64).unique()
    torch.testing.assert_close(times, trailing(path, k, 2.0)[:-1].flip(0).float(), atol=0, rtol=1.2e-7)


def test_k_step_maps_are_validated_at_their_own_times_and_others_at_any() -> None:
    t, of_three = uniform(8).float(), StepMap(k=3, shift=2.0)
    grid = trailing(RectifiedFlow(), 3, 2.0)[:-1]
    torch.testing.assert_close(of_three.validation_time(t, 64).unique(), grid.flip(0).float())
    assert torch.equal(Objective(density=UShaped(), shift=2.0).validation_time(t, 64), t)
