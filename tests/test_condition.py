"""What a network may be told besides z, t and text: a picture, its level of noise, a mask; and what it tells back."""

import copy
from pathlib import Path

import pytest
import torch
from networks import stirred
from torch import Tensor

from baselines.dit import DiT
from flow.guidance import ClassifierFree
from mmdit import checkpoint
from mmdit.model import MMDiT
from mmdit.network import Condition, HiddenStates

SIZES = {"in_channels": 3, "depth": 3, "width": 48, "heads": 3, "text_dim": 20, "pooled_dim": 10, "sample_size": 8,
         "pos_embed_max_size": 12}  # fmt: skip


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Condition]:
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(batch, 3, 8, 8, generator=draw)
    text, pooled = torch.randn(batch, 5, 20, generator=draw), torch.randn(batch, 10, generator=draw)
    return z, torch.rand(batch, generator=draw), Condition(text, pooled)


def picture(batch: int = 4, channels: int = 2) -> Tensor:
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "grow",
    [
        {"picture_channels": 2},
        {"level_embeds": True},
        {"two_times": True},
        {"picture_channels": 2, "level_embeds": True},
    ],
)
def test_a_network_that_has_grown_is_the_same_function_to_the_bit(grow: dict) -> None:
    plain = stirred(MMDiT(**SIZES))
    grown = copy.deepcopy(plain)
    grown.grow(**grow)
    z, t, condition = inputs()
    told = condition._replace(
        picture=picture() if grown.picture_channels else None, level=t if grown.level_embeds else None
    )
    assert torch.equal(grown(z, t, told), plain(z, t, condition))


def test_a_longer_pooled_vector_changes_nothing_at_first(tmp_path: Path) -> None:
    plain = stirred(MMDiT(**SIZES))
    grown = copy.deepcopy(plain)
    grown.grow(grown_pooled_dim=14)
    z, t, condition = inputs()
    longer = condition._replace(pooled=torch.cat([condition.pooled, torch.randn(4, 4)], dim=1))
    torch.testing.assert_close(grown(z, t, longer), plain(z, t, condition), atol=1e-6, rtol=0)
    grown(z, t, longer).square().sum().backward()
    assert grown.pooled.fc1.weight.grad is not None
    assert grown.pooled.fc1.weight.grad[:, 10:].abs().sum() > 0
    checkpoint.save(plain, tmp_path / "transformer")
    loaded = checkpoint.load(tmp_path, grown_pooled_dim=14)
    assert torch.equal(loaded(z, t, longer), grown(z, t, longer))
    checkpoint.save(loaded, tmp_path / "transformer")
    assert checkpoint.load(tmp_path).pooled_dim == 14
    with pytest.raises(ValueError, match="pooled_dim 14 and cannot have 12"):
        grown.grow(grown_pooled_dim=12)


def test_new_networks_with_and_without_a_picture_start_alike() -> None:
    torch.manual_seed(3)
    plain = MMDiT(**SIZES)
    torch.manual_seed(3)
    shown = MMDiT(**SIZES, picture_channels=2, level_embeds=True)
    for name, tensor in plain.state_dict().items():
        held = shown.state_dict()[name]
        assert torch.equal(held[:, : tensor.shape[1]] if name == "patch.weight" else held, tensor), name
    assert not shown.patch.weight[:, 12:].any()


def test_picture_and_level_change_the_output_and_learn() -> None:
    network = stirred(MMDiT(**SIZES, picture_channels=2, level_embeds=True))
    z, t, condition = inputs()
    told = condition._replace(picture=picture().requires_grad_(), level=torch.full((4,), 0.3))
    y = network(z, t, told)
    y.square().sum().backward()
    assert told.picture is not None
    assert told.picture.grad is not None
    assert told.picture.grad.abs().sum() > 0
    for weight in (network.patch.weight, network.level.fc2.weight):
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
    assert network.patch.weight.grad is not None
    assert network.patch.weight.grad[:, 12:].abs().sum() > 0  # of the picture's own columns
    assert not torch.equal(y, network(z, t, told._replace(picture=picture() + 1)))
    assert not torch.equal(y, network(z, t, told._replace(level=torch.full((4,), 0.6))))


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        (MMDiT(**SIZES), {"picture": picture()}, "no picture_channels: leave picture out"),
        (MMDiT(**SIZES), {"level": torch.zeros(4)}, "no level_embeds: leave level out"),
        (MMDiT(**SIZES, picture_channels=2), {}, "has picture_channels and needs a condition with picture"),
        (MMDiT(**SIZES, level_embeds=True), {}, "has level_embeds and needs a condition with level"),
        (MMDiT(**SIZES, text_mask=True), {}, "has text_mask and needs a condition with mask"),
        (DiT(**SIZES), {"picture": picture()}, "no picture_channels: leave picture out"),
    ],
)
def test_a_network_refuses_what_it_cannot_use_and_asks_for_what_it_needs(
    network: MMDiT | DiT, change: dict, message: str
) -> None:
    z, t, condition = inputs()
    with pytest.raises(ValueError, match=message):
        network(z, t, condition._replace(**change))


