"""Networks that read noisy pictures, whose gradients guide samples: ADM's classifier and GLIDE's noised CLIP.

Each reads w = (1 − τ)·x0 + τ·ε, the coordinates in which all paths are the same line (`flow.path`). So one network
serves models of every path.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any, Self, final

import torch
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, UNetMidBlock2D
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmdit.embed import VectorEmbedding, timestep_features
from mmdit.layers import scaled_dot_product
from storage.modules import read_module, write_module

TIME_FEATURES = 128
PROBE = "a picture"


class AttentionPool(nn.Module):
    """Attention of the mean token to itself and all tokens, as in CLIP's ResNet (Radford et al. 2021, §2.4).

    Args:
        width: channels of a token.
        tokens: how many there are.
        heads: attention heads.
        outputs: channels of the result.
    """

    def __init__(self, width: int, tokens: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(1 + tokens, width) / width**0.5)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, width, H, W) to (B, outputs)."""
        tokens = rearrange(maps, "b c h w -> b (h w) c")
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positions
        q = rearrange(self.query(tokens[:, :1]), "b n (h d) -> b n h d", h=self.heads)
        k, v = rearrange(self.key_value(tokens), "b n (two h d) -> b n two h d", two=2, h=self.heads).unbind(2)
        return self.proj(scaled_dot_product(q, k, v)[:, 0])


