"""LoRA with text encoders on whole models: as diffusers applies them, exported, converted, and what is refused."""

from pathlib import Path

import pytest
import tiny
import torch
from adapted import THEIRS, close
from adapted import output as network_output
from diffusers import StableDiffusion3Pipeline
from encoders import PROMPTS, SIZES, read, theirs
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from data.text.encoder import Text
from data.text.sd3 import SD3Text
from pipeline import LoadOptions, Pipeline
from pipeline.__main__ import main
from storage.updates import Adapter, merge

CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "text_projection"]
PARTS = ("transformer", "text_encoder", "text_encoder_2")
TEXT = {  # a layer of each encoder, by its name in diffusers
    "text_encoder.text_model.encoder.layers.1.self_attn.k_proj": (64, 64),
    "text_encoder_2.text_projection": (128, 128),
    "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo": (224, 96),
}


def apart(one: Text, other: Text) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.pipeline("sd35_medium", folder)
    return folder


def save_lora(pipe: StableDiffusion3Pipeline, configs: dict[str, LoraConfig], folder: Path, metadata: bool) -> Path:
    """Random updates of some parts, saved by diffusers."""
    draw, states = torch.Generator().manual_seed(5), {}
    for part, config in configs.items():
        module: nn.Module = getattr(pipe, part)
        module.add_adapter(config)
        for name, parameter in module.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
        states[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
    about = {f"{part}_lora_adapter_metadata": config.to_dict() for part, config in configs.items()} if metadata else {}
    pipe.save_lora_weights(folder, **states, **about)
    return folder


@pytest.mark.parametrize(
    ("options", "metadata"),
    [
        ({"lora_alpha": 4}, False),
        ({"lora_alpha": 2}, True),
        ({"lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"k_proj": 3}}, True),
    ],
    ids=["plain", "alpha", "rslora"],
)
@pytest.mark.parametrize("strength", [0.3, 1.0, 1.7])
def test_diffusers_makes_the_same_of_it(
    base: Path, tmp_path: Path, strength: float, options: dict, metadata: bool
) -> None:
    configs = {part: LoraConfig(r=4, target_modules=THEIRS if part == "transformer" else CLIP, **options)
               for part in PARTS}  # fmt: skip
    configs["text_encoder_2"].lora_alpha = 4 if not metadata else 12  # each part has its own
    source = save_lora(tiny.pipeline("sd35_medium", tmp_path / "x"), configs, tmp_path / "lora", metadata)
    opponent = StableDiffusion3Pipeline.from_pretrained(base)
    plain = theirs(opponent, PROMPTS)
    opponent.load_lora_weights(str(source), adapter_name="it")
    opponent.set_adapters(["it"], adapter_weights=[strength])
    ours = Pipeline.load(base, LoadOptions(lora=(f"{source}:{strength}",)))
    wanted = theirs(opponent, PROMPTS)
    assert apart(wanted, plain) > 1e-2
    assert apart(ours.text.encode(PROMPTS), wanted) < 1e-5
    assert close(network_output(ours.network), network_output(opponent.transformer))


def test_a_dora_of_a_text_encoder_is_diffusers_s(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=CLIP)
    source = save_lora(tiny.pipeline("sd35_medium", tmp_path / "x"), {"text_encoder": config}, tmp_path / "lora", True)
    opponent = StableDiffusion3Pipeline.from_pretrained(base)
    opponent.load_lora_weights(str(source))
    ours = Pipeline.load(base, LoadOptions(lora=(str(source),)))
    assert apart(ours.text.encode(PROMPTS), theirs(opponent, PROMPTS)) < 1e-5


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Of a layer of each encoder and of the network."""
    draw, state = torch.Generator().manual_seed(6), {}
    for name, (rows, inputs) in (TEXT | {"transformer.transformer_blocks.0.attn.to_q": (64, 64)}).items():
        state[f"{name}.lora_A.weight"] = torch.randn(2, inputs, generator=draw) / 4
        state[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=draw) / 4
    save_file(state, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize("kind", ["diffusers", "single-file"])
def test_an_export_holds_the_updates(base: Path, lora: Path, tmp_path: Path, kind: str) -> None:
    main(["export", str(base), "--lora", f"{lora}:0.7", "--format", kind, "--out", str(tmp_path / "out")])
    whole = tmp_path / "out" / "out.safetensors" if kind == "single-file" else tmp_path / "out"
    again = Pipeline.load(whole, LoadOptions(parts=base if kind == "single-file" else None))
    merged = Pipeline.load(base, LoadOptions(lora=(f"{lora}:0.7",)))
    assert apart(again.text.encode(PROMPTS), merged.text.encode(PROMPTS)) == 0
    assert apart(again.text.encode(PROMPTS), Pipeline.load(base).text.encode(PROMPTS)) > 1e-2
    opponent = (
        StableDiffusion3Pipeline.from_single_file(whole, config=str(base), local_files_only=True)
        if kind == "single-file"
        else StableDiffusion3Pipeline.from_pretrained(whole)
    )
    for encoder in (opponent.text_encoder, opponent.text_encoder_2, opponent.text_encoder_3):
        encoder.eval()  # from_single_file leaves them in training, with dropout
    assert apart(theirs(opponent, PROMPTS), merged.text.encode(PROMPTS)) < 1e-5


def test_updates_merge_into_a_single_file_whose_projection_is_the_identity(
    base: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main(["export", str(base), "--format", "single-file", "--out", str(tmp_path / "one")])
    file = tmp_path / "one" / "one.safetensors"
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(7)) / 8
    save_file({"lora_te1_text_projection.diff": delta}, tmp_path / "projection.safetensors")
    options = {"lora": (str(lora), str(tmp_path / "projection.safetensors"))}
    inside = Pipeline.load(file, LoadOptions(parts=base, **options))
    assert apart(inside.text.encode(PROMPTS), Pipeline.load(base, LoadOptions(**options)).text.encode(PROMPTS)) == 0
    inside.text.save(tmp_path / "folder")
    saved = SD3Text(tmp_path / "folder", **SIZES)
    assert apart(saved.encode(PROMPTS), inside.text.encode(PROMPTS)) == 0
    with pytest.raises(ValueError, match="a single file cannot hold CLIP-L's projection"):
        inside.text.original_state()


def test_a_weak_model_without_the_updates_has_other_encoders(base: Path, lora: Path) -> None:
    plain, merged = Pipeline.load(base), Pipeline.load(base, LoadOptions(lora=(str(lora),)))
    merged.away_from(Pipeline.load(base, LoadOptions(lora=(str(lora),))), 2.0)
    for one, other in ((plain, merged), (merged, plain)):
        with pytest.raises(ValueError, match="other text encoders"):
            one.away_from(other, 2.0)


def test_encoders_of_another_kind_take_no_updates(model: Path, lora: Path) -> None:
    state = {name: tensor for name, tensor in read(lora).items() if name.startswith("text_encoder.")}
    save_file(state, lora.with_name("clip.safetensors"))
    with pytest.raises(ValueError, match=r"text encoders are read if they are Stable Diffusion 3's$"):
        Pipeline.load(model, LoadOptions(lora=(str(lora.with_name("clip.safetensors")),)))


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("through", ["kohya", "diffusers", "ComfyUI"])
def test_a_converted_lora_updates_the_same(base: Path, lora: Path, tmp_path: Path, through: str, to: str) -> None:
    first = tmp_path / "first.safetensors"
    if through == "ComfyUI":
        comfy = {"text_encoder.": "clip_l", "text_encoder_2.": "clip_g", "text_encoder_3.": "t5xxl"}
        state = read(lora)
        for prefix, name in comfy.items():
            state = {key.replace(prefix, f"text_encoders.{name}.transformer."): x for key, x in state.items()}
        save_file(state, first)
    else:
        main(["convert", str(lora), "--to", through, "--out", str(first)])
    main(["convert", str(first), "--to", to, "--out", str(tmp_path / "second.safetensors")])
    names = {"diffusers": "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo.lora_A.weight",
             "kohya": "lora_te3_encoder_block_0_layer_1_DenseReluDense_wo.lora_down.weight"}  # fmt: skip
    assert names[to] in read(tmp_path / "second.safetensors")
    texts = [SD3Text(base, **SIZES) for _ in range(2)]
    for text, file in zip(texts, (lora, tmp_path / "second.safetensors"), strict=True):
        own = {key: x for key, x in read(file).items() if key.startswith(("text", "lora_te"))}
        save_file(own, tmp_path / "own.safetensors")
        merge([Adapter(tmp_path / "own.safetensors")], text.receivers())
    assert apart(texts[0].encode(PROMPTS), texts[1].encode(PROMPTS)) < 1e-6


def test_what_a_target_cannot_say_is_refused(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = read(lora)
    biased = state | {"text_encoder_2.text_projection.diff_b": torch.zeros(128)}
    unknown = state | {"lora_te1_text_model_encoder_layers_0_nothing.alpha": torch.zeros(())}
    for name, content, to, words in (
        ("lora", state, "peft", "updates text encoders, and a folder of PEFT holds the updates of one network"),
        ("biased", biased, "kohya", "it holds text_encoder_2.text_projection.diff_b"),
        ("unknown", unknown, "kohya", "it holds lora_te1_text_model_encoder_layers_0_nothing.alpha"),
    ):
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(tmp_path / f"{name}.safetensors"), "--to", to, "--out", str(tmp_path / "out")])
        printed = capsys.readouterr().err
        assert stop.value.code == 2
        assert words in printed
        assert printed.count("\n") == 1
        assert not (tmp_path / "out").exists()
