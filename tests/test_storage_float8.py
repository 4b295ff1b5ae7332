"""Weights in 8 bits: value × scale to the bit, in each form of files; what is damaged ends in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from eighths import FORMS, headed, marked, named, plain
from networks import stirred
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdit import checkpoint, lora
from mmdit.model import MMDiT
from mmdit.network import Condition
from mmdit.quantized import Quantized, quantize
from pipeline import LoadOptions, Pipeline
from pipeline.folder import single_file
from pipeline.sampling import Sampling
from storage.weights import open_file, open_folder

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BOTH = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
LAYER = "joint_blocks.1.x_block.mlp.fc1"
T5 = "text_encoders.t5xxl.transformer."


@pytest.fixture(scope="module")
def network() -> MMDiT:
    return stirred(MMDiT(4, depth=2, width=64, heads=1, text_dim=48, pooled_dim=32, sample_size=8))


@pytest.fixture(scope="module")
def tensors(network: MMDiT) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in checkpoint.export(network, "original").items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@BOTH
def test_all_values_of_eight_bits_are_decoded(dtype: torch.dtype, tmp_path: Path) -> None:
    """A scale of 3 puts them between the numbers of bfloat16."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    values = values[values.float().isfinite()].reshape(2, -1)
    save_file({"a.weight": values, "a.scale_weight": torch.tensor([3.0])}, tmp_path / "a.safetensors")
    assert torch.equal(open_file(tmp_path / "a.safetensors")["a.weight"], 3 * values.float())


@BOTH
@pytest.mark.parametrize("form", FORMS.values())
@pytest.mark.parametrize("prefix", ["", checkpoint.PREFIX, "diffusion_model."])
def test_a_network_is_value_times_scale(
    form: Callable, dtype: torch.dtype, prefix: str, tensors: dict, tmp_path: Path
) -> None:
    narrow = form({prefix + name: value for name, value in tensors.items()}, dtype)
    save_file(narrow.tensors, tmp_path / "narrow.safetensors", narrow.metadata)
    wanted = {name.removeprefix(prefix): value for name, value in narrow.wanted.items()}
    loaded = checkpoint.load(tmp_path / "narrow.safetensors")
    same(checkpoint.export(loaded, "original"), wanted)
    half = checkpoint.load(tmp_path / "narrow.safetensors", dtype="bfloat16")
    same(checkpoint.export(half, "original"), {name: value.bfloat16() for name, value in wanted.items()})


def test_a_folder_in_shards_may_have_scales_in_another_file(network: MMDiT, tmp_path: Path) -> None:
    """Its modulations lie in diffusers' order, and come back in ours."""
    checkpoint.save(network, tmp_path)
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    narrow = named(load_file(whole), E4M3)
    whole.unlink()
    table = {}
    for name in narrow.tensors:
        table[name] = "scales.safetensors" if name.endswith("weight_scale") else "weights.safetensors"
    for file in set(table.values()):
        save_file({name: value for name, value in narrow.tensors.items() if table[name] == file}, tmp_path / file)
    (tmp_path / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": table}))
    assert any(place.scale for place in open_folder(tmp_path, checkpoint.STEM).places.values())
    same(checkpoint.export(checkpoint.load(tmp_path), "diffusers"), narrow.wanted)


def wrong(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=file.name) as caught:
        checkpoint.load(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.scale_weight": None}, f"{LAYER}.weight has no scale; download it again"),
        ({f"{LAYER}.scale_weight": torch.ones(3)}, r"has the shape \(3,\) instead of one number, or one a row"),
        ({f"{LAYER}.scale_weight": torch.tensor(torch.nan)}, f"{LAYER}.scale_weight is not finite"),
        ({f"{LAYER}.scale_weight": torch.ones(1, dtype=torch.uint8)}, "with scales in torch.uint8"),
        ({f"{LAYER}.weight": None}, f"{LAYER}.scale_weight is a scale of no weight"),
        ({f"{LAYER}.weight": None, "a.scale_weight": torch.ones(1)}, r"is a scale of no weight \(and 1 more\)"),
        ({f"{LAYER}.weight_scale": torch.ones(1)}, "is a second scale of no weight"),
        ({f"{LAYER}.scale_output": torch.ones(1)}, rf"1 left over \({LAYER}.scale_output"),
        ({"final_layer.linear.scale_input": torch.ones(1)}, r"1 left over \(final_layer.linear.scale_input"),
        ({f"{LAYER}.weight_scale_2": torch.ones(1)}, "holds weights in nvfp4 .* get the model in float8, bfloat16"),
        ({f"{LAYER}.qweight": torch.ones(1)}, "holds weights in int4"),
        ({f"{LAYER}.weight.absmax": torch.ones(1)}, "holds weights in bitsandbytes"),
        ({f"{LAYER}.weight": torch.ones(2, 3, dtype=torch.uint8)}, "holds weights in torch.uint8 with scales"),
        ({f"{LAYER}.weight": torch.ones(2, 3, dtype=torch.int8)}, "type 'I8', .* get the model in float8"),
    ],
)
def test_a_damaged_file_is_one_line(change: dict, message: str, tensors: dict, tmp_path: Path) -> None:
    changed = {name: v for name, v in (marked(tensors, E4M3).tensors | change).items() if v is not None}
    assert re.search(message, wrong(tmp_path / "a.safetensors", changed))


