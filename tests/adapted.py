"""What the tests of LoRAs share: diffusers' small network, its layers, and outputs."""

import tiny
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from mmdit.model import Condition, MMDiT

THEIRS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
          "attn.add_v_proj", "attn.to_add_out"]  # fmt: skip


def opponent_network() -> SD3Transformer2DModel:
    """A small random network of diffusers."""
    torch.manual_seed(0)
    return tiny.frozen(tiny.transformer("sd35_medium"))


def output(model: MMDiT | SD3Transformer2DModel) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    z, t = torch.randn(2, 16, 8, 12, generator=draw), torch.tensor([0.2, 0.9])
    text, pooled = torch.randn(2, 9, tiny.TOKENS, generator=draw), torch.randn(2, tiny.POOLED, generator=draw)
    with torch.no_grad():
        if isinstance(model, MMDiT):
            return model(z, t, Condition(text, pooled))
        return model(z, text, pooled, 1000 * t, return_dict=False)[0]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() < 1e-5 * b.norm())
