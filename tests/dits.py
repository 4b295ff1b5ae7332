"""Small DiTs and CrossDiTs with random weights, and inputs for them."""

from zlib import crc32

import pytest
import torch
from torch import nn

from baselines.dit import CrossDiT, DiffusionTransformer, DiT

SIZES = {"in_channels": 3, "depth": 3, "width": 48, "heads": 3, "text_dim": 20, "pooled_dim": 10, "sample_size": 8,
         "pos_embed_max_size": 12}  # fmt: skip
both = pytest.mark.parametrize("kind", [DiT, CrossDiT])


def weighted_by_name(network: nn.Module) -> nn.Module:
    """Every weight random, so that nothing is hidden behind a zero gate, and a function of its name and shape alone."""
    for name, parameter in network.named_parameters():
        draw = torch.Generator().manual_seed(crc32(name.encode()))
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw) + ("norm_" in name)
    return network.eval()


def small(kind: type[DiffusionTransformer], **changes: object) -> DiffusionTransformer:
    network = weighted_by_name(kind(**(SIZES | changes)))
    assert isinstance(network, kind)
    return network
