"""Students: trainings on a teacher's pairs, of average velocities, and of a guided teacher's output."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import stirred
from safetensors.torch import load_file, save_file
from store_files import replan
from torch import Tensor
from trials import (
    ROOT,
    assert_goes_on_to_the_bit,
    assert_same,
    assert_two_learn_as_one,
    fit,
    lines,
    refused,
    small,
    under,
)

import evaluate
import sample
import train
from data.latents import Pixels
from data.module import Data, Stored
from data.store.reader import Store
from data.text.clip import CLIPText
from flow.guidance import ClassifierFree
from flow.objective import Interval
from flow.stepmap import StepMap
from mmdit.model import Condition
from pipeline import Pipeline
from training import experiment
from training.generator import Generator
from training.teacher import MatchedLesson

FEWSTEP = ROOT / "configs/fewstep"
OVERLAYS = ("reflow", "reflow-online", "distill", "meanflow", "meanflow-teacher", "guidance", "matching")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of six steps and its pairs: the folder of both."""
    folder = tmp_path_factory.mktemp("teacher")
    fit(small(folder))
    (folder / "prompts.txt").write_text("zero\na seven\nthe digit 3\n")
    argv = ["pairs", "--model", str(folder / "run"), "--prompts", str(folder / "prompts.txt"), "--num", "40"]
    sample.main([*argv, "--steps", "3", "--batch-size", "40", "--out", str(folder / "pairs")])
    return folder


@pytest.fixture
def student(trained: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The flags of a student's training, of an overlay in configs/fewstep."""
    config = small(tmp_path)
    assert config == tmp_path / "config.yaml"

    def flags(overlay: str) -> list[str]:
        given = ["--config", str(FEWSTEP / f"{overlay}.yaml"), "--optimization.warmup", "2"]
        if overlay != "meanflow":
            given += ["--network.path", str(trained / "run")]
        if overlay in ("reflow", "distill"):
            given += ["--data.store", str(trained / "pairs"), "--data.teacher", str(trained / "run")]
            given += ["--data.held_out", "4"]
        if overlay in ("guidance", "meanflow-teacher", "reflow-online", "matching"):
            given += ["--teacher.model", str(trained / "run")]
        if overlay == "reflow-online":
            given += ["--data.caption_dropout", "0", "--teacher.pairs.steps", "3", "--teacher.guidance", "2"]
        if overlay == "matching":
            given += ["--data.caption_dropout", "0", "--teacher.guidance", "2", "--objective.k", "2"]
        return given

    return flags


def built(config: Path, *flags: str) -> tuple[Generator, Data]:
    parser = experiment.parser("")
    return train.build(parser.instantiate(parser.parse_args(["--config", str(config), *flags])), None)[1:]


def test_every_overlay_is_tried() -> None:
    assert {file.stem for file in FEWSTEP.glob("*.yaml")} == set(OVERLAYS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_student_trains_stops_goes_on_to_the_bit_and_draws(
    student: Callable[..., list[str]], tmp_path: Path, overlay: str
) -> None:
    assert_goes_on_to_the_bit(tmp_path / "config.yaml", *student(overlay), stopped=2)
    pipe = Pipeline.load(tmp_path / "run/model")
    picture = pipe(["zero"], [0])
    assert picture.shape == (1, 1, 8, 8)
    assert picture.isfinite().all()


@pytest.mark.parametrize(
    ("overlay", "kind", "relative"),
    [
        ("meanflow", "ddp", 1e-6),
        ("meanflow", "fsdp2", 1e-6),
        ("meanflow-teacher", "fsdp2", 1e-5),
        ("matching", "ddp", 1e-5),
        ("matching", "fsdp2", 1e-5),
        ("reflow-online", "ddp", 1e-5),  # the student begins as its teacher, so that its loss is a small difference
    ],
)
def test_two_processes_learn_as_one(
    student: Callable[..., list[str]], tmp_path: Path, overlay: str, kind: str, relative: float
) -> None:
    more = ["--objective.step", "0"] if overlay == "meanflow-teacher" else []  # the derivative
    assert_two_learn_as_one(tmp_path / "config.yaml", *student(overlay), *more, kind=kind, relative=relative)


def test_in_bfloat16_average_velocities_have_the_same_gradient_but_for_rounding(
    student: Callable[..., list[str]], tmp_path: Path
) -> None:
    generator, data = built(tmp_path / "config.yaml", *student("meanflow"))
    generator.network = stirred(generator.network, 0.05).train()
    batch = next(iter(data.val_dataloader()))
    t, u = torch.linspace(0.1, 0.9, len(batch.x0)), torch.zeros(len(batch.x0))
    found = []
    for half in (False, True):
        generator.network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            lesson = generator.lesson(batch, u)
            lesson.loss(generator.objective, generator.network, t, Interval.between(t / 3, t)).mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in generator.network.parameters() if p.grad is not None]))
    assert found[0].norm() > 0
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()


