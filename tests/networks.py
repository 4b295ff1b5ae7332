"""Small networks with random weights, and inputs for them."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from flow.path import expand_as
from mmdit.model import Condition, MMDiT

Network = TypeVar("Network", bound=nn.Module)


def stirred(network: Network, scale: float = 0.1, draw: torch.Generator | None = None) -> Network:
    """Adds noise to every weight, so that nothing is hidden behind a zero gate; without `draw` always the same."""
    draw = draw or torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=draw).to(parameter)
    return network.eval()


def plain(**changes: float | bool | tuple[int, ...]) -> MMDiT:
    sizes = {"in_channels": 3, "depth": 2, "width": 48, "heads": 3, "text_dim": 20, "pooled_dim": 10, "sample_size": 8}
    return MMDiT(**(sizes | {"pos_embed_max_size": 12} | changes))


def inputs(height: int = 8, width: int = 8, text: int = 5) -> tuple[Tensor, Tensor, Condition]:
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(4, 3, height, width, generator=draw)
    condition = Condition(torch.randn(4, text, 20, generator=draw), torch.randn(4, 10, generator=draw))
    return z, torch.rand(4, generator=draw), condition


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()  # both may be zero


def linear(z: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
    """A model of one time that accepts an end and ignores it."""
    return 0.7 * z - expand_as(t, z)
