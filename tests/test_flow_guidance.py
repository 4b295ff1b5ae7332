"""Wrappers of a model: classifier-free guidance, a weak model to move away from, and pixels that are known."""

from typing import NamedTuple

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from flow.guidance import ClassifierFree, Weak, inpaint
from flow.objective import Estimate
from flow.path import Cosine, expand_as
from flow.sampler import euler


class Told(NamedTuple):
    value: Tensor
    mask: Tensor | None = None


def test_guidance_extrapolates_every_channel_in_one_call() -> None:
    calls = []

    def model(z: Tensor, t: Tensor, condition: Told) -> Tensor:
        calls.append(len(z))
        return z + condition.value[:, :, None, None]

    z, t = torch.randn(3, 4, 2, 2), torch.rand(3)
    condition, null = Told(torch.randn(3, 4)), Told(torch.randn(1, 4))
    expected = z + (null.value + 2.5 * (condition.value - null.value))[:, :, None, None]
    torch.testing.assert_close(ClassifierFree(model, null, 2.5)(z, t, condition), expected)
    assert calls == [6]
    torch.testing.assert_close(ClassifierFree(model, null, 1.0)(z, t, condition), model(z, t, condition))
    torch.testing.assert_close(
        ClassifierFree(model, null, 0.0)(z, t, condition), model(z, t, Told(null.value.expand(3, 4)))
    )
    with pytest.raises(ValueError, match="same fields"):
        ClassifierFree(model, null, 2.0)(z, t, Told(condition.value, torch.ones(3, 4, dtype=torch.bool)))


def two_branches() -> tuple[ClassifierFree, Tensor, Tensor, Told, list[int]]:
    calls = []

    def model(z: Tensor, t: Tensor, condition: Told) -> Tensor:
        calls.append(len(z))
        return z * condition.value[:, :, None, None] + t[:, None, None, None]

    z, condition = torch.randn(3, 4, 5, 5), Told(torch.randn(3, 4))
    return ClassifierFree(model, Told(torch.randn(1, 4)), 6.0), z, torch.full((3,), 0.3), condition, calls


def test_rescaled_guidance_has_the_spread_of_the_conditional_branch() -> None:
    plain, z, t, condition, _ = two_branches()
    alone = plain.model(z, t, condition)

    def guided(rescale: float) -> Tensor:
        return ClassifierFree(plain.model, plain.null, plain.scale, rescale)(z, t, condition)

    assert torch.equal(guided(0.0), plain(z, t, condition))
    torch.testing.assert_close(guided(1.0).flatten(1).std(1), alone.flatten(1).std(1))
    assert bool((plain(z, t, condition).flatten(1).std(1) > 1.5 * alone.flatten(1).std(1)).all())
    torch.testing.assert_close(guided(0.7), 0.7 * guided(1.0) + 0.3 * guided(0.0))
    torch.testing.assert_close(guided(0.7), rescale_noise_cfg(guided(0.0), alone, 0.7))


def test_guidance_outside_its_interval_is_the_plain_model_at_half_the_cost() -> None:
    plain, z, t, condition, calls = two_branches()
    within = ClassifierFree(plain.model, plain.null, plain.scale, interval=(0.25, 0.75))
    for time, inside in ((0.0, False), (0.24, False), (0.25, True), (0.5, True), (0.75, True), (0.76, False)):
        t = torch.full((3,), time)
        calls.clear()
        found = within.at(torch.tensor(time, dtype=torch.float64))(z, t, condition)
        assert calls == [6 if inside else 3]
        assert torch.equal(found, plain(z, t, condition) if inside else plain.model(z, t, condition))


def test_guidance_leaves_a_learned_variance_to_the_conditional_branch() -> None:
    def model(z: Tensor, t: Tensor, condition: Told) -> Tensor:
        y = z + condition.value[:, :, None, None]
        return torch.cat([y, 10 * y], 1)

    z, t = torch.randn(3, 4, 2, 2), torch.rand(3)
    condition, null = Told(torch.randn(3, 4)), Told(torch.randn(1, 4))
    for rescale in (0.0, 0.7):
        guided = ClassifierFree(model, null, 2.5, rescale, channels=4)(z, t, condition)
        y, v = guided.chunk(2, dim=1)
        torch.testing.assert_close(v, model(z, t, condition)[:, 4:])
        mean = ClassifierFree(lambda *told: model(*told)[:, :4], null, 2.5, rescale)(z, t, condition)
        torch.testing.assert_close(y, mean)


