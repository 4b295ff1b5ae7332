"""The objective: its loss per picture, what it gives the model, and means by time."""

import math

import pytest
import torch
from processes import PAIRS, pair
from torch import Tensor

from flow.density import LogitNormal, Uniform
from flow.objective import Objective, TimeBins
from flow.path import Path, expand_as
from flow.target import Target
from flow.weight import DensityWeight


def exact_model(objective: Objective, x0: Tensor, noise: Tensor):
    """A model that knows the pair, and so predicts the target without error."""

    def model(z: Tensor, t: Tensor, condition: object) -> Tensor:
        p, q = (expand_as(c, x0) for c in objective.target.row(objective.path, t))
        return p * x0 + q * noise

    return model


@pytest.mark.parametrize("both", PAIRS, ids=pair)
def test_loss_is_zero_for_the_target_and_counts_per_image(both: tuple[Path, Target]) -> None:
    path, target = both
    objective = Objective(path, target)
    x0, noise = torch.randn(2, 5, 2, 4, 4)
    t = objective.path.training_time(torch.linspace(0.1, 0.9, 5))
    model = exact_model(objective, x0, noise)
    torch.testing.assert_close(objective.loss(model, x0, noise, t, None), torch.zeros(5), atol=1e-10, rtol=0)
    off = torch.arange(5.0).reshape(5, 1, 1, 1)
    loss = objective.loss(lambda *a: model(*a) + off, x0, noise, t, None)
    torch.testing.assert_close(loss, torch.arange(5.0) ** 2, rtol=1e-5, atol=0)
    for time in t:
        a, b = path(time)
        estimate = objective.denoise(model, a * x0 + b * noise, time, None)
        torch.testing.assert_close((estimate.x0, estimate.noise), (x0, noise), rtol=1e-3, atol=1e-4)
        assert estimate.variance is None


def test_loss_gives_the_model_the_point_on_the_path_and_the_condition() -> None:
    x0, noise = torch.randn(2, 3, 1, 2, 2)
    t = torch.tensor([0.0, 0.25, 1.0])
    seen = []
    Objective().loss(lambda z, t, c: seen.append((z, t, c)) or z, x0, noise, t, "condition")
    z, time, condition = seen[0]
    torch.testing.assert_close(z, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]]))
    assert torch.equal(time, t)
    assert condition == "condition"


def test_loss_is_float32_around_a_bfloat16_network() -> None:
    x0, noise = torch.randn(2, 4, 1, 2, 2, dtype=torch.bfloat16)
    seen = []
    loss = Objective().loss(lambda z, t, c: seen.append((z, t)) or z.bfloat16(), x0, noise, torch.rand(4), None)
    assert (loss.dtype, seen[0][0].dtype, seen[0][1].dtype) == (torch.float32,) * 3
    with pytest.raises(TypeError, match="float32"):
        Objective().loss(lambda z, t, c: z, x0, noise, torch.rand(4, dtype=torch.bfloat16), None)


def test_weighting_by_a_density_equals_drawing_from_it() -> None:
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x0, noise = torch.zeros(2, 4000, 1, dtype=torch.float64)

    def model(z: Tensor, t: Tensor, condition: object) -> Tensor:
        return t[:, None] ** 2  # so that the loss depends on t

    drawn = Objective(density=LogitNormal())
    weighted = Objective(density=Uniform(), weight=DensityWeight(LogitNormal()))
    a, b = (o.loss(model, x0, noise, o.training_time(u, 1), None).mean().item() for o in (drawn, weighted))
    assert a == pytest.approx(b, rel=1e-3)
    unweighted = Objective(density=Uniform()).loss(model, x0, noise, u.float(), None).mean().item()
    assert a != pytest.approx(unweighted, rel=0.05)


def test_time_bins_average_by_t_and_reset() -> None:
    bins = TimeBins(4)
    assert all(map(math.isnan, bins.means()))
    bins.add(torch.tensor([0.0, 0.24, 0.3]), torch.tensor([1.0, 3.0, 5.0]))
    bins.add(torch.tensor([1.0]), torch.tensor([7.0]))
    kept = bins.sums.clone()
    assert kept.tolist() == [[4.0, 5.0, 0.0, 7.0], [2.0, 1.0, 0.0, 1.0]]
    means = bins.means()
    assert means[:2] == [2.0, 5.0]
    assert math.isnan(means[2])
    assert means[3] == 7.0
    assert all(map(math.isnan, bins.means()))
    bins.sums.copy_(kept)  # as a run that goes on
    assert bins.means(lambda sums: 3 * sums)[:2] == [2.0, 5.0]
