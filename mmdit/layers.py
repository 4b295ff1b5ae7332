"""The joint block: two streams of tokens, one attention (Esser et al. 2024, figure 2b)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

WRITTEN_OUT = 512  # tokens; beyond, the fused kernel is as fast (on a Xeon with AMX) and takes less memory


class Modulation(NamedTuple):
    """adaLN-Zero's three vectors for one sub-layer, each (B, 1, width) (Peebles & Xie 2022, §3.2)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift; the norm has no learned parameters. x (B, N, width)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with the gain cast to the input's type, so that autocast can use the fast kernel."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """q, k and v of one kind of token, and the output projection.

    Args:
        width: channels of a token.
        heads: attention heads.
        qk_norm: RMS-normalise each head's q and k, so that attention logits cannot grow (Esser et al. 2024, §5.3.2).
        asks: whether these tokens have queries. If false, q is empty and there is no output projection.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, asks: bool = True) -> None:
        super().__init__()
        self.heads, self.asks = heads, asks
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        if asks:
            self.proj = nn.Linear(width, width)
        else:
            self.norm_q.requires_grad_(False)  # unused, but released checkpoints hold it

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Modulated tokens (B, N, width) to q, k and v, each (B, N, heads, head_dim)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> b n three h d", three=3, h=self.heads).unbind(2)
        return self.norm_q(q) if self.asks else q[:, :0], self.norm_k(k), v


class ConvMlp(nn.Module):
    """The MLP of image tokens as two 3×3 convolutions over their places, conv2(SiLU(conv1(x))), all of one width.

    It has the convolutions of a U-Net's residual block (Ho et al. 2020, appendix B), under adaLN-Zero as any MLP.

    Args:
        width: channels of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, M, width), where M = height·width of the grid, row by row."""
        places = rearrange(x, "b (i j) c -> b c i j", i=grid[0])
        return rearrange(self.conv2(F.silu(self.conv1(places))), "b c i j -> b (i j) c")


class Stream(Attention):
    """The weights of one kind of token in a joint block: its part of the attention, and the MLP.

    Arguments as in `Attention`. `conv` makes the MLP a `ConvMlp`. `asks` is false for the text of the last block: the
    image attends to it, but the block's text output is not used.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, asks: bool = True, conv: bool = False) -> None:
        super().__init__(width, heads, qk_norm, asks)
        if asks:
            self.mlp = ConvMlp(width) if conv else Mlp(width, 4 * width, act_layer=GELUTanh)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention, softmax(q·kᵀ/√head_dim)·v (Vaswani et al. 2017, eq. 1).

    In bfloat16 on a CPU the backward pass of torch's fused kernel is slow: training with few tokens computes the
    formula as it stands.

    Args:
        q: (B, N, heads, head_dim).
        k: (B, M, heads, head_dim).
        v: as k.
        mask: bool, true where a token may be attended, broadcast to (B, heads, N, M); none means everywhere.

    Returns:
        (B, N, heads·head_dim).
    """
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad and k.shape[2] <= WRITTEN_OUT:
        logits = q * q.shape[-1] ** -0.5 @ k.mT
        logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
        attended = logits.softmax(-1).to(v.dtype) @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(attended, "b h n d -> b n (h d)")


