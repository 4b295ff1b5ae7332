"""ControlNets: equal to diffusers', of both released kinds; a new one changes nothing; what does not fit is refused."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from networks import inputs, plain, relative, stirred
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdit import checkpoint, control
from mmdit.control import Control, Controlled, JointControlNet, SingleControlNet, places
from mmdit.model import MMDiT
from storage.text import read_json

SIZES = {
    "sample_size": 8, "patch_size": 2, "in_channels": 3, "out_channels": 3, "num_attention_heads": 3,
    "attention_head_dim": 16, "joint_attention_dim": 20, "caption_projection_dim": 48, "pooled_projection_dim": 10,
    "pos_embed_max_size": 12,
}  # fmt: skip


def base_of(depth: int, folder: Path, **changes: object) -> tuple[MMDiT, SD3Transformer2DModel]:
    """A base with random weights, ours and diffusers'."""
    theirs = stirred(SD3Transformer2DModel(**SIZES, num_layers=depth, **changes))
    theirs.save_pretrained(folder)
    return checkpoint.load(folder), theirs


def theirs_of(kind: str, depth: int, theirs: SD3Transformer2DModel, **changes: object) -> SD3ControlNetModel:
    """One of diffusers' ControlNets with random weights. The kind without text borrows the base's patches."""
    if kind == "joint":
        return stirred(SD3ControlNetModel(**SIZES, num_layers=depth, **changes))
    single = {"joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None, "pos_embed_max_size": None}
    return stirred(SD3ControlNetModel(**(SIZES | single), num_layers=depth, **changes), scale=0.1)


def answer(
    base: SD3Transformer2DModel, nets: list[tuple[SD3ControlNetModel, Tensor, float]], pooled: Tensor | None = None
) -> Tensor:
    """What diffusers' network answers, steered by ControlNets as its pipeline does it."""
    z, t, condition = inputs()
    total: list[Tensor] | None = None
    for net, hint, scale in nets:
        hidden = z
        if net.pos_embed is None:
            hidden = base.pos_embed(z)
        text = None if net.context_embedder is None else condition.text
        vector = condition.pooled if pooled is None else pooled
        samples = net(hidden, hint, scale, text, vector, 1000 * t, return_dict=False)[0]
        total = samples if total is None else [a + b for a, b in zip(total, samples, strict=True)]
    return base(z, condition.text, condition.pooled, 1000 * t, total, return_dict=False)[0]


def hints(count: int) -> Tensor:
    return torch.randn(4, 3 * count, 8, 8, generator=torch.Generator().manual_seed(7))


def steered(network: Controlled, picture: Tensor) -> Tensor:
    z, t, condition = inputs()
    return network(z, t, condition._replace(picture=picture))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["joint", "single"])
@pytest.mark.parametrize(("base_depth", "depth"), [(4, 2), (5, 2), (7, 3), (3, 3), (2, 1)])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_equals_diffusers(tmp_path: Path, kind: str, base_depth: int, depth: int, scale: float) -> None:
    base, theirs = base_of(base_depth, tmp_path / "base", qk_norm="rms_norm")
    net = theirs_of(kind, depth, theirs, force_zeros_for_pooled_projection=False)
    net.save_pretrained(tmp_path / "net")
    ours = Controlled(base, [Control(control.load(tmp_path / "net"), scale)])
    hint = hints(1)
    expected = answer(theirs, [(net, hint, scale)])
    assert relative(steered(ours, hint), expected) < 1e-5
    unsteered = theirs(inputs()[0], inputs()[2].text, inputs()[2].pooled, 1000 * inputs()[1], return_dict=False)[0]
    assert relative(expected, unsteered) > 0.01


@torch.no_grad()
def test_several_are_added_up(tmp_path: Path) -> None:
    base, theirs = base_of(4, tmp_path / "base")
    nets = [theirs_of("joint", 2, theirs, force_zeros_for_pooled_projection=False) for _ in range(2)]
    nets[1] = stirred(nets[1], 0.2)
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
    loaded = [Control(control.load(tmp_path / str(i)), scale) for i, scale in enumerate((0.7, 1.6))]
    hint = hints(2)
    expected = answer(theirs, [(nets[0], hint[:, :3], 0.7), (nets[1], hint[:, 3:], 1.6)])
    assert relative(steered(Controlled(base, loaded), hint), expected) < 1e-5


@torch.no_grad()
def test_dual_attention_and_qk_norm(tmp_path: Path) -> None:
    base, theirs = base_of(4, tmp_path / "base", qk_norm="rms_norm", dual_attention_layers=(0, 1))
    net = theirs_of("joint", 2, theirs, qk_norm="rms_norm", dual_attention_layers=(0, 1))
    net.save_pretrained(tmp_path / "net")
    loaded = control.load(tmp_path / "net")
    assert loaded.zero_pooled  # diffusers' default
    expected = answer(theirs, [(net, hints(1), 1.0)], pooled=torch.zeros(4, 10))
    assert relative(steered(Controlled(base, [Control(loaded)]), hints(1)), expected) < 1e-5


