"""Trainings from judgement: what is drawn, judged and learned; resume, ranks, bad input."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from networks import stirred
from torch import Tensor
from trials import (
    ROOT,
    assert_goes_on_to_the_bit,
    assert_near_logs,
    assert_two_learn_as_one,
    ended,
    fit,
    lines,
    logged,
    refused,
    small,
    state,
)

import train
from data.batch import Batch
from data.latents import Pixels
from data.text.clip import CLIPText
from engine.flops import forward_flops, training_flops
from engine.strategy import Strategy
from flow.objective import Objective
from flow.preference import DPO, NFT, Preference
from metrics.distribution import frechet_distance
from metrics.features import DigitsJudge
from mmdit.model import MMDiT
from mmdit.network import Condition
from pipeline import Pipeline
from pipeline.sampling import Sampling
from storage.models import find_model
from training import experiment
from training.cost import StepCost
from training.generator import Generator
from training.judged import DrawingModel, JudgedLesson, Judgement
from training.rewards import Ink
from training.teacher import Pairs, Teacher, TeacherModel

CAPTIONS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture
def flags(trained: Path, tmp_path: Path) -> Callable[..., list[str]]:
    small(tmp_path)

    def given(overlay: str) -> list[str]:
        content = yaml.safe_load((ROOT / f"configs/preference/{overlay}.yaml").read_text())
        small_run = ["--run.steps", "6", "--run.validate_every", "3", "--optimization.warmup", "2"]
        model = ["--network.path", str(trained), "--judgement.reference", str(trained)]
        if overlay == "nft":  # digits in the place of shapes
            content["data"] = {"init_args": {"batch_size": 16, "caption_dropout": 0.0}}
            content["judgement"]["rewards"] = [{"class_path": "RightDigit"}, {"class_path": "Ink"}]
            content["judgement"]["features"] = "judge:assets/digits/judge"
        file = tmp_path / f"{overlay}.yaml"
        file.write_text(yaml.safe_dump(content))
        return ["--config", str(file), *small_run, *model, "--judgement.group", "4", "--judgement.pairs.steps", "3"]

    return given


@pytest.fixture
def pipe(text: CLIPText) -> Pipeline:
    network = MMDiT(1, depth=1, width=32, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8)
    return Pipeline(stirred(network, 0.1), Objective(), Pixels(1, 0.3, 2.66), text)


def judge_of(pipe: Pipeline, loss: Preference, **more: Any) -> DrawingModel:
    judge = DrawingModel(Judgement([Ink()], loss, **({"group": 4, "pairs": Pairs(3)} | more)), pipe.codec, None)
    judge.follow(pipe, torch.device("cpu"), Strategy())
    return judge


def noises(count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(count, 1, 8, 8, generator=draw), torch.randn(count, 1, 8, 8, generator=draw)


def lesson_of(judge: DrawingModel, pipe: Pipeline, noise: Tensor, fresh: Tensor) -> JudgedLesson:
    condition = pipe.condition(CAPTIONS)
    batch = Batch(0, np.arange(8), noise, noise, condition.text, condition.pooled, prompts=CAPTIONS)
    return judge.lesson(batch, fresh)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("uses", [1, 2])
@torch.no_grad()
def test_a_group_is_drawn_from_its_first_caption_and_judged(pipe: Pipeline, guidance: float, uses: int) -> None:
    judge = judge_of(pipe, NFT(clip=1.0), guidance=guidance, pairs=Pairs(3, uses=uses))
    noise, fresh = noises(8)
    lesson = lesson_of(judge, pipe, noise, fresh)
    rows = torch.arange(8).view(-1, uses, 4)
    for group in rows:
        first = int(group[0, 0])
        wanted = pipe.integrate(noise[group[0]], [CAPTIONS[first]] * 4, Sampling(3, guidance))
        ink = pipe.codec.decode(wanted).mean((1, 2, 3))
        worth = 0.5 + 0.5 * ((ink - ink.mean()) / ink.std(correction=0)).clamp(-1, 1)
        for use in group:
            torch.testing.assert_close(lesson.x0[use], wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(lesson.worth[use], worth, rtol=1e-3, atol=1e-3)
            assert all(torch.equal(row, pipe.condition(CAPTIONS).text[first]) for row in lesson.condition.text[use])
    assert torch.equal(lesson.noise, fresh)


@torch.no_grad()
def test_pairs_hold_the_better_picture_first_and_share_noise_and_time(pipe: Pipeline) -> None:
    judge = judge_of(pipe, DPO())
    noise, fresh = noises(8)
    lesson = lesson_of(judge, pipe, noise, fresh)
    ink = pipe.codec.decode(lesson.x0).mean((1, 2, 3))
    assert (ink[::2] > ink[1::2]).all()
    assert ink[0] == ink[:4].max()
    assert ink[1] == ink[:4].min()
    assert torch.equal(lesson.noise, fresh[::2].repeat_interleave(2, 0))
    t = torch.arange(8.0).expand(4, -1)
    assert judge.twins(t, 1)[0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert judge_of(pipe, NFT()).twins(t, 1) is t


def test_guidance_is_part_of_the_model_that_nft_learns(pipe: Pipeline) -> None:
    """At the old policy the loss is that of the guided output, and both branches get a gradient."""
    judge = judge_of(pipe, NFT(), guidance=3.0)
    condition, (noise, fresh) = pipe.condition(CAPTIONS), noises(8)
    lesson = lesson_of(judge, pipe, noise, fresh)
    t = torch.full((8,), 0.6)
    loss = lesson.loss(pipe.objective, pipe.network, t)
    z, y = pipe.objective.point_and_target(lesson.x0, fresh, t, None, None)
    null = condition.null(pipe.condition([""]))
    stacked = Condition._make(
        None if own is None else torch.cat([empty.expand_as(own), own])
        for empty, own in zip(null, lesson.condition, strict=True)
    )
    plain, told = pipe.network(torch.cat([z, z]), torch.cat([t, t]), stacked).chunk(2)
    off = 0.6 * (plain + 3 * (told - plain) - y)
    torch.testing.assert_close(loss, off.square().mean((1, 2, 3)) / off.abs().mean((1, 2, 3)), rtol=1e-3, atol=1e-4)
    assert judge.watched["moved"] < 1e-9


@pytest.mark.parametrize("overlay", ["dpo", "nft"])
def test_it_stops_goes_on_to_the_bit_and_keeps_the_model_of_the_best_reward(
    flags: Callable[..., list[str]], tmp_path: Path, overlay: str
) -> None:
    assert_goes_on_to_the_bit(tmp_path / "config.yaml", *flags(overlay), stopped=2)
    found = logged(tmp_path / "run")
    rewards = [entry["val/reward"] for entry in found.values() if "val/reward" in entry]
    drifts = [entry["val/drift"] for entry in found.values() if "val/drift" in entry]
    assert len(rewards) == len(drifts) == 2
    assert min(drifts) > 0
    assert state(tmp_path / "run")["numbers"]["best"] == pytest.approx(-max(rewards))
    told = [entry for entry in found.values() if "train/reward" in entry]
    assert told
    assert all(("train/accuracy" in entry) == (overlay == "dpo") for entry in told)
    assert Pipeline.load(find_model(tmp_path / "run"))(["zero"], [0]).isfinite().all()


def test_a_run_that_names_no_loss_learns_by_nft_and_goes_on(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = [*flags("nft"), "--run.steps", "3"]
    content = yaml.safe_load(Path(config[1]).read_text())
    del content["judgement"]["loss"]
    Path(config[1]).write_text(yaml.safe_dump(content))
    fit(tmp_path / "config.yaml", *config)
    fit(tmp_path / "config.yaml", *config)
    assert "is trained already" in capsys.readouterr().out
    assert type(Judgement().preference) is NFT


@torch.no_grad()
def test_the_validation_sees_how_far_the_pictures_move_and_how_varied_they_are(pipe: Pipeline) -> None:
    """Against the reference's pictures of the same captions and noise, on the judge's features, from sums of parts."""
    other = copy.deepcopy(pipe)
    stirred(other.network, 0.05)
    judgement = Judgement([Ink()], group=4, guidance=2.0, pairs=Pairs(3), features="judge:assets/digits/judge")
    judge = DrawingModel(judgement, pipe.codec, TeacherModel(Teacher(Path("reference")), other))
    judge.follow(pipe, torch.device("cpu"), Strategy())
    noise = torch.randn(80, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    captions = 10 * CAPTIONS
    values: dict[str, Tensor] = {}
    for rows in (np.arange(50), np.arange(50, 80)):
        texts = [captions[i] for i in rows]
        condition = pipe.condition(texts)
        batch = Batch(0, rows, noise[rows], noise[rows], condition.text, condition.pooled, prompts=texts)
        for _ in range(2):  # a second validation finds the reference's pictures drawn
            found = judge.verdict(batch, condition)
        for name, value in found.items():
            values[name] = values.get(name, 0) + value.double().sum(0) / 80
    judge.score(values, 80)
    network = DigitsJudge("assets/digits/judge")
    mine, theirs = (
        network(p.codec.decode(p.integrate(noise, captions, Sampling(3, 2.0)))).pooled for p in (pipe, other)
    )
    assert values["fd"].item() == pytest.approx(frechet_distance(mine, theirs), rel=1e-3)
    assert values["fd"] > 1e-3
    assert values["variety"].item() == pytest.approx((mine.var(0).sum() / theirs.var(0).sum()).item(), rel=1e-4)
    assert set(values) == {"reward", "reward_std", "fd", "variety"}
    assert set(judge.theirs) == {np.arange(50).tobytes(), np.arange(50, 80).tobytes()}


def test_a_model_that_learns_nothing_stays_at_its_reference(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    given = [*flags("nft"), "--optimization.lr", "1e-12"]
    fit(tmp_path / "config.yaml", *given)
    (*_, last) = [entry for entry in lines(tmp_path / "run") if "val/fd" in entry]
    assert abs(last["val/fd"]) < 1e-4
    assert last["val/variety"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("overlay", "kind"), [("dpo", "ddp"), ("nft", "ddp"), ("nft", "fsdp2")])
def test_two_processes_learn_as_one(flags: Callable[..., list[str]], tmp_path: Path, overlay: str, kind: str) -> None:
    """Also with different numbers of pairs of unequal reward. The drift is a difference of nearly equal outputs."""
    given = flags(overlay)
    if overlay == "dpo":
        given += ["--judgement.rewards", '[{"class_path": "Function", "init_args": {"function": "trials.bright"}}]']
    assert_two_learn_as_one(tmp_path / "config.yaml", *given, kind=kind, relative=5e-6)
    told = [entry["train/accuracy"] for entry in lines(tmp_path / "run") if "train/accuracy" in entry]
    assert overlay == "nft" or max(told) > 0


@pytest.mark.parametrize("overlay", ["dpo", "nft"])
def test_a_batch_in_two_parts_logs_what_the_whole_does(
    flags: Callable[..., list[str]], tmp_path: Path, overlay: str
) -> None:
    config, given = tmp_path / "config.yaml", flags(overlay)
    fit(config, *given, "--run.folder", str(tmp_path / "one"))
    fit(config, *given, "--strategy.accumulate_grad_batches", "2")
    assert_near_logs(tmp_path / "run", tmp_path / "one", 1e-5)


def test_the_reference_of_a_lora_is_its_base(trained: Path, flags: Callable[..., list[str]], tmp_path: Path) -> None:
    given = [
        *flags("dpo"),
        "--judgement.reference",
        "null",
        "--lora.rank",
        "2",
        "--lora.targets",
        '["image.qkv"]',
        "--network.path",
        str(trained / "model"),
    ]
    fit(tmp_path / "config.yaml", *given)
    drifts = [entry["val/drift"] for entry in lines(tmp_path / "run") if "val/drift" in entry]
    assert drifts[-1] > 0
    parser = experiment.parser("")
    config = parser.instantiate(parser.parse_args(["--config", str(tmp_path / "config.yaml"), *given]))
    generator = train.build(config, str(trained / "model"))[1]
    assert generator.judge
    assert generator.judge.reference
    assert generator.judge.reference.pipe.network is generator.network


def test_more_of_the_reward_is_drawn_after_training(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """From a model of six steps, whose pictures are grey noise, twenty steps of NFT raise the ink."""
    given = [*flags("nft"), "--judgement.rewards", '[{"class_path": "Ink"}]', "--optimization.lr", "2e-3"]
    fit(tmp_path / "config.yaml", *given, "--run.steps", "20", "--run.validate_every", "10")
    rewards = [entry["train/reward"] for entry in lines(tmp_path / "run") if "train/reward" in entry]
    assert rewards[-1] > rewards[0] + 0.02


@pytest.mark.parametrize("loss", [NFT(), DPO()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(("guidance", "uses"), [(1.0, 1), (3.0, 2)])
def test_the_cost_counts_drawing_and_comparing(pipe: Pipeline, loss: Preference, guidance: float, uses: int) -> None:
    judge = judge_of(pipe, loss, guidance=guidance, pairs=Pairs(3, uses=uses))
    judge.reference = TeacherModel(Teacher(Path("first")), pipe)
    z, condition = torch.zeros(8, 1, 8, 8), Condition(torch.zeros(8, 5, 64), torch.zeros(8, 64))
    cost = StepCost(pipe.network, Objective(), None, None, judge)(
        Batch(0, np.arange(8), z, z, condition.text, condition.pooled)
    )
    branches = 2 if guidance > 1 else 1
    compared = 1 if isinstance(loss, DPO) else branches
    learned = 1 if isinstance(loss, DPO) else branches
    once, whole = (count(pipe.network, z, torch.zeros(8), condition) for count in (forward_flops, training_flops))
    assert cost.flops == round(learned * whole + (compared + branches * 3 / uses) * once)


@pytest.mark.parametrize(
    ("overlay", "more", "message"),
    [
        ("dpo", ["--judgement.group", "1"], "group must be at least 2"),
        ("dpo", ["--judgement.group", "3"], "group must be even, since DPO compares pairs, got 3"),
        ("dpo", ["--judgement.group", "6"], "6 must divide the 8 pictures of each micro-batch"),
        ("dpo", ["--judgement.loss.beta", "0"], "DPO.beta must be > 0"),
        ("dpo", ["--judgement.reference", "null"], "DPO compares with a model that does not learn: set"),
        ("dpo", ["--judgement.reference", "nowhere"], "nowhere is no model folder"),
        ("nft", ["--judgement.features", "judge:nowhere"], "nowhere"),
        ("nft", ["--judgement.features", "colour"], "features are shapes:FOLDER"),
        ("nft", ["--judgement.reference", "null"],
         "judgement.features compare with the reference's pictures"),
        ("dpo", ["--judgement.rewards", "[]"], "rewards are missing: name at least one"),
        ("dpo", ["--data.caption_dropout", "0.1"], "10% are dropped: set the dropouts"),
        ("dpo", ["--judgement.guidance", "-1"], "guidance must be at least 0"),
        ("dpo", ["--judgement.pairs.sampler", "ddpm"], "ddpm draws noise on the way: take euler"),
        ("dpo", ["--objective", "StepMap"], "StepMap learns no output at a point"),
        ("dpo", ["--objective.target", "V"], "learned another target: Velocity, not V"),
        ("dpo", ["--teacher.model", "{run}"], "judgement and teacher exclude each other"),
        ("nft", ["--judgement.rewards", '[{{"class_path": "RightDigit", "init_args": {{"judge": "nowhere"}}}}]'],
         "nowhere/config.json is missing"),
        ("nft", ["--judgement.rewards", '[{{"class_path": "Nothing"}}]'], "Nothing"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    flags: Callable[..., list[str]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, overlay: str,
    more: list[str], message: str,
) -> None:  # fmt: skip
    told = refused(capsys, tmp_path / "config.yaml", *flags(overlay), *[flag.format(run=trained) for flag in more])
    assert message in told
    assert not (tmp_path / "run").exists()


def test_a_caption_that_the_judge_cannot_read_ends_the_training_in_one_line(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [*flags("nft"), "--judgement.rewards", '[{"class_path": "RightShapes"}]']
    told = ended(capsys, tmp_path / "config.yaml", *given)
    assert "RightShapes: the caption" in told
    assert "none of the shapes'" in told


def test_another_reference_is_not_the_same_run(
    flags: Callable[..., list[str]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, given = tmp_path / "config.yaml", flags("dpo")
    other = tmp_path / "reference"
    shutil.copytree(trained / "model", other)
    given = [*given, "--judgement.reference", str(other)]
    fit(config, *given, "--run.steps", "3")
    fit(config, "--run.folder", str(tmp_path / "another"), "--run.seed", "5")
    shutil.rmtree(other)
    shutil.copytree(tmp_path / "another/model", other)
    assert str(other) in refused(capsys, config, *given)


def test_the_main_average_draws_and_both_pictures_of_a_pair_have_one_time(
    flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, networks = [], []
    learn, follow, draw = DPO.loss, DrawingModel.follow, Generator.draw_samples

    def learned(self: DPO, *given: Any) -> Any:
        times.append(given[3].t)
        return learn(self, *given)

    def followed(self: DrawingModel, pipe: Pipeline, device: torch.device, strategy: Strategy) -> None:
        networks.append(pipe.network)
        follow(self, pipe, device, strategy)

    def sampled(self: Generator) -> None:
        networks.append(self.ema.main)
        draw(self)

    monkeypatch.setattr(DPO, "loss", learned)
    monkeypatch.setattr(DrawingModel, "follow", followed)
    monkeypatch.setattr(Generator, "draw_samples", sampled)
    fit(tmp_path / "config.yaml", *flags("dpo"))
    assert len(times) == 6
    assert all(torch.equal(t[::2], t[1::2]) and len(t.unique()) == len(t) // 2 for t in times)
    assert networks[0] is networks[1]


def test_a_function_of_the_user_is_a_reward(
    flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain one, without annotations, by its import path."""
    (tmp_path / "my_rewards.py").write_text("def dark(pictures, captions):\n    return -pictures.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = '[{"class_path": "Function", "init_args": {"function": "my_rewards.dark", "weight": 2}}]'
    fit(tmp_path / "config.yaml", *flags("dpo"), "--judgement.rewards", reward)
    assert all(-2 <= entry["val/reward"] < 0 for entry in lines(tmp_path / "run") if "val/reward" in entry)
