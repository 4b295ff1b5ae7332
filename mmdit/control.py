"""ControlNet: a copy of the network's first blocks reads a picture and steers the frozen network (Zhang et al. 2023).

Both released kinds are read: that with text (InstantX, Alimama; `JointControlNet`) and that of Stable Diffusion 3.5
large without text (`SingleControlNet`), in diffusers' layout; the latter also as Stability AI's single file.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit import checkpoint
from mmdit.checkpoint import EXTENSIONS, Naming, Piece
from mmdit.embed import VectorEmbedding, patchify, timestep_features
from mmdit.layers import DiTBlock, JointBlock
from mmdit.model import TIME_FEATURES, MMDiT, Tokens
from mmdit.network import Condition, HiddenStates, Network
from storage.checksums import verify
from storage.files import commit_json
from storage.text import read_json
from storage.weights import DType, Weights, dtype_of, open_file, open_folder, write_tensors

FOLDER = "controlnet"  # in a model folder
DIFFUSERS_CLASS, OUR_CLASS = "SD3ControlNetModel", "ControlNet"
HINT, OUTPUTS = "pos_embed_input.proj", "controlnet_blocks"
SINGLE_BLOCK = {  # our layer in a block without text: (its parts in diffusers, in the original files)
    "modulation": (("norm1.linear",), ("adaLN_modulation.1",)),
    "stream.qkv": (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.qkv",)),
    "stream.proj": (("attn.to_out.0",), ("attn.proj",)),
    "stream.mlp.fc1": (("ff.net.0.proj",), ("mlp.fc1",)),
    "stream.mlp.fc2": (("ff.net.2",), ("mlp.fc2",)),
}


def places(depth: int, count: int, every_block: bool = False) -> list[int | None]:
    """For each of a network's blocks, the number of the residual that follows it, or none.

    Args:
        depth: number of the network's blocks.
        count: number of residuals.
        every_block: divide as Stability AI's reference does, where one also follows the last block; otherwise as
            diffusers, where none does.
    """
    if every_block:
        return [min(i // max(depth // count, 1), count - 1) for i in range(depth)]
    return [*(int(i / (depth / count)) for i in range(depth - 1)), None]


class ControlNet(nn.Module, ABC):
    """h₀ = tokens of z + Z(hint), hᵢ = blockᵢ(hᵢ₋₁); the base's image tokens get Zᵢ(hᵢ) (Zhang et al. 2023, eq. 2).

    The linear maps Z start at zero, so that a new one changes nothing.

    Args:
        width: channels of a token.
        depth: number of blocks.
        in_channels: channels of the hint, which are those of the latent.
        patch_size: side of a patch, in latent pixels.

    Attributes:
        blocks: the blocks.
        largest: height or width of the largest latent; none means the base's.
        zero_pooled: the pooled text is zero and the hint's latents are not shifted by the VAE's shift, as in
            diffusers with `force_zeros_for_pooled_projection`.
        every_block: also the base's last block is followed by a residual, as in Stability AI's reference; in diffusers
            it is not.
    """

    SHARED: ClassVar[tuple[str, ...]] = ("in_channels", "patch_size", "width", "pooled_dim")  # as in the base
    blocks: nn.ModuleList
    pooled_dim: int
    largest: int | None = None

    def __init__(self, width: int, depth: int, in_channels: int, patch_size: int) -> None:
        super().__init__()
        self.width, self.depth, self.in_channels, self.patch_size = width, depth, in_channels, patch_size
        self.hint = nn.Linear(in_channels * patch_size**2, width)
        self.outputs = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for layer in (self.hint, *self.outputs):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.zero_pooled = self.every_block = False

    @abstractmethod
    def embed(self, base: MMDiT, z: Tensor, t: Tensor, condition: Condition) -> Tokens:
        """What the blocks work on, before the hint. Arguments as for `forward`."""

    @abstractmethod
    def states(self, tokens: Tokens) -> Iterator[Tensor]:
        """The image tokens after each block, (B, M, width)."""

    @abstractmethod
    def layout(self, naming: Naming) -> dict[str, list[Piece]]:
        """Our names → the tensors of each in another naming."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Its sizes as diffusers' `SD3ControlNetModel` names them, with extensions in our names."""

    def mismatch(self, base: MMDiT) -> str:
        """Why it cannot steer this network; empty if it can."""
        wrong = [name for name in self.SHARED if getattr(self, name) != getattr(base, name)]
        return ", ".join(f"{name} {getattr(self, name)} and not {getattr(base, name)}" for name in wrong)

    def forward(self, base: MMDiT, z: Tensor, t: Tensor, condition: Condition, hint: Tensor) -> list[Tensor | None]:
        """What is added to the base's image tokens after each of its blocks.

        Args:
            base: the network that is steered.
            z: noisy latents, (B, C, H, W).
            t: times in [0, 1], (B,) float32.
            condition: the base's.
            hint: latents of the picture, (B, in_channels, H, W).

        Returns:
            (B, M, width) or none for each of the base's blocks.
        """
        if self.zero_pooled:
            condition = condition._replace(pooled=torch.zeros_like(condition.pooled))
        tokens = self.embed(base, z, t, condition)
        hinted = self.hint(patchify(hint.to(self.hint.weight.dtype), self.patch_size))
        states = self.states(tokens._replace(image=tokens.image + hinted))
        own = [output(state) for output, state in zip(self.outputs, states, strict=True)]
        return [None if i is None else own[i] for i in places(base.depth, self.depth, self.every_block)]

    def _outside(self) -> dict[str, list[Piece]]:
        """The layout of hint and outputs, which both kinds and both namings share."""
        shape = (self.width, self.in_channels, self.patch_size, self.patch_size)  # a convolution in diffusers
        table = {"hint.weight": [Piece(f"{HINT}.weight", shape)], "hint.bias": [Piece(f"{HINT}.bias", shape[:1])]}
        for i in range(self.depth):
            for kind, size in (("weight", (self.width, self.width)), ("bias", (self.width,))):
                table[f"outputs.{i}.{kind}"] = [Piece(f"{OUTPUTS}.{i}.{kind}", size)]
        return table