def test_a_marker_without_scales_is_refused(tensors: dict, tmp_path: Path) -> None:
    narrow = plain(tensors, E4M3).tensors | {"scaled_fp8": torch.empty(0, dtype=E4M3)}
    assert "scaled_fp8 marks weights with scales, and none has one" in wrong(tmp_path / "a.safetensors", narrow)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "int8_tensorwise"])
def test_other_formats_are_refused_by_name(kind: str, tensors: dict, tmp_path: Path) -> None:
    note = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    changed = named(tensors, E4M3).tensors | {f"{LAYER}.comfy_quant": note}
    assert f"holds weights in {kind} ({LAYER})" in wrong(tmp_path / "a.safetensors", changed)
    narrow = headed(tensors, E4M3)
    header = {name: text.replace("float8_e4m3fn", kind, 1) for name, text in narrow.metadata.items()}
    assert f"holds weights in {kind} (" in wrong(tmp_path / "a.safetensors", narrow.tensors, header)


def test_a_named_layer_needs_a_scale_even_if_it_is_the_only_one(tensors: dict, tmp_path: Path) -> None:
    narrow = plain(tensors, E4M3).tensors
    header = {"_quantization_metadata": json.dumps({"layers": {"final_layer.linear": {"format": "float8_e4m3fn"}}})}
    assert "final_layer.linear.weight has no scale" in wrong(tmp_path / "a.safetensors", narrow, header)


@pytest.mark.parametrize("header", ["{", "[]", '{"layers": {"a": {}}}', '{"layers": {"a": 1}}', "[" * 100_000])
def test_a_broken_header_is_refused(header: str, tensors: dict, tmp_path: Path) -> None:
    printed = wrong(tmp_path / "a.safetensors", tensors, {"_quantization_metadata": header})
    assert "is damaged: _quantization_metadata or a comfy_quant names no format" in printed


@pytest.fixture(scope="module")
def small(released: tuple) -> dict[str, Tensor]:
    """Stable Diffusion 3.5 Large in small as a single file."""
    tensors = single_file(Pipeline.load(released[1]))
    return {name: value.clone().contiguous() for name, value in tensors.items()}


