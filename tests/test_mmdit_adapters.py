"""Updates in the files of other tools: every dialect, LoHa, LoKr and DoRA, strengths, and what is refused."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from adapted import THEIRS, close, opponent_network, output
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdit import checkpoint
from mmdit.adapters import merge
from mmdit.model import MMDiT
from pipeline.__main__ import main
from storage.updates import Adapter

WIDTH, RANK, ALPHA = 64, 3, 2.0
# Our layer, its name in the single files, and the names of its rows in diffusers.
LAYERS = {
    "blocks.1.image.qkv": ("joint_blocks.1.x_block.attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    "blocks.1.image.proj": ("joint_blocks.1.x_block.attn.proj", ["attn.to_out.0"]),
    "blocks.0.text.qkv": (
        "joint_blocks.0.context_block.attn.qkv",
        ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    ),
    "blocks.0.text.proj": ("joint_blocks.0.context_block.attn.proj", ["attn.to_add_out"]),
    "blocks.0.image.mlp.fc1": ("joint_blocks.0.x_block.mlp.fc1", ["ff.net.0.proj"]),
    "blocks.0.text.mlp.fc2": ("joint_blocks.0.context_block.mlp.fc2", ["ff_context.net.2"]),
}


@pytest.fixture
def opponent() -> SD3Transformer2DModel:
    return opponent_network()


@pytest.fixture
def base(opponent: SD3Transformer2DModel, tmp_path: Path) -> Path:
    opponent.save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def merged(base: Path, *files: Adapter) -> MMDiT:
    network = checkpoint.load(base)
    merge(network, files)
    return network


def factors(network: MMDiT) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """A and B of each part of each layer in diffusers."""
    draw, modules, found = torch.Generator().manual_seed(3), dict(network.named_modules()), {}
    for ours, (_, names) in LAYERS.items():
        module = modules[ours]
        assert isinstance(module, nn.Linear)
        rows = module.out_features // len(names)
        found[ours] = [
            (
                torch.randn(RANK, module.in_features, generator=draw) / 4,
                torch.randn(rows, RANK, generator=draw) / 4,
            )
            for _ in names
        ]
    return found


def written(dialect: str, given: dict[str, list[tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """The updates with names as the tool writes them, spelled out."""
    state: dict[str, Tensor] = {}
    for ours, sides in given.items():
        original, names = LAYERS[ours]
        block = ours.split(".")[1]
        if dialect in ("kohya", "ComfyUI"):  # one update of the joined rows: A below A, B on the diagonal
            down, up = torch.cat([a for a, _ in sides]), torch.block_diag(*(b for _, b in sides))
            if dialect == "kohya":
                flat = "lora_unet_" + original.replace(".", "_")
                state[f"{flat}.lora_down.weight"], state[f"{flat}.lora_up.weight"] = down, up
                state[f"{flat}.alpha"] = torch.tensor(ALPHA * len(sides))
            else:
                state[f"diffusion_model.{original}.lora_A.weight"] = down
                state[f"diffusion_model.{original}.lora_B.weight"] = up * ALPHA / RANK
            continue
        for name, (down, up) in zip(names, sides, strict=True):
            if dialect == "OneTrainer":
                flat = f"lora_transformer_transformer_blocks_{block}_{name.replace('.', '_')}"
                state[f"{flat}.lora_down.weight"], state[f"{flat}.lora_up.weight"] = down, up
                state[f"{flat}.alpha"] = torch.tensor(ALPHA)
            elif dialect == "LyCORIS":
                flat = f"lycoris_transformer_blocks_{block}_{name.replace('.', '_')}"
                state[f"{flat}.lora_down.weight"], state[f"{flat}.lora_up.weight"] = down, up
                state[f"{flat}.alpha"] = torch.tensor(ALPHA)
            elif dialect == "differences":
                flat = f"lycoris_transformer_blocks_{block}_{name.replace('.', '_')}"
                state[f"{flat}.diff"] = up @ down * ALPHA / RANK
            else:
                prefix = {"diffusers": "transformer", "PEFT": "base_model.model"}[dialect]
                full = f"{prefix}.transformer_blocks.{block}.{name}"
                state[f"{full}.lora_A.weight"], state[f"{full}.lora_B.weight"] = down, up
                if dialect == "diffusers":
                    state[f"{full}.alpha"] = torch.tensor(ALPHA)
    return state


def file_of(dialect: str, state: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    if dialect != "PEFT":
        save_file(state, folder / "any-name.safetensors")
        return folder / "any-name.safetensors"
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))
    return folder


@pytest.mark.parametrize("dialect", ["diffusers", "PEFT", "kohya", "ComfyUI", "OneTrainer", "LyCORIS", "differences"])
def test_one_lora_is_the_same_in_every_dialect(base: Path, tmp_path: Path, dialect: str) -> None:
    expected = checkpoint.load(base)
    given, modules = factors(expected), dict(expected.named_modules())
    for ours, sides in given.items():
        layer = modules[ours]
        assert isinstance(layer, nn.Linear)
        layer.weight.data += torch.cat([up @ down * ALPHA / RANK for down, up in sides])
    file = file_of(dialect, written(dialect, given), tmp_path / "files")
    found, wanted = merged(base, Adapter(file)).state_dict(), expected.state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=3, alpha=2, target_modules=THEIRS),
        LoKrConfig(r=3, alpha=2, target_modules=THEIRS),
        LoKrConfig(r=2, alpha=3, decompose_both=True, target_modules=["ff.net.2", "attn.to_k"]),
        LoKrConfig(r=64, alpha=32, target_modules=["attn.to_v"]),
        LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=[*THEIRS, "norm_out.linear"]),
        LoraConfig(r=4, lora_alpha=2, lora_bias=True, target_modules=[*THEIRS, "norm_out.linear"]),
    ],
    ids=["loha", "lokr", "lokr-both", "lokr-whole", "dora", "bias"],
)
def test_what_peft_trains_is_merged(
    base: Path, opponent: SD3Transformer2DModel, tmp_path: Path, config: PeftConfig
) -> None:
    plain = output(opponent)
    model = get_peft_model(opponent, config)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(4)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += (
                0.3 * torch.randn(parameter.shape, generator=draw) * (1 if "magnitude" not in key else 0.1)
            )
    model.save_pretrained(tmp_path / "peft")
    theirs = output(opponent)
    assert not close(theirs, plain)
    assert close(output(merged(base, Adapter(tmp_path / "peft"))), theirs)


@pytest.mark.parametrize("strength", [0.3, 1.0, 1.7, -0.5, 0.0])
def test_strengths_scale_and_several_add_up_as_in_diffusers(
    base: Path, opponent: SD3Transformer2DModel, tmp_path: Path, strength: float
) -> None:
    for name, seed in (("one", 5), ("two", 6)):
        other = tiny.frozen(tiny.transformer("sd35_medium"))
        other.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=THEIRS))
        draw = torch.Generator().manual_seed(seed)
        state = {key: 0.2 * torch.randn(x.shape, generator=draw) for key, x in get_peft_model_state_dict(other).items()}
        save_file({f"transformer.{key}": tensor for key, tensor in state.items()}, tmp_path / f"{name}.safetensors")
        theirs = StableDiffusion3Pipeline.lora_state_dict(str(tmp_path / f"{name}.safetensors"))
        opponent.load_lora_adapter(theirs, prefix="transformer", adapter_name=name)
    opponent.set_adapters(["one", "two"], weights=[strength, 0.8])
    files = Adapter.parse(f"{tmp_path}/one.safetensors:{strength}"), Adapter.parse(f"{tmp_path}/two.safetensors:0.8")
    assert close(output(merged(base, *files)), output(opponent))


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("dialect", ["diffusers", "PEFT", "kohya", "ComfyUI", "OneTrainer"])
def test_a_converted_lora_is_the_same(base: Path, tmp_path: Path, dialect: str, to: str) -> None:
    file = file_of(dialect, written(dialect, factors(checkpoint.load(base))), tmp_path / "files")
    out = tmp_path / ("peft" if to == "peft" else "out.safetensors")
    main(["convert", str(file), "--to", to, "--out", str(out)])
    found, wanted = merged(base, Adapter(out)).state_dict(), merged(base, Adapter(file)).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)


def test_a_lora_of_kohya_comes_back_to_the_bit_and_diffusers_reads_it(
    base: Path, opponent: SD3Transformer2DModel, tmp_path: Path
) -> None:
    network = checkpoint.load(base)
    state = written("kohya", factors(network))
    for name in ("0_x_block_adaLN_modulation_1", "2_context_block_adaLN_modulation_1"):  # the last has two vectors
        rows = {"0": 9, "2": 2}[name[0]] * WIDTH
        state[f"lora_unet_joint_blocks_{name}.lora_down.weight"] = torch.randn(2, WIDTH)
        state[f"lora_unet_joint_blocks_{name}.lora_up.weight"] = torch.randn(rows, 2) / 9
        state[f"lora_unet_joint_blocks_{name}.alpha"] = torch.tensor(2.0)
    state |= {
        name: torch.tensor(float(len(state[name.replace("alpha", "lora_down.weight")])))
        for name in state
        if "alpha" in name
    }  # s = 1: nothing is rounded
    save_file(state, tmp_path / "kohya.safetensors")
    main(
        ["convert", str(tmp_path / "kohya.safetensors"), "--to", "diffusers", "--out", str(tmp_path / "d.safetensors")]
    )
    main(["convert", str(tmp_path / "d.safetensors"), "--to", "kohya", "--out", str(tmp_path / "again.safetensors")])
    again = load_file(tmp_path / "again.safetensors")
    assert set(again) == set(state)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    theirs = StableDiffusion3Pipeline.lora_state_dict(str(tmp_path / "d.safetensors"))
    opponent.load_lora_adapter(theirs, prefix="transformer")
    assert close(output(merged(base, Adapter(tmp_path / "kohya.safetensors"))), output(opponent))


def test_peft_itself_reads_what_is_written_for_it(base: Path, opponent: SD3Transformer2DModel, tmp_path: Path) -> None:
    state = written("kohya", factors(checkpoint.load(base)))
    name = "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1"  # of another rank than the rest
    state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = (
        torch.randn(2, WIDTH),
        torch.randn(9 * WIDTH, 2),
    )
    save_file(state, tmp_path / "kohya.safetensors")
    main(["convert", str(tmp_path / "kohya.safetensors"), "--to", "peft", "--out", str(tmp_path / "peft")])
    PeftModel.from_pretrained(opponent, str(tmp_path / "peft"))  # type: ignore[arg-type]
    assert close(output(opponent), output(merged(base, Adapter(tmp_path / "kohya.safetensors"))))


def test_what_cannot_be_converted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_file({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.zeros(2, 2)}, tmp_path / "lokr.safetensors")
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.zeros(())}, tmp_path / "flux.safetensors")
    (tmp_path / "there").mkdir()
    for file, out, words in (
        ("lokr.safetensors", "x", "it holds lycoris_transformer_blocks_0_attn_to_q.lokr_w1"),
        ("flux.safetensors", "x", "it looks like one of Flux"),
        ("nowhere", "x", "is not a LoRA"),
        ("lokr.safetensors", "there", "exists: choose another --out"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(tmp_path / file), "--to", "kohya", "--out", str(tmp_path / out)])
        told = capsys.readouterr().err
        assert stop.value.code == 2
        assert words in told
        assert told.count("\n") == 1


def test_a_dora_of_columns_is_normed_over_the_rows(base: Path, tmp_path: Path) -> None:
    network = checkpoint.load(base)
    weight = network.get_submodule("blocks.0.image.proj").weight
    assert isinstance(weight, Tensor)
    draw = torch.Generator().manual_seed(7)
    down, up = torch.randn(2, WIDTH, generator=draw), torch.randn(WIDTH, 2, generator=draw)
    magnitude = torch.rand(1, WIDTH, generator=draw)
    whole = weight.detach() + up @ down / 2
    expected = weight.detach() + 0.4 * (
        magnitude * whole / whole.square().sum(0, keepdim=True).sqrt() - weight.detach()
    )
    name = "lora_unet_joint_blocks_0_x_block_attn_proj"
    save_file(
        {
            f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0),
            f"{name}.dora_scale": magnitude,
        },
        tmp_path / "dora.safetensors",
    )  # fmt: skip
    found = merged(base, Adapter(tmp_path / "dora.safetensors", 0.4)).get_submodule("blocks.0.image.proj").weight
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_biases_norms_and_the_patch_embedding_are_updated(base: Path, tmp_path: Path) -> None:
    """As ComfyUI saves the difference of two models: of matrices and convolutions the factors, of the rest all."""
    draw, before = torch.Generator().manual_seed(9), checkpoint.load(base)
    original = checkpoint.export(before, "original")
    layers = ("x_embedder.proj", "final_layer.adaLN_modulation.1", "joint_blocks.0.x_block.attn.qkv")
    norm = "joint_blocks.1.context_block.attn.ln_q"

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) / 9

    state = {f"diffusion_model.{norm}.diff": some(*original[f"{norm}.weight"].shape)}
    wanted = {f"{norm}.weight": state[f"diffusion_model.{norm}.diff"]}
    for layer in layers:
        rows, inputs, *kernel = original[f"{layer}.weight"].shape
        down, up, bias = some(2, inputs, *kernel), some(rows, 2, *[1] * len(kernel)), some(rows)
        keys = ("lora_down.weight", "lora_up.weight", "diff_b")
        state |= {f"diffusion_model.{layer}.{key}": x for key, x in zip(keys, (down, up, bias), strict=True)}
        wanted[f"{layer}.weight"] = (up.flatten(1) @ down.flatten(1)).view(rows, inputs, *kernel)
        wanted[f"{layer}.bias"] = bias
    save_file(state, tmp_path / "x.safetensors")
    after = checkpoint.export(merged(base, Adapter(tmp_path / "x.safetensors", 0.3)), "original")
    for name, tensor in original.items():
        expected = tensor + 0.3 * wanted[name] if name in wanted else tensor
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-6)


def test_loha_and_lokr_are_their_formulas(base: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(8)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    loha = {
        "hada_w1_a": some(WIDTH, 2),
        "hada_w1_b": some(2, WIDTH),
        "hada_w2_a": some(WIDTH, 2),
        "hada_w2_b": some(2, WIDTH),
    }
    lokr = {"lokr_w1": some(4, 4), "lokr_w2_a": some(WIDTH // 4, 5), "lokr_w2_b": some(5, WIDTH // 4)}
    names = "lora_unet_joint_blocks_0_x_block_attn_proj", "lora_unet_joint_blocks_1_x_block_attn_proj"
    state = {f"{names[0]}.{key}": tensor for key, tensor in loha.items()}
    state |= {f"{names[1]}.{key}": tensor for key, tensor in lokr.items()}
    state |= {f"{names[0]}.alpha": torch.tensor(1.0), f"{names[1]}.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "x.safetensors")
    before, after = checkpoint.load(base).state_dict(), merged(base, Adapter(tmp_path / "x.safetensors")).state_dict()
    changes = [after[f"blocks.{i}.image.proj.weight"] - before[f"blocks.{i}.image.proj.weight"] for i in (0, 1)]
    inner = lokr["lokr_w2_a"] @ lokr["lokr_w2_b"]
    for i, j in ((0, 0), (3, 17), (WIDTH - 1, 5)):
        hadamard = (loha["hada_w1_a"][i] @ loha["hada_w1_b"][:, j]) * (loha["hada_w2_a"][i] @ loha["hada_w2_b"][:, j])
        assert changes[0][i, j].item() == pytest.approx(hadamard.item() / 2, abs=1e-4)
        q = WIDTH // 4
        kron = lokr["lokr_w1"][i // q, j // q] * inner[i % q, j % q]
        assert changes[1][i, j].item() == pytest.approx(kron.item() * 2 / 5, abs=1e-4)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 64)}, "it looks like one of Flux"),
        ({"lora_unet_down_blocks_1_attentions_0_proj_in.alpha": ()}, "it looks like one of a UNet, such as SDXL"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": ()}, "text encoders are read if they are Stable"),
        ({"diffusion_model.joint_blocks.0.x_block.attn.proj.diff_b": (5,)}, r"1 damaged \(.*diff_b"),
        ({"diffusion_model.joint_blocks.0.x_block.attn.proj.diff": (5, 5)}, r"1 damaged \(.*attn.proj.diff"),
        ({"lora_unet_joint_blocks_0_x_block_attn_proj.hada_w1_a": (64, 2)}, r"1 left over \(.*hada_w1_a"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_named(base: Path, tmp_path: Path, state: dict, message: str) -> None:
    network = checkpoint.load(base)
    good = {key: tensor for key, tensor in written("kohya", factors(network)).items() if "attn_proj" not in key}
    save_file(good | {key: torch.zeros(shape) for key, shape in state.items()}, tmp_path / "x.safetensors")
    plain = output(network)
    with pytest.raises(ValueError, match=message):
        merge(network, [Adapter(tmp_path / "x.safetensors")])
    assert torch.equal(output(network), plain)


def test_a_path_may_end_in_a_strength(tmp_path: Path) -> None:
    assert Adapter.parse("a/b.safetensors") == Adapter(Path("a/b.safetensors"), 1.0)
    assert Adapter.parse("a:b:-0.5") == Adapter(Path("a:b"), -0.5)
    (tmp_path / "run:2").mkdir()
    assert Adapter.parse(f"{tmp_path}/run:2") == Adapter(tmp_path / "run:2", 1.0)
    for text in ("x:abc", "x:nan", "x:"):
        with pytest.raises(ValueError, match="neither a file nor PATH:STRENGTH"):
            Adapter.parse(text)
