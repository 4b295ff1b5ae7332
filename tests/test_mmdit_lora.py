"""Low-rank updates: trained here and read by diffusers, trained there and read here, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from adapted import THEIRS, close, opponent_network, output
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from mmdit import checkpoint, lora
from mmdit.adapters import merge
from mmdit.lora import LoRA
from mmdit.model import MMDiT
from storage.updates import Adapter


@pytest.fixture
def opponent() -> SD3Transformer2DModel:
    return opponent_network()


@pytest.fixture
def network(opponent: SD3Transformer2DModel, tmp_path: Path) -> MMDiT:
    opponent.save_pretrained(tmp_path / "transformer")
    return checkpoint.load(tmp_path / "transformer")


def shaken(model: torch.nn.Module) -> None:
    """Makes the updates, which start at zero, random."""
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize(
    "spec",
    [
        LoRA(4),
        LoRA(4, alpha=2),
        LoRA(3, targets=("qkv", "proj", "fc1", "fc2", "modulation", "context", "final.linear")),
    ],
)
def test_updates_made_here_are_diffusers_s(
    network: MMDiT, opponent: SD3Transformer2DModel, tmp_path: Path, spec: LoRA
) -> None:
    plain = output(network)
    lora.add(network, spec)
    assert torch.equal(output(network), plain)  # B starts at zero
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in network.named_parameters() if ".lora_" in name}
    shaken(network)
    ours = output(network)
    assert not close(ours, plain)

    lora.save(lora.export(network), tmp_path / "lora", "a model")
    opponent.load_lora_adapter(StableDiffusion3Pipeline.lora_state_dict(tmp_path / "lora"), prefix="transformer")
    assert close(output(opponent), ours)

    again = checkpoint.load(tmp_path / "transformer")
    merge(again, [Adapter(tmp_path / "lora")])
    assert close(output(again), ours)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=THEIRS),
        LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "attn2.to_v", "net.0.proj", "norm1_context.linear"]),
        LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["to_k", "norm_out.linear", "proj_out"]),
        LoraConfig(r=4, lora_alpha=4, alpha_pattern={"to_k": 12}, rank_pattern={"to_v": 2}, target_modules=THEIRS),
    ],
    ids=["joint", "some", "rslora", "patterns"],
)  # fmt: skip
def test_updates_made_by_diffusers_are_ours(
    network: MMDiT, opponent: SD3Transformer2DModel, tmp_path: Path, config: LoraConfig
) -> None:
    plain = output(opponent)
    opponent.add_adapter(config)
    shaken(opponent)
    theirs = output(opponent)
    assert not close(theirs, plain)
    opponent.save_lora_adapter(tmp_path / "lora")
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "lora", get_peft_model_state_dict(opponent), transformer_lora_adapter_metadata=config.to_dict()
    )
    merge(network, [Adapter(tmp_path / "lora" / lora.FILE)])
    assert close(output(network), theirs)


def test_a_merge_into_half_precision_rounds_once(network: MMDiT, tmp_path: Path) -> None:
    lora.add(network, LoRA(4))
    shaken(network)
    lora.save(lora.export(network), tmp_path / "lora", "base")
    exact, half = (checkpoint.load(tmp_path / "transformer", "bfloat16") for _ in range(2))
    for other in (exact.float(), half):
        merge(other, [Adapter(tmp_path / "lora"), Adapter(tmp_path / "lora", 0.7)])
    wanted = exact.bfloat16().state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in half.state_dict().items())


def test_an_alpha_in_the_file_scales_its_layer(network: MMDiT, tmp_path: Path) -> None:
    lora.add(network, LoRA(4, targets=("image.proj",)))
    shaken(network)
    state = lora.export(network)
    half = state | {name.replace("lora_A.weight", "alpha"): torch.tensor(2.0) for name in state if "lora_A" in name}
    save_file(half, tmp_path / "half.safetensors")
    twice = {name: tensor * (0.5 if "lora_B" in name else 1) for name, tensor in state.items()}
    save_file(twice, tmp_path / "twice.safetensors")
    outputs = []
    for file in ("half", "twice"):
        other = checkpoint.load(tmp_path / "transformer")
        merge(other, [Adapter(tmp_path / f"{file}.safetensors")])
        outputs.append(output(other))
    assert close(*outputs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"targets": ("image.query",)}, "no linear layer's name ends in 'image.query'"),
        ({"targets": ("patch",)}, "patch embedding"),
        ({"rank": 0}, "rank >= 1"),
        ({"alpha": -1}, "alpha > 0"),
    ],
)
def test_impossible_updates_are_refused(network: MMDiT, spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.add(network, LoRA(**spec))


def test_files_that_do_not_fit_are_named_and_change_nothing(network: MMDiT, tmp_path: Path) -> None:
    plain = output(network)
    trained = checkpoint.load(tmp_path / "transformer")
    lora.add(trained, LoRA(4))
    lora.save(lora.export(trained), tmp_path / "lora", "a model")
    state = load_file(tmp_path / "lora" / lora.FILE)
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    for changed, message in (
        (state | {"text_encoder.layers.0.lora_A.weight": torch.zeros(2, 2)}, r"1 left over \(text_encoder"),
        (state | {key: torch.zeros(4, 64, 1, 1)}, r"1 damaged \(transformer.transformer_blocks.0.attn.to_q"),
        (state | {key: torch.full((4, 64), torch.nan)}, "not finite"),
        (state | {key: torch.zeros(4, 7)}, r"1 damaged \(transformer.transformer_blocks.0.attn.to_q"),
        ({name: tensor for name, tensor in state.items() if name != key}, r"1 left over \(.*lora_B"),
        ({}, "it is empty"),
    ):
        save_file(changed, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=message):
            merge(network, [Adapter(tmp_path / "x.safetensors")])
    for metadata in ("[]", "{", '{"lora_alpha": "high"}', '{"alpha_pattern": [1]}'):
        save_file(state, tmp_path / "y.safetensors", metadata={"lora_adapter_metadata": metadata})
        with pytest.raises(ValueError, match="broken adapter metadata"):
            merge(network, [Adapter(tmp_path / "y.safetensors")])
    save_file(state, tmp_path / "dora.safetensors", metadata={"lora_adapter_metadata": json.dumps({"use_dora": True})})
    with pytest.raises(ValueError, match="is a DoRA"):
        merge(network, [Adapter(tmp_path / "dora.safetensors")])
    with pytest.raises(FileNotFoundError, match="is not a LoRA"):
        merge(network, [Adapter(tmp_path / "nowhere")])
    assert torch.equal(output(network), plain)
