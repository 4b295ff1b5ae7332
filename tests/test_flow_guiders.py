"""Guiders: adaptive projected guidance and CFG-Zero*, the same for every path and target."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from processes import PAIRS, TIMES, pair
from torch import Tensor

from flow.guidance import ClassifierFree, Guider, Projected, Weak, ZeroStar
from flow.objective import Estimate
from flow.path import Cosine, LDMLinear, Path, RectifiedFlow, expand_as
from flow.sampler import euler, heun
from flow.target import Epsilon, Target, V, Velocity, prediction, solve, velocity

GRID = torch.linspace(0.9, 0.1, 5, dtype=torch.float64)
OPTIONS = {"eta": 0.3, "threshold": 1.5, "momentum": -0.6}


class Text(NamedTuple):
    text: Tensor


NULL, CONDITION = Text(torch.tensor([0.3], dtype=torch.float64)), Text(torch.linspace(1, 3, 4, dtype=torch.float64))


class Drawer:
    """A model of any path and target: v = ε − x0 is one function of w and τ. Keeps the sizes of its batches."""

    def __init__(self, path: Path, target: Target) -> None:
        self.path, self.target, self.calls = path, target, []

    def v(self, w: Tensor, tau: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(w * expand_as(text, w)).cumsum(-1) + expand_as(tau, w) * expand_as(text, w) ** 2

    def __call__(self, z: Tensor, t: Tensor, condition: Text) -> Tensor:
        self.calls.append(len(z))
        a, b = self.path(t)
        v = self.v(z / expand_as(a + b, z), b / (a + b), condition.text)
        return prediction(self.path, self.target, z, v, t)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def guided(model: Drawer, make: type[Guider], scale: float = 4.0, **options: float) -> Callable[..., Tensor]:
    """(z, t ()) → y, for one walk over the grid."""
    guide = ClassifierFree(model, NULL, scale, guider=make(model.path, model.target, GRID, **options))
    return lambda z, t: guide.at(t)(z, t.expand(len(z)), CONDITION)


def estimates(model: Drawer, y: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Estimate]:
    return lambda z, t: Estimate(*solve(model.path, model.target, z, y(z, t), t))


@pytest.mark.parametrize("both", PAIRS, ids=pair)
def test_the_velocity_is_the_difference_of_noise_and_picture(both: tuple[Path, Target]) -> None:
    z, y, t = numbers(2, 49, 5)[0], numbers(2, 49, 5)[1], TIMES
    x0, noise = solve(*both, z, y, t)
    torch.testing.assert_close(velocity(*both, z, y, t), noise - x0)
    torch.testing.assert_close(prediction(*both, z, noise - x0, t), y)


@pytest.mark.parametrize(("make", "options"), [(Projected, OPTIONS), (ZeroStar, {"zero_steps": 0})])
@pytest.mark.parametrize("both", PAIRS, ids=pair)
def test_a_guider_does_the_same_on_every_process(
    both: tuple[Path, Target], make: type[Guider], options: dict[str, float]
) -> None:
    """At the same (w, τ), two times after each other, so that the momentum counts."""
    line, other = Drawer(RectifiedFlow(), Velocity()), Drawer(*both)
    on_line, on_other = (guided(model, make, **options) for model in (line, other))
    w = numbers(4, 3, 5)
    for t in (torch.tensor(0.75, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)):
        a, b = other.path(t)
        tau, z = b / (a + b), (a + b) * w
        found = velocity(*both, z, on_other(z, t), t)
        torch.testing.assert_close(found, on_line(w, tau), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("both", PAIRS, ids=pair)
def test_projected_guidance_with_the_whole_difference_is_plain_guidance(both: tuple[Path, Target]) -> None:
    model, z, t = Drawer(*both), numbers(4, 3, 5), torch.tensor(0.25, dtype=torch.float64)
    plain = ClassifierFree(model, NULL, 4.0)(z, t.expand(4), CONDITION)
    torch.testing.assert_close(guided(model, Projected, eta=1.0)(z, t), plain)
    assert (guided(model, Projected, eta=0.5)(z, t) - plain).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"eta": 0.4}, {"threshold": 0.7}, {"momentum": -0.6}, OPTIONS], ids=str)
def test_projected_guidance_is_the_papers_on_pictures(options: dict[str, float]) -> None:
    """Of x̂0, on a path that is no line, over three times, against diffusers' function."""
    model = Drawer(Cosine(), V())
    guide, buffer = guided(model, Projected, **options), MomentumBuffer(options.get("momentum", 0.0))
    threshold = options.get("threshold", 0.0)  # 0 is none there
    for t, z in zip(GRID, numbers(3, 4, 3, 5), strict=False):
        null, cond = (
            solve(model.path, model.target, z, model(z, t.expand(4), some), t)[0]
            for some in (Text(NULL.text.expand(4)), CONDITION)
        )
        wanted = normalized_guidance(cond, null, 3.0, buffer, options.get("eta", 0.0), threshold, True)
        torch.testing.assert_close(estimates(model, guide)(z, t).x0, wanted)


