"""Linear layers of a frozen network in one byte a weight, or in half of one: the base of a LoRA training."""

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind: TypeAlias = Literal["int8", "nf4"]
BLOCK = 64  # weights that share a scale in NF4
EDGE = 0.9677083  # the outermost of NF4's quantiles


def nf4_levels() -> Tensor:
    """The 16 levels of NF4: quantiles of a normal distribution (Dettmers et al. 2023, eq. 4 and appendix E), at most 1.

    Zero is one of them: there are 7 negative and 8 positive ones.
    """
    above = torch.special.ndtri(torch.linspace(EDGE, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(EDGE, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (levels / levels.max()).float()


NF4 = nf4_levels()


class Quantized(nn.Module):
    """A frozen linear layer whose weights are decoded for each product, and again in the backward pass.

    In int8 each row has a scale. In NF4 64 weights have one, and two weights share a byte. Scales are float32: a weight
    takes 1 + 4/inputs or 0.5625 bytes.

    Args:
        linear: the layer to replace.
        kind: how its weights are stored.
    """

    def __init__(self, linear: nn.Linear, kind: Kind) -> None:
        super().__init__()
        self.kind, self.shape, self.bias = kind, linear.weight.shape, linear.bias
        weight = linear.weight.detach().float()
        if kind == "int8":
            scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
            codes = (weight / scale).round().to(torch.int8)
        else:
            rows = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).unflatten(0, (-1, BLOCK))
            scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
            levels = NF4.to(weight.device)
            nearest = torch.bucketize(rows / scale, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
            codes = 16 * nearest[::2] + nearest[1::2]
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The decoded weights (outputs, inputs)."""
        codes, scale = self.get_buffer("codes"), self.get_buffer("scale").to(dtype)
        if self.kind == "int8":
            return codes.to(dtype) * scale
        levels = NF4.to(codes.device, dtype)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)  # of each byte
        decoded = F.embedding(codes.int(), pairs).view(-1, BLOCK).mul_(scale)
        return decoded.flatten()[: self.shape.numel()].view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b, in autocast's type if it is on and else in that of x."""
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        y: Tensor = Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Product(torch.autograd.Function):
    """x·Wᵀ. It keeps nothing for the backward pass, which decodes W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight(ctx.dtype), None


def quantize(network: nn.Module, kind: Kind) -> None:
    """Replaces the frozen linear layers of the network's blocks, in place."""
    for block in network.get_submodule("blocks").children():
        for name, module in [*block.named_modules()]:
            if type(module) is nn.Linear and not module.weight.requires_grad:
                parent, _, own = name.rpartition(".")
                setattr(block.get_submodule(parent), own, Quantized(module, kind))
