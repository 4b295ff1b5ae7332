"""Conversion between `MMDiT`, diffusers' `SD3Transformer2DModel` and the released single files; load and save.

Each of our tensors is one or more of their tensors concatenated, so a table of names is the whole mapping.
"""

import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from mmdit.embed import TIME_SCALE
from mmdit.layers import JointBlock
from mmdit.model import MMDiT
from storage.checksums import verify
from storage.configs import MOST
from storage.files import commit_json
from storage.text import read_json
from storage.weights import DType, Weights, check_tensors, dtype_of, open_file, open_folder, shorten, write_tensors

CONFIG, STEM = "config.json", "diffusion_pytorch_model"
DIFFUSERS_CLASS, OUR_CLASS = "SD3Transformer2DModel", "MMDiT"
EXTENSIONS = {  # settings of MMDiT that diffusers' class does not have, with their defaults
    "time_scale": TIME_SCALE, "two_times": False, "guidance_embeds": False, "picture_channels": 0,
    "level_embeds": False, "text_mask": False, "conv_mlp": False,
}  # fmt: skip
NOT_IN_SHAPES = ("time_scale", "picture_channels", "text_mask")  # cannot be inferred from names and shapes
PREFIX = "model.diffusion_model."  # before the network's names in a single file
Naming: TypeAlias = Literal["diffusers", "original"]
Module = TypeVar("Module", bound=nn.Module)

# our layer: (its parts in diffusers, its parts in the single files)
OUTSIDE_BLOCKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "patch": (("pos_embed.proj",), ("x_embedder.proj",)),
    "context": (("context_embedder",), ("context_embedder",)),
    "time.fc1": (("time_text_embed.timestep_embedder.linear_1",), ("t_embedder.mlp.0",)),
    "time.fc2": (("time_text_embed.timestep_embedder.linear_2",), ("t_embedder.mlp.2",)),
    "pooled.fc1": (("time_text_embed.text_embedder.linear_1",), ("y_embedder.mlp.0",)),
    "pooled.fc2": (("time_text_embed.text_embedder.linear_2",), ("y_embedder.mlp.2",)),
    "span.fc1": (("time_text_embed.span_embedder.linear_1",), ("span_embedder.mlp.0",)),
    "span.fc2": (("time_text_embed.span_embedder.linear_2",), ("span_embedder.mlp.2",)),
    "guidance.fc1": (("time_text_embed.guidance_embedder.linear_1",), ("guidance_embedder.mlp.0",)),
    "guidance.fc2": (("time_text_embed.guidance_embedder.linear_2",), ("guidance_embedder.mlp.2",)),
    "level.fc1": (("time_text_embed.level_embedder.linear_1",), ("level_embedder.mlp.0",)),
    "level.fc2": (("time_text_embed.level_embedder.linear_2",), ("level_embedder.mlp.2",)),
    "final.modulation": (("norm_out.linear",), ("final_layer.adaLN_modulation.1",)),
    "final.linear": (("proj_out",), ("final_layer.linear",)),
}
IN_BLOCK: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "modulation": (
        ("norm1.linear", "norm1_context.linear"),
        ("x_block.adaLN_modulation.1", "context_block.adaLN_modulation.1"),
    ),
    "image.qkv": (("attn.to_q", "attn.to_k", "attn.to_v"), ("x_block.attn.qkv",)),
    "image.norm_q": (("attn.norm_q",), ("x_block.attn.ln_q",)),
    "image.norm_k": (("attn.norm_k",), ("x_block.attn.ln_k",)),
    "image.proj": (("attn.to_out.0",), ("x_block.attn.proj",)),
    "image.mlp.fc1": (("ff.net.0.proj",), ("x_block.mlp.fc1",)),
    "image.mlp.fc2": (("ff.net.2",), ("x_block.mlp.fc2",)),
    "image.mlp.conv1": (("ff.conv1",), ("x_block.mlp.conv1",)),
    "image.mlp.conv2": (("ff.conv2",), ("x_block.mlp.conv2",)),
    "text.qkv": (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), ("context_block.attn.qkv",)),
    "text.norm_q": (("attn.norm_added_q",), ("context_block.attn.ln_q",)),
    "text.norm_k": (("attn.norm_added_k",), ("context_block.attn.ln_k",)),
    "text.proj": (("attn.to_add_out",), ("context_block.attn.proj",)),
    "text.mlp.fc1": (("ff_context.net.0.proj",), ("context_block.mlp.fc1",)),
    "text.mlp.fc2": (("ff_context.net.2",), ("context_block.mlp.fc2",)),
    "dual.qkv": (("attn2.to_q", "attn2.to_k", "attn2.to_v"), ("x_block.attn2.qkv",)),
    "dual.norm_q": (("attn2.norm_q",), ("x_block.attn2.ln_q",)),
    "dual.norm_k": (("attn2.norm_k",), ("x_block.attn2.ln_k",)),
    "dual.proj": (("attn2.to_out.0",), ("x_block.attn2.proj",)),
}


