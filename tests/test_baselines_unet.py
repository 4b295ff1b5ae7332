"""The U-Net: diffusers' own function at the step 1000·t, told what the transformer is told, and of equal size."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from jsonargparse import ArgumentParser
from networks import stirred
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from baselines.unet import CONFIG, STEM, UNet
from mmdit.model import Condition, MMDiT

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = {"in_channels": 3, "channels": (8, 12), "layers_per_block": 1, "heads": 2, "text_dim": 20, "pooled_dim": 10,
         "sample_size": 8, "norm_num_groups": 4}  # fmt: skip

WEIGHTS = f"{STEM}.safetensors"


def small(**changes: object) -> UNet:
    """A small network with every weight random, so that nothing is hidden behind the zero convolution."""
    return stirred(UNet(**(SIZES | changes)))


def inputs(height: int = 8, width: int = 8, text: int = 5) -> tuple[Tensor, Tensor, Condition]:
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(4, 3, height, width, generator=draw)
    condition = Condition(torch.randn(4, text, 20, generator=draw), torch.randn(4, 10, generator=draw))
    return z, torch.rand(4, generator=draw), condition


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("out_channels", [None, 6])
@pytest.mark.parametrize("size", [(8, 8), (4, 10), (2, 2)])
def test_starts_as_zero_of_the_promised_shape(size: tuple[int, int], out_channels: int | None) -> None:
    network = UNet(**(SIZES | {"out_channels": out_channels}))
    z, t, condition = inputs(*size)
    assert torch.equal(network(z, t, condition), torch.zeros(4, out_channels or 3, *size))
    assert network.out_channels == (out_channels or 3)


def test_the_network_reports_its_sizes() -> None:
    network = UNet(**(SIZES | {"channels": (8, 12, 16)}))
    assert (network.in_channels, network.out_channels, network.text_dim, network.pooled_dim) == (3, 3, 20, 10)
    assert (network.sample_size, network.unit, network.largest) == (8, 4, None)


@pytest.mark.parametrize("adm", [False, True])
def test_equals_diffusers_at_a_thousand_t(tmp_path: Path, adm: bool) -> None:
    network = small(out_channels=6, adm=adm)
    network.save(tmp_path)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    z, t, condition = inputs(4, 10)
    mask = torch.arange(5) < torch.tensor([3, 5, 1, 4])[:, None]
    for keep in (None, mask):
        expected = theirs(
            z, 1000 * t, condition.text, class_labels=condition.pooled, encoder_attention_mask=keep
        ).sample
        assert expected.abs().mean() > 0.01
        assert torch.equal(network(z, t, condition._replace(mask=keep)), expected)
    steps = torch.tensor([1, 250, 999, 1000])
    whole = theirs(z, steps, condition.text, class_labels=condition.pooled).sample
    assert relative(network(z, steps / 1000, condition), whole) < 1e-4


def test_every_option_and_every_input_changes_the_output() -> None:
    z, t, condition = inputs()
    base = small()(z, t, condition)
    for change in ({"heads": 4}, {"norm_num_groups": 2}, {"layers_per_block": 2}, {"channels": (8, 16)}, {"adm": True}):
        assert relative(small(**change)(z, t, condition), base) > 1e-3, change
    assert relative(small()(z, t + 0.1, condition), base) > 1e-3
    assert relative(small()(z, t, condition._replace(text=condition.text + 1)), base) > 1e-3
    assert relative(small()(z, t, condition._replace(pooled=condition.pooled + 1)), base) > 1e-3


def test_heads_are_a_number_of_heads() -> None:
    attentions = [m for m in small(heads=4).modules() if type(m).__name__ == "Attention"]
    assert len(attentions) == 14  # of itself and of the text: two down, one in the middle, four up
    assert {m.heads for m in attentions} == {4}


def test_adm_scales_by_the_time_and_resamples_inside_residual_blocks() -> None:
    network = small(adm=True, heads=4)
    blocks = [m for m in network.modules() if type(m).__name__ == "ResnetBlock2D"]
    assert all(block.time_emb_proj.out_features == 2 * block.out_channels for block in blocks)  # AdaGN: scale and shift
    assert sum(block.downsample is not None for block in blocks) == 1
    assert sum(block.upsample is not None for block in blocks) == 1
    assert not any(type(m).__name__ in ("Downsample2D", "Upsample2D") and m.use_conv for m in network.modules())
    attentions = [m for m in network.modules() if type(m).__name__ == "Attention"]
    assert [m.heads for m in attentions] == [4, 6, 6, 6, 4, 4, 6]  # as wide at every level; one reads image and text


@pytest.mark.parametrize("adm", [False, True])
def test_mask_hides_padding_and_no_mask_attends_to_it(adm: bool) -> None:
    network = small(adm=adm)
    z, t, condition = inputs(text=6)
    mask = torch.arange(6) < torch.tensor([3, 6, 1, 4])[:, None]
    other = condition.text.where(mask[..., None], torch.randn(4, 6, 20))
    masked = network(z, t, condition._replace(mask=mask))
    assert torch.equal(network(z, t, Condition(other, condition.pooled, mask)), masked)
    assert relative(network(z, t, Condition(other, condition.pooled)), masked) > 1e-3
    short = Condition(condition.text[:1, :3], condition.pooled[:1])
    assert relative(network(z[:1], t[:1], short), masked[:1]) < 1e-5
    full = condition._replace(mask=torch.ones(4, 6, dtype=torch.bool))
    assert relative(network(z, t, full), network(z, t, condition)) < 1e-6


def test_samples_of_a_batch_do_not_influence_each_other() -> None:
    network = small()
    z, t, condition = inputs()
    one = network(z[2:3], t[2:3], Condition(condition.text[2:3], condition.pooled[2:3]))
    assert relative(one, network(z, t, condition)[2:3]) < 1e-5


@pytest.mark.parametrize("adm", [False, True])
def test_every_parameter_learns_after_the_first_step(adm: bool) -> None:
    network = UNet(**SIZES, adm=adm)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    z, t, condition = inputs()
    for _ in range(2):  # the zero convolution holds all other gradients back for one step
        optimizer.zero_grad()
        (network(z, t, condition) - z.flip(0)).square().mean().backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-7, name  # what cancels exactly leaves rounding errors of 1e-9


@pytest.mark.parametrize("adm", [False, True])
def test_save_and_load_keep_every_bit(tmp_path: Path, adm: bool) -> None:
    network = small(out_channels=6, adm=adm)
    network.save(tmp_path / "unet")
    loaded = UNet.load(tmp_path / "unet")
    assert not loaded.training
    assert loaded.settings == network.settings
    assert loaded.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    theirs.save_pretrained(tmp_path / "theirs")
    z, t, condition = inputs()
    assert torch.equal(UNet.load(tmp_path / "theirs")(z, t, condition), network(z, t, condition))


@pytest.mark.parametrize("size", [(6, 8), (8, 10)])
def test_a_size_that_does_not_halve_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"latent {size[0]}×{size[1]} is not a multiple of 4"):
        UNet(**(SIZES | {"channels": (8, 12, 8)}))(*inputs(*size))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"channels": ()}, "channels must not be empty"),
        ({"channels": (8, 0)}, "at least 1"),
        ({"in_channels": 0}, "at least 1"),
        ({"out_channels": 0}, "at least 1"),
        ({"layers_per_block": 0}, "at least 1"),
        ({"norm_num_groups": 0}, "at least 1"),
        ({"channels": (8, 14)}, "multiples of heads and of norm_num_groups"),
        ({"heads": 3}, "multiples of heads"),
        ({"heads": 3, "adm": True}, "multiples of heads"),
        ({"channels": (4, 8)}, "two or more times the latter"),
        ({"sample_size": 7}, "multiple of 2 with 2 levels"),
    ],
)
def test_impossible_dimensions_are_refused(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        UNet(**(SIZES | sizes))
    assert "\n" not in str(caught.value)


def test_one_channel_a_group_would_forget_the_time() -> None:
    """Why it is refused: h + e(t) with e constant over the picture, normalised channel by channel, is h normalised."""
    config = small().settings | {"block_out_channels": [4, 4]}
    z, t, condition = inputs()
    theirs = UNet2DConditionModel(**config).eval()
    y = [theirs(z, 1000 * when, condition.text, class_labels=condition.pooled).sample for when in (t, 1 - t)]
    assert relative(y[0], y[1]) < 1e-5


def change_config(folder: Path, **changes: object) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_from_config(folder: Path, name: str) -> None:
    file = folder / CONFIG
    config = json.loads(file.read_text())
    del config[name]
    file.write_text(json.dumps(config))


def spoil_truncate(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def spoil_rename(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["model.diffusion_model.out.2.weight"] = state.pop("conv_out.weight")
    save_file(state, folder / WEIGHTS)


def spoil_shape(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["conv_out.bias"] = state["conv_out.bias"][:-1].clone()
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncate, "truncated or no safetensors"),
        (spoil_rename, r"1 missing \(conv_out.weight\), 1 left over \(model.diffusion"),
        (spoil_shape, r"mis-shaped \(conv_out.bias \(2,\) instead of \(3,\)\)"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no weights at"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "truncated or no safetensors"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is no JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "no JSON object"),
        (lambda folder: (folder / CONFIG).unlink(), "there is no .*config.json"),
        (lambda folder: change_config(folder, _class_name="UNet2DModel"), "UNet2DModel, not a UNet2DCond"),
        (lambda folder: change_config(folder, block_out_channels=[8, 16]), "do not fit this U-Net's config"),
        (lambda folder: change_config(folder, block_out_channels=[8, 13]), "multiples of heads"),
        (lambda folder: change_config(folder, block_out_channels=8), "wrong type"),
        (lambda folder: change_config(folder, sample_size="8"), "wrong type"),
        (lambda folder: change_config(folder, sample_size=8.0), "wrong type"),
        (lambda folder: change_config(folder, attention_head_dim=[2, 2]), "wrong type"),
        (lambda folder: change_config(folder, resnet_time_scale_shift="scale_shift"),
         "unsupported or missing settings: .*down_block_types"),
        (lambda folder: change_config(folder, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"]),
         "unsupported or missing settings: .*down_block_types"),
        (lambda folder: change_config(folder, upcast_attention=True), "unsupported .*: .*upcast_attention"),
        (lambda folder: drop_from_config(folder, "class_embed_type"), "missing settings: class_embed_type"),
        (lambda folder: drop_from_config(folder, "cross_attention_dim"), "lacks 'cross_attention_dim'"),
    ],
)  # fmt: skip
def test_damaged_folders_are_named_in_one_line(tmp_path: Path, spoil, message: str) -> None:
    small().save(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        UNet.load(tmp_path)
    assert "\n" not in str(caught.value)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def flops(network: nn.Module) -> int:
    """Of the forward pass of one picture with 10 text tokens, attention included: two per multiply-add."""
    inputs = torch.zeros(1, 1, 8, 8), torch.zeros(1), Condition(torch.zeros(1, 10, 64), torch.zeros(1, 64))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    assert any("attention" in str(operation) for operation in counter.get_flop_counts()["Global"])
    return counter.get_total_flops()


def configured(file: Path) -> nn.Module:
    """The network that a YAML file asks for, built as the training builds it."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(nn.Module, "network", required=True)
    return parser.instantiate(parser.parse_object({"network": yaml.safe_load(file.read_text())["network"]})).network


@pytest.mark.parametrize(
    ("overlay", "measure", "within"),
    [("unet-parameters", parameters, 0.03), ("unet-flops", flops, 0.03), ("adm", flops, 0.07)],
)
def test_overlays_match_the_transformer(overlay: str, measure, within: float) -> None:
    transformer = configured(CONFIGS / "digits.yaml")
    network = configured(CONFIGS / "network" / f"{overlay}.yaml")
    assert isinstance(transformer, MMDiT)
    assert isinstance(network, UNet)
    for key in ("in_channels", "out_channels", "text_dim", "pooled_dim", "sample_size"):
        assert getattr(network, key) == getattr(transformer, key), key
    assert measure(network) == pytest.approx(measure(transformer), rel=within)
    if overlay == "adm":
        assert parameters(network) == 238_769  # as its YAML file says