class JointControlNet(ControlNet):
    """The kind with text: the joint blocks and all embeddings of an MMDiT.

    Args:
        arguments: `MMDiT`'s, with the number of blocks as `depth`.
    """

    SHARED = (*ControlNet.SHARED, "text_dim", "text_mask")

    def __init__(self, arguments: dict[str, Any]) -> None:
        trunk = MMDiT(**arguments)
        super().__init__(trunk.width, trunk.depth, trunk.in_channels, trunk.patch_size)
        last = trunk.depth - 1
        whole = JointBlock(
            trunk.width, trunk.heads, trunk.qk_norm, dual=last in trunk.dual_attention_layers, conv_mlp=trunk.conv_mlp
        )
        for unused in (whole.text.proj, whole.text.mlp):  # released checkpoints hold them
            unused.requires_grad_(False)
        trunk.blocks[last] = whole
        del trunk.final
        self.trunk = trunk
        self.text_dim, self.pooled_dim, self.text_mask = trunk.text_dim, trunk.pooled_dim, trunk.text_mask
        self.largest = trunk.largest

    @classmethod
    def of(cls, base: MMDiT, depth: int) -> Self:
        """A new one whose blocks and embeddings are copies of the base's.

        Raises:
            ValueError: a residual of it would follow none of the base's blocks.
        """
        if depth not in (fitting := [n for n in range(1, base.depth) if n - 1 in places(base.depth, n)]):
            numbers = ", ".join(map(str, fitting)) or "no fitting number of"
            raise ValueError(f"a ControlNet of a network of {base.depth} blocks can have {numbers} blocks, not {depth}")
        names = (
            "in_channels", "patch_size", "width", "heads", "text_dim", "pooled_dim", "qk_norm", "sample_size",
            "pos_embed_max_size", "time_scale", "text_mask", "conv_mlp",
        )  # fmt: skip
        dual = tuple(i for i in base.dual_attention_layers if i < depth)
        control = cls({name: getattr(base, name) for name in names} | {"depth": depth, "dual_attention_layers": dual})
        state = base.state_dict()
        control.trunk.load_state_dict({name: state[name] for name in control.trunk.state_dict()})
        return control

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.trunk.blocks

    def embed(self, base: MMDiT, z: Tensor, t: Tensor, condition: Condition) -> Tokens:
        return self.trunk.embed(z, t, condition)

    def states(self, tokens: Tokens) -> Iterator[Tensor]:
        text, image, vector, mask, grid = tokens
        for block in self.blocks:
            text, image = block(text, image, vector, mask, grid)
            yield image

    def layout(self, naming: Naming) -> dict[str, list[Piece]]:
        if naming != "diffusers":
            raise ValueError("a ControlNet with text is stored in diffusers' layout only")
        inner = checkpoint.layout(self.trunk, naming)
        return {f"trunk.{name}": there for name, there in inner.items()} | self._outside()

    def config(self) -> dict[str, Any]:
        own = checkpoint.config(self.trunk)
        return own | {"extra_conditioning_channels": 0, "pos_embed_type": "sincos", "use_pos_embed": True}