class Piece(NamedTuple):
    """A tensor in diffusers or in a single file."""

    name: str
    shape: tuple[int, ...]
    swapped: bool = False  # it holds (scale, shift), ours (shift, scale)


class Part(NamedTuple):
    """A layer in diffusers or in a single file, which holds some rows of one of our layers."""

    name: str
    rows: int
    swapped: bool


def parts(network: MMDiT, module: str, rows: int, naming: Naming) -> list[Part]:
    """The layers that make up one of our layers in another naming, in order.

    Args:
        network: the network that has the layer.
        module: the name of our layer, one with weights.
        rows: outputs of that layer.
        naming: the other naming.
    """
    column = 0 if naming == "diffusers" else 1
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if not block:
        names, prefix, sizes = OUTSIDE_BLOCKS[module][column], "", [rows]
    else:
        names = IN_BLOCK[block[2]][column]
        prefix = f"{('transformer_blocks', 'joint_blocks')[column]}.{block[1]}."
        sizes = [rows // len(names)] * len(names)
        if block[2] == "modulation":
            sizes = [part * network.width for part in cast(JointBlock, network.blocks[int(block[1])]).parts]
    two_vectors = naming == "diffusers" and module.endswith("modulation")  # diffusers: (scale, shift)
    return [
        Part(prefix + name, size, two_vectors and size == 2 * network.width)
        for name, size in zip(names, sizes, strict=True)
    ]


def layout(network: MMDiT, naming: Naming) -> dict[str, list[Piece]]:
    """Our names → the tensors of each in another naming, in order. The network may be on the meta device."""
    table = {}
    for ours, tensor in network.state_dict().items():
        module, _, kind = ours.rpartition(".")
        if ours == "positions":
            name = "pos_embed.pos_embed" if naming == "diffusers" else "pos_embed"
            table[ours] = [Piece(name, (1, network.pos_embed_max_size**2, network.width))]
            continue
        tail = tuple(tensor.shape[1:])
        if ours == "patch.weight":  # a convolution in diffusers and the single files
            tail = (network.in_channels + network.picture_channels, network.patch_size, network.patch_size)
        table[ours] = [
            Piece(f"{name}.{kind}", (rows, *tail), swapped)
            for name, rows, swapped in parts(network, module, len(tensor), naming)
        ]
    return table


def export(network: MMDiT, naming: Naming, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Our tensors under the names of diffusers or the single files. Bit-exact; views, except where halves are swapped.

    Args:
        network: the network to convert.
        naming: the naming to use; names of the single files are without `PREFIX`.
        state: other tensors under our names, such as gradients; none means the network's weights.
    """
    return pieces(network.state_dict() if state is None else state, layout(network, naming))


def pieces(state: Mapping[str, Tensor], table: Mapping[str, list[Piece]]) -> dict[str, Tensor]:
    """Our tensors under the names of a table such as `layout` returns."""
    theirs = {}
    for ours, there in table.items():
        parts = state[ours].detach().flatten().split([math.prod(piece.shape) for piece in there])
        for piece, part in zip(there, parts, strict=True):
            tensor = part.reshape(piece.shape)
            theirs[piece.name] = swap(tensor) if piece.swapped else tensor
    return theirs


def fill(
    network: Module, weights: Weights, table: Mapping[str, list[Piece]], dtype: torch.dtype, device: torch.device | str
) -> Module:
    """Fills a network on the meta device from a table as `layout` returns. Each tensor is read directly into its place.

    Raises:
        ValueError: names every missing, left-over or mis-shaped tensor, before anything is read.
    """
    check_tensors(weights, {p.name: p.shape for there in table.values() for p in there}, "this network's config")
    state = {}
    for ours, tensor in network.state_dict().items():
        state[ours] = torch.empty(tensor.shape, dtype=dtype, device=device)
        places = state[ours].flatten().split([math.prod(piece.shape) for piece in table[ours]])
        for piece, place in zip(table[ours], places, strict=True):
            source = weights[piece.name]
            place.copy_((swap(source) if piece.swapped else source).flatten())
    network.load_state_dict(state, assign=True)
    return network.eval()


def infer(weights: Weights) -> tuple[Naming, dict[str, Any]]:
    """The naming and `MMDiT`'s arguments, inferred from names and shapes.

    Without a q/k norm the heads are taken to have 64 channels, as in all released models. The size of the training
    pictures cannot be inferred; it is MMDiT's default, or less if the positional table is smaller.

    Raises:
        ValueError: the weights are not those of an SD3 transformer. The message guesses what they are.
    """
    naming: Naming = "diffusers" if "pos_embed.pos_embed" in weights else "original"
    column = 0 if naming == "diffusers" else 1
    blocks = ("transformer_blocks", "joint_blocks")[column]
    numbers = [int(found[1]) for name in weights if (found := re.match(rf"{blocks}\.(\d+)\.", name))]

    def shape(ours: str, block: int | None = None) -> tuple[int, ...] | None:
        names = OUTSIDE_BLOCKS[ours] if block is None else IN_BLOCK[ours]
        name = f"{'' if block is None else f'{blocks}.{block}.'}{names[column][0]}.weight"
        return weights.shape(name) if name in weights else None

    patch, positions = shape("patch"), ("pos_embed.pos_embed", "pos_embed")[column]
    text, pooled, final = shape("context"), shape("pooled.fc1"), shape("final.linear")
    whole = numbers and max(numbers) < len(weights)
    if not (whole and patch and len(patch) == 4 and text and pooled and final and positions in weights):
        raise ValueError(f"{weights.source} holds no SD3 transformer{_guess(weights)}")
    depth, width, size = max(numbers) + 1, patch[0], patch[2]
    norm = shape("image.norm_k", block=0)
    table = math.isqrt(weights.shape(positions)[1])
    return naming, {
        "in_channels": patch[1],
        "patch_size": size,
        "depth": depth,
        "width": width,
        "heads": width // norm[0] if norm else max(width // 64, 1),
        "text_dim": text[1],
        "pooled_dim": pooled[1],
        "qk_norm": norm is not None,
        "sample_size": min(128, table * size),
        "pos_embed_max_size": table,
        "out_channels": final[0] // size**2,
        "dual_attention_layers": tuple(i for i in range(depth) if shape("dual.qkv", block=i)),
        "two_times": shape("span.fc1") is not None,
        "guidance_embeds": shape("guidance.fc1") is not None,
        "level_embeds": shape("level.fc1") is not None,
        "conv_mlp": shape("image.mlp.conv1", block=0) is not None,
    }


def load(
    path: str | os.PathLike[str],
    dtype: DType = "float32",
    device: torch.device | str = "cpu",
    two_times: bool = False,
    guidance_embeds: bool = False,
    picture_channels: int = 0,
    level_embeds: bool = False,
    text_mask: bool = False,
    grown_pooled_dim: int = 0,
) -> MMDiT:
    """Reads a transformer, ours or a released one, tensor by tensor: peak memory is that of the network.

    Args:
        path: a transformer's folder (`config.json` and safetensors, whole or sharded), a model folder with
            `transformer/` inside, a run's folder, or a single safetensors file, with or without the other parts of the
            model.
        dtype: of the weights in memory.
        device: where they go.
        two_times: adds an input for the end of a step, if the network has none.
        guidance_embeds: likewise adds an input for the guidance scale.
        picture_channels: likewise adds an input for a picture with this many channels.
        level_embeds: likewise adds an input for the noise level of that picture.
        text_mask: masks padding from now on.
        grown_pooled_dim: lengthens the pooled vector to so many numbers, for image embeddings or sizes and crops.

    Raises:
        FileNotFoundError, ValueError: in one line, if a file is missing, truncated, of another kind or does not fit.
            The network is loaded whole or not at all.
    """
    path = Path(path)
    if path.is_dir():
        places = (path / "transformer", path / "model" / "transformer")
        folder = next((place for place in places if place.is_dir()), path)
        naming: Naming = "diffusers"
        if folder != path:
            verify(folder.parent, folder.name)
        arguments = arguments_of(read_json(folder / CONFIG), folder / CONFIG)
        weights = open_folder(folder, STEM)
    else:
        whole = open_file(path)
        weights = whole.under(PREFIX) or whole
        naming, arguments = infer(weights)
    try:
        with torch.device("meta"):
            network = MMDiT(**arguments)
    except (TypeError, RuntimeError) as error:  # the latter for sizes beyond 64 bits
        raise ValueError(f"{path} describes no network that could be built: {error}") from None
    network = fill(network, weights, layout(network, naming), dtype_of(dtype), device)
    network.grow(two_times, guidance_embeds, picture_channels, level_embeds, text_mask, grown_pooled_dim)
    return network.to(device, dtype_of(dtype)).eval()


def extensions(network: MMDiT) -> dict[str, Any]:
    """The arguments of `MMDiT` that diffusers' class does not support; empty if diffusers can read the network."""
    return {name: getattr(network, name) for name, default in EXTENSIONS.items() if getattr(network, name) != default}


def config(network: MMDiT) -> dict[str, Any]:
    """The network's shape as diffusers' `SD3Transformer2DModel` names it, with extensions in our names.

    With extensions it names our class, which diffusers' `AutoModel` refuses.
    """
    extra = extensions(network)
    return {
        "_class_name": OUR_CLASS if extra else DIFFUSERS_CLASS,
        "sample_size": network.sample_size,
        "patch_size": network.patch_size,
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "num_layers": network.depth,
        "num_attention_heads": network.heads,
        "attention_head_dim": network.width // network.heads,
        "joint_attention_dim": network.text_dim,
        "caption_projection_dim": network.width,
        "pooled_projection_dim": network.pooled_dim,
        "pos_embed_max_size": network.pos_embed_max_size,
        "dual_attention_layers": list(network.dual_attention_layers),
        "qk_norm": "rms_norm" if network.qk_norm else None,
        **extra,
    }


def save(network: MMDiT, folder: Path) -> None:
    """Writes config and weights so that `SD3Transformer2DModel.from_pretrained` reads them. OSError on failure."""
    commit_json(folder / CONFIG, config(network))
    write_tensors(export(network, "diffusers"), folder / f"{STEM}.safetensors")


def single_file(network: MMDiT) -> dict[str, Tensor]:
    """The network's tensors as a released single file names them.

    Raises:
        ValueError: a network read from the file would differ.
    """
    if lost := {name: value for name, value in extensions(network).items() if name in NOT_IN_SHAPES}:
        named = ", ".join(f"{name} {value:g}" for name, value in lost.items())
        raise ValueError(f"a single file cannot store {named}: write a folder")
    if not network.qk_norm and network.heads != max(network.width // 64, 1):
        raise ValueError(
            f"a single file cannot hold a network without qk_norm whose heads have "
            f"{network.width // network.heads} channels: readers assume 64; write a folder"
        )
    return {PREFIX + name: tensor for name, tensor in export(network, "original").items()}


def arguments_of(
    config: Mapping[str, Any], file: Path, kinds: Collection[str] = (DIFFUSERS_CLASS, OUR_CLASS)
) -> dict[str, Any]:
    """`MMDiT`'s arguments from diffusers' config of one of these classes, read from a file that errors name."""

    def checked(name: str, value: Any, kind: type) -> Any:
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or not 0 <= value < 2**31:
            raise ValueError(f"{file} has a value of the wrong type: {name} {value!r:.80} is no {kind.__name__} >= 0")
        return value

    def size(name: str) -> int:
        return checked(name, config[name], int)

    if config.get("_class_name") not in kinds:
        raise ValueError(f"{file} describes a {config.get('_class_name')!s:.80}, not an {next(iter(kinds))}")
    if config.get("qk_norm") not in (None, "rms_norm"):
        raise ValueError(f"{file} has qk_norm {config['qk_norm']!r:.80}: use null or 'rms_norm'")
    try:
        width = size("num_attention_heads") * size("attention_head_dim")
        if config.get("caption_projection_dim", width) != width:
            raise ValueError(f"{file}: caption_projection_dim must be heads × head dim, {width}")
        if size("num_layers") > MOST["num_layers"]:
            raise ValueError(f"{file}: num_layers must be at most {MOST['num_layers']}, got {config['num_layers']}")
        dual = config.get("dual_attention_layers") or ()
        if not isinstance(dual, list | tuple):
            raise ValueError(f"{file} has a value of the wrong type: dual_attention_layers {dual!r:.80} is no list")
        return {
            "in_channels": size("in_channels"),
            "patch_size": size("patch_size"),
            "depth": size("num_layers"),
            "width": width,
            "heads": size("num_attention_heads"),
            "text_dim": size("joint_attention_dim"),
            "pooled_dim": size("pooled_projection_dim"),
            "qk_norm": config.get("qk_norm") == "rms_norm",
            "sample_size": size("sample_size"),
            "pos_embed_max_size": size("pos_embed_max_size"),
            "out_channels": None if config.get("out_channels") is None else size("out_channels"),
            "dual_attention_layers": tuple(checked("dual_attention_layers", i, int) for i in dual),
            **{name: checked(name, config.get(name, d), type(d)) for name, d in EXTENSIONS.items()},
        }
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}; is it an SD3 transformer?") from None


def _guess(weights: Weights) -> str:
    """What a file of another kind seems to be, for the message."""
    for start, kind in (
        ("double_blocks.", "Flux"),
        ("single_transformer_blocks.", "Flux"),
        ("input_blocks.", "a Stable Diffusion 1, 2 or XL UNet"),
        ("down_blocks.", "a UNet or VAE of diffusers"),
        ("lora_", "a LoRA in a layout that is not diffusers'"),
        ("transformer.", "a LoRA, which goes on top of a model: give it as --lora"),
    ):
        if any(name.startswith(start) for name in weights):
            return f"; it seems to be {kind}"
    return f": its tensors are {shorten(sorted(weights)[:3])}, …" if weights else ": it is empty"


def swap(tensor: Tensor) -> Tensor:
    """Exchanges the first and second half of the rows."""
    return torch.roll(tensor, len(tensor) // 2, dims=0)
