"""Frozen layers in one byte a weight or half of one: the levels, the products, the gradients, and what they keep."""

import pytest
import torch
from networks import stirred
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit import lora
from mmdit.model import MMDiT
from mmdit.network import Condition
from mmdit.quantized import NF4, Kind, Quantized, quantize

PUBLISHED = [  # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
KINDS: tuple[Kind, ...] = ("int8", "nf4")


def layer(outputs: int = 48, inputs: int = 40) -> nn.Linear:
    made = nn.Linear(inputs, outputs).requires_grad_(False)
    with torch.no_grad():
        made.weight[3] = 0.0  # a row without a scale
        made.weight[5, 7] = 9.0
    return made


def test_the_levels_of_nf4_are_the_published_ones() -> None:
    torch.testing.assert_close(NF4, torch.tensor(PUBLISHED), rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", [(48, 40), (7, 9), (1, 64)])
def test_nf4_takes_the_nearest_level_of_each_64_weights(shape: tuple[int, int]) -> None:
    """The last ones may be fewer."""
    weight = torch.randn(shape)
    dense = nn.Linear(shape[1], shape[0], bias=False)
    dense.weight.data = weight
    found = Quantized(dense, "nf4").weight(torch.float32)
    expected = []
    for block in weight.flatten().split(64):
        levels = NF4 * block.abs().max()
        expected.append(levels[(block[:, None] - levels).abs().argmin(1)])
    torch.testing.assert_close(found, torch.cat(expected).view(shape), rtol=0, atol=1e-6)


def test_int8_rounds_to_a_127th_of_the_row_s_largest() -> None:
    dense = layer()
    steps = dense.weight.abs().amax(1, keepdim=True) / 127
    found = Quantized(dense, "int8").weight(torch.float32)
    assert ((found - dense.weight).abs() <= steps / 2 * 1.001).all()
    assert torch.equal(found[3], torch.zeros(40))
    assert found[5, 7] == pytest.approx(9.0)
    assert len(found[0].div(steps[0]).round().unique()) > 30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_decoded_weights(kind: Kind, dtype: torch.dtype) -> None:
    dense = layer().to(dtype)
    small = Quantized(dense, kind)
    x = torch.randn(5, 3, 40, dtype=dtype, requires_grad=True)
    upstream = torch.randn(5, 3, 48, dtype=dtype)
    y = small(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    wanted = F.linear(x, small.weight(dtype)) + dense.bias
    (wanted_gradient,) = torch.autograd.grad(wanted, x, upstream)
    assert y.dtype == dtype
    assert torch.equal(y, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)


@pytest.mark.parametrize(("kind", "most"), [("int8", 1 + 4 / 1024), ("nf4", 0.5 + 4 / 64)])
def test_bytes_of_a_weight_and_nothing_of_them_kept_for_the_backward_pass(kind: Kind, most: float) -> None:
    dense = layer(96, 1024)
    small = Quantized(dense, kind)
    assert sum(buffer.nbytes for buffer in small.buffers()) / dense.weight.numel() == most
    assert [name for name, _ in small.named_parameters()] == ["bias"]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        small(torch.randn(2, 1024, requires_grad=True))
    assert sum(tensor.numel() for tensor in kept) < 1024


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_decides_the_type(kind: Kind) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert Quantized(layer(), kind)(torch.randn(2, 40)).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("nf4", 0.2)])
def test_a_network_with_updates_keeps_them_and_what_is_outside_of_its_blocks(kind: Kind, error: float) -> None:
    network = stirred(MMDiT(in_channels=4, depth=2, width=64, heads=2, text_dim=32, pooled_dim=16))
    lora.add(network, lora.LoRA(rank=2, targets=("image.qkv",)))
    z, t, condition = (
        torch.randn(2, 4, 4, 4),
        torch.tensor([0.3, 0.8]),
        Condition(torch.randn(2, 5, 32), torch.randn(2, 16)),
    )
    before = network(z, t, condition).detach()
    quantize(network, kind)
    after = network(z, t, condition)
    assert 0 < (after - before).norm() / before.norm() < error
    after.square().mean().backward()
    learning = {name for name, p in network.named_parameters() if p.grad is not None}
    assert learning == {f"blocks.{i}.image.qkv.lora_{side}.default.weight" for i in range(2) for side in "AB"}
    dense = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    assert dense
    assert not [name for name in dense if name.startswith("blocks.") and ".lora_" not in name]
    assert type(network.patch) is nn.Linear
