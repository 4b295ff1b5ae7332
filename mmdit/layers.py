"""The joint block: two streams of tokens, one attention (Esser et al. 2024, figure 2b)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn


class Modulation(NamedTuple):
    """adaLN-Zero's three vectors for one sub-layer, each (B, 1, width) (Peebles & Xie 2022, §3.2)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift, the norm without learned parameters. x (B, N, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def norm_heads(qk: Tensor, gain: Tensor) -> Tensor:
    """RMS norm of each head's queries and keys, against attention logits that grow (Esser et al. 2024, §5.3.2).

    Args:
        qk: (B, N, 2, heads, head_dim).
        gain: learned factor per channel, (N, 2, 1, head_dim): text and image tokens have their own.

    Returns:
        qk's shape and dtype; float32 inside.
    """
    x = qk.float()
    scale = torch.rsqrt(torch.linalg.vecdot(x, x) / x.shape[-1] + 1e-6)  # b n 2 heads
    return (x * (scale[..., None] * gain)).to(qk.dtype)


class Stream(nn.Module):
    """What one kind of token owns in a joint block: q, k, v before the attention; projection and MLP behind it.

    Args:
        width: channels of a token.
        heads: attention heads.
        qk_norm: RMS-normalise q and k.
        writes: false for the last block's text, which the image still reads but nobody reads after it.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, writes: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.gain = nn.Parameter(torch.ones(2, 1, width // heads)) if qk_norm else None  # query, key
        if writes:
            self.proj = nn.Linear(width, width)
            self.mlp = Mlp(width, 4 * width, act_layer=GELUTanh)

    def update(self, x: Tensor, attended: Tensor, attention: Modulation, mlp: Modulation) -> Tensor:
        """The two gated residuals: x (B, N, width) and what its tokens attended to (B, N, width) to (B, N, width)."""
        x = x + attention.gate * self.proj(attended)
        return x + mlp.gate * self.mlp(modulate(x, mlp.shift, mlp.scale))


class JointBlock(nn.Module):
    """Text and image streams with their own weights, joined in one attention over [text, image].

    Args:
        width: channels of a token.
        heads: attention heads.
        qk_norm: RMS-normalise q and k.
        last: the text stream only gives q, k and v; `forward` returns its tokens unchanged.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, last: bool = False) -> None:
        super().__init__()
        self.heads, self.last = heads, last
        self.image = Stream(width, heads, qk_norm)
        self.text = Stream(width, heads, qk_norm, writes=not last)
        self.modulation = nn.Linear(width, (8 if last else 12) * width)  # image's six, then text's six or two

    def forward(self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            text: (B, N, width).
            image: (B, M, width).
            vector: SiLU of time and pooled text, (B, width).
            mask: true where a token may be attended, (B, 1, 1, N + M); none means everywhere.

        Returns:
            (text, image), shapes as given.
        """
        six = self.modulation(vector)[:, None].chunk(8 if self.last else 12, dim=-1)
        image_attention, image_mlp = Modulation(*six[:3]), Modulation(*six[3:6])
        text_shift, text_scale = six[6:8]

        qkv_text = self.text.qkv(modulate(text, text_shift, text_scale))
        qkv_image = self.image.qkv(modulate(image, image_attention.shift, image_attention.scale))
        qkv = rearrange(torch.cat([qkv_text, qkv_image], 1), "b n (three h d) -> b n three h d", three=3, h=self.heads)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if self.text.gain is not None and self.image.gain is not None:
            gains = self.text.gain.expand(text.shape[1], -1, -1, -1), self.image.gain.expand(image.shape[1], -1, -1, -1)
            qk = norm_heads(qk, torch.cat(gains))
        q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (*qk.unbind(2), v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended = rearrange(attended, "b h n d -> b n (h d)")
        attended_text, attended_image = attended.split([text.shape[1], image.shape[1]], dim=1)

        image = self.image.update(image, attended_image, image_attention, image_mlp)
        if not self.last:
            text = self.text.update(text, attended_text, Modulation(*six[6:9]), Modulation(*six[9:]))
        return text, image


class FinalLayer(nn.Module):
    """Modulated norm and the linear map from tokens to patches.

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
