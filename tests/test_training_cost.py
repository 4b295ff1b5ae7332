"""The cost of a training step: its pictures, tokens and passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import inputs, plain

from data.batch import Batch
from engine.flops import forward_flops
from flow.meanflow import MeanFlow
from flow.objective import Objective
from mmdit.network import Condition
from pipeline import Pipeline
from training.cost import StepCost
from training.teacher import Teacher, TeacherModel


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


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (3.0, 2), ((1.0, 6.0), 2)])
def test_a_teacher_adds_a_forward_pass_and_with_guidance_two(pipe: Pipeline, guidance: Any, passes: int) -> None:
    teacher = TeacherModel(Teacher(Path("teacher"), guidance), pipe)
    z, condition = torch.zeros(4, 1, 8, 8), Condition(torch.zeros(4, 5, 64), torch.zeros(4, 64))
    student = StepCost(pipe.network, Objective(), teacher, True)
    cost = student(Batch(0, np.arange(4), z, z, condition.text, condition.pooled))
    assert cost.flops == (3 + passes) * forward_flops(pipe.network, z, torch.zeros(4), condition)
