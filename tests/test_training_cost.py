"""The cost of a training step: its pictures, tokens and passes."""

import numpy as np
import pytest
from networks import inputs, plain

from data.batch import Batch
from engine.flops import forward_flops
from flow.meanflow import MeanFlow
from flow.objective import Objective
from training.cost import StepCost


@pytest.mark.parametrize(
    ("objective", "whole", "passes"),  # forward; backward for the inputs, and for whole training the weights
    [(Objective(), True, 3), (Objective(), False, 2), (MeanFlow(share=0.25), True, 3.5), (MeanFlow(share=1), True, 5)],
)
def test_a_step_is_some_forward_passes_over_patches_and_text(objective: Objective, whole: bool, passes: float) -> None:
    network = plain(two_times=objective.two_times)
    z, t, condition = inputs(8, 12, text=5)
    cost = StepCost(network, objective, None, whole)(Batch(0, np.arange(4), z, z, condition.text, condition.pooled))
    assert (cost.images, cost.tokens) == (4, 4 * (4 * 6 + 5))
    assert cost.flops == passes * forward_flops(network, z, t, condition)