@torch.no_grad()
def test_the_original_file_of_the_kind_without_text(tmp_path: Path) -> None:
    """It follows Stability AI's reference, in which a residual also follows the last block."""
    width, depth, base_depth = 128, 2, 4
    wide = SIZES | {"num_attention_heads": 2, "attention_head_dim": 64, "caption_projection_dim": width}
    theirs = stirred(SD3Transformer2DModel(**wide, num_layers=base_depth))
    theirs.save_pretrained(tmp_path / "base")
    single = {"joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None, "pos_embed_max_size": None}
    net = stirred(SD3ControlNetModel(**(wide | single), num_layers=depth, force_zeros_for_pooled_projection=False))
    file = tmp_path / "canny.safetensors"
    save_file(original_names(net.state_dict(), depth), file)
    base, ours = checkpoint.load(tmp_path / "base"), control.load(file)
    assert isinstance(ours, SingleControlNet)
    assert ours.every_block
    ours.every_block = False
    expected = answer(theirs, [(net, hints(1), 1.0)])
    assert relative(steered(Controlled(base, [Control(ours)]), hints(1)), expected) < 1e-5
    ours.every_block = True
    assert relative(steered(Controlled(base, [Control(ours)]), hints(1)), expected) > 1e-3


def original_names(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors of diffusers' ControlNet without text as Stability AI's files name them."""
    renamed = {"attn.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
               "norm1.linear": "adaLN_modulation.1"}  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for new, old in renamed.items():
            name = re.sub(rf"(transformer_blocks\.\d+)\.{re.escape(new)}\.", rf"\1.{old}.", name)
        if ".to_q." in name or ".to_k." in name or ".to_v." in name:
            continue
        found[name] = tensor.clone()
    for i in range(depth):
        for kind in ("weight", "bias"):
            rows = [state[f"transformer_blocks.{i}.attn.to_{part}.{kind}"] for part in "qkv"]
            found[f"transformer_blocks.{i}.attn.qkv.{kind}"] = torch.cat(rows)
    return found


def test_the_reference_divides_the_blocks_as_its_code_does() -> None:
    assert places(38, 19, every_block=True) == [i // 2 for i in range(38)]
    assert places(38, 19) == [*(i // 2 for i in range(37)), None]
    assert places(38, 16)[:37] == [int(i * 16 / 38) for i in range(37)]  # all of them, not 13


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"conv_mlp": True}, {"dual_attention_layers": (0, 2)}, {"qk_norm": False}])
def test_a_new_one_changes_nothing_and_copies_the_first_blocks(changes: dict) -> None:
    base = stirred(plain(depth=4, **changes))
    z, t, condition = inputs()
    new = JointControlNet.of(base, 2)
    network = Controlled(base, [Control(new)])
    assert torch.equal(steered(network, hints(1)), base(z, t, condition))
    held = base.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in new.trunk.state_dict().items())


def test_the_first_gradient_reaches_the_outputs_and_then_the_hint() -> None:
    base = stirred(plain(depth=4)).requires_grad_(False)
    new = JointControlNet.of(base, 2)
    network = Controlled(base, [Control(new)])
    steered(network, hints(1)).square().mean().backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in new.outputs)
    assert new.hint.weight.grad.abs().max() == 0
    assert all(p.grad is None for p in base.parameters())
    unused = [name for name, p in new.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []  # DDP would wait for them
    with torch.no_grad():
        for layer in new.outputs:
            layer.weight += 0.1
    steered(network, hints(1)).square().mean().backward()
    assert new.hint.weight.grad.abs().max() > 0


@torch.no_grad()
def test_written_folders_open_in_diffusers(tmp_path: Path) -> None:
    base = stirred(plain(depth=4))
    new = stirred(JointControlNet.of(base, 2))
    control.save(new, tmp_path / "net")
    theirs = SD3ControlNetModel.from_pretrained(tmp_path / "net")
    checkpoint.save(base, tmp_path / "base")
    network = SD3Transformer2DModel.from_pretrained(tmp_path / "base")
    found = steered(Controlled(base, [Control(new)]), hints(1))
    assert relative(answer(network, [(theirs, hints(1), 1.0)]), found) < 1e-5
    again = control.load(tmp_path / "net")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), new.state_dict().values(), strict=True))


@torch.no_grad()
def test_round_trip_with_what_diffusers_does_not_know(tmp_path: Path) -> None:
    new = stirred(JointControlNet.of(plain(depth=4, conv_mlp=True, time_scale=10.0), 2))
    control.save(new, tmp_path)
    again = control.load(tmp_path)
    assert isinstance(again, JointControlNet)
    assert again.trunk.conv_mlp
    assert again.trunk.time_scale == 10
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), new.state_dict().values(), strict=True))
    assert read_json(tmp_path / "config.json")["_class_name"] == "ControlNet"  # not diffusers'


@torch.no_grad()
def test_the_rule_for_the_last_block_is_kept(tmp_path: Path) -> None:
    new = stirred(SingleControlNet(48, 2, 3, 10, in_channels=3))
    new.every_block = True
    control.save(new, tmp_path)
    assert control.load(tmp_path).every_block
    assert read_json(tmp_path / "config.json")["_class_name"] == "ControlNet"  # diffusers would follow the other rule


def test_a_control_net_with_fewer_positions_limits_the_size() -> None:
    new = JointControlNet.of(plain(depth=3, pos_embed_max_size=6), 1)
    assert Controlled(plain(depth=3), [Control(new)]).largest == 12


@torch.no_grad()
def test_an_interval_turns_it_off_elsewhere() -> None:
    base = stirred(plain(depth=3))
    new = stirred(JointControlNet.of(base, 1))
    part = Controlled(base, [Control(new, interval=(0.5, 1.0))])
    whole = Controlled(base, [Control(new)])
    z, _, condition = inputs()
    hinted = condition._replace(picture=hints(1))
    for t, expected in (
        (0.7, whole(z, torch.full((4,), 0.7), hinted)),
        (0.3, base(z, torch.full((4,), 0.3), condition)),
    ):
        assert torch.equal(part(z, torch.full((4,), t), hinted), expected)


@torch.no_grad()
def test_skipped_layers_skip_their_residual() -> None:
    base = stirred(plain(depth=4))
    new = stirred(JointControlNet.of(base, 2))
    z, t, condition = inputs()
    hinted = condition._replace(picture=hints(1))
    residuals = new(base, z, t, condition, hints(1))
    network = Controlled(base, [Control(new)])
    expected = base(z, t, condition, skip_layers=(1,), residuals=[residuals[0], None, residuals[2], None])
    assert torch.equal(network(z, t, hinted, skip_layers=(1,)), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 96, "heads": 6}, "width 48 and not 96"),
        ({"text_dim": 24}, "text_dim 20 and not 24"),
        ({"in_channels": 4, "pooled_dim": 12}, "in_channels 3 and not 4, pooled_dim 10 and not 12"),
    ],
)
def test_another_base_is_refused(changes: dict, words: str) -> None:
    new = JointControlNet.of(plain(depth=3), 1)
    with pytest.raises(ValueError, match=re.escape(f"one of another base: it has {words}")):
        Controlled(plain(depth=3, **changes), [Control(new)])


def test_networks_that_no_control_net_knows_are_refused() -> None:
    new = JointControlNet.of(plain(depth=3), 1)
    with pytest.raises(ValueError, match="takes a picture, a guidance or two times"):
        Controlled(plain(depth=3, two_times=True), [Control(new)])
    for depth, words in ((4, "can have 1, 2 blocks, not 3"), (2, "can have 1 blocks, not 0")):
        with pytest.raises(ValueError, match=words):
            JointControlNet.of(plain(depth=depth), int(words[-1]))


def test_bad_files_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no ControlNet"):
        control.load(tmp_path / "none")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no single file of a ControlNet"):
        control.load(tmp_path / "other.safetensors")
    broken = {"controlnet_blocks.99999.weight": torch.zeros(1), "pos_embed_input.proj.weight": torch.zeros(2, 2)}
    for name in ("transformer_blocks.0.attn.qkv.weight", "time_text_embed.text_embedder.linear_1.weight"):
        broken[name] = torch.zeros(2)
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="is no single file of a ControlNet"):
        control.load(tmp_path / "broken.safetensors")
    masked = SD3ControlNetModel(**SIZES, num_layers=1, extra_conditioning_channels=1)
    masked.save_pretrained(tmp_path / "masked")
    with pytest.raises(ValueError, match="also takes a mask"):
        control.load(tmp_path / "masked")
    checkpoint.save(plain(depth=2), tmp_path / "base")
    with pytest.raises(ValueError, match="describes a SD3Transformer2DModel, not an SD3ControlNetModel"):
        control.load(tmp_path / "base")
    net = SD3ControlNetModel(**SIZES, num_layers=1)
    net.save_pretrained(tmp_path / "net")
    file = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "controlnet_blocks.0.bias"}, file)
    with pytest.raises(ValueError, match=r"controlnet_blocks\.0\.bias"):
        control.load(tmp_path / "net")