class JointBlock(nn.Module):
    """Text and image streams with their own weights, joined in one attention over [text, image].

    With `dual`, MMDiT-X's block (Stable Diffusion 3.5 medium): before the MLP, the image also attends to itself
    alone, from the same normed tokens with a separate modulation.

    Args:
        width: channels of a token.
        heads: attention heads.
        qk_norm: RMS-normalise q and k.
        last: the text stream only has k and v; `forward` returns its tokens unchanged.
        dual: the image stream has a second attention.
        conv_mlp: the image stream has a `ConvMlp`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: bool,
        last: bool = False,
        dual: bool = False,
        conv_mlp: bool = False,
    ) -> None:
        super().__init__()
        self.image = Stream(width, heads, qk_norm, conv=conv_mlp)
        self.conv_mlp = conv_mlp
        self.text = Stream(width, heads, qk_norm, asks=not last)
        self.dual = Attention(width, heads, qk_norm) if dual else None
        self.parts = [9 if dual else 6, 2 if last else 6]  # modulation vectors of image and text
        self.modulation = nn.Linear(width, sum(self.parts) * width)

    def forward(
        self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None, grid: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            text: (B, N, width).
            image: (B, M, width).
            vector: SiLU of time and pooled text, (B, width).
            mask: true where a token may be attended, (B, 1, 1, N + M); none means everywhere.
            grid: (height, width) of the M image tokens, for a `ConvMlp`.

        Returns:
            (text, image), shapes as given.
        """
        parts = self.modulation(vector)[:, None].chunk(sum(self.parts), dim=-1)
        image_parts, text_parts = parts[: self.parts[0]], parts[self.parts[0] :]
        joint, mlp = Modulation(*image_parts[:3]), Modulation(*image_parts[3:6])

        text_qkv = self.text.attend(modulate(text, text_parts[0], text_parts[1]))
        image_qkv = self.image.attend(modulate(image, joint.shift, joint.scale))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text_qkv, image_qkv, strict=True))  # [text, image]
        text_attended, image_attended = scaled_dot_product(q, k, v, mask).tensor_split([-image.shape[1]], dim=1)

        x = torch.addcmul(image, joint.gate, self.image.proj(image_attended))
        if self.dual is not None:
            dual = Modulation(*image_parts[6:])
            attended = scaled_dot_product(*self.dual.attend(modulate(image, dual.shift, dual.scale)))
            x = torch.addcmul(x, dual.gate, self.dual.proj(attended))
        normed = modulate(x, mlp.shift, mlp.scale)
        image = torch.addcmul(x, mlp.gate, self.image.mlp(normed, grid) if self.conv_mlp else self.image.mlp(normed))

        if self.text.asks:
            joint, mlp = Modulation(*text_parts[:3]), Modulation(*text_parts[3:])
            text = torch.addcmul(text, joint.gate, self.text.proj(text_attended))
            text = torch.addcmul(text, mlp.gate, self.text.mlp(modulate(text, mlp.shift, mlp.scale)))
        return text, image


class SubLayers(NamedTuple):
    """A block's modulation of its self attention and of its MLP."""

    attention: Modulation
    mlp: Modulation


def sub_layers(parts: Tensor) -> SubLayers:
    """Cuts (B, 6·width) in the order of DiT: shift, scale and gate of the attention, then of the MLP."""
    vectors = parts[:, None].chunk(6, dim=-1)
    return SubLayers(Modulation(*vectors[:3]), Modulation(*vectors[3:]))


class DiTBlock(nn.Module):
    """DiT's adaLN-Zero block (Peebles & Xie 2022, figure 3): one set of weights for all tokens of a sequence.

    Args:
        width: channels of a token.
        heads: attention heads.
        qk_norm: RMS-normalise q and k.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.stream = Stream(width, heads, qk_norm)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, kept: int, vector: Tensor, mask: Tensor | None) -> Tensor:
        """One block.

        Args:
            x: all tokens, (B, L, width).
            kept: number of tokens, from the end, to compute; all tokens are attended to.
            vector: SiLU of time and pooled text, (B, width).
            mask: true where a token may be attended, (B, 1, 1, L); none means everywhere.

        Returns:
            (B, kept, width).
        """
        attention, mlp = sub_layers(self.modulation(vector))
        q, k, v = self.stream.attend(modulate(x, attention.shift, attention.scale))
        attended = self.stream.proj(scaled_dot_product(q[:, -kept:], k, v, mask))
        x = torch.addcmul(x[:, -kept:], attention.gate, attended)
        return torch.addcmul(x, mlp.gate, self.stream.mlp(modulate(x, mlp.shift, mlp.scale)))


class FinalLayer(nn.Module):
    """The modulated norm and the linear map from tokens to patches.

    Args:
        width: channels of a token.
        out: channels of a patch, p·p·C.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)  # shift, scale
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x (B, M, width), vector (B, width) to (B, M, out)."""
        shift, scale = self.modulation(vector)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))
