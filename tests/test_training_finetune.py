"""Training from a released model, in full and by low-rank updates, with the configs that are shipped for it."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from finetuned import FEWSTEP, FINETUNE, LORA, NFT, ROOT, faulty_after, fit, settings
from safetensors.torch import load_file
from trials import assert_same, lines, state

import encode
import sample
from flow.guidance import ClassifierFree
from flow.objective import Estimate
from mmdit import checkpoint, lora
from mmdit.network import Condition
from pipeline import LoadOptions, Pipeline
from pipeline.__main__ import main
from pipeline.folder import learned
from pipeline.sampling import Sampling
from training import experiment
from training.build import build, lora_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "base"
    tiny.pipeline("sd35_medium", folder)
    return folder


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of scenes, encoded by the released model's own VAE and text encoders."""
    folder = tmp_path_factory.mktemp("store") / "scenes"
    source = ["--encode.source", "data.shapes.Shapes", "--encode.source.count", "12", "--encode.side", "32"]
    encode.main([*settings(base, folder, (FINETUNE,), folder.parent, 4), *source, "--encode.step", "16"])
    return folder


def picture(pipe: Pipeline) -> torch.Tensor:
    return pipe(["a seven"], [0], sampling=replace(pipe.sampling, steps=2, guidance=4.5), height=64, width=64)


def theirs(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
    return pipe("a seven", num_inference_steps=2, guidance_scale=4.5, height=64, width=64,
                generator=torch.Generator().manual_seed(0), output_type="pt").images  # fmt: skip


def test_all_of_a_released_model_is_trained_and_opens_in_diffusers(base: Path, store: Path, tmp_path: Path) -> None:
    fit(base, store, tmp_path / "run")
    trained = Pipeline.load(tmp_path / "run/model")
    before, after = checkpoint.load(base).state_dict(), trained.network.state_dict()
    frozen = {"positions", "blocks.2.text.norm_q.weight"}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert trained.sampling.spacing == "flow_match"
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "run/model")
    pipe.set_progress_bar_config(disable=True)
    assert (theirs(pipe) - picture(trained)).abs().max() < 1 / 255
    weights = tmp_path / "run/model/text_encoder_3/model.safetensors"
    assert weights.stat().st_ino == (base / "text_encoder_3/model.safetensors").stat().st_ino  # not copied
    assert len(list((tmp_path / "run/samples").glob("*.png"))) == 2


