"""Small networks with random weights, and inputs for them."""

import torch
from torch import Tensor, nn

from flow.path import expand_as
from mmdit.model import Condition, MMDiT


def stirred(network: nn.Module, scale: float = 0.1) -> MMDiT:
    """With every weight random, so that nothing is hidden behind a zero gate."""
    draw = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=draw).to(parameter)
    return network.eval()


def plain(**changes: float | bool | tuple[int, ...]) -> MMDiT:
    sizes = {"in_channels": 3, "depth": 2, "width": 48, "heads": 3, "text_dim": 20, "pooled_dim": 10, "sample_size": 8}
    return MMDiT(**(sizes | {"pos_embed_max_size": 12} | changes))


def inputs(count: int = 4) -> tuple[Tensor, Tensor, Condition]:
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(count, 3, 8, 8, generator=draw)
    condition = Condition(torch.randn(count, 5, 20, generator=draw), torch.randn(count, 10, generator=draw))
    return z, torch.rand(count, generator=draw), condition


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def linear(z: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
    """A model of one time, that may be told the other."""
    return 0.7 * z - expand_as(t, z)
