"""A teacher: what it costs, and the null condition of its guidance."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import stirred

from data.batch import Batch
from data.latents import Pixels
from data.sizes import SIZE_FEATURES
from data.text.clip import CLIPText
from engine.flops import forward_flops, training_flops
from engine.strategy import Strategy, blocks
from flow.guidance import ClassifierFree
from flow.matching import Matching
from flow.objective import Objective
from flow.stepmap import StepMap
from mmdit.model import MMDiT
from mmdit.network import Condition
from pipeline import Pipeline
from training.cost import StepCost
from training.teacher import Teacher, TeacherModel


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (3.0, 2), ((1.0, 6.0), 2)])
def test_a_teacher_adds_a_forward_pass_and_with_guidance_two(pipe: Pipeline, guidance: Any, passes: int) -> None:
    teacher = TeacherModel(Teacher(Path("teacher"), guidance), pipe)
    z, condition = torch.zeros(4, 1, 8, 8), Condition(torch.zeros(4, 5, 64), torch.zeros(4, 64))
    student = StepCost(pipe.network, Objective(), teacher)
    cost = student(Batch(0, np.arange(4), z, z, condition.text, condition.pooled))
    once, learned = (count(pipe.network, z, torch.zeros(4), condition) for count in (forward_flops, training_flops))
    assert cost.flops == learned + passes * once


@pytest.mark.parametrize("k", [1, 4])
def test_matching_adds_the_guided_teacher_the_critic_s_step_and_the_student_s_walk(pipe: Pipeline, k: int) -> None:
    teacher = TeacherModel(Teacher(Path("teacher"), 3.0, matching=Matching()), pipe, walked=k - 1)
    z, condition = torch.zeros(4, 1, 8, 8), Condition(torch.zeros(4, 5, 64), torch.zeros(4, 64))
    cost = StepCost(pipe.network, StepMap(k=k), teacher)(Batch(0, np.arange(4), z, z, condition.text, condition.pooled))
    once, learned = (count(pipe.network, z, torch.zeros(4), condition) for count in (forward_flops, training_flops))
    assert cost.flops == 2 * learned + (2 + k - 1) * once


def test_a_prepared_teacher_is_frozen_compiled_and_on_a_cpu_in_float32(pipe: Pipeline) -> None:
    pipe = copy.deepcopy(pipe)
    pipe.network.half().requires_grad_(True)
    teacher = TeacherModel(Teacher(Path("teacher"), 3.0), pipe)
    teacher.prepare(torch.device("cpu"), Strategy(compile=True))
    assert {(weight.dtype, weight.requires_grad) for weight in pipe.network.parameters()} == {(torch.float32, False)}
    assert all(block._compiled_call_impl for block in blocks(pipe.network))


def test_a_student_that_is_its_own_teacher_stays_as_it_is(pipe: Pipeline) -> None:
    pipe = copy.deepcopy(pipe)
    pipe.network.requires_grad_(True)
    teacher = TeacherModel(Teacher(None, 3.0), pipe, bare=True)
    teacher.prepare(torch.device("cpu"), Strategy(compile=True))
    assert all(weight.requires_grad for weight in pipe.network.parameters())
    assert not any(block._compiled_call_impl for block in blocks(pipe.network))


def test_the_null_condition_of_guidance_has_the_sizes_of_the_pictures(text: CLIPText) -> None:
    sizes = {"in_channels": 1, "depth": 1, "width": 32, "heads": 1, "text_dim": 64, "pooled_dim": 64 + SIZE_FEATURES}
    network = stirred(MMDiT(**sizes, sample_size=8, pos_embed_max_size=8))  # type: ignore[arg-type]
    pipe = Pipeline(network, Objective(), Pixels(1, 0.3, 2.66), text)
    teacher = TeacherModel(Teacher(Path("teacher"), 3.0), pipe)
    draw = torch.Generator().manual_seed(0)
    z, t = torch.randn(3, 1, 8, 8, generator=draw), torch.tensor([0.2, 0.5, 0.8])
    captions = text.encode(["zero", "one", "two"])
    shown = torch.randn(3, SIZE_FEATURES, generator=draw)
    condition = Condition(captions.tokens, torch.cat([captions.pooled, shown], 1))
    empty = text.encode([""] * 3)
    null = Condition(empty.tokens, torch.cat([empty.pooled, shown], 1))
    with torch.no_grad():
        field = teacher.lesson(condition, z, z, torch.zeros(3)).field
        assert field
        found = field(z, t, condition, z)
        wanted = ClassifierFree(network, null, 3.0)(z, t, condition)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
