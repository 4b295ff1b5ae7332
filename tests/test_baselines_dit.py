"""DiT and CrossDiT as functions: the tied MMDiT, their blocks in plain torch, text without positions, and costs."""

import copy
import math

import pytest
import torch
from dits import SIZES, both, small, weighted_by_name
from networks import inputs, relative
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from baselines.dit import CrossBlock, CrossDiT, DiT
from mmdit.layers import DiTBlock
from mmdit.model import Condition, MMDiT


def tied(network: DiT) -> MMDiT:
    """The MMDiT both of whose streams are the network's only one."""
    theirs = MMDiT(**network.settings)
    state = {}
    for name, tensor in network.state_dict().items():
        start, _, end = name.partition(".stream.")
        if end:
            state |= {f"{start}.{stream}.{end}": tensor for stream in ("image", "text")}
        elif name.startswith("blocks.") and ".modulation." in name:
            last = name.startswith(f"blocks.{network.depth - 1}.")
            state[name] = torch.cat([tensor, tensor[: 2 * network.width] if last else tensor])
        else:
            state[name] = tensor
    wanted = theirs.state_dict()
    own = {name: tensor for name, tensor in state.items() if name in wanted}
    unread = [name for name in state if name not in wanted]
    assert all(name.startswith(f"blocks.{network.depth - 1}.text.") for name in unread)
    theirs.load_state_dict(own | {"positions": network.positions})
    return theirs.eval()


@both
@pytest.mark.parametrize("out_channels", [None, 6])
@pytest.mark.parametrize("size", [(8, 8), (4, 10), (24, 2)])
def test_starts_as_the_identity_and_as_zero(kind, size: tuple[int, int], out_channels: int | None) -> None:
    network = kind(**(SIZES | {"out_channels": out_channels}))
    assert torch.equal(network(*inputs(*size)), torch.zeros(4, out_channels or 3, *size))
    text, image, vector = torch.randn(4, 5, 48), torch.randn(4, 16, 48), torch.randn(4, 48)
    assert torch.equal(network.run_blocks(text, image, vector, None), image)


@both
def test_starts_from_the_distribution_of_the_transformer_it_is_compared_with(kind) -> None:
    """Every weight that both have is drawn with the same deviation, in the same places zero."""
    torch.manual_seed(0)
    ours, theirs = kind(**SIZES).state_dict(), MMDiT(**SIZES).state_dict()
    for name, tensor in ours.items():
        other = theirs[name.replace("stream", "image")] if "cross" not in name else None
        if other is not None and "modulation" not in name and tensor.numel() > 1000:
            assert tensor.std() == pytest.approx(other.std().item(), rel=0.1), name
        elif "modulation" in name or name.endswith("bias") or name.endswith("cross.proj.weight"):
            assert tensor.abs().max() == 0, name


@both
def test_the_network_reports_its_sizes(kind) -> None:
    network, theirs = (k(**SIZES, patch_size=4, out_channels=6) for k in (kind, MMDiT))
    names = ("in_channels", "out_channels", "text_dim", "pooled_dim", "sample_size", "unit", "largest", "depth")
    assert [getattr(network, name) for name in names] == [getattr(theirs, name) for name in names]
    family = kind(depth=1, in_channels=1, text_dim=1, pooled_dim=1, sample_size=2, pos_embed_max_size=1)
    assert (family.width, family.settings["heads"], family.out_channels) == (64, 1, 1)


