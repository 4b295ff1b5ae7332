"""The contract of every network: what it is told, and what others may ask of it."""

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class Condition(NamedTuple):
    """What the network is told besides z and t. A part that a network has no use for stays none."""

    text: Tensor  # (B, N, text_dim) token features
    pooled: Tensor  # (B, pooled_dim) one vector for the whole caption
    mask: Tensor | None = None  # (B, N) bool, true for real tokens; none: padding is attended, as in released models
    guidance: Tensor | None = None  # (B,) scale of the guidance that a network with guidance_embeds has learned
    picture: Tensor | None = None  # (B, picture_channels, H, W) latents of a picture to work from, of z's size
    level: Tensor | None = None  # (B,) in [0, 1], how much noise that picture was given

    def null(self, text: "Condition") -> "Condition":
        """What guidance moves away from: another text (B or 1, …), but the same picture and level."""
        return text._replace(picture=self.picture, level=self.level)


class HiddenStates:
    """Image tokens after chosen blocks, which a forward pass fills in.

    It is no dict, since FSDP copies the dicts among a module's arguments.

    Args:
        blocks: numbers of blocks, from 0.

    Attributes:
        tokens: block → (B, M, width) after it, of the latest forward pass.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        self.blocks = frozenset(blocks)
        self.tokens: dict[int, Tensor] = {}

    def add(self, block: int, tokens: Tensor) -> None:
        """Keeps the tokens if they were asked for."""
        if block in self.blocks:
            self.tokens[block] = tokens


class Network(nn.Module):
    """model(z, t, condition) → y: z (B, in_channels, H, W), t (B,) float32 in [0, 1], y (B, out_channels, H, W).

    Attributes:
        in_channels: channels of the latent.
        out_channels: channels of y.
        text_dim: channels of a text token.
        pooled_dim: channels of the pooled text vector.
        sample_size: side of the latents of its training.
        unit: height and width of a latent are multiples of it.
        largest: height or width of the largest latent; none is no limit.
        depth: blocks of a transformer, of width `width`; 0 is none.
        skippable: blocks that skip-layer guidance may leave out.
        two_times: it is also given the time at which a step ends.
        guidance_embeds: it is told `Condition.guidance`.
        picture_channels: channels of `Condition.picture`; 0 is none.
        level_embeds: it is told `Condition.level`.
        text_mask: it is told `Condition.mask`.
    """

    in_channels: int
    out_channels: int
    text_dim: int
    pooled_dim: int
    sample_size: int
    unit: int
    largest: int | None
    depth: int = 0
    width: int = 0
    skippable: int = 0
    two_times: bool = False
    guidance_embeds: bool = False
    picture_channels: int = 0
    level_embeds: bool = False
    text_mask: bool = False

    TOLD: ClassVar[dict[str, str]] = {
        "guidance": "guidance_embeds", "picture": "picture_channels", "level": "level_embeds", "mask": "text_mask",
    }  # fmt: skip

    def check(self, condition: Condition) -> None:
        """ValueError unless the condition has the parts that this network is told, and no others but a mask."""
        for part, name in self.TOLD.items():
            given, needed = getattr(condition, part) is not None, bool(getattr(self, name))
            if needed and not given:
                raise ValueError(f"this network has {name} and needs a condition with {part}")
            if given and not needed and part != "mask":
                raise ValueError(f"this network has no {name}: leave {part} out of the condition")
