"""Updates of text encoders in LoRA files: every tool's names, strengths, fingerprints, caches, and what is refused."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from encoders import PROMPTS, SIZES, absent, assert_same, copied, read
from safetensors.torch import save_file
from torch import Tensor

from data.text.encoder import Text
from data.text.sd3 import SD3Text
from storage.updates import Adapter, merge

RANK, ALPHA = 3, 2.0
LAYERS = {  # an encoder's folder and layer
    ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"),
    ("text_encoder", "text_projection"),
    ("text_encoder_2", "text_model.encoder.layers.1.self_attn.out_proj"),
    ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"),
    ("text_encoder_2", "text_projection"),
    ("text_encoder_3", "encoder.block.1.layer.0.SelfAttention.v"),
    ("text_encoder_3", "encoder.block.0.layer.1.DenseReluDense.wi_1"),
}
KOHYA = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}
COMFY = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
Factors = dict[tuple[str, str], tuple[Tensor, Tensor]]


@pytest.fixture
def folder(released: tuple[StableDiffusion3Pipeline, Path], tmp_path: Path) -> Path:
    return copied(released[1], tmp_path)


@pytest.fixture
def factors(folder: Path) -> Factors:
    """A and B of each layer."""
    draw, found = torch.Generator().manual_seed(3), {}
    for encoder, layer in sorted(LAYERS):
        rows, inputs = read(folder / encoder / "model.safetensors")[f"{layer}.weight"].shape
        down, up = (torch.randn(shape, generator=draw) / 4 for shape in ((RANK, inputs), (rows, RANK)))
        found[encoder, layer] = down, up
    return found


def written(dialect: str, factors: Factors) -> dict[str, Tensor]:
    """The updates with names as the tool writes them, spelled out."""
    state: dict[str, Tensor] = {}
    for (encoder, layer), (down, up) in factors.items():
        match dialect:
            case "diffusers":
                state[f"{encoder}.{layer}.lora_A.weight"] = down
                state[f"{encoder}.{layer}.lora_B.weight"] = up * ALPHA / RANK
            case "diffusers, older":
                state[f"{encoder}.{layer}.lora_linear_layer.down.weight"] = down
                state[f"{encoder}.{layer}.lora_linear_layer.up.weight"] = up * ALPHA / RANK
            case "kohya":
                name = f"{KOHYA[encoder]}_{layer.replace('.', '_')}"
                state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = down, up
                state[f"{name}.alpha"] = torch.tensor(ALPHA)
            case "ComfyUI":
                name = f"text_encoders.{COMFY[encoder]}.transformer.{layer}"
                state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = down, up * ALPHA / RANK
            case "differences":
                state[f"text_encoders.{COMFY[encoder]}.transformer.{layer}.diff"] = up @ down * ALPHA / RANK
    return state


def saved(state: dict[str, Tensor], tmp_path: Path, name: str = "lora") -> Path:
    save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path / f"{name}.safetensors"


def changed(folder: Path, encoder: str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Writes an encoder's weights anew."""
    file = folder / encoder / "model.safetensors"
    tensors = read(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def added(folder: Path, factors: Factors, strength: float = 1.0) -> Text:
    """What encoders give whose weights on disk have the updates."""
    for (encoder, layer), (down, up) in factors.items():
        delta = strength * ALPHA / RANK * up @ down
        changed(folder, encoder, lambda tensors, name=f"{layer}.weight", d=delta: tensors[name].add_(d))
    return SD3Text(folder, **SIZES).encode(PROMPTS)


def given(folder: Path, *adapters: Adapter, **options) -> SD3Text:
    text = SD3Text(folder, **SIZES, **options)
    merge(adapters, text.receivers())
    return text


def assert_close(ours: Text, wanted: Text) -> None:
    for one, other in zip(ours, wanted, strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()


@pytest.mark.parametrize("dialect", ["diffusers", "diffusers, older", "kohya", "ComfyUI", "differences"])
def test_one_lora_is_the_same_in_every_dialect(folder: Path, factors: Factors, tmp_path: Path, dialect: str):
    plain = SD3Text(folder, **SIZES).encode(PROMPTS)
    ours = given(folder, Adapter(saved(written(dialect, factors), tmp_path))).encode(PROMPTS)
    wanted = added(folder, factors)
    assert_close(ours, wanted)
    for slot in SD3Text(folder, **SIZES).slots:
        apart = (ours.tokens - plain.tokens)[:, slot.rows, slot.columns]
        assert apart.abs().max() > 1e-2, slot.name
    assert (ours.pooled - plain.pooled).abs().max() > 1e-2


@pytest.mark.parametrize("strength", [0.3, 1.7, -1.0])
def test_a_strength_scales_and_several_add_up(folder: Path, factors: Factors, tmp_path: Path, strength: float):
    file = saved(written("kohya", factors), tmp_path)
    ours = given(folder, Adapter(file, strength), Adapter(file, 0.5)).encode(PROMPTS)
    assert_close(ours, added(folder, factors, strength + 0.5))


def test_biases_norms_and_words_are_updated(folder: Path, tmp_path: Path):
    draw = torch.Generator().manual_seed(4)
    names = {
        "text_model.encoder.layers.0.self_attn.q_proj": ("diff_b", "bias"),
        "text_model.encoder.layers.1.layer_norm1": ("diff", "weight"),
        "text_model.final_layer_norm": ("w_norm", "weight"),
        "text_model.embeddings.token_embedding": ("diff", "weight"),
    }
    state, tensors = {}, read(folder / "text_encoder" / "model.safetensors")
    for layer, (end, kind) in names.items():
        delta = torch.randn(tensors[f"{layer}.{kind}"].shape, generator=draw)
        state[f"lora_te1_{layer.replace('.', '_')}.{end}"] = delta
        changed(folder, "text_encoder", lambda t, name=f"{layer}.{kind}", d=delta: t[name].add_(-0.3 * d))
    plain = SD3Text(folder, **SIZES).encode(PROMPTS)
    ours = given(folder, Adapter(saved(state, tmp_path), 0.3)).encode(PROMPTS)
    for layer, (_, kind) in names.items():
        changed(folder, "text_encoder", lambda t, name=f"{layer}.{kind}": t[name].copy_(tensors[name]))
    assert_close(ours, SD3Text(folder, **SIZES).encode(PROMPTS))
    assert not torch.allclose(ours.tokens, plain.tokens, atol=1e-2)


@pytest.mark.parametrize("how", ["index", "folder"])
def test_without_t5_its_part_does_nothing_and_a_warning_says_so(
    folder: Path, factors: Factors, tmp_path: Path, how: str
):
    file = saved(written("kohya", factors), tmp_path)
    absent(folder, ["text_encoder_3"], how)
    with pytest.warns(UserWarning, match=r"lora.safetensors also updates T5, which this model does not have"):
        ours = given(folder, Adapter(file)).encode(PROMPTS)
    assert_close(ours, added(folder, {key: found for key, found in factors.items() if key[0] != "text_encoder_3"}))
    alone = {key: found for key, found in factors.items() if key[0] == "text_encoder_3"}
    with pytest.raises(ValueError, match="it updates T5 alone, which this model does not have"):
        given(folder, Adapter(saved(written("diffusers", alone), tmp_path, "t5")))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"lora_te1_text_model_encoder_layers_9_mlp_fc1.lora_up.weight": (4, 2)}, r"1 left over \(lora_te1_.*layers_9"),
        ({"text_encoder_2.text_model.nothing.alpha": ()}, r"1 left over \(text_encoder_2.text_model.nothing.alpha\)"),
        ({"text_encoders.clip_l.transformer.text_projection.diff": (3, 3)}, r"1 damaged \(text_encoders.clip_l"),
        ({"text_encoder.text_projection.diff_b": (64,)}, r"1 damaged \(text_encoder.text_projection.diff_b \(64,\)"),
        ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": (2, 224)}, r"1 left over \(lora_te3_"),
        ({"text_encoder.text_projection.lora_A.weight": (0, 64), "text_encoder.text_projection.lora_B.weight": (64, 0)},
         r"1 damaged \(text_encoder.text_projection"),
        ({"text_encoder.text_projection.lora_A.weight": (), "text_encoder.text_projection.lora_B.weight": ()},
         r"1 damaged \(text_encoder.text_projection"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_changes_nothing(
    folder: Path, factors: Factors, tmp_path: Path, state: dict, message: str
):
    good = {key: tensor for key, tensor in written("ComfyUI", factors).items() if "text_projection" not in key}
    text = SD3Text(folder, **SIZES)
    before = text.fingerprint()
    file = saved(good | {name: torch.zeros(shape) for name, shape in state.items()}, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        merge([Adapter(saved(good, tmp_path, "good")), Adapter(file)], text.receivers())
    assert "\n" not in str(error.value)
    assert text.fingerprint() == before
    assert_same(text.encode(PROMPTS), SD3Text(folder, **SIZES).encode(PROMPTS))


def test_fingerprints_and_caches_know_the_updates(folder: Path, factors: Factors, tmp_path: Path):
    cache = tmp_path / "cache"
    plain = SD3Text(folder, **SIZES, cache=cache)
    states = [plain.encode(PROMPTS)]
    prints = [plain.fingerprint()]
    file = saved(written("kohya", factors), tmp_path)
    twice = {name: tensor * 2 if name.endswith("alpha") else tensor for name, tensor in read(file).items()}
    ways = [(file, 1.0), (file, 0.3), (saved(twice, tmp_path, "twice"), 1.0)]
    for path, strength in ways:
        text = given(folder, Adapter(path, strength), cache=cache)
        prints.append(text.fingerprint())
        states.append(text.encode(PROMPTS))
        assert_same(states[-1], given(folder, Adapter(path, strength)).encode(PROMPTS))
        assert given(folder, Adapter(path, strength)).fingerprint() == prints[-1]
    assert len([*cache.iterdir()]) == len(PROMPTS) * len(states)
    for i, one in enumerate(states):
        for j in range(i):
            assert prints[i] != prints[j]
            assert not torch.allclose(one.tokens, states[j].tokens, atol=1e-3)


def test_updates_reach_encoders_that_are_kept_and_captions_that_were_encoded(
    folder: Path, factors: Factors, tmp_path: Path
):
    text = SD3Text(folder, **SIZES)
    text.keep(True)
    text.encode(PROMPTS)
    file = saved(written("kohya", factors), tmp_path)
    merge([Adapter(file)], text.receivers())
    assert_same(text.encode(PROMPTS), given(folder, Adapter(file)).encode(PROMPTS))
    assert text.kept


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_saved_model_has_the_updates_and_its_source_has_not(
    folder: Path, factors: Factors, tmp_path: Path, stored: torch.dtype
):
    for encoder in KOHYA:
        changed(folder, encoder, lambda tensors: tensors.update({n: v.to(stored) for n, v in tensors.items()}))
    before = {encoder: (folder / encoder / "model.safetensors").read_bytes() for encoder in KOHYA}
    file = saved(written("kohya", factors), tmp_path)
    text = given(folder, Adapter(file))
    text.save(tmp_path / "saved")
    for encoder in KOHYA:
        tensors, old = (read(place / encoder / "model.safetensors") for place in (tmp_path / "saved", folder))
        kept = torch.bfloat16 if stored.itemsize == 1 else stored
        for name, tensor in tensors.items():
            wanted = old[name].float()
            if (found := factors.get((encoder, name.removesuffix(".weight")))) is not None:
                wanted = wanted + ALPHA / RANK * found[1] @ found[0]
            assert torch.equal(tensor, wanted.to(kept)), name
        assert (folder / encoder / "model.safetensors").read_bytes() == before[encoder]


def test_nothing_is_said_where_all_is_there(folder: Path, factors: Factors, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given(folder, Adapter(saved(written("kohya", factors), tmp_path)))