@both
def test_every_parameter_learns_once_it_has_left_the_start(kind) -> None:
    network = kind(**SIZES)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    z, t, condition = inputs()
    for _ in range(3):  # the zero output, then the zero gates hold other gradients back, each for one step
        optimizer.zero_grad()
        (network(z, t, condition) - z.flip(0)).square().mean().backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-7, name  # what cancels exactly leaves rounding errors of 1e-9


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
def test_dit_is_the_mmdit_whose_streams_are_tied(size: tuple[int, int], qk_norm: bool, masked: bool) -> None:
    """In its output; and its gradients are the sums of those of the two streams."""
    ours = small(DiT, qk_norm=qk_norm)
    theirs = tied(ours)
    z, t, condition = inputs(*size)
    if masked:
        condition = condition._replace(mask=torch.arange(5) < torch.tensor([3, 5, 1, 4])[:, None])
    out, expected = ours(z, t, condition), theirs(z, t, condition)
    assert relative(out, expected) < 1e-6

    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    given = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        if ".stream." in name:
            streams = [given.get(name.replace("stream", stream)) for stream in ("image", "text")]
        elif name.startswith("blocks."):
            image, text = given[name].tensor_split([6 * 48])
            streams = [image, torch.cat([text, torch.zeros_like(image[len(text) :])])]
        else:
            streams = [given[name]]
        wanted = sum(gradient for gradient in streams if gradient is not None)
        assert (parameter.grad - wanted).norm() < 1e-5 * wanted.norm() + 1e-6, name


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def attended(q: Tensor, k: Tensor, v: Tensor, gains: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v of one sample, head by head; every row (N, heads · d), RMS-normalised with gains (d,)."""
    size = len(gains[0])
    heads = []
    for columns in torch.arange(q.shape[-1]).split(size):
        a, b = (x[:, columns] / (x[:, columns].square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        logits = (a * gains[0]) @ (b * gains[1]).T / math.sqrt(size)
        logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)
        heads.append(logits.softmax(-1) @ v[:, columns])
    return torch.cat(heads, dim=-1)


def of(linear: nn.Linear, x: Tensor) -> Tensor:
    return x @ linear.weight.T + linear.bias


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    """Two layers with the tanh form of GELU between them."""
    hidden = of(module.fc1, x)
    hidden = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return of(module.fc2, hidden)


def by_hand(block: DiTBlock | CrossBlock, x: Tensor, vector: Tensor, text: Tensor | None, mask: Tensor) -> Tensor:
    """One sample: x (N, width), vector (width,), and text (T, width) with its mask, if the block crosses over to it."""
    stream = block.stream
    shift1, scale1, gate1, shift2, scale2, gate2 = of(block.modulation, vector).split(len(vector))
    q, k, v = of(stream.qkv, norm(x) * (1 + scale1) + shift1).split(len(vector), dim=-1)
    read = attended(q, k, v, (stream.norm_q.weight, stream.norm_k.weight), mask if text is None else None)
    x = x + gate1 * of(stream.proj, read)
    if text is not None:
        cross = block.cross
        k, v = of(cross.kv, text).split(len(vector), dim=-1)
        x = x + of(cross.proj, attended(of(cross.q, x), k, v, (cross.norm_q.weight, cross.norm_k.weight), mask))
    return x + gate2 * mlp(stream.mlp, norm(x) * (1 + scale2) + shift2)


def test_blocks_follow_the_formula() -> None:
    draw = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 7, 24, generator=draw), torch.randn(2, 4, 24, generator=draw)
    vector = torch.randn(2, 24, generator=draw)
    inside, across = (weighted_by_name(kind(24, 3, True)) for kind in (DiTBlock, CrossBlock))
    masks = torch.arange(7) != torch.tensor([2, 5])[:, None], torch.arange(4) < torch.tensor([4, 2])[:, None]
    for i in range(2):
        wanted = by_hand(inside, x[i], vector[i], None, masks[0][i])
        mask = masks[0][:, None, None]
        torch.testing.assert_close(inside(x, 7, vector, mask)[i], wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(inside(x, 3, vector, mask)[i], wanted[-3:], atol=1e-5, rtol=1e-4)
        wanted = by_hand(across, x[i], vector[i], text[i], masks[1][i])
        torch.testing.assert_close(across(x, text, vector, masks[1][:, None, None])[i], wanted, atol=1e-5, rtol=1e-4)


@both
def test_the_output_does_not_depend_on_the_order_of_the_text(kind) -> None:
    """Text has no positions; pictures have."""
    network = small(kind)
    z, t, condition = inputs()
    base = network(z, t, condition)
    order = torch.tensor([3, 0, 4, 2, 1])
    mask = torch.arange(5) < torch.tensor([3, 5, 1, 4])[:, None]
    assert relative(network(z, t, condition._replace(text=condition.text[:, order])), base) < 1e-5
    masked = network(z, t, condition._replace(mask=mask))
    shuffled = Condition(condition.text[:, order], condition.pooled, mask[:, order])
    assert relative(network(z, t, shuffled), masked) < 1e-5
    assert relative(network(z, t, condition._replace(mask=mask[:, order])), masked) > 1e-3
    turned = network(z.flip(-1).unflatten(-1, (4, 2)).flip(-1).flatten(-2), t, condition)  # patches the other way
    assert relative(turned.flip(-1).unflatten(-1, (4, 2)).flip(-1).flatten(-2), base) > 1e-2


@both
def test_repeated_tokens_change_attention_in_context_but_not_cross_attention(kind) -> None:
    """Each token told twice is the same to an attention of the text alone; in context it outweighs the image."""
    network = small(kind)
    z, t, condition = inputs()
    base, twice = network(z, t, condition), condition._replace(text=condition.text.repeat(1, 2, 1))
    error = relative(network(z, t, twice), base)
    assert error < 1e-5 if kind is CrossDiT else error > 1e-3


@both
def test_mask_hides_padding_and_no_mask_attends_to_it(kind) -> None:
    network = small(kind)
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


@both
def test_samples_of_a_batch_do_not_influence_each_other(kind) -> None:
    network = small(kind)
    z, t, condition = inputs()
    one = network(z[2:3], t[2:3], Condition(condition.text[2:3], condition.pooled[2:3]))
    assert relative(one, network(z, t, condition)[2:3]) < 1e-5


@both
def test_every_input_and_every_option_changes_the_output(kind) -> None:
    z, t, condition = inputs()
    base = small(kind)(z, t, condition)
    for change in ({"heads": 4}, {"qk_norm": False}, {"depth": 2}, {"sample_size": 4}, {"patch_size": 4}):
        assert relative(small(kind, **change)(z, t, condition), base) > 1e-3, change
    for changed in (
        (z + 1, t, condition),
        (z, t + 0.1, condition),
        (z, t, condition._replace(text=condition.text.flip(0))),
        (z, t, condition._replace(pooled=condition.pooled.flip(0))),
    ):
        assert relative(small(kind)(*changed), base) > 1e-3


@both
def test_the_length_of_normalised_queries_and_keys_has_no_effect(kind) -> None:
    """Ten times longer ones are the same, in every attention of its own."""
    for qk_norm in (True, False):
        z, t, condition = inputs()
        network = small(kind, qk_norm=qk_norm)
        base = network(z, t, condition)
        rows = {"stream.qkv": 2 * 48, "cross.q": 48, "cross.kv": 48}
        grown = 0
        for name, module in network.named_modules():
            count = rows.get(name.split(".", 2)[-1])
            if count:
                copy = [p.detach().clone() for p in module.parameters()]
                for p in module.parameters():
                    p.data[:count] *= 10
                error = relative(network(z, t, condition), base)
                assert error < 1e-3 if qk_norm else error > 1e-3, name
                for p, old in zip(module.parameters(), copy, strict=True):
                    p.data = old
                grown += 1
        assert grown == (3 if kind is DiT else 9)


@both
def test_half_precision_is_the_same_function_but_for_rounding(kind) -> None:
    z, t, condition = inputs()
    network = small(kind)
    full, out = network(z, t, condition), copy.deepcopy(network).to(torch.bfloat16)(z, t, condition)
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), full) < 0.1


@both
@pytest.mark.parametrize(("qk_norm", "patch"), [(True, 2), (False, 4)])
def test_parameters_and_operations_are_those_of_the_closed_formula(kind, qk_norm: bool, patch: int) -> None:
    w, depth, tokens, pooled, channels, n = 48, 3, 20, 10, 3, 5
    m = (8 // patch) ** 2
    network = kind(**SIZES, qk_norm=qk_norm, patch_size=patch)
    cross = kind is CrossDiT
    block = 18 * w * w + 15 * w + cross * (4 * w * w + 4 * w) + (1 + cross) * qk_norm * 2 * (w // 3)
    numbers = channels * patch**2
    outside = (numbers + tokens + 256 + pooled + 2) * w + 4 * w  # weights and biases on the way in
    outside += 2 * w * w + 2 * w * w + 2 * w + (w + 1) * numbers  # second layers, last modulation and last linear
    assert sum(p.numel() for p in network.parameters()) == depth * block + outside

    inside = depth * 6 * w * w + 2 * w * w  # multiply-adds of the modulations
    once = (256 + pooled + 2 * w) * w
    ends = m * numbers * w * 2 + n * tokens * w
    if cross:
        blocks = depth * (m * 12 * w * w + 2 * m * m * w + 2 * m * w * w + 2 * n * w * w + 2 * m * n * w)
    else:
        whole = (n + m) * 12 * w * w + 2 * (n + m) ** 2 * w
        blocks = (depth - 1) * whole + (n + m) * 3 * w * w + m * 9 * w * w + 2 * m * (n + m) * w
    z, t, condition = inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(z[:1], t[:1], Condition(condition.text[:1], condition.pooled[:1]))
    assert counter.get_total_flops() == 2 * (inside + once + ends + blocks)


def test_dit_costs_what_mmdit_costs_but_for_the_modulation_of_the_text() -> None:
    z, t, condition = inputs()
    counts = []
    for network in (DiT(**SIZES), MMDiT(**SIZES)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(z, t, condition)
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * 4 * (6 + 6 + 2) * 48**2


@both
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 0}, "at least 1"),
        ({"out_channels": 0}, "at least 1"),
        ({"heads": 5}, "width must be a multiple of heads and of 4"),
        ({"width": 50, "heads": 1}, "multiple of heads and of 4"),
        ({"sample_size": 7}, "multiple of patch_size"),
        ({"sample_size": 32}, "fits the table of 12 patches"),
    ],
)
def test_impossible_dimensions_are_refused(kind, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**(SIZES | sizes))


@both
@pytest.mark.parametrize(
    ("size", "message"), [((7, 8), "latent 7×8 is not a multiple"), ((8, 26), "4×13 patches do not fit")]
)
def test_impossible_sizes_are_refused(kind, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(kind)(*inputs(*size))
