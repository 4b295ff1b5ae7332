"""The planner's count of all networks of a training, against the first step of that training."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from finetuned import FINETUNE, LORA, settings
from PIL import Image
from test_training_residual import saved
from tiny import pipeline as released_pipeline
from torch import nn
from trials import ROOT, small

import encode
import train
from benchmarks.footprint import Job, memory, step
from benchmarks.plan import arguments, job_of, main
from data.text.clip import CLIPText
from engine.ema import tensors
from engine.flops import forward_flops
from engine.meter import Meter
from flow.objective import Objective
from flow.target import X0
from mmdit import checkpoint
from mmdit.network import Condition
from pipeline import Pipeline
from training.generator import Generator
from training.reader import Reader, of_network

WORDS, PICTURE = ROOT / "configs/sd3/new-words.yaml", ROOT / "configs/picture"
ONE_STEP = ["--run.steps", "1", "--run.validate_every", "1", "--optimization.warmup", "0", "--grid.prompts", "[]"]
ONE_GPU = ["--gpus", "1", "--side", "64"]
ALL_CAPTIONS = ["--data.caption_dropout", "0"]
MATCHING = ["--teacher.matching", "{}", "--objective", "StepMap", "--objective.k", "3"]
JUDGED = ["--judgement.rewards", "[{class_path: Ink}]", "--judgement.group", "2", "--judgement.pairs.steps", "3"]
ENCODERS = "[text_encoder,text_encoder_2]"


def planned(*flags: str) -> Job:
    return job_of(arguments().parse_args([*flags, *ONE_STEP, *ONE_GPU]))


def learned(*flags: str) -> Generator:
    """The module of a training, after its first step."""
    found: list[Generator] = []
    build = train.build

    def kept(*given: Any) -> Any:
        made = build(*given)
        found.append(made[1])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", kept)
        train.main(["fit", *flags, *ONE_STEP])
    return found[0]


def held_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights and buffers of modules, shared ones once."""
    found = {x.untyped_storage()._cdata: x for module in modules for x in tensors(module).values()}
    return sum(x.untyped_storage().nbytes() for x in found.values())


def assert_held(job: Job, generator: Generator, *frozen: nn.Module) -> None:
    """The plan's bytes of weights and averages, of gradients and of moments are those of the training."""
    needed = memory(job)
    learners = [generator.network, *([generator.critic] if generator.critic else [])]
    weights = [p for network in learners for p in network.parameters() if p.requires_grad]
    (optimizer,) = generator.trainer.optimizers
    moments = [x for own in optimizer.state.values() for name, x in own.items() if name.startswith("exp_avg")]
    assert needed.gradients == sum(x.numel() * x.element_size() for x in weights)
    assert needed.optimizer == sum(x.numel() * x.element_size() for x in moments)
    found = held_bytes(*learners, *generator.ema.copies, *frozen)
    assert needed.parameters + needed.others + needed.positions + needed.averages == found


def worked(generator: Generator) -> float:
    """FLOPs of one picture of the first step, as the training counts them."""
    (meter,) = (callback for callback in generator.trainer.callbacks if isinstance(callback, Meter))
    ((shapes, cost),) = meter.cost.known.items()  # type: ignore[attr-defined]
    assert cost.images == shapes[0][0]
    return cost.flops / cost.images


@pytest.fixture
def config(tmp_path: Path, text: CLIPText) -> list[str]:
    return ["--config", str(small(tmp_path))]


@pytest.fixture
def tokens(text: CLIPText) -> list[str]:
    return ["--tokens", str(text.encode([""]).tokens.shape[1])]


@pytest.mark.parametrize(
    "flags",
    [
        ["--teacher.guidance", "2"],
        ["--teacher.pairs.steps", "3", "--teacher.pairs.uses", "2", *ALL_CAPTIONS],
        MATCHING,
    ],
    ids=["output", "pairs", "matching"],
)
def test_a_teacher_and_its_critic(config: list[str], tokens: list[str], trained: Path, flags: list[str]) -> None:
    flags = [*config, "--teacher.model", str(trained), *flags]
    job, generator = planned(*flags, *tokens), learned(*flags)
    assert generator.teacher
    assert_held(job, generator, generator.teacher.pipe.network)
    assert step(job).work == worked(generator)


@pytest.mark.parametrize(
    "flags", [["--judgement.loss", "DPO"], ["--judgement.loss", "NFT", "--judgement.guidance", "2"]], ids=["DPO", "NFT"]
)
def test_a_judge_and_its_reference(config: list[str], tokens: list[str], trained: Path, flags: list[str]) -> None:
    flags = [*config, "--judgement.reference", str(trained), *JUDGED, *ALL_CAPTIONS, *flags]
    job, generator = planned(*flags, *tokens), learned(*flags)
    assert generator.judge
    assert generator.judge.reference
    assert_held(job, generator, generator.judge.reference.pipe.network)
    assert step(job).work == worked(generator)


def test_a_regressor(config: list[str], tokens: list[str], tmp_path: Path, text: CLIPText) -> None:
    overlays = [word for name in ("deblurring", "residual") for word in ("--config", str(PICTURE / f"{name}.yaml"))]
    model = saved(tmp_path / "regressor", text, Objective(target=X0()))
    flags = [*config, *overlays, "--residual.regressor", model]
    job, generator = planned(*flags, *tokens), learned(*flags)
    assert generator.pipeline.regressor
    assert_held(job, generator, generator.pipeline.regressor.network)
    assert step(job).work == worked(generator)


def test_the_passes_of_an_objective(config: list[str], tokens: list[str]) -> None:
    flags = [*config, "--objective", "MeanFlow", "--objective.share", "0.5", "--network.two_times", "true"]
    job, generator = planned(*flags, *tokens), learned(*flags)
    assert_held(job, generator)
    assert step(job).work == worked(generator) == pytest.approx(4 * step(job).flops, rel=0.1)