class SingleControlNet(ControlNet):
    """The kind without text, of Stable Diffusion 3.5 large: DiT's blocks over the base's own patches and positions.

    Args:
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads.
        pooled_dim: channels of the pooled text vector.
        in_channels: channels of the hint.
        patch_size: side of a patch, in latent pixels.
    """

    def __init__(
        self, width: int, depth: int, heads: int, pooled_dim: int, in_channels: int = 16, patch_size: int = 2
    ) -> None:
        super().__init__(width, depth, in_channels, patch_size)
        self.heads, self.pooled_dim = heads, pooled_dim
        self.time, self.pooled = VectorEmbedding(TIME_FEATURES, width), VectorEmbedding(pooled_dim, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, qk_norm=False) for _ in range(depth))

    def embed(self, base: MMDiT, z: Tensor, t: Tensor, condition: Condition) -> Tokens:
        dtype = self.hint.weight.dtype
        image, grid = base.embed_image(z)
        features = timestep_features(t, TIME_FEATURES).to(dtype)
        vector = F.silu(self.time(features) + self.pooled(condition.pooled.to(dtype)))
        return Tokens(image[:, :0], image.to(dtype), vector, None, grid)

    def states(self, tokens: Tokens) -> Iterator[Tensor]:
        image = tokens.image
        for block in self.blocks:
            image = block(image, image.shape[1], tokens.vector, None)
            yield image

    def layout(self, naming: Naming) -> dict[str, list[Piece]]:
        column, table = (0 if naming == "diffusers" else 1), self._outside()
        for name, tensor in self.state_dict().items():
            if name in table:
                continue
            module, _, kind = name.rpartition(".")
            if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
                names = [f"transformer_blocks.{block[1]}.{part}" for part in SINGLE_BLOCK[block[2]][column]]
            else:
                names = list(checkpoint.OUTSIDE_BLOCKS[module][0])  # these have diffusers' names in both
            shape = (tensor.shape[0] // len(names), *tensor.shape[1:])
            table[name] = [Piece(f"{part}.{kind}", shape) for part in names]
        return table

    def config(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "patch_size": self.patch_size,
            "num_layers": self.depth,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.width // self.heads,
            "pooled_projection_dim": self.pooled_dim,
            "joint_attention_dim": None,
            "use_pos_embed": False,
            "pos_embed_type": None,
            "pos_embed_max_size": None,
        }


class Control(NamedTuple):
    """A ControlNet at work."""

    network: ControlNet
    scale: float = 1.0  # factor of what it adds
    interval: tuple[float, float] = (0.0, 1.0)  # it works at times from the first to the second


class Controlled(Network):
    """A network that is steered by ControlNets: its `Condition.picture` holds their hints, one after the other.

    Args:
        base: the network.
        controls: at least one ControlNet; what they add is added up.

    Raises:
        ValueError: in one line, if one of them does not fit the network.
    """

    def __init__(self, base: MMDiT, controls: Iterable[Control]) -> None:
        super().__init__()
        controls = list(controls)
        if base.picture_channels or base.two_times or base.guidance_embeds:
            raise ValueError("this network takes a picture, a guidance or two times, which no ControlNet knows")
        for control in controls:
            if wrong := control.network.mismatch(base):
                raise ValueError(f"the ControlNet is one of another base: it has {wrong}")
        self.base, self.controls = base, nn.ModuleList(control.network for control in controls)
        self.scales, self.intervals = [c.scale for c in controls], [c.interval for c in controls]
        self.in_channels, self.out_channels = base.in_channels, base.out_channels
        self.text_dim, self.pooled_dim, self.text_mask = base.text_dim, base.pooled_dim, base.text_mask
        self.sample_size, self.unit = base.sample_size, base.unit
        self.largest = min([base.largest, *(c.network.largest for c in controls if c.network.largest)])
        self.depth, self.width, self.skippable = base.depth, base.width, base.skippable
        self.picture_channels = sum(control.network.in_channels for control in controls)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks: of the ControlNets, then of the base."""
        return [*(block for control in self.settings for block in control.network.blocks), *self.base.blocks]

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        condition: Condition,
        end: Tensor | None = None,
        skip_layers: Collection[int] = (),
        hidden_states: HiddenStates | None = None,
    ) -> Tensor:
        """The base's output at (z, t), steered. Arguments and errors as for `MMDiT`."""
        self.check_condition(condition)
        assert condition.picture is not None
        hints, plain = condition.picture.split(self.in_channels, dim=1), condition._replace(picture=None)
        added: list[Tensor | None] = [None] * self.depth
        for (control, scale, (low, high)), hint in zip(self.settings, hints, strict=True):
            if (low, high) != (0.0, 1.0) and not bool(((low <= t) & (t <= high)).any()):
                continue
            for i, residual in enumerate(control(self.base, z, t, plain, hint)):
                if residual is not None:
                    scaled = residual if scale == 1 else scale * residual
                    sofar = added[i]
                    added[i] = scaled if sofar is None else sofar + scaled
        return self.base(z, t, plain, end, skip_layers, hidden_states, added)

    @property
    def settings(self) -> list[Control]:
        """The ControlNets with their scales and intervals."""
        networks = (cast(ControlNet, network) for network in self.controls)
        return [Control(*each) for each in zip(networks, self.scales, self.intervals, strict=True)]


def attach(
    path: str | os.PathLike[str],
    blocks: int | None = None,
    control: Path | None = None,
    dtype: DType = "float32",
) -> Controlled:
    """A network from disk, frozen, with a ControlNet to train.

    Args:
        path: the network, as for `mmdit.checkpoint.load`.
        blocks: those of a new ControlNet, copies of the network's first; none means half of them.
        control: a ControlNet to train further, as for `load`; none means a new one.
        dtype: of the frozen network's weights; the ControlNet's are float32.

    Raises:
        FileNotFoundError, ValueError: in one line, if a file is missing, damaged or does not fit.
    """
    base = checkpoint.load(path, dtype)
    if control and blocks is not None:
        raise ValueError(f"network.blocks is for a new ControlNet, and {control} has its own: leave one out")
    new = load(control) if control else JointControlNet.of(base, base.depth // 2 if blocks is None else blocks)
    if new.zero_pooled:
        raise ValueError(f"{control} learned without pooled text and from latents without the VAE's shift "
                         "(force_zeros_for_pooled_projection), which is not done here: train a new one")  # fmt: skip
    base.requires_grad_(False)
    return Controlled(base, [Control(new)])


def find(path: Path) -> Path:
    """The folder or file of a ControlNet: itself, or one in a model's or run's folder. FileNotFoundError if none."""
    if not path.exists():
        raise FileNotFoundError(f"there is no ControlNet {path}: give a folder or a .safetensors file")
    places = (path / FOLDER, path / "model" / FOLDER)
    found = next((place for place in places if place.is_dir()), path)
    if found.is_dir() and not (found / checkpoint.CONFIG).is_file():
        raise FileNotFoundError(f"{path} holds no ControlNet: give a folder with its config.json, or its single file")
    return found


def load(path: str | os.PathLike[str], dtype: DType = "float32", device: torch.device | str = "cpu") -> ControlNet:
    """Reads a ControlNet, ours or a released one.

    Args:
        path: a folder of diffusers' `SD3ControlNetModel`, a model's or run's folder with one, or Stability AI's single
            file of one for Stable Diffusion 3.5 large.
        dtype: of the weights in memory.
        device: where they go.

    Raises:
        FileNotFoundError, ValueError: in one line, if a file is missing, truncated, of another kind or does not fit.
    """
    place = find(Path(path))
    if place != Path(path):
        verify(place.parent, place.name)
    naming: Naming = "diffusers" if place.is_dir() else "original"
    weights = open_folder(place, checkpoint.STEM) if place.is_dir() else open_file(place)
    with torch.device("meta"):
        control = _from_config(place / checkpoint.CONFIG) if place.is_dir() else _from_shapes(weights)
    return checkpoint.fill(control, weights, control.layout(naming), dtype_of(dtype), device)


def _from_config(file: Path) -> ControlNet:
    """The ControlNet that diffusers' config describes, with random weights."""
    config, kinds = read_json(file), (DIFFUSERS_CLASS, OUR_CLASS)
    if config.get("extra_conditioning_channels"):
        raise ValueError(f"{file} is a ControlNet that also takes a mask, which is not supported")
    single = config.get("joint_attention_dim", 0) is None
    if single:  # what it does not have
        config.pop("caption_projection_dim", None)
        config |= {"joint_attention_dim": 1, "sample_size": 1, "pos_embed_max_size": 1}
    given = checkpoint.arguments_of(config, file, kinds)
    if single:
        names = ("width", "depth", "heads", "pooled_dim", "in_channels", "patch_size")
        control: ControlNet = SingleControlNet(**{name: given[name] for name in names})
    else:
        control = JointControlNet({name: value for name, value in given.items() if name != "out_channels"})
    control.zero_pooled = config.get("force_zeros_for_pooled_projection", True)
    control.every_block = config.get("every_block", False)
    if not isinstance(control.zero_pooled, bool) or not isinstance(control.every_block, bool):
        raise ValueError(f"{file}: force_zeros_for_pooled_projection and every_block must be true or false")
    return control


def _from_shapes(weights: Weights) -> ControlNet:
    """The ControlNet in Stability AI's single file, with random weights."""
    numbers = [int(found[1]) for name in weights if (found := re.match(rf"{OUTPUTS}\.(\d+)\.", name))]
    pooled = "time_text_embed.text_embedder.linear_1.weight"
    shapes = {"transformer_blocks.0.attn.qkv.weight": 2, f"{HINT}.weight": 4, pooled: 2}  # name → dimensions
    whole = numbers and max(numbers) < len(weights)
    if not whole or any(name not in weights or len(weights.shape(name)) != n for name, n in shapes.items()):
        raise ValueError(
            f"{weights.source} is no single file of a ControlNet of Stable Diffusion 3.5 large; others are folders of "
            "diffusers, with a config.json"
        )
    width, channels, patch, _ = weights.shape(f"{HINT}.weight")
    control = SingleControlNet(
        width, max(numbers) + 1, max(width // 64, 1), weights.shape(pooled)[1], channels, patch
    )  # fmt: skip
    control.every_block = True
    return control


def config(control: ControlNet) -> dict[str, Any]:
    """Its shape as diffusers' `SD3ControlNetModel` names it. It names our class if diffusers cannot build it."""
    own = control.config() | ({"every_block": True} if control.every_block else {})
    kind = OUR_CLASS if any(name in own for name in (*EXTENSIONS, "every_block")) else DIFFUSERS_CLASS
    return own | {"_class_name": kind, "force_zeros_for_pooled_projection": control.zero_pooled}


def save(control: ControlNet, folder: Path) -> None:
    """Writes config and weights so that diffusers' `SD3ControlNetModel.from_pretrained` reads them."""
    commit_json(folder / checkpoint.CONFIG, config(control))
    tensors = checkpoint.pieces(control.state_dict(), control.layout("diffusers"))
    write_tensors(tensors, folder / f"{checkpoint.STEM}.safetensors")
