"""The contract of every network: its inputs and its public attributes."""

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class Condition(NamedTuple):
    """The network's inputs besides z and t. A field that the network does not use stays none."""

    text: Tensor  # (B, N, text_dim) token features
    pooled: Tensor  # (B, pooled_dim) one vector for the whole caption
    mask: Tensor | None = None  # (B, N) bool, true for real tokens; none means all tokens, as in released models
    guidance: Tensor | None = None  # (B,) guidance scale, for a network that has learned guidance
    picture: Tensor | None = None  # (B, picture_channels, H, W) latents of an input picture, of z's size
    level: Tensor | None = None  # (B,) in [0, 1], noise level of the input picture

    def null(self, text: "Condition") -> "Condition":
        """The null condition of guidance: another text (B or 1, …), the same picture and level."""
        return text._replace(picture=self.picture, level=self.level)


class HiddenStates:
    """Image tokens after chosen blocks. A forward pass fills them in.

    It is not a dict, because FSDP copies dicts among a module's arguments.

    Args:
        blocks: numbers of blocks, from 0.

    Attributes:
        tokens: block → tokens after it, (B, M, width), of the latest forward pass.
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
        sample_size: side of the latents in training.
        unit: height and width of a latent are multiples of it.
        largest: height or width of the largest latent; none means no limit.
        depth: number of blocks of a transformer; 0 for other networks.
        width: channels of a token of a transformer; 0 for other networks.
        skippable: number of blocks that skip-layer guidance may leave out.
        two_times: whether it also takes the time at which a step ends.
        guidance_embeds: whether it takes `Condition.guidance`.
        picture_channels: channels of `Condition.picture`; 0 means that it takes no picture.
        level_embeds: whether it takes `Condition.level`.
        text_mask: whether it takes `Condition.mask`.
        words: for a network that reads token numbers, how many there are; 0 for one that reads vectors.
        text_length: tokens of every caption; 0 means any number.
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
    words: int = 0
    text_length: int = 0

    CONDITION_FIELDS: ClassVar[dict[str, str]] = {
        "guidance": "guidance_embeds", "picture": "picture_channels", "level": "level_embeds", "mask": "text_mask",
    }  # fmt: skip

    def forget(self) -> None:
        """Drops what the network keeps between the calls of one drawing, if anything."""

    def check_condition(self, condition: Condition) -> None:
        """ValueError unless the condition has the fields that this network takes, and no others except a mask."""
        for field, name in self.CONDITION_FIELDS.items():
            given, needed = getattr(condition, field) is not None, bool(getattr(self, name))
            if needed and not given:
                raise ValueError(f"this network has {name} and needs a condition with {field}")
            if given and not needed and field != "mask":
                raise ValueError(f"this network has no {name}: leave {field} out of the condition")
