"""Distribution matching: its gradient is that of the KL divergence, and a generator learns a distribution."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from gaussians import MEAN, STD
from torch import Tensor, nn

from flow.density import shift
from flow.grid import trailing
from flow.matching import Matching
from flow.objective import Model, Objective
from flow.path import Cosine, Path, RectifiedFlow, expand_as
from flow.sampler import euler
from flow.stepmap import StepMap
from flow.target import V, Velocity, solve


def exact(objective: Objective, mean: Tensor, std: Tensor) -> Model:
    """The best output for pictures of N(mean, std²), with the gradient of both."""

    def model(z: Tensor, t: Tensor, condition: object = None) -> Tensor:
        a, b, p, q = (expand_as(c, z) for c in (*objective.path(t), *objective.target.row(objective.path, t)))
        slope = std / ((a * std) ** 2 + b**2) * (z - a * mean)
        return p * (mean + a * std * slope) + q * b / std * slope

    return model


class Learner(nn.Linear):
    """A small network of three numbers and the time."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, z: Tensor, t: Tensor, condition: object = None) -> Tensor:
        return super().forward(torch.cat([z.flatten(1), t[:, None]], 1)).view_as(z)


def mirrored(count: int) -> tuple[Tensor, Tensor]:
    """Standard normal pictures and noise of mean 0, exactly: both signs of each occur with both of the other."""
    x, noise = torch.randn(2, count, 2)
    return torch.cat([x, -x, x, -x]), torch.cat([noise, noise, -noise, -noise])


@pytest.mark.parametrize("objective", [Objective(), Objective(Cosine(), V()), Objective(Cosine(), Velocity())])
@pytest.mark.parametrize("at", [0.2, 0.5, 0.9])
def test_the_gradient_is_that_of_the_divergence(objective: Objective, at: float) -> None:
    """KL of N(a·μ, a²σ² + b²) from N(a·m, a²s² + b²): its derivative by μ is a²·(μ − m) / (a²s² + b²)."""
    mean, std = torch.tensor(-0.4), torch.tensor(0.6)
    unit, noise = mirrored(50)
    x = (mean + std * unit).requires_grad_(True)
    t = torch.full((len(x),), at)
    teacher = exact(objective, torch.tensor(MEAN), torch.tensor(STD))
    loss, _ = Matching().losses(objective, x, noise, t, teacher, exact(objective, mean, std))
    loss.sum().backward()
    a, b = objective.path(t)
    z = expand_as(a, x) * x + expand_as(b, x) * noise
    real, _ = solve(objective.path, objective.target, z, teacher(z, t), t)
    size = (x - real).detach().abs().mean(1, keepdim=True)
    found = (a[0] / b[0]) ** 2 * (x.grad * 2 * size).mean()  # two pixels, and the mean over them
    expected = a[0] ** 2 * (mean - MEAN) / ((a[0] * STD) ** 2 + b[0] ** 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_where_critic_and_teacher_agree_there_is_nothing_to_learn() -> None:
    x, noise = torch.randn(2, 6, 3, requires_grad=True)
    model = Learner()
    loss, _ = Matching().losses(Objective(), x, noise.detach(), torch.rand(6), model, model)
    assert torch.equal(loss, torch.zeros(6))


def test_the_critic_s_loss_is_the_objective_s_and_no_loss_teaches_the_other_network() -> None:
    made, critic, teacher = Learner(), Learner(), Learner()
    objective, noise, t = Objective(), torch.randn(6, 3), torch.rand(6)
    x = made(torch.randn(6, 3), t, None)
    student, learned = Matching().losses(objective, x, noise, t, teacher, critic)
    assert torch.equal(learned, objective.loss(critic, x.detach(), noise, t, None))
    networks = (made, critic, teacher)
    for loss, learner in ((student, made), (learned, critic)):
        gradients = [torch.autograd.grad(loss.sum(), list(n.parameters()), retain_graph=True, allow_unused=True)
                     for n in networks]  # fmt: skip
        for network, found in zip(networks, gradients, strict=True):
            learns = [g is not None and bool(g.abs().max() > 0) for g in found]
            assert any(learns) == (network is learner)


def test_times_have_the_teacher_s_shift() -> None:
    u = torch.linspace(0.05, 0.95, 10)
    for alpha in (1.0, 3.0):
        torch.testing.assert_close(Matching().times(u, Objective(shift=alpha), 64), shift(u, alpha))


def test_a_generator_learns_the_teacher_s_distribution() -> None:
    """A generator μ + σ·ε and a critic that knows Gaussians begin elsewhere and end at the teacher's mean and width."""
    own = nn.ParameterList([torch.tensor(-1.0), torch.tensor(1.2)])
    theirs = nn.ParameterList([torch.tensor(-1.0), torch.tensor(1.2)])
    objective, draw = Objective(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([{"params": own, "lr": 0.01}, {"params": theirs, "lr": 0.04}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        start, noise = torch.randn(2, 256, 4, generator=draw)
        t = Matching().times(torch.rand(256, generator=draw), objective, 1)
        critic, teacher = exact(objective, *theirs), exact(objective, torch.tensor(MEAN), torch.tensor(STD))
        losses = Matching().losses(objective, own[0] + own[1] * start, noise, t, teacher, critic)
        optimizer.zero_grad()
        torch.stack(losses).mean(1).sum().backward()
        optimizer.step()
        schedule.step()
    for learner in (own, theirs):
        assert learner[0].item() == pytest.approx(MEAN, abs=0.02)
        assert abs(learner[1].item()) == pytest.approx(STD, abs=0.02)


# What the student draws (`StepMap.picture`).

PATHS: list[tuple[Path, Callable]] = [(RectifiedFlow(), Velocity), (Cosine(), V)]


@pytest.mark.parametrize(("path", "target"), PATHS)
@pytest.mark.parametrize(("k", "alpha"), product((1, 2, 3), (1.0, 3.0)))
def test_each_picture_is_what_the_walk_sees_at_its_step(path: Path, target: Callable, k: int, alpha: float) -> None:
    objective, model = StepMap(path, target(), shift=alpha, k=k), Learner()
    noise = torch.randn(6 * k, 3, 1)
    t = objective.training_time((torch.arange(6 * k) + 0.5) / (6 * k), 1)
    found = objective.picture(model, noise, t, None)
    seen: list[Tensor] = []
    grid = trailing(path, k, alpha)
    with torch.no_grad():
        end = euler(lambda z, t: objective.denoise(model, z, t, None), path, noise, grid,
                    lambda i, z, x0: seen.append(x0))  # fmt: skip
    assert t.unique().numel() == k
    for row, time in enumerate(t):
        step = int((grid[:-1] - time.double()).abs().argmin())
        torch.testing.assert_close(found[row], seen[step][row], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[-1], end)  # the last picture is the walk's


def test_only_the_last_step_of_a_walk_learns() -> None:
    """The gradient of the second of two steps is that of a model which is given the point after the first."""
    objective, model = StepMap(k=2), Learner()
    noise, t = torch.randn(4, 3, 1), torch.full((4,), 0.5)
    objective.picture(model, noise, t, None).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.no_grad():
        z = noise - 0.5 * model(noise, torch.ones(4), None)
    (z - 0.5 * model(z, t, None)).sum().backward()
    for gradient, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad)