def test_the_norm_is_limited_for_each_picture() -> None:
    model, t, z = Drawer(RectifiedFlow(), Velocity()), GRID[2], numbers(4, 3, 5)
    cond = solve(model.path, model.target, z, model(z, t.expand(4), CONDITION), t)[0]
    moved = [
        (estimates(model, guided(model, Projected, eta=1.0, threshold=r))(z, t).x0 - cond).flatten(1).norm(dim=1) / 3
        for r in (math.inf, 4.0)
    ]
    torch.testing.assert_close(moved[1], moved[0].clamp(max=4.0))
    assert (moved[0] < 4).any()
    assert (moved[0] > 4).any()


@pytest.mark.parametrize("walk", [euler, heun])
def test_momentum_counts_every_time_once(walk: Callable) -> None:
    """The first call at a time, as Heun's method calls the model at the end of a step and again at the next one's."""
    model = Drawer(RectifiedFlow(), Velocity())
    seen: list[tuple[float, Tensor]] = []
    guide = estimates(model, guided(model, Projected, eta=1.0, momentum=-0.5))
    latest: dict[float, Tensor] = {}

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        null, cond = (
            solve(model.path, model.target, z, model(z, t.expand(4), some), t)[0]
            for some in (Text(NULL.text.expand(4)), CONDITION)
        )
        earlier = [d for time, d in latest.items() if time != float(t)]
        total = cond - null - 0.5 * (earlier[-1] if earlier else 0)
        latest.setdefault(float(t), total)
        found = guide(z, t)
        torch.testing.assert_close(found.x0, cond + 3 * total)
        seen.append((float(t), z))
        return found

    walk(denoise, model.path, numbers(4, 3, 5), GRID)
    assert len(seen) == {euler: 4, heun: 8}[walk]


def test_momentum_survives_a_gradient_through_the_guided_model() -> None:
    """A reward of x̂0 calls the model again under `torch.func`, whose tensors must not stay behind."""
    model, z = Drawer(RectifiedFlow(), Velocity()), numbers(4, 3, 5)
    once, twice = (estimates(model, guided(model, Projected, **OPTIONS)) for _ in range(2))
    for t in GRID[:3]:
        wanted = once(z, t)
        torch.testing.assert_close(twice(z, t), wanted)
        grad = torch.func.grad(lambda z, t=t: twice(z, t).x0.square().sum())(z)
        assert grad.isfinite().all()


