"""Masks of the loss: each place counts as its mask says, in every objective."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flow.meanflow import MeanFlow
from flow.objective import Objective
from flow.path import ImprovedCosine
from flow.penalty import Penalty
from flow.stepmap import StepMap
from flow.target import Epsilon
from flow.variance import LearnedVariance
from flow.weight import ExponentialWeight
from mmdit.network import Condition
from tokens.process import NextCode

B, C, SIDE = 3, 2, 4


def network(outputs: int) -> Callable[..., Tensor]:
    """Looks at each place alone, by weights that learn, and takes any times and conditions."""
    weights = torch.randn(C * outputs, C, requires_grad=True)

    def model(z: Tensor, t: Tensor, *_: object) -> Tensor:
        return torch.einsum("oc,bchw->bohw", weights, z) * (1 + t.view(-1, 1, 1, 1))

    model.weights = weights  # type: ignore[attr-defined]
    return model


OBJECTIVES: dict[str, Objective] = {
    "flow": Objective(weight=ExponentialWeight()),
    "huber": Objective(penalty=Penalty()),
    "variance": LearnedVariance(ImprovedCosine(), Epsilon(), vlb_weight=0.5),
    "mean flow": MeanFlow(share=1.0),
    "mean flow in steps": MeanFlow(share=1.0, step=0.1),
    "step map": StepMap(k=2),
    "codes": NextCode(5, text_weight=0.0),
}


def case(name: str) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """(change of the data, mask) → the losses and the gradient of their sum, all else being equal."""
    objective = OBJECTIVES[name]
    x0, noise = torch.randn(2, B, C, SIDE, SIDE)
    if objective.discrete:
        x0 = torch.randint(5, x0.shape).float()
    t, interval = objective.times(torch.tensor([[0.3, 0.6, 0.9], [0.2, 0.1, 0.5], [0.0] * 3]), SIDE**2)
    model = network(objective.outputs)

    def losses(change: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = objective.loss(model, (x0 + change) % 5 if objective.discrete else x0 + change, noise, t,
                              Condition(torch.zeros(B, 1, 1), torch.zeros(B, 0)), interval, None, mask)  # fmt: skip
        return loss.detach(), torch.autograd.grad(loss.sum(), model.weights)[0]  # type: ignore[attr-defined]

    return losses


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_mask_of_ones_is_no_mask_to_the_bit(name: str) -> None:
    losses, nothing = case(name), torch.zeros(())
    for plain, masked in zip(losses(nothing, None), losses(nothing, torch.ones(B, 1, SIDE, SIDE)), strict=True):
        assert torch.equal(plain, masked)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_left_out_has_no_part_in_loss_and_gradient(name: str) -> None:
    """The data may be anything there. Elsewhere they may not."""
    losses = case(name)
    mask = torch.zeros(B, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    nothing, elsewhere = losses(torch.zeros(()), mask), losses((1 - mask).round(), mask)
    for one, other in zip(nothing, elsewhere, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert (losses(mask, mask)[0] - nothing[0]).abs().min() > 1e-3


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "huber"])  # whose penalty is of the mean
def test_the_loss_is_linear_in_the_mask(name: str) -> None:
    losses, nothing = case(name), torch.zeros(())
    mask = torch.rand(B, 1, SIDE, SIDE)
    parts = [losses(nothing, part) for part in (mask, 1 - mask)]
    for whole, one, other in zip(losses(nothing, None), *parts, strict=True):
        torch.testing.assert_close(one + other, whole, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(one, other, rtol=0.01)
