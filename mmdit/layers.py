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
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Stream(nn.Module):
    """What one kind of token owns in a joint block: q, k, v before the attention; projection and MLP behind it.

    Args:
        width: channels of a token.
        heads: attention heads.
        qk_norm: RMS-normalise each head's q and k, so that attention logits cannot grow (Esser et al. 2024, §5.3.2).
        writes: false for the last block's text, which the image still reads but nobody reads after it.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, writes: bool = True) -> None:
        super().__init__()
        self.heads, self.writes = heads, writes
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        if writes:
            self.proj = nn.Linear(width, width)
            self.mlp = Mlp(width, 4 * width, act_layer=GELUTanh)
        else:
            self.norm_q.requires_grad_(False)  # unread, but released checkpoints hold it

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Modulated tokens (B, N, width) to q, k and v, each (B, N, heads, head_dim); q is empty unless it writes."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> b n three h d", three=3, h=self.heads).unbind(2)
        return self.norm_q(q) if self.writes else q[:, :0], self.norm_k(k), v

    def update(self, x: Tensor, attended: Tensor, attention: Modulation, mlp: Modulation) -> Tensor:
        """The two gated residuals: x (B, N, width) and what its tokens attended to (B, N, width) to (B, N, width)."""
        x = torch.addcmul(x, attention.gate, self.proj(attended))
        return torch.addcmul(x, mlp.gate, self.mlp(modulate(x, mlp.shift, mlp.scale)))


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
        self.last = last
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
        parts = self.modulation(vector)[:, None].chunk(8 if self.last else 12, dim=-1)
        image_attention, image_mlp = Modulation(*parts[:3]), Modulation(*parts[3:6])
        text_shift, text_scale = parts[6:8]

        of_text = self.text.attend(modulate(text, text_shift, text_scale))
        of_image = self.image.attend(modulate(image, image_attention.shift, image_attention.scale))
        joint = (torch.cat(pair, dim=1) for pair in zip(of_text, of_image, strict=True))  # [text, image]
        q, k, v = (rearrange(x, "b n h d -> b h n d") for x in joint)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended = rearrange(attended, "b h n d -> b n (h d)")
        attended_text, attended_image = attended.tensor_split([-image.shape[1]], dim=1)

        image = self.image.update(image, attended_image, image_attention, image_mlp)
        if not self.last:
            text = self.text.update(text, attended_text, Modulation(*parts[6:9]), Modulation(*parts[9:]))
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
