"""The prior as a function: torch's own encoder layers, who sees whom, padding, and bad inputs."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dits import weighted_by_name
from networks import relative
from torch import Tensor, nn

from mmdit.embed import timestep_features
from mmdit.network import Condition
from mmdit.prior import CausalBlock, Prior

SIZES = {"in_channels": 12, "depth": 3, "width": 48, "heads": 3, "text_dim": 20, "pooled_dim": 10}


def small(**changes: object) -> Prior:
    network = weighted_by_name(Prior(**(SIZES | changes)))
    assert isinstance(network, Prior)
    return network


def inputs(text: int = 5) -> tuple[Tensor, Tensor, Condition]:
    draw = torch.Generator().manual_seed(1)
    z, t = torch.randn(4, 12, 1, 1, generator=draw), torch.rand(4, generator=draw)
    return z, t, Condition(torch.randn(4, text, 20, generator=draw), torch.randn(4, 10, generator=draw))


def test_it_starts_as_zero_and_reports_its_sizes() -> None:
    network = Prior(**SIZES)
    assert torch.equal(network(*inputs()), torch.zeros(4, 12, 1, 1))
    assert (network.in_channels, network.out_channels, network.text_dim, network.pooled_dim) == (12, 12, 20, 10)
    assert (network.sample_size, network.unit, network.largest, network.depth, network.width) == (1, 1, 1, 3, 48)
    family = Prior(in_channels=1, depth=2, text_dim=1, pooled_dim=1)
    assert (family.width, family.settings["heads"], family.skippable) == (128, 2, 0)


def theirs(block: CausalBlock, width: int, heads: int) -> nn.TransformerEncoderLayer:
    """The same weights in torch's layer."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, lambda x: F.gelu(x, approximate="tanh"), batch_first=True, norm_first=True
    )
    layer.load_state_dict({
        "self_attn.in_proj_weight": block.qkv.weight, "self_attn.in_proj_bias": block.qkv.bias,
        "self_attn.out_proj.weight": block.proj.weight, "self_attn.out_proj.bias": block.proj.bias,
        "linear1.weight": block.mlp.fc1.weight, "linear1.bias": block.mlp.fc1.bias,
        "linear2.weight": block.mlp.fc2.weight, "linear2.bias": block.mlp.fc2.bias,
        "norm1.weight": block.norm_attention.weight, "norm1.bias": block.norm_attention.bias,
        "norm2.weight": block.norm_mlp.weight, "norm2.bias": block.norm_mlp.bias,
    })  # fmt: skip
    return layer


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_a_causal_transformer_of_torch_s_layers_read_at_the_query(masked: bool) -> None:
    network = small(qk_norm=False, text_mask=masked)
    z, t, condition = inputs()
    real = torch.ones(4, 9, dtype=torch.bool)
    if masked:
        real[:, :5] = torch.arange(5) < torch.tensor([3, 5, 1, 4])[:, None]
        condition = condition._replace(mask=real[:, :5])
    x = torch.cat([
        network.context(condition.text), network.pooled(condition.pooled)[:, None],
        network.time(timestep_features(t, 256))[:, None], network.embedding(z[:, None, :, 0, 0]),
        network.query.expand(4, 1, -1),
    ], dim=1)  # fmt: skip
    hidden = torch.triu(torch.ones(9, 9, dtype=torch.bool), 1) | ~real[:, None]
    hidden &= ~torch.eye(9, dtype=torch.bool)
    for block in network.blocks:
        assert isinstance(block, CausalBlock)
        x = theirs(block, 48, 3)(x, src_mask=hidden.repeat_interleave(3, dim=0))
    wanted = network.out(network.norm(x[:, -1]))
    assert relative(network(z, t, condition).flatten(1), wanted) < 1e-5


def test_a_token_sees_only_those_before_it() -> None:
    network = small()
    seen: list[Tensor] = []
    network.blocks[1].register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    z, t, condition = inputs()
    network(z, t, condition)
    other = condition.text.clone()
    other[:, 2] += 1
    changed = (
        (2, z, t, condition._replace(text=other)),
        (5, z, t, condition._replace(pooled=condition.pooled + 1)),
        (6, z, t.flip(0), condition),
        (7, z + 1, t, condition),
    )
    for place, *given in changed:
        network(*given)
        moved = (seen[-1] - seen[0]).abs().amax((0, 2))
        assert torch.equal(moved[:place], torch.zeros(place)), place
        assert (moved[place:] > 1e-4).all(), place


