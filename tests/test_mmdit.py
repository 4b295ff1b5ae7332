"""The network: equal to diffusers' on random weights, the identity at the start, and blind where it should be."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from einops import rearrange
from networks import inputs, plain, relative, stirred
from torch.overrides import TorchFunctionMode

from mmdit import checkpoint
from mmdit.embed import crop_centre, patchify, sincos_2d, timestep_features, unpatchify
from mmdit.layers import WRITTEN_OUT, scaled_dot_product
from mmdit.model import Condition, MMDiT


def small(**changes: int | bool | tuple[int, ...]) -> MMDiT:
    """A small network with every weight random, so that nothing is hidden behind a zero gate."""
    return stirred(plain(**{"depth": 3} | changes))


def diffusers_twin(network: MMDiT, folder: Path) -> SD3Transformer2DModel:
    checkpoint.save(network, folder)
    return SD3Transformer2DModel.from_pretrained(folder).eval()


@pytest.mark.parametrize("dual", [(), (0, 1), (2,)])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (4, 10), (24, 6)])
def test_equals_diffusers_forward_and_in_every_gradient(
    tmp_path: Path, size: tuple[int, int], qk_norm: bool, dual: tuple[int, ...]
) -> None:
    network = small(qk_norm=qk_norm, dual_attention_layers=dual)
    theirs = diffusers_twin(network, tmp_path)
    z, t, condition = inputs(*size)
    ours_out = network(z, t, condition)
    theirs_out = theirs(z, condition.text, condition.pooled, t * 1000).sample
    assert relative(ours_out, theirs_out) < 1e-5

    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (ours_out * direction).sum().backward()
    (theirs_out * direction).sum().backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}
    gradients["positions"] = network.positions
    ours_grad = checkpoint.export(network, "diffusers", gradients)
    for name, parameter in theirs.named_parameters():
        if name.endswith("attn2.to_k.bias") and not qk_norm:  # shifts all logits of a query alike: no gradient
            assert max(ours_grad[name].abs().max(), parameter.grad.abs().max()) < 1e-5
        else:
            assert relative(ours_grad[name], parameter.grad) < 1e-5, name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [40, WRITTEN_OUT + 1])
def test_attention_trained_in_bfloat16_has_at_most_twice_the_error_of_the_fused_kernel(
    tokens: int, masked: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, tokens, 3, 16, generator=generator).bfloat16() for _ in range(4)]
    mask = torch.arange(tokens).expand(2, 1, 1, -1) < torch.tensor([tokens // 2, tokens])[:, None, None, None]
    fused = []

    def results(dtype: torch.dtype, limit: int) -> list[torch.Tensor]:
        monkeypatch.setattr("mmdit.layers.WRITTEN_OUT", limit)
        q, k, v, direction = (x.to(dtype) for x in drawn)
        for x in (q, k, v):
            x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16), Called() as called:
            y = scaled_dot_product(q, k, v, mask if masked else None)
        fused.append(F.scaled_dot_product_attention in called.functions)
        assert y.dtype == dtype
        return [y, *torch.autograd.grad(y, (q, k, v), direction.flatten(2))]

    exact, kernel, ours = results(torch.float64, 0), results(torch.bfloat16, 0), results(torch.bfloat16, WRITTEN_OUT)
    assert fused == [True, True, tokens > WRITTEN_OUT]
    for x, theirs, mine in zip(exact, kernel, ours, strict=True):
        assert relative(mine.double(), x) < 2 * relative(theirs.double(), x) < 0.02


class Called(TorchFunctionMode):
    """Notes torch's functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.add(func)
        return func(*args, **(kwargs or {}))


def test_every_option_changes_the_output() -> None:
    z, t, condition = inputs()
    base = small()(z, t, condition)
    for change in ({"qk_norm": False}, {"heads": 6}, {"depth": 2}, {"sample_size": 12}, {"pos_embed_max_size": 16},
                   {"dual_attention_layers": (1,)}):  # fmt: skip
        assert relative(small(**change)(z, t, condition), base) > 1e-3, change
    assert relative(small()(z, t + 0.1, condition), base) > 1e-3
    assert relative(small()(z, t, condition, skip_layers=(1,)), base) > 1e-3
    assert relative(small()(z, t, condition._replace(text=condition.text + 1)), base) > 1e-3
    assert relative(small()(z, t, condition._replace(pooled=condition.pooled + 1)), base) > 1e-3


def test_preset_width_is_64_per_block() -> None:
    with torch.device("meta"):
        network = MMDiT(depth=6)
    assert (network.width, network.heads) == (384, 6)


@pytest.mark.parametrize("dual", [(), (0,)])
def test_starts_as_zero_with_every_block_the_identity(dual: tuple[int, ...]) -> None:
    network = MMDiT(
        3, depth=2, width=48, heads=3, text_dim=20, pooled_dim=10, sample_size=8, dual_attention_layers=dual
    )
    z, t, condition = inputs()
    assert torch.equal(network(z, t, condition), torch.zeros_like(z))
    text, image, vector = torch.randn(2, 5, 48), torch.randn(2, 16, 48), torch.randn(2, 48)
    for block in network.blocks:
        out = block(text, image, vector, None)
        assert torch.equal(out[0], text)
        assert torch.equal(out[1], image)
        assert block.modulation.weight.abs().max() == 0
    network.final.linear.reset_parameters()  # the first thing that learns
    other = condition._replace(text=condition.text.flip(0), pooled=condition.pooled.flip(0))
    assert torch.equal(network(z, t, condition), network(z, t / 2, other))
    assert 0.015 < network.time.fc1.weight.std() < 0.025
    bound = math.sqrt(6 / (48 + 3 * 48))
    assert bound * 0.9 < network.blocks[0].image.qkv.weight.abs().max() <= bound