def test_a_network_cannot_have_two_pictures() -> None:
    network = MMDiT(**SIZES, picture_channels=2)
    network.grow(picture_channels=2)  # which it has
    with pytest.raises(ValueError, match="picture_channels 2 and cannot have 3"):
        network.grow(picture_channels=3)


@pytest.mark.parametrize("told", [{"picture_channels": 2}, {"level_embeds": True}, {"text_mask": True}])
def test_what_it_is_told_comes_back_from_disk(tmp_path: Path, told: dict) -> None:
    network = stirred(MMDiT(**SIZES, **told))
    checkpoint.save(network, tmp_path / "transformer")
    back = checkpoint.load(tmp_path)
    assert {name: getattr(back, name) for name in told} == told
    for name, tensor in network.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert "MMDiT" in (tmp_path / "transformer/config.json").read_text()  # diffusers would leave it out unasked


@pytest.mark.parametrize("told", [{"picture_channels": 2}, {"text_mask": True}, {"time_scale": 10.0}])
def test_a_single_file_cannot_tell_it(told: dict) -> None:
    with pytest.raises(ValueError, match=f"a single file cannot store {next(iter(told))}"):
        checkpoint.single_file(MMDiT(**SIZES, **told))


def test_a_released_network_grows_as_it_is_read(tmp_path: Path) -> None:
    checkpoint.save(stirred(MMDiT(**SIZES)), tmp_path / "transformer")
    network = checkpoint.load(tmp_path, picture_channels=3, level_embeds=True)
    assert (network.picture_channels, network.level_embeds) == (3, True)
    z, t, condition = inputs()
    told = condition._replace(picture=picture(channels=3), level=t)
    assert torch.equal(network(z, t, told), checkpoint.load(tmp_path)(z, t, condition))


def test_guidance_moves_away_from_the_text_and_not_from_the_picture() -> None:
    network = stirred(MMDiT(**SIZES, picture_channels=2, level_embeds=True))
    z, t, condition = inputs()
    told = condition._replace(picture=picture(), level=t)
    null = Condition(torch.zeros(1, 5, 20), torch.zeros(1, 10))
    guided = ClassifierFree(network, told.null(null), 3.0)(z, t, told)
    alone = network(z, t, told._replace(text=torch.zeros(4, 5, 20), pooled=torch.zeros(4, 10)))
    torch.testing.assert_close(guided, alone + 3 * (network(z, t, told) - alone), atol=1e-4, rtol=1e-4)


def test_guidance_refuses_a_null_condition_without_the_picture() -> None:
    z, t, condition = inputs()
    with pytest.raises(ValueError, match="same fields"):
        ClassifierFree(lambda z, *_: z, condition, 2.0)(z, t, condition._replace(picture=picture()))


def test_hidden_states_are_the_tokens_after_the_blocks_asked_for() -> None:
    network = stirred(MMDiT(**SIZES))
    z, t, condition = inputs()
    kept = {}
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda module, inputs, outputs, i=i: kept.__setitem__(i, outputs[1]))
    states = HiddenStates([0, 2])
    y = network(z, t, condition, hidden_states=states)
    assert set(states.tokens) == {0, 2}
    assert all(torch.equal(states.tokens[i], kept[i]) for i in (0, 2))
    assert states.tokens[0].shape == (4, 16, 48)
    assert torch.equal(y, network(z, t, condition))  # asking changes nothing
