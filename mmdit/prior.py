"""DALL·E 2's prior: a causal transformer that draws an image embedding for a caption (Ramesh et al. 2022, §2.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.embed import VectorEmbedding, timestep_features
from mmdit.layers import Stream, scaled_dot_product
from mmdit.model import TIME_FEATURES
from mmdit.network import Condition
from mmdit.saved import SavedNetwork

ADDED = 4  # tokens behind the text: pooled vector, time, noised embedding, query


class CausalBlock(Stream):
    """A block of pre-norm self attention and MLP.

    Args:
        width: channels of a token.
        heads: attention heads.
        qk_norm: RMS-normalise q and k.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__(width, heads, qk_norm)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, kept: int, mask: Tensor) -> Tensor:
        """One block.

        Args:
            x: all tokens, (B, L, width).
            kept: number of tokens, from the end, to compute.
            mask: true where a row's token may attend to a column's, (B or 1, 1, L, L).

        Returns:
            (B, kept, width).
        """
        q, k, v = self.attend(self.norm_attention(x))
        x = x[:, -kept:] + self.proj(scaled_dot_product(q[:, -kept:], k, v, mask[:, :, -kept:]))
        return x + self.mlp(self.norm_mlp(x))


class Prior(SavedNetwork):
    """model(z, t, condition) → y on embeddings, latents of 1 × 1, as `data.clip.CLIPImage` makes them.

    The sequence is [text tokens, pooled vector, time, noised embedding, query]. Each token attends to those before it
    and to itself; y is read at the query, which is learned. The text's own order is in its tokens, which an encoder
    with positions made; the others each have a linear layer of their own. So nothing here depends on the number of
    tokens.

    Args:
        in_channels: numbers of an embedding.
        depth: number of blocks.
        width: channels of a token; none means 64·depth.
        heads: attention heads; none means one per 64 channels.
        text_dim: channels of a text token.
        pooled_dim: channels of the pooled text vector.
        qk_norm: RMS-normalise queries and keys.
        text_mask: takes a mask of the text; padding is not attended to.

    Raises:
        ValueError: a size is below 1, or the width is not a multiple of heads.

    Example:
        >>> network = Prior(in_channels=16, depth=2, text_dim=8, pooled_dim=8)
        >>> condition = Condition(text=torch.randn(1, 5, 8), pooled=torch.randn(1, 8))
        >>> y = network(torch.randn(1, 16, 1, 1), torch.tensor([0.5]), condition)
        >>> y.shape, bool((y == 0).all())  # a zero output layer: the network starts at y = 0
        (torch.Size([1, 16, 1, 1]), True)
    """

    def __init__(
        self,
        in_channels: int = 768,
        depth: int = 20,
        width: int | None = None,
        heads: int | None = None,
        text_dim: int = 768,
        pooled_dim: int = 768,
        qk_norm: bool = True,
        text_mask: bool = False,
    ) -> None:
        super().__init__()
        width = 64 * depth if width is None else width
        heads = max(width // 64, 1) if heads is None else heads
        sizes = {
            "in_channels": in_channels, "depth": depth, "width": width, "heads": heads, "text_dim": text_dim,
            "pooled_dim": pooled_dim,
        }  # fmt: skip
        if min(sizes.values()) < 1:
            raise ValueError(f"all sizes of the network must be at least 1, got {min(sizes.values())}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and heads {heads}")
        self.settings = sizes | {"qk_norm": qk_norm, "text_mask": text_mask}
        self.in_channels = self.out_channels = in_channels
        self.text_dim, self.pooled_dim, self.depth, self.width = text_dim, pooled_dim, depth, width
        self.text_mask = text_mask
        self.sample_size = self.unit = self.largest = 1

        self.context, self.pooled = nn.Linear(text_dim, width), nn.Linear(pooled_dim, width)
        self.time, self.embedding = VectorEmbedding(TIME_FEATURES, width), nn.Linear(in_channels, width)
        self.query = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(CausalBlock(width, heads, qk_norm) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, in_channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier for linears, N(0, 0.02) for time and query, zero for the output: the network starts at y = 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.time.fc1.weight, self.time.fc2.weight, self.query):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.out.weight)

    def forward(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output at (z, t). All inputs except t are cast to the type of its weights.

        Args:
            z: noised embeddings, (B, in_channels, 1, 1).
            t: times in [0, 1], (B,) float32.
            condition: text of the same batch size.

        Returns:
            (B, in_channels, 1, 1).

        Raises:
            ValueError: z has another shape, or the condition does not fit.
        """
        self.check_condition(condition)
        if z.shape[1:] != (self.in_channels, 1, 1):
            raise ValueError(f"this network reads embeddings {(self.in_channels, 1, 1)}, got {tuple(z.shape[1:])}")
        dtype = self.query.dtype
        added = (
            self.pooled(condition.pooled.to(dtype)),
            self.time(timestep_features(t, TIME_FEATURES).to(dtype)),
            self.embedding(z.flatten(1).to(dtype)),
            self.query.expand(len(z), -1),
        )  # each b width
        text = self.context(condition.text.to(dtype))  # b n width
        x = torch.cat([text, torch.stack(added, dim=1).to(text.dtype)], dim=1)  # b n+4 width
        mask = causal(x.shape[1], None if condition.mask is None else F.pad(condition.mask, (0, ADDED), value=True), x)
        for i, block in enumerate(self.blocks):
            x = block(x, 1 if i == self.depth - 1 else x.shape[1], mask)
        return self.out(self.norm(x[:, 0]))[..., None, None]  # b c 1 1


def causal(length: int, real: Tensor | None, like: Tensor) -> Tensor:
    """Who may attend to whom, (B or 1, 1, L, L) bool: rows to columns up to their own that are real, and to themselves.

    Args:
        length: L.
        real: (B, L), false for padding; none means all.
        like: a tensor on the device.
    """
    own = torch.eye(length, dtype=torch.bool, device=like.device)
    before = own.new_ones(length, length).tril()
    return (before if real is None else before & real[:, None, None]).logical_or(own).view(-1, 1, length, length)
