"""Pairs that a teacher makes during the training: they are its own pictures, fresh at each step, and counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import stirred
from trials import small

import train
from data.batch import Batch
from data.latents import Pixels
from data.text.clip import CLIPText
from engine.flops import forward_flops, training_flops
from flow.objective import Objective
from mmdit.model import MMDiT
from mmdit.network import Condition
from pipeline import Pipeline
from pipeline.sampling import Sampling
from training import experiment
from training.cost import StepCost
from training.generator import Generator
from training.teacher import Pairs, Teacher, TeacherModel

CAPTIONS = ["zero", "a seven", "the digit 3", "nine"]
SIZES: dict[str, Any] = {"in_channels": 1, "depth": 1, "width": 32, "heads": 1, "text_dim": 64, "pooled_dim": 64}


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def pipeline(text: CLIPText, **more: Any) -> Pipeline:
    network = stirred(MMDiT(**SIZES, sample_size=8, pos_embed_max_size=8, **more))
    return Pipeline(network, Objective(shift=2.0), Pixels(1, 0.3, 2.66), text)


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 3), ("heun", 5), ("dpmpp_2m", 3)])
@pytest.mark.parametrize("guidance", [1.0, 3.0, (1.0, 5.0)])
@pytest.mark.parametrize("told", [False, True])
def test_a_pair_is_the_picture_that_the_teacher_draws_from_this_noise(
    text: CLIPText, sampler: str, calls: int, guidance: Any, told: bool
) -> None:
    """Also with a scale for each picture, and by a teacher that is told its guidance."""
    pipe = pipeline(text, guidance_embeds=told)
    teacher = TeacherModel(Teacher(Path("teacher"), guidance, Pairs(3, sampler)), pipe)
    z, u = noise(4), torch.tensor([0.0, 0.25, 0.5, 1.0])
    with torch.no_grad():
        lesson = teacher.lesson(pipe.condition(CAPTIONS), torch.zeros_like(z), z, u)
    low, high = teacher.teacher.range
    scales = low + (high - low) * u
    for i, (caption, scale) in enumerate(zip(CAPTIONS, scales.tolist(), strict=True)):
        wanted = pipe.integrate(z[i : i + 1], [caption], Sampling(3, scale, sampler))
        torch.testing.assert_close(lesson.x0[i : i + 1], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(lesson.noise, z)
    assert lesson.field is None
    assert lesson.condition.guidance is None if low == high else torch.equal(lesson.condition.guidance, scales)
    assert Pairs(3, sampler).evaluations(teacher.pipe.objective) == calls


def test_samples_that_share_a_pair_have_its_noise_caption_and_scale(text: CLIPText) -> None:
    pipe = pipeline(text)
    teacher = TeacherModel(Teacher(Path("teacher"), (1.0, 5.0), Pairs(2, uses=2)), pipe)
    z, u, condition = noise(4), torch.tensor([0.1, 0.2, 0.3, 0.4]), pipe.condition(CAPTIONS)
    with torch.no_grad():
        alone = teacher.lesson(condition, torch.zeros_like(z), z, u)
        shared = teacher.lesson(condition, torch.zeros_like(z), z, u, uses=2)
    first = [0, 0, 2, 2]
    torch.testing.assert_close(shared.x0, alone.x0[first], rtol=1e-5, atol=1e-5)
    assert torch.equal(shared.noise, z[first])
    for ours, theirs in zip(shared.condition, alone.condition, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs[first])


def built(folder: Path, *flags: str) -> tuple[Generator, Any]:
    argv = ["--config", str(small(folder)), "--network.width", "32"]
    parser = experiment.parser("")
    return train.build(parser.instantiate(parser.parse_args([*argv, *flags])), None)[1:]


def test_pairs_are_a_function_of_seed_and_step_and_never_come_twice(text: CLIPText, tmp_path: Path) -> None:
    pipeline(text).save(tmp_path / "teacher")
    flags = ["--teacher.model", str(tmp_path / "teacher"), "--teacher.pairs.steps", "2", "--objective.shift", "2"]
    found = []
    for _ in range(2):
        generator, data = built(tmp_path, *flags, "--data.caption_dropout", "0")
        batches = iter(data.train_dataloader())
        with torch.no_grad():
            found.append([generator.lesson(next(batches), torch.zeros(8)) for _ in range(3)])
    for ours, again in zip(*found, strict=True):
        assert torch.equal(ours.x0, again.x0)
        assert torch.equal(ours.noise, again.noise)
    drawn = torch.cat([lesson.x0 for lesson in found[0]]).flatten(1)
    assert torch.pdist(drawn).min() > 1e-3


def test_a_training_step_uses_a_pair_as_often_as_asked(
    text: CLIPText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline(text).save(tmp_path / "teacher")
    flags = ["--teacher.model", str(tmp_path / "teacher"), "--teacher.pairs.uses", "4", "--objective.shift", "2"]
    generator, data = built(tmp_path, *flags, "--teacher.pairs.steps", "2")
    assert generator.teacher
    draw, asked = generator.teacher.draw, []
    monkeypatch.setattr(generator.teacher, "draw", lambda z, *rest: (asked.append(len(z)), draw(z, *rest))[1])
    monkeypatch.setattr(generator, "add_losses", lambda *given: None)  # needs a trainer
    generator.training_step(next(iter(data.train_dataloader())))
    assert asked == [2]  # of the 8 samples


@pytest.mark.parametrize(
    ("pairs", "guidance", "calls"),
    [(Pairs(3), 1.0, 3), (Pairs(3), 3.0, 6), (Pairs(3, "heun"), 3.0, 10), (Pairs(3, "heun", uses=4), 3.0, 2.5)],
)
def test_the_cost_of_a_step_counts_the_walks(pipe: Pipeline, pairs: Pairs, guidance: float, calls: float) -> None:
    teacher = TeacherModel(Teacher(Path("teacher"), guidance, pairs), pipe)
    z, condition = torch.zeros(4, 1, 8, 8), Condition(torch.zeros(4, 5, 64), torch.zeros(4, 64))
    cost = StepCost(pipe.network, Objective(), teacher)(Batch(0, np.arange(4), z, z, condition.text, condition.pooled))
    once, learned = (count(pipe.network, z, torch.zeros(4), condition) for count in (forward_flops, training_flops))
    assert cost.flops == round(learned + calls * once)