def test_low_rank_updates_are_trained_here_and_draw_the_same_in_diffusers(
    base: Path, store: Path, tmp_path: Path
) -> None:
    fit(base, store, tmp_path / "run", "--lora.rank", "4", "--optimization.lr", "0.1", configs=(FINETUNE, LORA))
    assert not (tmp_path / "run/model").exists()
    ours = Pipeline.load(tmp_path / "run/lora")
    assert ours.sampling.spacing == "flow_match"
    drawn = picture(ours)
    assert (drawn - picture(Pipeline.load(base))).abs().max() > 0.02
    again = Pipeline.load(base, LoadOptions(lora=(str(tmp_path / "run"),)))
    assert torch.equal(drawn, picture(again))
    pipe = StableDiffusion3Pipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "run/lora")
    assert (theirs(pipe) - drawn).abs().max() < 1 / 255
    sizes = {name: tensor.shape for name, tensor in load_file(tmp_path / "run/lora" / lora.FILE).items()}
    assert sizes["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] == (4, 64)


def test_settings_for_sd35_are_those_of_their_source(base: Path, store: Path, tmp_path: Path) -> None:
    configs = (FINETUNE, LORA, ROOT / "configs/sd3/lora-sd35.yaml")
    p = experiment.parser("")
    config = p.parse_args([f"--config={file}" for file in configs])
    assert (config.optimization.lr, config.optimization.clip, config.data.init_args.batch_size) == (1e-4, 0.1, 12)
    fit(base, store, tmp_path / "run", "--grid.prompts", "[]", configs=configs, steps=2)
    assert (tmp_path / "run/lora" / lora.FILE).is_file()


@pytest.mark.parametrize("small", [(), ("--lora.quantize", "nf4", "--network.init_args.dtype", "bfloat16")])
def test_updates_resume_to_the_bit_from_a_checkpoint_without_the_base(
    base: Path, store: Path, tmp_path: Path, small: tuple[str, ...]
) -> None:
    flags = ("--lora.rank", "4", *small)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    fit(base, store, straight, *flags)
    names = state(straight)["tensors"].keys() - {"bins", "guard.counts", "guard.usual"}
    assert all(".lora_" in name for name in names)
    assert {name.partition(".")[0] for name in names} == {"network", "average", "optimizer"}
    with faulty_after(4):
        fit(base, store, resumed, *flags)
    assert state(resumed)["step"] == 2
    fit(base, store, resumed, *flags)
    assert_same(state(resumed), state(straight))
    adapters = [load_file(run / "lora" / lora.FILE) for run in (resumed, straight)]
    assert_same(*adapters)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora.rank", "0"], "rank >= 1"),
        (["--lora.ranks", "4"], "ranks"),
        (["--text.init_args.folder", "nowhere"], "there is no folder nowhere"),
        (["--network.init_args.dtype", "bfloat16"], "trained weights must be float32"),
        (["--lora.rank", "4", "--network.init_args.path", "LONE"], "lora needs a whole model folder"),
        (["--lora.rank", "4", "--lora.targets", "[query]"], "ends in 'query'"),
        (["--lora.rank", "4", "--lora.quantize", "int4"], "int4"),
        (["--lora.rank", "4", "--lora.quantize", "int8", "--strategy.kind", "fsdp2"], "goes with strategy.kind ddp"),
        (["--network.init_args.path", "nowhere"], "nowhere"),
        (["--codec.init_args.path", "nowhere"], "nowhere"),
        (["--data.store", "nowhere"], "nowhere"),
        (["--data.held_out", "12"], "held_out must be from 1 to below the store's 12 samples"),
        (["--text.init_args.max_sequence_length", "9"], "max_sequence_length"),
        (["--text.init_args.tokens_dim", "99"], "tokens_dim"),
    ],
)
def test_bad_input_ends_in_one_line(
    base: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    lone = tmp_path / "lone"
    shutil.copytree(base / "transformer", lone)
    with pytest.raises(SystemExit) as end:
        fit(base, store, tmp_path / "run", *(str(lone) if flag == "LONE" else flag for flag in flags))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert len(lines[0]) < 250
    assert not (tmp_path / "run").exists()


def test_a_lora_learns_its_base_s_pairs_and_says_how_it_is_sampled(base: Path, store: Path, tmp_path: Path) -> None:
    """Without a second network: the teacher is the network without its updates."""
    flags = ["--teacher.pairs.steps", "2", "--lora.rank", "4", "--sampling.steps", "3", "--optimization.lr", "0.1"]
    fit(base, store, tmp_path / "run", *flags, configs=(FINETUNE, LORA, FEWSTEP))
    moved = tmp_path / "student.safetensors"
    shutil.copyfile(tmp_path / "run/lora" / lora.FILE, moved)
    main(["convert", str(moved), "--to", "kohya", "--out", str(tmp_path / "kohya.safetensors")])
    ways = [(tmp_path / "run", ()), (base, (str(moved),)), (base, (str(tmp_path / "kohya.safetensors"),))]
    drawn = []
    for path, updates in ways:
        pipe = Pipeline.load(path, LoadOptions(lora=updates))
        assert (pipe.sampling.steps, pipe.sampling.guidance, pipe.sampling.spacing) == (3, 1.0, "trailing")
        assert pipe.shift() == 1.0
        drawn.append(pipe(["a seven"], [0], height=64, width=64))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn[2], drawn[0], rtol=0, atol=1e-4)
    pipe = StableDiffusion3Pipeline.from_pretrained(base)
    pipe.load_lora_weights(moved.parent, weight_name=moved.name)

    argv = ["--prompt", "a seven", "--height", "64", "--width", "64", "--out", str(tmp_path / "samples")]
    with warnings.catch_warnings(record=True) as told:
        sample.main([*argv, "--model", str(base), "--lora", str(moved)])
    assert not any("learned" in str(warning.message) for warning in told)
    for flags in (["--model", str(tmp_path / "run")], ["--model", str(base), "--lora", f"{moved}:0.5"]):
        with pytest.warns(UserWarning, match="learned 3 steps with guidance 1, not 2 steps with guidance 1"):
            sample.main([*argv, *flags, "--steps", "2"])


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_lora_learns_from_rewards_of_its_own_pictures(base: Path, store: Path, tmp_path: Path, quantize: str) -> None:
    """Its base is the reference, without a second network."""
    flags = ["--judgement.rewards", '[{"class_path": "Ink"}]', "--judgement.pairs.steps", "2"]
    flags += ["--data.batch_size", "16", "--optimization.lr", "0.02", "--lora.quantize", quantize]
    fit(base, store, tmp_path / "run", *flags, configs=(FINETUNE, LORA, NFT))
    entries = lines(tmp_path / "run")
    rewards = [entry["val/reward"] for entry in entries if "val/reward" in entry]
    drifts = [entry["val/drift"] for entry in entries if "val/drift" in entry]
    assert all(0 < reward < 1 for reward in rewards)
    assert min(drifts) > 0
    assert (tmp_path / "run/lora" / lora.FILE).is_file()