@pytest.mark.parametrize("form", ["plain", "marked"])
def test_a_single_file_draws_the_pictures_of_its_decoded_weights(
    form: str, small: dict, released: tuple, tmp_path: Path
) -> None:
    """With its network and T5 in 8 bits and the rest, VAE and CLIP, in 16."""
    narrow = {name: value.half() for name, value in small.items()}
    wide = {name: value.half().float() for name, value in small.items()}
    for prefix in (checkpoint.PREFIX, T5):
        own = {name: value for name, value in small.items() if name.startswith(prefix)}
        made = plain(own, E4M3) if form == "plain" else marked(own, E4M3, (prefix,))
        narrow |= made.tensors
        wide |= made.wanted
    drawn = []
    for name, tensors in (("narrow", narrow), ("wide", wide)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        pipe = Pipeline.load(tmp_path / f"{name}.safetensors", LoadOptions(dtype="float32", parts=released[1]))
        drawn.append(pipe(["a handwritten seven"], [3], sampling=Sampling(steps=2, guidance=1.0)))
    assert torch.equal(*drawn)
    assert drawn[0].std() > 0.02


def test_what_is_given_on_is_decoded(small: dict, released: tuple, tmp_path: Path) -> None:
    """Where most weights of a part have 8 bits, in bfloat16; and a VAE is computed in it."""
    made = [marked({k: v for k, v in small.items() if k.startswith(p)}, E4M3, (p,)) for p in (checkpoint.PREFIX, T5)]
    vae = plain({k: v for k, v in small.items() if k.startswith("first_stage_model.")}, E4M3)
    narrow = small | made[0].tensors | made[1].tensors | vae.tensors
    save_file(narrow, tmp_path / "narrow.safetensors")
    pipe = Pipeline.load(tmp_path / "narrow.safetensors", LoadOptions(dtype="stored", parts=released[1]))
    wanted = made[0].wanted | made[1].wanted | vae.wanted
    given = single_file(pipe)
    assert given.keys() == small.keys()
    for name, value in wanted.items():
        assert torch.equal(given[name], value.to(given[name].dtype)), name
        if name in vae.wanted or name.startswith(checkpoint.PREFIX):
            assert given[name].dtype == torch.bfloat16
    assert pipe(["a handwritten seven"], [3], sampling=Sampling(steps=1, guidance=1.0)).isfinite().all()
    pipe.save(tmp_path / "folder")
    again = Pipeline.load(tmp_path / "folder")
    assert torch.equal(
        again.network.state_dict()["final.linear.weight"], pipe.network.state_dict()["final.linear.weight"].float()
    )
    t5 = open_folder(tmp_path / "folder" / "text_encoder_3", "model")
    assert not any(place.scale for place in t5.places.values())
    for name, value in made[1].wanted.items():
        if (key := name.removeprefix(T5)) in t5:
            assert torch.equal(t5[key], value.to(t5[key].dtype)), name


def test_a_folder_whose_encoder_has_scales_is_given_on_without(released: tuple, tmp_path: Path) -> None:
    """Other files of encoders are linked as they are; these, no other tool reads."""
    shutil.copytree(released[1], tmp_path / "model")
    file = tmp_path / "model" / "text_encoder_3" / "model.safetensors"
    narrow = marked(load_file(file), E4M3)
    save_file(narrow.tensors, file, {"format": "pt"})
    Pipeline.load(tmp_path / "model").save(tmp_path / "copy")
    given = load_file(tmp_path / "copy" / "text_encoder_3" / "model.safetensors")
    assert all(torch.equal(given[name], narrow.wanted[name].to(given[name].dtype)) for name in given)
    assert not any("scale" in name for name in given)


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_a_lora_trains_on_top_as_on_the_decoded_weights(kind: str, tensors: dict, tmp_path: Path) -> None:
    narrow = marked(tensors, E4M3)
    save_file(narrow.tensors, tmp_path / "narrow.safetensors")
    save_file(narrow.wanted, tmp_path / "wide.safetensors")
    gradients = []
    for name in ("narrow", "wide"):
        base = checkpoint.load(tmp_path / f"{name}.safetensors")
        torch.manual_seed(0)
        lora.add(base, lora.LoRA(rank=4))
        if kind != "none":
            quantize(base, kind)
            assert any(isinstance(module, Quantized) for module in base.modules())
        condition = Condition(torch.randn(2, 5, 48), torch.randn(2, 32))
        base(torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9]), condition).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in base.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0
