"""Losses of judged pictures: gradients in closed form, the β of other code, and the advice of a group's rewards."""

import math

import pytest
import torch
from torch import Tensor

from flow import target as targets
from flow.objective import Model, Objective
from flow.path import Cosine, RectifiedFlow
from flow.preference import DPO, NFT, Drawn, Preference

OBJECTIVES = [Objective(), Objective(Cosine(), targets.Epsilon()), Objective(RectifiedFlow(), targets.X0())]


def batch(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, noise and times; each two pictures in a row share noise and time."""
    draw = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(count, 2, 3, 3, generator=draw) for _ in range(2))
    return x0, noise[::2].repeat_interleave(2, 0), torch.linspace(0.2, 0.9, count)[::2].repeat_interleave(2)


def linear(weight: Tensor) -> Model:
    """The model y = w·z + t."""
    return lambda z, t, condition: weight * z + t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o.target).__name__)
def test_the_gradient_of_dpo_is_that_of_a_linear_model_in_closed_form(objective: Objective) -> None:
    """dL/dw = σ(−margin)·β/2·(dm_w/dw − dm_l/dw), with dm/dw = mean(2·(w·z + t − y)·z)."""
    x0, noise, t = batch()
    beta, weight, reference = 3.0, torch.tensor(0.4, requires_grad=True), torch.tensor(0.1)
    loss = DPO(beta).loss(objective, linear(weight), linear(reference), Drawn(x0, noise, t, None, torch.ones(4))).loss
    loss.mean().backward()
    z, y = objective.point_and_target(x0, noise, t, None, None)

    def each(w: Tensor, slope: bool) -> Tensor:
        off = w * z + t.view(-1, 1, 1, 1) - y
        return (2 * off * z if slope else off.square()).flatten(1).mean(1)

    with torch.no_grad():
        gap = each(weight, False) - each(reference, False)
        margin = -beta / 2 * (gap[::2] - gap[1::2])
        slope = each(weight, True)
        wanted = torch.sigmoid(-margin) * beta / 2 * (slope[::2] - slope[1::2])
        torch.testing.assert_close(loss, -torch.log(torch.sigmoid(margin)).repeat_interleave(2), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weight.grad, wanted.mean(), rtol=1e-5, atol=1e-6)


def test_beta_is_that_of_the_papers_code() -> None:
    """In diffusers' script, without the ½, it is half of this β; with a sum over pixels it is smaller by C·H·W."""
    x0, noise, t = batch()
    objective, model, other = Objective(), linear(torch.tensor(0.4)), linear(torch.tensor(0.1))
    loss = DPO(5.0).loss(objective, model, other, Drawn(x0, noise, t, None, torch.ones(4))).loss
    z, y = objective.point_and_target(x0, noise, t, None, None)
    model_w, model_l, ref_w, ref_l = (
        (each(z, t, None) - y)[part::2].square() for each in (model, other) for part in (0, 1)
    )
    gap = (model_w - model_l) - (ref_w - ref_l)
    for inside in (2.5 * gap.mean((1, 2, 3)), 5.0 / (2 * 3 * 3) / 2 * gap.sum((1, 2, 3))):
        torch.testing.assert_close(loss[::2], -torch.nn.functional.logsigmoid(-inside), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o.target).__name__)
def test_at_the_reference_dpo_is_ln_2_and_pulls_the_pair_apart(objective: Objective) -> None:
    x0, noise, t = batch()
    weight = torch.tensor(0.4, requires_grad=True)
    found = DPO(8.0).loss(
        objective, linear(weight), linear(torch.tensor(0.4)), Drawn(x0, noise, t, None, torch.ones(4))
    )
    torch.testing.assert_close(found.loss, torch.full((4,), math.log(2)))
    assert not found.watched["winner_margin"].any()
    (slope,) = torch.autograd.grad(found.loss.mean(), weight)
    own = objective.error(linear(weight)(*objective.point_and_target(x0, noise, t, None, None)[:1], t, None),
                          objective.point_and_target(x0, noise, t, None, None)[1], t)  # fmt: skip
    (wanted,) = torch.autograd.grad(8.0 / 4 * (own[::2] - own[1::2]).mean(), weight)
    torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o.target).__name__)
