"""MMDiT: the multimodal diffusion transformer of Stable Diffusion 3 (Esser et al. 2024, §4 and figure 2)."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.embed import (
    SPAN_SCALE,
    TIME_SCALE,
    VectorEmbedding,
    crop_centre,
    patchify,
    sincos_2d,
    timestep_features,
    unpatchify,
)
from mmdit.layers import FinalLayer, JointBlock
from mmdit.network import Condition, HiddenStates, Network

TIME_FEATURES = 256
EMBEDDINGS = {"two_times": "span", "guidance_embeds": "guidance", "level_embeds": "level"}  # argument → module


class Tokens(NamedTuple):
    """What the blocks work on."""

    text: Tensor  # (B, N, width)
    image: Tensor  # (B, M, width), patches with their positions
    vector: Tensor  # (B, width), SiLU of the sum of all numbers and the pooled text
    mask: Tensor | None  # (B, 1, 1, N + M), true where a token may be attended
    grid: tuple[int, int]  # height and width in patches


class MMDiT(Network):
    """The network: model(z, t, condition) → y, of z's shape; with two_times, model(z, t, condition, end) → y.

    Args:
        in_channels: channels of the latent.
        patch_size: side of a patch, in latent pixels.
        depth: number of joint blocks.
        width: channels of a token; none means 64·depth, as in the paper's family.
        heads: attention heads; none means one per 64 channels.
        text_dim: channels of a text token.
        pooled_dim: channels of the pooled text vector.
        qk_norm: RMS-normalise queries and keys.
        sample_size: side of the latent at the base resolution; positions are spaced as if it filled the table.
        pos_embed_max_size: side of the positional table in patches, the largest picture that fits.
        out_channels: channels of y; none means in_channels. A learned variance takes twice as many.
        dual_attention_layers: blocks whose image tokens also attend to themselves alone, counted from 0.
        time_scale: radians by which the fastest time feature turns from t = 0 to 1. To train an average velocity from
            scratch, 10 is better: it is learned from a derivative by t, to which fast features add noise.
        two_times: also takes the end of a step, for average velocities (Geng et al. 2025).
        guidance_embeds: also takes the guidance scale that the output is to have (Meng et al. 2023, §3.1).
        picture_channels: channels of an input picture, concatenated to z (Saharia et al. 2021, §2.1); 0 means none.
        level_embeds: also takes the noise level of the input picture (Ho et al. 2021, §4.2).
        text_mask: takes a mask of the text; padding is not attended to.
        conv_mlp: the MLPs of the image tokens are 3×3 convolutions, which see the neighbouring tokens.

    Example:
        >>> import torch
        >>> network = MMDiT(in_channels=4, depth=2, text_dim=8, pooled_dim=8, sample_size=8, pos_embed_max_size=4)
        >>> condition = Condition(text=torch.randn(1, 5, 8), pooled=torch.randn(1, 8))
        >>> y = network(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), condition)
        >>> y.shape, bool((y == 0).all())  # zero gates and a zero output: the network starts at y = 0
        (torch.Size([1, 4, 8, 8]), True)
    """

    largest: int
    positions: Tensor
    span: VectorEmbedding
    guidance: VectorEmbedding
    level: VectorEmbedding

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
        dual_attention_layers: tuple[int, ...] = (),
        time_scale: float = TIME_SCALE,
        two_times: bool = False,
        guidance_embeds: bool = False,
        picture_channels: int = 0,
        level_embeds: bool = False,
        text_mask: bool = False,
        conv_mlp: bool = False,
    ) -> None:
        super().__init__()
        width = 64 * depth if width is None else width
        heads = max(width // 64, 1) if heads is None else heads
        out_channels = in_channels if out_channels is None else out_channels
        sizes = (
            in_channels, patch_size, depth, width, heads, text_dim, pooled_dim, sample_size, pos_embed_max_size,
            out_channels,
        )  # fmt: skip
        if min(sizes) < 1:
            raise ValueError(f"all sizes of the network must be at least 1, got {min(sizes)}")
        if width % heads or width % 4:
            raise ValueError(f"width must be a multiple of heads and of 4, got width {width} and heads {heads}")
        if sample_size % patch_size or sample_size // patch_size > pos_embed_max_size:
            raise ValueError(
                f"sample_size must be a multiple of patch_size that fits the table of {pos_embed_max_size} patches, "
                f"got sample_size {sample_size} and patch_size {patch_size}"
            )
        dual = tuple(sorted(dual_attention_layers))
        if not set(dual) <= set(range(depth)):
            raise ValueError(f"dual_attention_layers must be blocks from 0 to {depth - 1}, got {dual}")
        self.in_channels, self.patch_size, self.depth, self.width, self.heads = (
            in_channels, patch_size, depth, width, heads,
        )  # fmt: skip
        self.text_dim, self.pooled_dim, self.qk_norm, self.dual_attention_layers = text_dim, pooled_dim, qk_norm, dual
        self.sample_size, self.pos_embed_max_size, self.out_channels = sample_size, pos_embed_max_size, out_channels
        if time_scale <= 0:
            raise ValueError(f"time_scale must be > 0, got {time_scale}")
        self.time_scale, self.conv_mlp = time_scale, conv_mlp
        self.skippable = depth
        self.unit, self.largest = patch_size, pos_embed_max_size * patch_size

        self.patch = nn.Linear(in_channels * patch_size**2, width)
        self.context = nn.Linear(text_dim, width)
        self.time = VectorEmbedding(TIME_FEATURES, width)
        self.pooled = VectorEmbedding(pooled_dim, width)
        self.blocks = nn.ModuleList(
            JointBlock(width, heads, qk_norm, last=i == depth - 1, dual=i in dual, conv_mlp=conv_mlp)
            for i in range(depth)
        )
        self.final = FinalLayer(width, patch_size**2 * out_channels)
        spacing = sample_size / patch_size / pos_embed_max_size
        self.register_buffer("positions", sincos_2d(pos_embed_max_size, width, spacing))
        self.init_weights()
        self.grow(two_times, guidance_embeds, picture_channels, level_embeds, text_mask)

    def init_weights(self) -> None:
        """Xavier for linears, N(0, 0.02) for the vector embeddings, zero for every modulation and the output.

        With zero gates each block starts as the identity, and the network starts at y = 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.time, self.pooled):
            nn.init.normal_(embedding.fc1.weight, std=0.02)
            nn.init.normal_(embedding.fc2.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, JointBlock | FinalLayer):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.final.linear.weight)

    def grow(
        self,
        two_times: bool = False,
        guidance_embeds: bool = False,
        picture_channels: int = 0,
        level_embeds: bool = False,
        text_mask: bool = False,
        grown_pooled_dim: int = 0,
    ) -> None:
        """Adds inputs and layers that the network lacks. New weights start at zero, so the function stays the same.

        A student therefore starts as its teacher. The arguments are those of the constructor; only `text_mask` changes
        the output at once. `grown_pooled_dim` is the new pooled_dim; 0 leaves the pooled vector as it is.

        Raises:
            ValueError: the network already takes a picture with another number of channels, or a longer pooled vector.
        """
        numbers = {"two_times": two_times, "guidance_embeds": guidance_embeds, "level_embeds": level_embeds}
        for name in (name for name, wanted in numbers.items() if wanted and not getattr(self, name)):
            embedding = VectorEmbedding(TIME_FEATURES, self.width)
            nn.init.normal_(embedding.fc1.weight, std=0.02)
            nn.init.zeros_(embedding.fc2.weight)
            for layer in (embedding.fc1, embedding.fc2):
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
            self.add_module(EMBEDDINGS[name], embedding)
            setattr(self, name, True)
        if picture_channels and self.picture_channels not in (0, picture_channels):
            raise ValueError(
                f"this network has picture_channels {self.picture_channels} and cannot have {picture_channels}"
            )
        if picture_channels and not self.picture_channels:
            widen(self.patch, picture_channels * self.patch_size**2)
            self.picture_channels = picture_channels
        if grown_pooled_dim and grown_pooled_dim < self.pooled_dim:
            raise ValueError(f"this network has pooled_dim {self.pooled_dim} and cannot have {grown_pooled_dim}")
        if grown_pooled_dim:
            assert isinstance(self.pooled.fc1, nn.Linear)
            widen(self.pooled.fc1, grown_pooled_dim - self.pooled_dim)
            self.pooled_dim = grown_pooled_dim
        self.text_mask = self.text_mask or text_mask

    def embed(self, z: Tensor, t: Tensor, condition: Condition, end: Tensor | None = None) -> Tokens:
        """What the blocks work on. Arguments and errors as for `forward`."""
        if end is not None and not self.two_times:
            raise ValueError("this network takes one time and got an end: set two_times or leave end out")
        self.check_condition(condition)
        if condition.picture is not None:
            z = torch.cat([z, condition.picture.to(z.dtype)], dim=1)
        image, grid = self.embed_image(z)
        dtype = self.positions.dtype
        text = self.context(condition.text.to(dtype)).to(image.dtype)  # b n width
        features = timestep_features(t, TIME_FEATURES, self.time_scale).to(dtype)
        vector = self.time(features) + self.pooled(condition.pooled.to(dtype))
        if self.two_times:
            span = torch.zeros_like(t) if end is None else t - end
            vector = vector + self.span(timestep_features(span, TIME_FEATURES, SPAN_SCALE).to(dtype))
        if condition.guidance is not None:
            vector = vector + self.guidance(timestep_features(condition.guidance, TIME_FEATURES, 1.0).to(dtype))
        if condition.level is not None:
            vector = vector + self.level(timestep_features(condition.level, TIME_FEATURES).to(dtype))
        mask = None
        if condition.mask is not None:
            mask = F.pad(condition.mask, (0, image.shape[1]), value=True)[:, None, None]  # b 1 1 n+m
        return Tokens(text, image, F.silu(vector), mask, grid)

    def embed_image(self, z: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The patches of z (B, C, H, W) with their positions, (B, M, width), and their grid."""
        height, rest_h = divmod(z.shape[-2], self.patch_size)
        width, rest_w = divmod(z.shape[-1], self.patch_size)
        if rest_h or rest_w:
            raise ValueError(f"latent {z.shape[-2]}×{z.shape[-1]} is not a multiple of patch_size {self.patch_size}")
        patches = patchify(z.to(self.positions.dtype), self.patch_size)
        return self.patch(patches) + crop_centre(self.positions, height, width), (height, width)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        condition: Condition,
        end: Tensor | None = None,
        skip_layers: Collection[int] = (),
        hidden_states: HiddenStates | None = None,
        residuals: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """The network's output at (z, t). All inputs except t are cast to the type of its weights.

        Args:
            z: noisy latents, (B, C, H, W); H and W multiples of the patch.
            t: times in [0, 1], (B,) float32.
            condition: text of the same batch size.
            end: end of the step from t, (B,) float32; none means t itself, and y is the velocity at t.
            skip_layers: blocks to leave out, for skip-layer guidance.
            hidden_states: receives the image tokens after the blocks that it names.
            residuals: for each block, what a ControlNet adds to its image tokens, (B, M, width) or none.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: H or W is not a multiple of the patch, or exceeds the positional table; the condition lacks a
                field that the network needs, or has one it does not use; or `end` without two_times.
        """
        text, image, vector, mask, grid = self.embed(z, t, condition, end)
        for i, block in enumerate(self.blocks):
            if i not in skip_layers:
                text, image = block(text, image, vector, mask, grid)
                if residuals and (residual := residuals[i]) is not None:
                    image = image + residual.to(image.dtype)
                if hidden_states is not None:
                    hidden_states.add(i, image)
        return unpatchify(self.final(image, vector), *grid, self.patch_size)  # b c h w


def widen(layer: nn.Linear, more: int) -> None:
    """Gives a linear layer so many more inputs, behind the others and with zero weights."""
    new = layer.weight.new_zeros(layer.out_features, more)
    layer.weight = nn.Parameter(torch.cat([layer.weight.detach(), new], dim=1))
    layer.in_features += more