def test_the_batches_of_pairs_are_the_store_s_whatever_the_step(trained: Path, text: CLIPText) -> None:
    store = Store(trained / "pairs")
    data = Stored(text, Pixels(1, 0.3, 2.66), 0, store.source, 8, 0.0, held_out=4, teacher=str(trained / "run"))
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1, accumulate_grad_batches=1)  # type: ignore[assignment]
    x0, noise = store.latents(np.arange(40)).float().chunk(2, dim=1)
    partner = {tuple(x.flatten().tolist()): n for x, n in zip(x0, noise, strict=True)}
    batches = iter(data.train_dataloader())
    for _ in range(9):  # two epochs
        batch = next(batches)
        for x, n in zip(batch.x0, batch.noise, strict=True):
            assert torch.equal(partner[tuple(x.flatten().tolist())], n)


def test_a_one_step_map_is_validated_where_it_is_learned(student: Callable[..., list[str]], tmp_path: Path) -> None:
    fit(tmp_path / "config.yaml", *student("distill"), "--run.steps", "3")
    told = [line for line in lines(tmp_path / "run") if "val/loss" in line][-1]
    assert len({value for key, value in told.items() if key.startswith("val/loss")}) == 1


def test_each_time_is_validated_once(
    student: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map in two steps has two times, each for half of the eight that are logged."""
    times, steps, loss, step = [], [], StepMap.loss, Generator.validation_step

    def seen(self: StepMap, model: object, x0: Tensor, noise: Tensor, t: Tensor, *rest: Any) -> Tensor:
        if not torch.is_grad_enabled():
            times.append(t[0].item())
        return loss(self, model, x0, noise, t, *rest)

    monkeypatch.setattr(StepMap, "loss", seen)
    monkeypatch.setattr(Generator, "validation_step", lambda self, batch: steps.append(1) or step(self, batch))
    fit(tmp_path / "config.yaml", *student("distill"), "--objective.k", "2", "--run.steps", "3")
    assert len(set(times)) == 2
    assert len(times) == 2 * len(steps) > 0
    last = [line for line in lines(tmp_path / "run") if "val/loss" in line][-1]
    losses = [value for key, value in sorted(last.items()) if key.startswith("val/loss_t")]
    assert losses == [losses[0]] * 4 + [losses[-1]] * 4
    assert losses[0] != losses[-1]


@pytest.mark.parametrize(("first", "then"), [("matching", "distill"), ("distill", "matching")])
def test_a_run_with_a_critic_and_one_without_do_not_continue_each_other(
    student: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture, first: str, then: str
) -> None:
    config = tmp_path / "config.yaml"
    fit(config, *student(first))
    branch = ["--run.folder", str(tmp_path / "branch"), "--run.steps", "12", "--from", str(tmp_path / "run")]
    assert "is a checkpoint of another network or training" in refused(capsys, config, *student(then), *branch)
    assert not (tmp_path / "branch").exists()


def test_reflow_learns_the_pairs_better_than_a_free_coupling_allows(
    student: Callable[..., list[str]], trained: Path, tmp_path: Path
) -> None:
    """At t = 1 the picture is known from the noise of a pair, and not known at all from noise that is drawn anew."""
    flags = [*student("reflow"), "--run.steps", "240", "--run.validate_every", "240", "--optimization.lr", "0.01"]
    fit(tmp_path / "config.yaml", *flags, "--ema.decay", "0.9", "--data.held_out", "1")
    pipe = Pipeline.load(tmp_path / "run/model")
    store = Store(trained / "pairs")
    x0, noise = store.latents(np.arange(40)).float().chunk(2, dim=1)
    captions = [store.captions(i)[0] for i in range(40)]
    drawn = pipe.integrate(noise, captions)
    others = pipe.integrate(noise.roll(1, 0), captions)
    error, free = ((x - x0).square().mean().item() for x in (drawn, others))
    assert pipe.sampling.steps == 1
    assert error < 0.7 * free


def test_a_student_of_a_guided_teacher_learns_its_output_at_the_given_scale(
    student: Callable[..., list[str]], trained: Path, tmp_path: Path
) -> None:
    generator, data = built(tmp_path / "config.yaml", *student("guidance"))
    teacher = Pipeline.load(trained / "run/model")
    stirred(teacher.network)  # so that guidance matters
    generator.teacher.pipe.network.load_state_dict(teacher.network.state_dict())
    batch = next(iter(data.val_dataloader()))
    u = torch.linspace(0, 1, len(batch.x0))
    t = torch.full_like(u, 0.6)
    loss = generator.lesson(batch, u).loss(generator.objective, generator.network, t)
    scale = 1 + 5 * u
    z = 0.4 * batch.x0 + 0.6 * batch.noise
    condition = Condition(batch.text, batch.pooled)
    null = teacher.condition([""])
    rows = []
    for i, w in enumerate(scale):
        guided = ClassifierFree(teacher.network, null, float(w))
        one = slice(i, i + 1)
        rows.append(guided(z[one], t[one], Condition(batch.text[one], batch.pooled[one])))
    with torch.no_grad():
        y = generator.network(z, t, condition._replace(guidance=scale))
        expected = (y - torch.cat(rows)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_no_part_of_what_is_trained_or_saved(
    student: Callable[..., list[str]], trained: Path, tmp_path: Path
) -> None:
    generator, _ = built(tmp_path / "config.yaml", *student("guidance"))
    before = Pipeline.load(trained / "run/model").network.state_dict()
    held = generator.teacher.pipe.network.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in held.items())
    own = {name.removeprefix("network.") for name in generator.state_dict() if not name.startswith("guard.")}
    assert own == set(generator.network.state_dict())


def test_the_critic_begins_as_the_teacher_learns_and_is_no_part_of_the_model(
    student: Callable[..., list[str]], trained: Path, tmp_path: Path
) -> None:
    config, flags = tmp_path / "config.yaml", student("matching")
    generator, _ = built(config, *flags)
    assert generator.critic is not None
    assert generator.critic is not generator.teacher.pipe.network
    assert_same(generator.critic.state_dict(), Pipeline.load(trained / "run/model").network.state_dict())
    weights = generator.named_weights()
    groups = generator.optimization.build(weights).param_groups
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    learning = {name: rates[id(weight)] for name, weight in weights.items() if weight.requires_grad}
    assert {rate for name, rate in learning.items() if name.startswith("critic.")} == {4 * 5e-4}
    assert {rate for name, rate in learning.items() if not name.startswith("critic.")} == {5e-4}
    fit(config, *flags)
    found = under(tmp_path / "run", "critic.")
    assert found.keys() == generator.critic.state_dict().keys()
    assert any(not torch.equal(found[name], tensor) for name, tensor in generator.critic.state_dict().items())
    assert {f"{name}.exp_avg" for name in learning} <= under(tmp_path / "run", "optimizer.").keys()
    assert Pipeline.load(tmp_path / "run/model").network.state_dict().keys() == found.keys()


def test_the_noise_of_matching_is_no_picture_s_own(student: Callable[..., list[str]], tmp_path: Path) -> None:
    """Not the noise that the student draws from, in training and in validation; the same whenever it is asked for."""
    generator, data = built(tmp_path / "config.yaml", *student("matching"))
    batch = next(iter(data.val_dataloader()))
    lesson, again = (generator.lesson(batch, torch.full((len(batch.x0),), 0.5)) for _ in range(2))
    assert isinstance(lesson, MatchedLesson)
    assert isinstance(again, MatchedLesson)
    assert torch.equal(lesson.fresh, again.fresh)
    assert torch.equal(lesson.noise, batch.noise)
    product = (lesson.fresh * lesson.noise).flatten(1).mean(1)
    assert product.abs().max() < 0.6  # 64 pixels: a deviation of 1/8
    assert lesson.fresh.std() == pytest.approx(1, abs=0.1)


def test_average_velocities_draw_with_one_evaluation(
    student: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fit(tmp_path / "config.yaml", *student("meanflow"))
    out = tmp_path / "evaluation"
    evaluate.main(["--model", str(tmp_path / "run"), "--steps", "1,2", "--per-digit", "7", "--out", str(out)])
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["sampler"], row["evaluations"]) for row in rows] == [("meanflow", 1.0), ("meanflow", 2.0)]
    pipe = Pipeline.load(tmp_path / "run/model")
    assert pipe.network.two_times
    assert not torch.equal(pipe(["zero"], [0]), pipe(["zero"], [0], sampling=experiment.Sampling(1, 1.0, "euler")))


def test_another_teacher_s_or_codec_s_pairs_are_refused_by_name(
    student: Callable[..., list[str]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, flags = tmp_path / "config.yaml", student("reflow")
    fit(config, "--run.folder", str(tmp_path / "other"), "--run.seed", "3")
    told = refused(capsys, config, *flags, "--data.teacher", str(tmp_path / "other"))
    assert "was encoded otherwise: teacher: there" in told
    assert "codec.shift_factor: there 0.3, here 0.2" in refused(capsys, config, *flags, "--codec.shift", "0.2")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_text_encoders_is_refused(
    student: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(ROOT / "assets/digits/text", tmp_path / "text")
    file = tmp_path / "text/text_encoder/model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    flags = [*student("guidance"), "--text.folder", str(tmp_path / "text")]
    assert "has other text encoders" in refused(capsys, tmp_path / "config.yaml", *flags)


def test_a_store_of_no_pairs_is_no_coupling(
    student: Callable[..., list[str]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(trained / "pairs", tmp_path / "plain")
    replan(tmp_path / "plain", latents="mean")
    told = refused(capsys, tmp_path / "config.yaml", *student("reflow"), "--data.store", str(tmp_path / "plain"))
    assert 'latents: there "mean", here "pair"' in told


@pytest.mark.parametrize(
    ("overlay", "flags", "message"),
    [
        ("reflow", ["--network.path", "nowhere"], "nowhere"),
        ("reflow", ["--data.teacher", "nowhere"], "nowhere is no model folder"),
        ("reflow", ["--data.store", "nowhere"], "there is no store at nowhere"),
        ("guidance", ["--teacher.model", "nowhere"], "nowhere is no model folder"),
        ("reflow", ["--data.teacher", "null"], "holds pairs: set data.teacher to the model folder that made them"),
        ("guidance", ["--objective.target", "V"], "learned another target: Velocity, not V"),
        ("guidance", ["--lora.rank", "2"], "leave out network.guidance_embeds"),
        ("guidance", ["--teacher.guidance", "[3.0, 1.0]"], "or two that rise"),
        ("guidance", ["--teacher.guidance", "3.0"], "need each other"),
        ("guidance", ["--codec.shift", "0.2"], "has another codec"),
        ("reflow-online", ["--teacher.model", "null"], "only a LoRA can learn without one"),
        ("reflow-online", ["--teacher.pairs.sampler", "ddpm"], "ddpm draws noise on the way: take euler"),
        ("reflow-online", ["--teacher.pairs.sampler", "meanflow"], "needs a network of two times"),
        ("reflow-online", ["--teacher.pairs.steps", "0"], "steps must be at least 1"),
        ("reflow-online", ["--teacher.pairs.uses", "0"], "uses must be at least 1"),
        ("reflow-online", ["--teacher.pairs.uses", "3"], "must divide the 8 pictures of each micro-batch"),
        ("reflow-online", ["--teacher.guidance", "[1.0, 3.0]"], "need each other"),
        ("reflow", ["--teacher.model", "{run}", "--teacher.pairs.steps", "2"], "the data are pairs already"),
        ("matching", ["--objective", "Objective"], "matching needs objective.class_path StepMap"),
        ("matching", ["--teacher.pairs.steps", "2"], "matching and teacher.pairs exclude each other"),
        ("matching", ["--teacher.guidance", "[1.0, 3.0]"], "matching needs one teacher.guidance"),
        ("matching", ["--lora.rank", "2", "--lora.targets", "[image.qkv]", "--network.path", "{run}/model"],
         "trains whole networks and no LoRA"),
        ("matching", ["--teacher.model", "null"], "only a LoRA can learn without one"),
        ("matching", ["--optimization.groups", "[{{pattern: ^judge, lr: 2.0}}]"], "no trained weight's name"),
        ("meanflow", ["--network.two_times", "false"], "set network.two_times"),
        ("meanflow", ["--objective.path", "Cosine"], "Option 'path' is not accepted"),
        ("meanflow", ["--objective.share", "2"], "0 < share <= 1"),
        ("meanflow", ["--objective.step", "1"], "0 <= step < 1"),
        ("meanflow", ["--network.two_times", "false", "--objective", "Objective"],
         "sampler meanflow needs a network of two times"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    student: Callable[..., list[str]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, overlay: str,
    flags: list[str], message: str,
) -> None:  # fmt: skip
    given = [flag.format(run=trained / "run") for flag in flags]
    told = refused(capsys, tmp_path / "config.yaml", *student(overlay), *given)
    assert message in told
    assert not (tmp_path / "run").exists()