@pytest.mark.parametrize("worth", [0.0, 0.3, 0.5, 1.0])
def test_at_the_old_policy_nft_follows_the_flow_with_the_sign_of_the_reward(objective: Objective, worth: float) -> None:
    """Its gradient is (2r − 1)·β times that of the weighted flow loss mean((x̂0 − x0)²) / sg(mean|x̂0 − x0|)."""
    x0, noise, t = batch()
    weight, beta = torch.tensor(0.4, requires_grad=True), 0.7
    found = NFT(beta).loss(
        objective, linear(weight), linear(torch.tensor(0.4)), Drawn(x0, noise, t, None, torch.full((4,), worth))
    )
    (slope,) = torch.autograd.grad(found.loss.mean(), weight)
    z, _ = objective.point_and_target(x0, noise, t, None, None)
    off = targets.solve(objective.path, objective.target, z, linear(weight)(z, t, None), t)[0] - x0
    flow = off.square().mean((1, 2, 3)) / off.detach().abs().mean((1, 2, 3))
    (wanted,) = torch.autograd.grad((2 * worth - 1) * beta * flow.mean(), weight)
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loss, flow.detach())


def test_nft_is_the_papers_equation_for_rectified_flow() -> None:
    """x̂0 = z − t·v, with v⁺ = (1 − β)·v_old + β·v and v⁻ = (1 + β)·v_old − β·v."""
    x0, noise, t = batch()
    objective, beta = Objective(), 0.6
    worth, model, old = torch.tensor([0.1, 0.9, 0.5, 1.0]), linear(torch.tensor(0.4)), linear(torch.tensor(0.1))
    loss = NFT(beta).loss(objective, model, old, Drawn(x0, noise, t, None, worth)).loss
    s = t.view(-1, 1, 1, 1)
    z = (1 - s) * x0 + s * noise
    v, v_old = model(z, t, None), old(z, t, None)
    wanted = torch.zeros(4)
    for share, moved in ((worth, (1 - beta) * v_old + beta * v), (1 - worth, (1 + beta) * v_old - beta * v)):
        off = z - s * moved - x0
        wanted += share * off.square().mean((1, 2, 3)) / off.abs().mean((1, 2, 3))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)


def test_rewards_are_normalised_within_a_group() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [10.0, 10.0, 10.0, 10.0], [0.0, 0.0, 0.0, 1e6]])
    order, worth = NFT(clip=2.0).advice(rewards)
    assert torch.equal(order, torch.arange(4).expand(3, 4))
    spread = math.sqrt(14 / 4)
    torch.testing.assert_close(worth[0], 0.5 + torch.tensor([-2.0, -1.0, 0.0, 3.0]) / spread / 4)
    assert torch.equal(worth[1], torch.full((4,), 0.5))
    assert torch.equal(NFT(clip=1.0).advice(rewards).worth[2, 3:], torch.ones(1))
    torch.testing.assert_close(NFT(clip=2.0).advice(5 + 3 * rewards).worth[0], worth[0])


def test_dpo_pairs_the_best_with_the_worst() -> None:
    rewards = torch.tensor([[3.0, 1.0, 4.0, 1.5], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 1.0, 1.0]])
    order, worth = DPO().advice(rewards)
    assert order.tolist() == [[2, 1, 0, 3], [0, 3, 1, 2], [1, 0, 2, 3]]
    assert worth.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert all(sorted(row) == [0, 1, 2, 3] for row in order.tolist())


def test_pairs_of_equal_reward_teach_nothing() -> None:
    x0, noise, t = batch()
    weight = torch.tensor(0.4, requires_grad=True)
    model, other = linear(weight), linear(torch.tensor(0.1))
    half = DPO(3.0).loss(Objective(), model, other, Drawn(x0, noise, t, None, torch.tensor([1.0, 1.0, 0.0, 0.0])))
    assert not half.loss[2:].any()
    (slope,) = torch.autograd.grad(half.loss.sum(), weight)
    alone = DPO(3.0).loss(Objective(), model, other, Drawn(x0[:2], noise[:2], t[:2], None, torch.ones(2)))
    (wanted,) = torch.autograd.grad(alone.loss.sum(), weight)
    torch.testing.assert_close(slope, wanted)


@pytest.mark.parametrize("loss", [NFT(), DPO(3.0)], ids=lambda loss: type(loss).__name__)
def test_no_gradient_reaches_the_model_compared_with(loss: Preference) -> None:
    x0, noise, t = batch()
    weight = torch.tensor(0.1, requires_grad=True)
    found = loss.loss(Objective(), linear(torch.tensor(0.4)), linear(weight), Drawn(x0, noise, t, None, torch.ones(4)))
    assert not found.loss.requires_grad


@pytest.mark.parametrize("made", [lambda: NFT(0.0), lambda: NFT(math.inf), lambda: NFT(clip=-1.0), lambda: DPO(0.0)])
def test_a_strength_must_be_positive(made: object) -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        made()  # type: ignore[operator]