def test_zero_star_brings_the_null_branch_nearest_to_the_conditional_one() -> None:
    model, t, z = Drawer(RectifiedFlow(), Velocity()), GRID[1], numbers(4, 3, 5)
    null, cond = (model(z, t.expand(4), some) for some in (Text(NULL.text.expand(4)), CONDITION))
    theirs = cfg_zero_star_scale(cond.flatten(1), null.flatten(1)).double()[:, :, None] * null
    found = guided(model, ZeroStar, zero_steps=0)(z, t)
    torch.testing.assert_close(found, theirs + 4 * (cond - theirs), rtol=1e-5, atol=1e-5)  # their scale is float32
    star = (4 * cond - found) / 3
    torch.testing.assert_close(((cond - star) * null).flatten(1).sum(1), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(("path", "target"), [(RectifiedFlow(), Velocity()), (LDMLinear(), Epsilon())])
def test_the_first_steps_stand_still_and_cost_nothing(path: Path, target: Target) -> None:
    model, states = Drawer(path, target), [z := numbers(4, 3, 5)]
    guide = estimates(model, guided(model, ZeroStar, zero_steps=2))
    euler(guide, path, z, GRID, lambda i, z, x0: states.append(z))
    w = [z / sum(path(t)) for t, z in zip(GRID, states, strict=True)]
    torch.testing.assert_close(w[1], w[0])
    torch.testing.assert_close(w[2], w[0])
    assert (w[3] - w[2]).abs().max() > 0.01
    assert model.calls == [8, 8]
    model.calls.clear()
    euler(estimates(model, guided(model, ZeroStar, zero_steps=0)), path, z, GRID)
    assert model.calls == [8] * 4


@pytest.mark.parametrize(("make", "options"), [(Projected, OPTIONS), (ZeroStar, {})])
def test_what_happens_to_a_picture_depends_on_it_alone(make: type[Guider], options: dict[str, float]) -> None:
    model, z = Drawer(RectifiedFlow(), Velocity()), numbers(4, 3, 5)
    together = euler(estimates(model, guided(model, make, **options)), model.path, z, GRID)
    for i in range(4):
        guide = ClassifierFree(model, NULL, 4.0, guider=make(model.path, model.target, GRID, **options))
        alone = Text(CONDITION.text[i : i + 1])

        def denoise(z: Tensor, t: Tensor, guide: ClassifierFree = guide, alone: Text = alone) -> Estimate:
            return Estimate(*solve(model.path, model.target, z, guide.at(t)(z, t.expand(1), alone), t))

        torch.testing.assert_close(euler(denoise, model.path, z[i : i + 1], GRID)[0], together[i])


def test_outside_the_interval_the_plain_model_runs_and_momentum_passes_over_it() -> None:
    model, z = Drawer(RectifiedFlow(), Velocity()), numbers(4, 3, 5)
    whole, within = (Projected(model.path, model.target, GRID, **OPTIONS) for _ in range(2))
    always = ClassifierFree(model, NULL, 4.0, guider=whole)
    sometimes = ClassifierFree(model, NULL, 4.0, guider=within, interval=(0.0, 0.6))
    for t in GRID:
        found = sometimes.at(t)(z, t.expand(4), CONDITION)
        if t > 0.6:
            assert torch.equal(found, model(z, t.expand(4), CONDITION))
        else:
            torch.testing.assert_close(found, always.at(t)(z, t.expand(4), CONDITION))
    still = ClassifierFree(model, NULL, 4.0, guider=ZeroStar(model.path, model.target, GRID), interval=(0.0, 0.6))
    first = GRID[0]
    assert torch.equal(still.at(first)(z, first.expand(4), CONDITION), model(z, first.expand(4), CONDITION))


def test_rescaling_and_a_weak_model_come_after_the_guider() -> None:
    model, t, z = Drawer(Cosine(), V()), GRID[2], numbers(4, 3, 5)
    own = guided(model, Projected, eta=0.2)(z, t)
    cond, weak = (model(z, t.expand(4), some) for some in (CONDITION, Text(CONDITION.text * 0.9)))

    def combined(**options: object) -> Tensor:
        guider = Projected(model.path, model.target, GRID, eta=0.2)
        return ClassifierFree(model, NULL, 4.0, guider=guider, **options).at(t)(z, t.expand(4), CONDITION)

    away = combined(weak=Weak(lambda z, t, condition: model(z, t, Text(condition.text * 0.9)), 0.5))
    torch.testing.assert_close(away, own + 0.5 * (cond - weak))
    torch.testing.assert_close(combined(rescale=1.0).flatten(1).std(1), cond.flatten(1).std(1))


@pytest.mark.parametrize(("make", "options"), [(Projected, OPTIONS), (ZeroStar, {"zero_steps": 1})])
def test_a_learned_variance_comes_from_the_conditional_branch(make: type[Guider], options: dict[str, float]) -> None:
    """Also in a step without velocity."""
    plain, z = Drawer(LDMLinear(), Epsilon()), numbers(4, 3, 5)

    def model(z: Tensor, t: Tensor, condition: Text) -> Tensor:
        y = plain(z, t, condition)
        return torch.cat([y, 10 * y], 1)

    mean = guided(plain, make, **options)
    both = ClassifierFree(model, NULL, 4.0, channels=3, guider=make(plain.path, plain.target, GRID, **options))
    for t in GRID[:3]:
        y, variance = both.at(t)(z, t.expand(4), CONDITION).chunk(2, dim=1)
        torch.testing.assert_close(y, mean(z, t))
        torch.testing.assert_close(variance, 10 * plain(z, t.expand(4), CONDITION))


def test_branches_of_zeros_are_finite() -> None:
    """A network starts at y = 0."""
    z, t, zeros = numbers(4, 3, 5), GRID[1], torch.zeros(4, 3, 5, dtype=torch.float64)
    for guider in (
        Projected(RectifiedFlow(), Velocity(), GRID, **OPTIONS),
        ZeroStar(RectifiedFlow(), Velocity(), GRID),
    ):
        assert torch.equal(guider(z, t, zeros, zeros, 4.0), zeros)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (Projected, {"eta": -0.1}, "0 <= eta <= 1"),
        (Projected, {"eta": 1.1}, "0 <= eta <= 1"),
        (Projected, {"threshold": 0.0}, "threshold > 0"),
        (Projected, {"momentum": -1.0}, "-1 < momentum < 1"),
        (Projected, {"momentum": 1.0}, "-1 < momentum < 1"),
        (ZeroStar, {"zero_steps": -1}, "zero_steps from 0 to below the 4 steps of the walk, got -1"),
        (ZeroStar, {"zero_steps": 4}, "zero_steps from 0 to below the 4 steps of the walk, got 4"),
    ],
)
def test_impossible_options_are_refused(make: type[Guider], options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(RectifiedFlow(), Velocity(), GRID, **options)