def test_the_output_depends_on_everything() -> None:
    network = small()
    z, t, condition = inputs()
    base = network(z, t, condition)
    for other in (
        network(z.flip(0), t, condition),
        network(z, t.flip(0), condition),
        network(z, t, condition._replace(text=condition.text.flip(0))),
        network(z, t, condition._replace(pooled=condition.pooled.flip(0))),
    ):
        assert relative(other, base) > 1e-3
    one = network(z[2:3], t[2:3], Condition(condition.text[2:3], condition.pooled[2:3]))
    assert relative(one, base[2:3]) < 1e-5  # and on nothing else of the batch


def test_a_mask_hides_padding_and_without_one_it_is_attended_to() -> None:
    network = small(text_mask=True)
    z, t, condition = inputs(text=6)
    mask = torch.arange(6) < torch.tensor([3, 6, 1, 4])[:, None]
    other = condition.text.where(mask[..., None], torch.randn(4, 6, 20))
    masked = network(z, t, condition._replace(mask=mask))
    assert torch.equal(network(z, t, Condition(other, condition.pooled, mask)), masked)
    free = small()
    assert relative(free(z, t, Condition(other, condition.pooled)), free(z, t, condition)) > 1e-3
    short = Condition(condition.text[:1, :3], condition.pooled[:1], mask[:1, :3])
    assert relative(network(z[:1], t[:1], short), masked[:1]) < 1e-5
    for enabled in (False, True):  # in bfloat16 attention is written out
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            nothing = network(z, t, condition._replace(mask=torch.zeros_like(mask)))
        assert nothing.isfinite().all()  # padding that sees nobody sees itself


def test_every_parameter_learns_once_it_has_left_the_start() -> None:
    network = Prior(**SIZES)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    z, t, condition = inputs()
    for _ in range(3):  # the zero output holds other gradients back for one step
        optimizer.zero_grad()
        (network(z, t, condition) - z.flip(0)).square().mean().backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-7, name


def test_bfloat16_weights_and_autocast_stay_near() -> None:
    z, t, condition = inputs()
    base = small()(z, t, condition)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(small()(z, t, condition).float(), base) < 0.05
    assert relative(small().bfloat16()(z, t, condition).float(), base) < 0.05


def test_bad_sizes_and_inputs_are_named_in_one_line() -> None:
    z, t, condition = inputs()
    calls = [
        (lambda: Prior(**(SIZES | {"depth": 0})), "at least 1, got 0"),
        (lambda: Prior(**(SIZES | {"heads": 5})), "multiple of heads, got width 48 and heads 5"),
        (lambda: small()(torch.zeros(4, 12, 2, 2), t, condition), r"reads embeddings \(12, 1, 1\), got \(12, 2, 2\)"),
        (lambda: small()(z[..., 0, 0], t, condition), r"reads embeddings \(12, 1, 1\), got \(12,\)"),
        (lambda: small(text_mask=True)(z, t, condition), "has text_mask and needs a condition with mask"),
        (lambda: small()(z, t, condition._replace(picture=z)), "has no picture_channels"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    network = small(text_mask=True, qk_norm=False)
    network.save(tmp_path)
    loaded = Prior.load(tmp_path)
    assert not loaded.training
    assert loaded.settings == network.settings
    z, t, condition = inputs()
    condition = condition._replace(mask=torch.ones(4, 5, dtype=torch.bool))
    assert torch.equal(loaded(z, t, condition), network(z, t, condition))
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    for wrong, message in (
        ({"text_mask": 1}, "wrong type: text_mask"),
        ({"depth": 4}, "do not fit this Prior's config"),
        ({"_class_name": "DiT"}, "describes a DiT, not a Prior"),
    ):
        file.write_text(json.dumps(content | wrong))
        with pytest.raises(ValueError, match=message):
            Prior.load(tmp_path)
