"""Training from a released model, in full and by low-rank updates, with the configs that are shipped for it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from trials import assert_same, state

import encode
import train
from mmdit import checkpoint, lora
from pipeline import LoadOptions, Pipeline
from training.generator import Generator

ROOT = Path(__file__).parents[1]
FINETUNE, LORA = ROOT / "configs/sd3/finetune.yaml", ROOT / "configs/sd3/lora.yaml"


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


def settings(base: Path, store: Path, configs: tuple[Path, ...], folder: Path, steps: int) -> list[str]:
    """Flags that make the shipped configs small."""
    argv = [arg for config in configs for arg in ("--config", str(config))]
    changes = {
        "run.folder": folder, "run.steps": steps, "run.validate_every": 2, "run.checkpoint_every": 2,
        "run.log_every": 1, "run.precision": "32-true", "run.accelerator": "cpu",
        "text.init_args.folder": base, "codec.init_args.path": base, "network.init_args.path": base,
        "text.init_args.tokens_dim": tiny.TOKENS, "text.init_args.pooled_dim": tiny.POOLED,
        "text.init_args.dtype": "float32", "text.init_args.max_sequence_length": 8,
        "encode.store": store, "data.store": store, "data.held_out": 3, "data.workers": 0,
        "optimization.warmup": 1, "optimization.lr": 1e-3, "ema.decay": 0.5,
        "sampling.steps": 2, "grid.columns": 1,
    }  # fmt: skip
    for name, value in changes.items():
        argv += [f"--{name}", str(value)]
    return argv


def fit(
    base: Path, store: Path, folder: Path, *flags: str, configs: tuple[Path, ...] = (FINETUNE,), steps: int = 4
) -> None:
    train.main(["fit", *settings(base, store, configs, folder, steps), *flags])


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
    draw = Generator.draw_samples

    def fault(self: Generator) -> None:
        if self.global_step == 4:
            raise OSError("the disk fell off")
        draw(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "draw_samples", fault)
        with pytest.raises(SystemExit):
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