def test_the_base_s_pairs_are_those_of_the_base_whatever_the_updates(base: Path, store: Path, tmp_path: Path) -> None:
    argv = [*settings(base, store, (FINETUNE, LORA, FEWSTEP), tmp_path / "run", 4), "--teacher.pairs.steps", "2"]
    parser = experiment.parser("")
    config = parser.parse_args(argv)
    config.encode, named = None, lora_base(config)
    _, generator, data = build(parser.instantiate(config), named)
    assert generator.teacher
    for name, parameter in generator.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    lesson = generator.lesson(batch, torch.zeros(len(batch.x0)))
    pipe = Pipeline.load(base)
    how = Sampling(2, 4.5, spacing="flow_match")
    condition = Condition(batch.text, batch.pooled)
    walk, _ = how.walk(pipe.objective, pipe.objective.alpha(batch.x0[0, 0].numel()))
    guided = ClassifierFree(pipe.network, generator.pipeline.condition([""]), 4.5)

    def denoise(z: torch.Tensor, t: torch.Tensor) -> Estimate:
        return pipe.objective.denoise(guided, z, t, condition)

    with torch.no_grad():
        wanted = walk(denoise, batch.noise, lambda: batch.noise, None)
    torch.testing.assert_close(lesson.x0, wanted, rtol=1e-3, atol=1e-3)
    trained = [name for name, p in generator.network.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    lesson.loss(generator.objective, generator.network, torch.full((len(batch.x0),), 0.5)).mean().backward()
    assert all(p.grad is not None for p in generator.network.parameters() if p.requires_grad)


def test_a_lora_that_is_sampled_like_its_base_says_nothing(base: Path, store: Path, tmp_path: Path) -> None:
    fit(base, store, tmp_path / "run", "--lora.rank", "4", "--sampling.steps", "28", configs=(FINETUNE, LORA))
    assert learned(tmp_path / "run/lora") is None


def test_a_damaged_note_on_sampling_ends_in_one_line(base: Path, tmp_path: Path) -> None:
    network = Pipeline.load(base).network
    lora.add(network, lora.LoRA(2))
    for i, note in enumerate(('{"shift": 1}', "[]", "no JSON", '{"shift": "x", "path": {}, "target": {}}')):
        lora.save(lora.export(network), tmp_path / str(i), str(base), {lora.PROCESS: note})
        with pytest.raises(ValueError, match="pytorch_lora_weights") as fault:
            Pipeline.load(tmp_path / str(i))
        assert "\n" not in str(fault.value)