class HalfUNet(nn.Module, ABC):
    """The lower half of ADM's U-Net with attention pooling (Dhariwal & Nichol 2021, §4 and their code).

    Residual blocks with adaptive group normalisation (§3), the last of a level halving the picture inside the block as
    in BigGAN, and self attention behind each. The steps that a time is embedded as are 1000·τ.

    Args:
        in_channels: channels of a picture or latent.
        sample_size: its side.
        channels: channels of each level, from the finest; each level but the last halves the side.
        layers: residual blocks of a level.
        head_channels: channels of an attention head.
        groups: of group normalisation.
        outputs: length of the result.
        codec: `fingerprint` of the codec in whose latents it was trained.

    Raises:
        ValueError: a size is below 1, does not divide another as it must, or the side cannot be halved so often.
    """

    def __init__(
        self,
        in_channels: int,
        sample_size: int,
        channels: Sequence[int],
        layers: int,
        head_channels: int,
        groups: int,
        outputs: int,
        codec: dict[str, Any],
    ) -> None:
        super().__init__()
        channels = tuple(map(index, channels))
        if not channels or min(in_channels, sample_size, *channels, layers, head_channels, groups, outputs) < 1:
            raise ValueError("channels must not be empty, and all sizes must be at least 1")
        if any(width % head_channels or width % groups for width in channels):
            raise ValueError(f"channels must be multiples of head_channels and of groups, got {channels}")
        halvings = len(channels) - 1
        if sample_size % 2**halvings:
            raise ValueError(f"a side of {sample_size} cannot be halved {halvings} times")
        self.settings: dict[str, Any] = {
            "in_channels": in_channels, "sample_size": sample_size, "channels": list(channels), "layers": layers,
            "head_channels": head_channels, "groups": groups, "codec": codec,
        }  # fmt: skip
        self.in_channels, self.sample_size, self.codec = in_channels, sample_size, codec
        width, embedded = channels[-1], 4 * channels[0]
        self.time = VectorEmbedding(TIME_FEATURES, embedded)
        self.first = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        alike: dict[str, Any] = {
            "temb_channels": embedded, "resnet_groups": groups, "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": head_channels,
        }  # fmt: skip
        down: list[Any] = ["resnet"] * halvings + [None]
        self.levels = nn.ModuleList(
            AttnDownBlock2D(above, own, num_layers=layers, downsample_type=kind, **alike)
            for above, own, kind in zip((channels[0], *channels[:-1]), channels, down, strict=True)
        )
        self.middle = UNetMidBlock2D(width, **alike)
        self.norm = nn.GroupNorm(groups, width)
        self.pool = AttentionPool(width, (sample_size // 2**halvings) ** 2, width // head_channels, outputs)

    def forward(self, w: Tensor, tau: Tensor) -> Tensor:
        """Noisy pictures w (B, C, H, W) at τ (B,) in [0, 1] to (B, outputs). Each is independent of its batch."""
        if w.shape[1:] != (size := (self.in_channels, self.sample_size, self.sample_size)):
            raise ValueError(f"it reads {' × '.join(map(str, size))} numbers, got {' × '.join(map(str, w.shape[1:]))}")
        embedded = self.time(timestep_features(tau, TIME_FEATURES))
        x = self.first(w)
        for level in self.levels:
            x, _ = level(x, embedded)
        return self.pool(nn.functional.silu(self.norm(self.middle(x, embedded))))

    @abstractmethod
    def score(self, w: Tensor, tau: Tensor, asked: Tensor) -> Tensor:
        """ln p of what is asked for, up to a constant, (B,): differentiable by w."""

    def save(self, folder: Path) -> None:
        """Writes config and weights. OSError on failure."""
        write_module(self, self.settings, folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote, without gradients of the weights; errors as `read_module`."""
        return read_module(cls, folder).requires_grad_(False)


@final
class Classifier(HalfUNet):
    """A classifier of noisy pictures (Dhariwal & Nichol 2021, §4).

    Args:
        classes: the words for each class, any of which names it in a prompt.
        **sizes: of `HalfUNet`.
    """

    def __init__(self, classes: Sequence[Sequence[str]], **sizes: Any) -> None:
        super().__init__(**sizes, outputs=len(classes))
        self.classes = [list(words) for words in classes]
        self.settings["classes"] = self.classes
        joined = ("|".join(re.escape(words.lower()) for words in names) for names in self.classes)
        self.patterns = [re.compile(rf"\b({names})\b") for names in joined]

    def labels(self, prompts: Sequence[str]) -> Tensor:
        """The class that each prompt names, (B,). ValueError unless it names exactly one."""
        found = []
        for prompt in prompts:
            named = [label for label, pattern in enumerate(self.patterns) if pattern.search(prompt.lower())]
            if len(named) != 1:
                known = ", ".join(names[0] for names in self.classes)
                raise ValueError(f"the prompt {prompt!r} names {len(named)} of the classifier's classes, "
                                 f"not one: {known}")  # fmt: skip
            found += named
        return torch.tensor(found)

    def score(self, w: Tensor, tau: Tensor, asked: Tensor) -> Tensor:
        """ln p(c | w, τ) for the classes `asked` (B,)."""
        return self(w, tau).log_softmax(1).gather(1, asked[:, None])[:, 0]


@final
class NoisyCLIP(HalfUNet):
    """CLIP's two towers, of which that of the pictures reads noisy ones (GLIDE, Nichol et al. 2022).

    The tower of texts is one linear layer on the frozen pooled vector of a text encoder.

    Args:
        outputs: length of both embeddings.
        pooled_dim: length of the pooled vector.
        **sizes: of `HalfUNet`.
    """

    probe: Tensor  # (pooled_dim,) the pooled vector of PROBE: another text encoder has another

    def __init__(self, outputs: int, pooled_dim: int, **sizes: Any) -> None:
        super().__init__(**sizes, outputs=outputs)
        self.settings |= {"outputs": outputs, "pooled_dim": pooled_dim}
        self.register_buffer("probe", torch.zeros(pooled_dim))
        self.words = nn.Linear(pooled_dim, outputs, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def knows(self, pooled: Tensor) -> bool:
        """Whether the pooled vector of PROBE (pooled_dim,) is that of the text encoder that it has learned."""
        return pooled.shape == self.probe.shape and bool((pooled - self.probe).norm() <= 0.02 * self.probe.norm())

    def similarity(self, w: Tensor, tau: Tensor, pooled: Tensor) -> Tensor:
        """Scaled cosines of all texts with all pictures, (texts, pictures)."""
        pictures, texts = normalize(self(w, tau), dim=-1), normalize(self.words(pooled), dim=-1)
        return self.log_scale.exp().clamp(max=100) * texts @ pictures.T

    def score(self, w: Tensor, tau: Tensor, asked: Tensor) -> Tensor:
        """The scaled cosine of each picture with the pooled vector of its text, `asked` (B, pooled_dim)."""
        cosines = (normalize(self(w, tau), dim=-1) * normalize(self.words(asked), dim=-1)).sum(1)
        return self.log_scale.exp().clamp(max=100) * cosines