def test_every_parameter_learns_after_the_first_steps() -> None:
    network = MMDiT(
        3, depth=2, width=48, heads=3, text_dim=20, pooled_dim=10, sample_size=8, dual_attention_layers=(0,)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    z, t, condition = inputs()
    for _ in range(4):  # zero output, image gates and text gates hold the gradient back for a step each
        optimizer.zero_grad()
        (network(z, t, condition) - z.flip(0)).square().mean().backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        if name == "blocks.1.text.norm_q.weight":  # the last block's text asks nothing, but released files hold it
            assert not parameter.requires_grad
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_mask_hides_padding_and_no_mask_attends_to_it() -> None:
    network = small()
    z, t, condition = inputs(text=6)
    mask = torch.arange(6) < torch.tensor([3, 6, 1, 4])[:, None]
    other = condition.text.where(mask[..., None], torch.randn(4, 6, 20))
    masked = network(z, t, Condition(condition.text, condition.pooled, mask))
    assert relative(network(z, t, Condition(other, condition.pooled, mask)), masked) < 1e-6
    assert relative(network(z, t, Condition(other, condition.pooled)), masked) > 1e-3
    short = Condition(condition.text[:1, :3], condition.pooled[:1])
    assert relative(network(z[:1], t[:1], short), masked[:1]) < 1e-5
    assert (
        relative(network(z, t, condition._replace(mask=torch.ones(4, 6, dtype=torch.bool))), network(z, t, condition))
        < 1e-6
    )


def test_half_precision_is_the_same_function_but_for_rounding_and_keeps_t_exact() -> None:
    z, t, condition = inputs()
    full = small(dual_attention_layers=(0,))
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        half = copy.deepcopy(full).to(dtype)
        out = half(z, t, condition)
        assert out.dtype == dtype
        assert relative(out.float(), full(z, t, condition)) < tolerance
        assert not torch.equal(half(z, torch.full((4,), 0.5), condition), half(z, torch.full((4,), 0.5005), condition))


def test_samples_of_a_batch_do_not_influence_each_other() -> None:
    network = small()
    z, t, condition = inputs()
    one = network(z[2:3], t[2:3], Condition(condition.text[2:3], condition.pooled[2:3]))
    assert relative(one, network(z, t, condition)[2:3]) < 1e-5


def test_patches_round_trip_and_lie_where_they_were() -> None:
    z = torch.randn(2, 3, 4, 6)
    tokens = patchify(z, 2)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[:, 4], z[:, :, 2:4, 2:4].flatten(1))
    channels_last = rearrange(tokens, "b n (c p q) -> b n (p q c)", c=3, p=2)
    assert torch.equal(unpatchify(channels_last, 2, 3, 2), z)
    weight = torch.randn(5, 3, 2, 2)
    convolved = F.conv2d(z, weight, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(F.linear(tokens, weight.flatten(1)), convolved)


def test_positions_follow_the_formula_and_the_crop_is_centred() -> None:
    table = sincos_2d(6, 16, spacing=0.5)
    for row, column, i in ((0, 5, 1), (3, 2, 0), (4, 1, 3)):
        angle = 10000 ** (-i / 4) * 0.5
        assert table[row, column, i].item() == pytest.approx(math.sin(column * angle), abs=1e-6)
        assert table[row, column, 4 + i].item() == pytest.approx(math.cos(column * angle), abs=1e-6)
        assert table[row, column, 8 + i].item() == pytest.approx(math.sin(row * angle), abs=1e-6)
        assert table[row, column, 12 + i].item() == pytest.approx(math.cos(row * angle), abs=1e-6)
    assert torch.equal(crop_centre(table, 2, 3).reshape(2, 3, 16), table[2:4, 1:4])
    with pytest.raises(ValueError, match="7×2 patches do not fit"):
        crop_centre(table, 7, 2)


def test_our_table_is_the_one_diffusers_computes() -> None:
    theirs = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, num_layers=1, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=20, caption_projection_dim=48, pooled_projection_dim=10, pos_embed_max_size=12,
    )  # fmt: skip
    torch.testing.assert_close(small().positions.flatten(0, 1)[None], theirs.pos_embed.pos_embed)


def test_timestep_features_are_of_a_thousand_t_cosine_first() -> None:
    features = timestep_features(torch.tensor([0.0, 0.3]), 8)
    assert features[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    angles = [300 * 10000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    torch.testing.assert_close(features[1], torch.tensor(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(7, 8), (8, 9)])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a multiple of patch_size 2"):
        small()(*inputs(*size))


def test_a_picture_beyond_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="13×4 patches do not fit the positional table of 12×12"):
        small()(*inputs(26, 8))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 5}, "multiple of heads"),
        ({"patch_size": 0}, "at least 1"),
        ({"depth": 0}, "at least 1"),
        ({"sample_size": 7}, "multiple of patch_size"),
        ({"sample_size": 64}, "fits"),
        ({"dual_attention_layers": (3,)}, "blocks from 0 to 2"),
    ],
)
def test_impossible_dimensions_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**sizes)