# ---- text encoders that learn


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "base"
    released_pipeline("sd35_medium", folder)
    return folder


@pytest.fixture(scope="module")
def shape(base: Path) -> Path:
    """The config of the base's network, without its weights."""
    network = checkpoint.load(base)
    names = ("in_channels", "patch_size", "depth", "width", "heads", "text_dim", "pooled_dim", "qk_norm", "sample_size",
             "pos_embed_max_size", "dual_attention_layers")  # fmt: skip
    sizes = {name: getattr(network, name) for name in names}
    given = {name: list(size) if isinstance(size, tuple) else size for name, size in sizes.items()}
    file = base.parent / "shape.yaml"
    file.write_text(yaml.safe_dump({"network": {"class_path": "MMDiT", "init_args": given}}))
    return file


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    (folder / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"pictures/{i}.png")
        (folder / f"pictures/{i}.txt").write_text(f"a <toy> and {i}")
    source = ["--encode.source.path", str(folder / "pictures"), "--encode.side", "32", "--encode.step", "16"]
    encode.main([*settings(base, folder / "store", (FINETUNE,), folder, 4), *source, "--encode.text", "captions",
                 "--encode.duplicates", "null"])  # fmt: skip
    return folder / "store"


@pytest.mark.parametrize(
    ("configs", "flags"),
    [
        ((FINETUNE, WORDS), []),
        ((FINETUNE, LORA), ["--lora.rank", "2", "--lora.text_encoders", ENCODERS]),
        ((FINETUNE, LORA, WORDS), ["--lora.rank", "2", "--lora.text_encoders", "[text_encoder_3]"]),
    ],
    ids=["words", "updates", "both"],
)
def test_text_encoders(
    base: Path, store: Path, shape: Path, tmp_path: Path, configs: tuple[Path, ...], flags: list[str]
) -> None:
    flags = [*settings(base, store, configs, tmp_path / "run", 1), "--text.init_args.max_sequence_length", "16", *flags]
    job, generator = planned(*flags, "--config", str(shape), "--frozen", "float32"), learned(*flags)
    assert isinstance(generator.network, Reader)
    assert_held(job, generator)
    network = of_network(generator.network)
    (meter,) = (callback for callback in generator.trainer.callbacks if isinstance(callback, Meter))
    (((images, *sides), text),) = meter.cost.known  # type: ignore[attr-defined]
    condition = Condition(torch.zeros(text), torch.zeros(images, network.pooled_dim))
    once = forward_flops(network, torch.zeros(images, *sides), torch.zeros(images), condition) / images
    assert 1.8 * once < worked(generator) < 2.3 * once  # not three: frozen weights have no gradients, but the text has


# ---- on more than one GPU, and what is printed


def test_only_weights_that_learn_are_divided(config: list[str], trained: Path) -> None:
    flags = [*config, "--teacher.model", str(trained), *MATCHING]
    one, parts = (memory(planned(*flags, *more)) for more in ([], ["--strategy.kind", "fsdp2"]))
    assert one.others > 0
    eight = memory(job_of(arguments().parse_args([*flags, "--strategy.kind", "fsdp2", "--gpus", "8", "--side", "64"])))
    assert (eight.others, eight.gradients) == (one.others, one.gradients / 8)
    assert eight.gathered > parts.gathered == 0


def test_each_learning_pass_keeps_its_activations(config: list[str], trained: Path) -> None:
    """A critic's beside the student's, both branches of a guided model, and both pictures of a choice."""
    matching, nft = ["--teacher.model", str(trained), *MATCHING], [*JUDGED, "--judgement.guidance", "2"]
    choices = ["--judgement.loss", "DPO", "--judgement.reference", str(trained)]
    plans = [planned(*config, *more) for more in ([], matching, nft, choices)]
    once, critic, guided, chosen = (memory(plan).activations for plan in plans)
    given = 8 * 4 * (3 * 64 + 64 * 154 + 64)  # the batch itself, once
    assert critic - given == guided - given == chosen - given == 2 * (once - given)
    three_and_the_reference = 2 * (3 + 1)  # for two pictures
    assert step(plans[3]).work == pytest.approx(three_and_the_reference * step(plans[3]).flops, rel=0.1)


def test_a_frozen_network_keeps_its_stored_type(config: list[str], tmp_path: Path, pipe: Pipeline) -> None:
    half = copy.deepcopy(pipe)
    half.network.half()
    half.save(tmp_path / "half")
    assert memory(planned(*config, "--teacher.model", str(tmp_path / "half"))).others == held_bytes(half.network)


def test_the_plan_says_which_networks_it_counts(
    config: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*config, "--teacher.model", str(trained), *MATCHING, "--teacher.guidance", "2", *ONE_GPU]
    main(flags)
    said = capsys.readouterr().out
    assert "teacher of 13,700 parameters: a picture passes it 0 × with a backward pass and 2 × without" in said
    assert "critic of 13,700 parameters: a picture passes it 1 × with a backward pass and 0 × without" in said
    assert "frozen weights of other networks" in said
    main([*flags, "--json"])
    roles = json.loads(capsys.readouterr().out)["roles"]
    assert roles[0] == {"name": "network", "learned": 1, "frozen": 0}
    assert sum(role["frozen"] for role in roles if role["name"] == "network") == 2  # walked


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher.model", "runs/none"], "runs/none is no model folder"),
        (["--judgement.loss", "DPO"], "judgement.reference is missing"),
    ],
)
def test_faults_are_one_line(
    config: list[str], flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*config, *flags, *ONE_GPU])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert words in said
