"""A teacher's field learned in place of the pair's own velocity."""

import torch
from gaussians import MEAN, STD, average, velocity
from torch import Tensor, nn

from flow.meanflow import MeanFlow
from flow.objective import Interval, Objective


def test_a_teacher_s_field_replaces_the_pair_s_velocity() -> None:
    teacher, student = nn.Linear(3, 3), nn.Linear(3, 3)
    x0, noise = torch.randn(2, 6, 3)
    t, seen = torch.rand(6), []

    def field(z: Tensor, t: Tensor, condition: object, y: Tensor) -> Tensor:
        seen.append((z, t, condition, y))
        return teacher(z)

    def loss(network: nn.Module) -> Tensor:
        return Objective().loss(lambda z, t, condition: network(z), x0, noise, t, "told", field=field)

    assert torch.equal(loss(teacher), torch.zeros(6))
    assert (loss(student) > 1e-3).all()
    z, time, condition, y = seen[0]
    torch.testing.assert_close(z, (1 - t)[:, None] * x0 + t[:, None] * noise)
    assert (torch.equal(time, t), condition) == (True, "told")
    torch.testing.assert_close(y, noise - x0)
    loss(student).mean().backward()
    assert student.weight.grad.abs().max() > 0
    assert teacher.weight.grad is None
    found = student.weight.grad.clone()
    student.zero_grad()
    (student(z) - teacher(z).detach()).square().mean().backward()
    torch.testing.assert_close(found, student.weight.grad)


def test_a_field_s_average_is_learned_over_intervals() -> None:
    """Of the exact field, whose averages are known: their loss is nought but for float32, and the field's is not."""
    x0, noise = MEAN + STD * torch.randn(64, 3), torch.randn(64, 3)
    t = 0.4 + 0.6 * torch.rand(64)
    interval = Interval.between(t * torch.rand(64) * 0.5, t)
    objective = MeanFlow()
    field = lambda z, t, condition, y: velocity(z, t)  # noqa: E731
    assert objective.loss(average, x0, noise, t, None, interval, field).max() < 1e-10
    other = objective.loss(lambda z, t, condition, end: velocity(z, t), x0, noise, t, None, interval, field)
    assert other.mean() > 1e-2
    assert (
        objective.loss(average, x0, noise, t, None, interval).mean() > 1e-2
    )  # a pair's own velocity is only so in mean