def test_guidance_moves_away_from_a_weak_model_in_its_interval() -> None:
    plain, z, t, condition, calls = two_branches()

    def worse(z: Tensor, t: Tensor, condition: Told) -> Tensor:
        calls.append(-len(z))
        return z + condition.value[:, :, None, None]

    guidance = ClassifierFree(plain.model, plain.null, plain.scale, weak=Weak(worse, 2.8, (0.25, 0.75)))
    guided = guidance.at(t[0])
    guided(z, t, Told(torch.randn(3, 4)))  # another condition before leaves no trace
    expected = plain(z, t, condition) + 2.8 * (plain.model(z, t, condition) - worse(z, t, condition))
    calls.clear()
    torch.testing.assert_close(guided(z, t, condition), expected)
    assert calls == [6, -3]
    for time in (0.2, 0.8):
        outside = torch.full((3,), time)
        assert torch.equal(guidance.at(outside[0])(z, outside, condition), plain(z, outside, condition))
    only = ClassifierFree(plain.model, plain.null, 6.0, interval=(0.9, 1.0), weak=Weak(worse, 0.5))
    told = plain.model(z, t, condition)
    torch.testing.assert_close(only.at(t[0])(z, t, condition), told + 0.5 * (told - worse(z, t, condition)))


def test_known_pixels_follow_their_own_path_and_the_rest_is_the_model_s() -> None:
    x0, noise, other, mine = torch.randn(4, 2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, 1:3, 2:] = 1

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        return Estimate(mine, other, mine)

    seen = []
    path, grid = Cosine(), torch.tensor([0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
    a, b = path(grid[0])
    euler(inpaint(denoise, x0, noise, mask), path, a * x0 + b * noise, grid, lambda i, z, _: seen.append((grid[i], z)))
    for t, z in seen:
        a, b = path(t)
        blended = mask * (a * mine + b * other) + (1 - mask) * (a * x0 + b * noise)
        torch.testing.assert_close(z, blended.to(z.dtype))
    assert len(seen) == 3
    assert inpaint(denoise, x0, noise, mask)(x0, grid).variance is mine


class Text(NamedTuple):
    text: Tensor


class Watched:
    """A model whose calls are kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, ...]] = []

    def __call__(self, z: Tensor, t: Tensor, condition: Text, *end: Tensor) -> Tensor:
        self.calls.append((t, *end))
        y = torch.tanh(z * expand_as(condition.text, z)) + expand_as(t, z)
        return y - expand_as(end[0], z) ** 2 if end else y


def test_a_scale_for_each_picture_is_a_call_for_each() -> None:
    model, null, z, t = Watched(), Text(torch.tensor([0.3])), torch.randn(4, 3, 4, 4), torch.rand(4)
    condition, scales = Text(torch.linspace(1, 3, 4)), [0.0, 1.0, 2.5, 7.0]
    for options in ({}, {"rescale": 0.7}, {"channels": 2}):
        together = ClassifierFree(model, null, torch.tensor(scales)[:, None, None, None], **options)(z, t, condition)
        for i, scale in enumerate(scales):
            alone = ClassifierFree(model, null, scale, **options)(z, t, condition)
            torch.testing.assert_close(together[i], alone[i])
    assert (together[3] - together[2]).abs().max() > 0.1


def test_guidance_passes_the_end_time_to_every_branch() -> None:
    null, condition = Text(torch.tensor([0.3])), Text(torch.linspace(1, 3, 4))
    z, t = torch.randn(4, 3, 4, 4), torch.linspace(0.5, 0.8, 4)
    end, model, weak = t / 3, Watched(), Watched()
    guided = ClassifierFree(model, null, 3.0, weak=Weak(weak, 0.5))(z, t, condition, end)
    assert [[x.tolist() for x in call] for call in model.calls] == [[[*x.tolist()] * 2 for x in (t, end)]]
    assert [[x.tolist() for x in call] for call in weak.calls] == [[t.tolist(), end.tolist()]]
    no, yes = (Watched()(z, t, some, end) for some in (Text(null.text.expand(4)), condition))
    torch.testing.assert_close(guided, no + 3 * (yes - no))  # the weak model is the same one

    outside = Watched()
    unguided = ClassifierFree(outside, null, 3.0, interval=(0.9, 1.0)).at(t[0])(z, t, condition, end)
    assert torch.equal(unguided, yes)
    assert [[x.tolist() for x in call] for call in outside.calls] == [[t.tolist(), end.tolist()]]
    without = Watched()
    ClassifierFree(without, null, 3.0)(z, t, condition)
    assert [len(call) for call in without.calls] == [1]
