"""The classical transformers: DiT with text in context, and DiT with cross attention (Esser et al. 2024, §5.2.2)."""

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.embed import VectorEmbedding, crop_centre, patchify, sincos_2d, timestep_features, unpatchify
from mmdit.layers import DiTBlock, FinalLayer, Stream, modulate, scaled_dot_product, sub_layers
from mmdit.model import TIME_FEATURES
from mmdit.network import Condition
from mmdit.saved import SavedNetwork


class DiffusionTransformer(SavedNetwork, ABC):
    """The parts that both DiTs share with MMDiT: model(z, t, condition) → y, embeddings, positions, last layer.

    Args:
        in_channels: channels of the latent.
        patch_size: side of a patch, in latent pixels.
        depth: number of blocks.
        width: channels of a token; none means 64·depth, as in MMDiT's family.
        heads: attention heads; none means one per 64 channels.
        text_dim: channels of a text token.
        pooled_dim: channels of the pooled text vector.
        qk_norm: RMS-normalise queries and keys, of every attention.
        sample_size: side of the latent at the base resolution; positions are spaced as if it filled the table.
        pos_embed_max_size: side of the positional table in patches, the largest picture that fits.
        out_channels: channels of y; none means in_channels. A learned variance takes twice as many.

    Raises:
        ValueError: a size is below 1, the width is not a multiple of heads and of 4, or sample_size is not a multiple
            of patch_size that fits the table.

    Attributes:
        unit: height and width of a latent are multiples of it.
        largest: height or width of the largest latent.
        settings: the arguments, with defaults in place of none.
    """

    largest: int
    positions: Tensor

    def __init__(
        self,
        in_channels: int = 16,
        patch_size: int = 2,
        depth: int = 24,
        width: int | None = None,
        heads: int | None = None,
        text_dim: int = 4096,
        pooled_dim: int = 2048,
        qk_norm: bool = True,
        sample_size: int = 128,
        pos_embed_max_size: int = 192,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        width = 64 * depth if width is None else width
        heads = max(width // 64, 1) if heads is None else heads
        out_channels = in_channels if out_channels is None else out_channels
        sizes = {
            "in_channels": in_channels, "patch_size": patch_size, "depth": depth, "width": width, "heads": heads,
            "text_dim": text_dim, "pooled_dim": pooled_dim, "sample_size": sample_size,
            "pos_embed_max_size": pos_embed_max_size, "out_channels": out_channels,
        }  # fmt: skip
        if min(sizes.values()) < 1:
            raise ValueError(f"all sizes of the network must be at least 1, got {min(sizes.values())}")
        if width % heads or width % 4:
            raise ValueError(f"width must be a multiple of heads and of 4, got width {width} and heads {heads}")
        if sample_size % patch_size or sample_size // patch_size > pos_embed_max_size:
            raise ValueError(
                f"sample_size must be a multiple of patch_size that fits the table of {pos_embed_max_size} patches, "
                f"got sample_size {sample_size} and patch_size {patch_size}"
            )
        self.settings = sizes | {"qk_norm": qk_norm}
        self.in_channels, self.out_channels, self.text_dim, self.pooled_dim = (
            in_channels, out_channels, text_dim, pooled_dim,
        )  # fmt: skip
        self.patch_size, self.depth, self.width, self.sample_size = patch_size, depth, width, sample_size
        self.unit, self.largest = patch_size, pos_embed_max_size * patch_size

        self.patch = nn.Linear(in_channels * patch_size**2, width)
        self.context = nn.Linear(text_dim, width)
        self.time = VectorEmbedding(TIME_FEATURES, width)
        self.pooled = VectorEmbedding(pooled_dim, width)
        self.blocks = nn.ModuleList(self.block(width, heads, qk_norm) for _ in range(depth))
        self.final = FinalLayer(width, patch_size**2 * out_channels)
        spacing = sample_size / patch_size / pos_embed_max_size
        table = sincos_2d(pos_embed_max_size, width, spacing)
        self.register_buffer("positions", table, persistent=False)  # computed from the config
        self.init_weights()

    @staticmethod
    @abstractmethod
    def block(width: int, heads: int, qk_norm: bool) -> nn.Module:
        """A new block."""

    @abstractmethod
    def run_blocks(self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        """All blocks, one after the other.

        Args:
            text: embedded text tokens, (B, N, width).
            image: embedded patches with their positions, (B, M, width).
            vector: SiLU of time and pooled text, (B, width).
            mask: true for real text tokens, (B, N); none means all.

        Returns:
            The image's tokens, (B, M, width).
        """

    def init_weights(self) -> None:
        """As in MMDiT: zero for every modulation, every cross attention's projection and the output.

        Each block starts as the identity, and the network starts at y = 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.time, self.pooled):
            nn.init.normal_(embedding.fc1.weight, std=0.02)
            nn.init.normal_(embedding.fc2.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, DiTBlock | CrossBlock | FinalLayer):
                nn.init.zeros_(module.modulation.weight)
            elif isinstance(module, CrossAttention):
                nn.init.zeros_(module.proj.weight)
        nn.init.zeros_(self.final.linear.weight)

    def forward(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output at (z, t). All inputs except t are cast to the type of its weights.

        Args:
            z: noisy latents, (B, C, H, W); H and W multiples of the patch.
            t: times in [0, 1], (B,) float32.
            condition: text of the same batch size; its mask needs a true token in every row.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: H or W is not a multiple of the patch, or has more patches than the positional table.
        """
        self.check_condition(condition)
        height, rest_h = divmod(z.shape[-2], self.patch_size)
        width, rest_w = divmod(z.shape[-1], self.patch_size)
        if rest_h or rest_w:
            raise ValueError(f"latent {z.shape[-2]}×{z.shape[-1]} is not a multiple of patch_size {self.patch_size}")
        dtype = self.positions.dtype

        image = self.patch(patchify(z.to(dtype), self.patch_size)) + crop_centre(self.positions, height, width)
        text = self.context(condition.text.to(dtype)).to(image.dtype)  # b n width
        features = timestep_features(t, TIME_FEATURES).to(dtype)
        vector = F.silu(self.time(features) + self.pooled(condition.pooled.to(dtype)))  # b width
        image = self.run_blocks(text, image, vector, condition.mask)
        return unpatchify(self.final(image, vector), height, width, self.patch_size)  # b c h w


@final
class DiT(DiffusionTransformer):
    """DiT (Peebles & Xie 2022) with the text in context: blocks over [text, image], one set of weights for both.

    It is MMDiT with its two streams tied. As in MMDiT, the last block does not compute its text output.
    """

    @staticmethod
    def block(width: int, heads: int, qk_norm: bool) -> nn.Module:
        return DiTBlock(width, heads, qk_norm)

    def run_blocks(self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        x, count = torch.cat([text, image], dim=1), image.shape[1]
        if mask is not None:
            mask = F.pad(mask, (0, count), value=True)[:, None, None]  # b 1 1 n+m
        for i, block in enumerate(self.blocks):
            x = block(x, count if i == self.depth - 1 else x.shape[1], vector, mask)
        return x


class CrossAttention(nn.Module):
    """Image tokens attend to text tokens.

    Args:
        width: channels of a token.
        heads: attention heads.
        qk_norm: RMS-normalise q and k.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, image: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the image (B, M, width) to the text (B, N, width), where the mask (B, 1, 1, N) is true."""
        q = rearrange(self.q(image), "b m (h d) -> b m h d", h=self.heads)
        k, v = rearrange(self.kv(text), "b n (two h d) -> b n two h d", two=2, h=self.heads).unbind(2)
        return self.proj(scaled_dot_product(self.norm_q(q), self.norm_k(k), v, mask))


class CrossBlock(nn.Module):
    """adaLN-Zero self attention of the image, its cross attention to the text, adaLN-Zero MLP.

    The cross attention is that of PixArt-α (Chen et al. 2023, §2.3): between the two, without norm, modulation or gate,
    with an output projection that starts at zero. It has the heads and the width of the self attention.

    Args:
        width: channels of a token.
        heads: attention heads.
        qk_norm: RMS-normalise q and k, in both attentions.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.stream = Stream(width, heads, qk_norm)
        self.cross = CrossAttention(width, heads, qk_norm)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, image: Tensor, text: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        """image (B, M, width), text (B, N, width), vector (B, width), mask (B, 1, 1, N) or none to (B, M, width)."""
        attention, mlp = sub_layers(self.modulation(vector))
        attended = scaled_dot_product(*self.stream.attend(modulate(image, attention.shift, attention.scale)))
        x = torch.addcmul(image, attention.gate, self.stream.proj(attended))
        x = x + self.cross(x, text, mask)
        return torch.addcmul(x, mlp.gate, self.stream.mlp(modulate(x, mlp.shift, mlp.scale)))


@final
class CrossDiT(DiffusionTransformer):
    """DiT whose image tokens attend to the text tokens in every block (PixArt-α, Chen et al. 2023).

    All blocks attend to the same linearly embedded text, which no block changes. Unlike in PixArt-α, each block has its
    own modulation, the text embedding is one linear layer, and the pooled vector is added to the time embedding: all as
    in MMDiT, so that only the attention to the text differs.
    """

    @staticmethod
    def block(width: int, heads: int, qk_norm: bool) -> nn.Module:
        return CrossBlock(width, heads, qk_norm)

    def run_blocks(self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            mask = mask[:, None, None]  # b 1 1 n
        for block in self.blocks:
            image = block(image, text, vector, mask)
        return image
