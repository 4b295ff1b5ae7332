"""The cost of a training step: its pictures, tokens and passes."""

import numpy as np
import pytest
from networks import inputs, plain

from data.batch import Batch
from engine.flops import forward_flops, training_flops
from flow.meanflow import MeanFlow
from flow.objective import Objective
from mmdit.control import Control, Controlled, JointControlNet
from training.cost import StepCost


@pytest.mark.parametrize(("objective", "more"), [(Objective(), 0), (MeanFlow(share=0.25), 0.5), (MeanFlow(share=1), 2)])
def test_a_step_is_a_pass_over_patches_and_text_and_the_backward_pass(objective: Objective, more: float) -> None:
    """The backward pass is two forward passes but for the gradients of the inputs."""
    network = plain(two_times=objective.two_times)
    z, t, condition = inputs(8, 12, text=5)
    cost = StepCost(network, objective, None)(Batch(0, np.arange(4), z, z, condition.text, condition.pooled))
    assert (cost.images, cost.tokens) == (4, 4 * (4 * 6 + 5))
    once = forward_flops(network, z, t, condition)
    assert cost.flops == training_flops(network, z, t, condition) + more * once
    width, numbers = network.width, 256 * (2 if objective.two_times else 1)
    first = 24 * 4 * z.shape[1] + 5 * condition.text.shape[2] + numbers + condition.pooled.shape[1]
    assert cost.flops == (3 + more) * once - 2 * 4 * first * width


def test_a_step_of_few_weights_leaves_out_the_others_gradients() -> None:
    network = plain()
    z, t, condition = inputs(8, 12, text=5)
    batch = Batch(0, np.arange(4), z, z, condition.text, condition.pooled)
    once = forward_flops(network, z, t, condition)
    last = StepCost(network, Objective(), None, {"final.linear.weight"})(batch)
    assert last.flops == once + 2 * 4 * 24 * network.width * 4 * z.shape[1]
    words = StepCost(network, Objective(), None, (), reads=True)(batch)
    assert 1.5 * once < words.flops < 2 * once


def test_a_step_of_a_control_net_goes_back_through_its_base_but_not_to_its_weights() -> None:
    base = plain(depth=4).requires_grad_(False)
    network = Controlled(base, [Control(JointControlNet.of(base, 2))])
    z, t, condition = inputs(8, 12, text=5)
    learning = {name for name, weight in network.named_parameters() if weight.requires_grad}
    batch = Batch(0, np.arange(4), z, z, condition.text, condition.pooled, picture=z)
    step = StepCost(network, Objective(), None, learning)(batch).flops
    of_base, of_both = forward_flops(base, z, t, condition), forward_flops(network, z, t, condition._replace(picture=z))
    control = of_both - of_base
    assert of_both + 2 * control < step < of_both + 2 * control + of_base
    assert step == pytest.approx(of_both + 2 * control + of_base, rel=0.1)
