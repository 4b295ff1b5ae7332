"""Names: our parameters ↔ those of diffusers' `SD3Transformer2DModel`, and the transformer's folder on disk.

Every tensor of ours is one or more of theirs laid end to end, so a table of names and shapes is the whole mapping.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from mmdit.model import TIME_FEATURES, MMDiT

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
State = dict[str, Tensor]


class Piece(NamedTuple):
    """One of their tensors."""

    name: str
    shape: tuple[int, ...]
    swapped: bool = False  # they keep (scale, shift) where we keep (shift, scale)


def layout(network: MMDiT) -> dict[str, list[Piece]]:
    """For each of our names, their tensors that make it up, in order."""
    width, patch, head = network.width, network.patch_size, network.width // network.heads
    table: dict[str, list[Piece]] = {
        "patch.weight": [Piece("pos_embed.proj.weight", (width, network.in_channels, patch, patch))],
        "patch.bias": [Piece("pos_embed.proj.bias", (width,))],
        "positions": [Piece("pos_embed.pos_embed", (1, network.pos_embed_max_size**2, width))],
    }

    def linear(ours: str, *theirs: tuple[str, int], inputs: int = width, swapped: int | None = None) -> None:
        """Stacked linear layers: their names and output sizes; `swapped` is the index of one with swapped halves."""
        for kind, tail in (("weight", (inputs,)), ("bias", ())):
            table[f"{ours}.{kind}"] = [
                Piece(f"{name}.{kind}", (rows, *tail), i == swapped) for i, (name, rows) in enumerate(theirs)
            ]

    linear("context", ("context_embedder", width), inputs=network.text_dim)
    for ours, theirs, inputs in (("time", "timestep", TIME_FEATURES), ("pooled", "text", network.pooled_dim)):
        linear(f"{ours}.fc1", (f"time_text_embed.{theirs}_embedder.linear_1", width), inputs=inputs)
        linear(f"{ours}.fc2", (f"time_text_embed.{theirs}_embedder.linear_2", width))
    for i in range(network.depth):
        last = i == network.depth - 1
        we, they = f"blocks.{i}", f"transformer_blocks.{i}"
        linear(
            f"{we}.modulation",
            (f"{they}.norm1.linear", 6 * width),
            (f"{they}.norm1_context.linear", (2 if last else 6) * width),
            swapped=1 if last else None,
        )
        for stream, qkv, norms, out, mlp in (
            ("image", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
            ("text", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out",
             "ff_context"),
        ):  # fmt: skip
            linear(f"{we}.{stream}.qkv", *((f"{they}.attn.{name}", width) for name in qkv))
            if network.qk_norm:
                for norm, name in zip(("norm_q", "norm_k"), norms, strict=True):
                    table[f"{we}.{stream}.{norm}.weight"] = [Piece(f"{they}.attn.{name}.weight", (head,))]
            if stream == "image" or not last:
                linear(f"{we}.{stream}.proj", (f"{they}.attn.{out}", width))
                linear(f"{we}.{stream}.mlp.fc1", (f"{they}.{mlp}.net.0.proj", 4 * width))
                linear(f"{we}.{stream}.mlp.fc2", (f"{they}.{mlp}.net.2", width), inputs=4 * width)
    linear("final.modulation", ("norm_out.linear", 2 * width), swapped=0)
    linear("final.linear", ("proj_out", patch**2 * network.out_channels))
    return table


def to_diffusers(network: MMDiT, state: State) -> State:
    """Our state dict under their names. Bit-exact; the tensors are new."""
    theirs: State = {}
    for ours, pieces in layout(network).items():
        parts = state[ours].flatten().split([math.prod(piece.shape) for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            theirs[piece.name] = (
                _swap(part.reshape(piece.shape)) if piece.swapped else part.reshape(piece.shape).clone()
            )
    return theirs


def from_diffusers(network: MMDiT, state: State) -> State:
    """Their state dict under our names. Bit-exact; the tensors are new.

    Raises:
        ValueError: naming every missing, left-over or mis-shaped tensor.
    """
    table = layout(network)
    shapes = {piece.name: piece.shape for pieces in table.values() for piece in pieces}
    faults = {
        "missing": sorted(shapes.keys() - state.keys()),
        "left over": sorted(state.keys() - shapes.keys()),
        "mis-shaped": [
            f"{name} {tuple(state[name].shape)} instead of {shape}"
            for name, shape in sorted(shapes.items())
            if name in state and state[name].shape != shape
        ],
    }
    if any(faults.values()):
        told = (f"{len(names)} {fault} ({_few(names)})" for fault, names in faults.items() if names)
        raise ValueError(f"the weights do not fit this transformer's config: {', '.join(told)}")
    ours = network.state_dict()
    return {
        name: torch.cat([(_swap(state[p.name]) if p.swapped else state[p.name]).flatten() for p in pieces]).reshape(
            ours[name].shape
        )
        for name, pieces in table.items()
    }


def save(network: MMDiT, folder: Path) -> None:
    """Writes config and weights so that `SD3Transformer2DModel.from_pretrained` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "_class_name": "SD3Transformer2DModel",
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
        "dual_attention_layers": [],
        "qk_norm": "rms_norm" if network.qk_norm else None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    # Not save_file: it hides a full disk in an error of its own and makes a file that only its owner can read.
    (folder / WEIGHTS).write_bytes(serialize(to_diffusers(network, state), metadata={"format": "pt"}))


def load(folder: Path) -> MMDiT:
    """Reads a transformer folder, ours or one that diffusers wrote.

    Raises:
        ValueError: if a file is missing, truncated or foreign, or names or shapes do not fit. Nothing is half-loaded.
    """
    config = _read_config(folder / CONFIG)
    try:
        network = MMDiT(
            in_channels=config["in_channels"],
            patch_size=config["patch_size"],
            depth=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            heads=config["num_attention_heads"],
            text_dim=config["joint_attention_dim"],
            pooled_dim=config["pooled_projection_dim"],
            qk_norm=config.get("qk_norm") == "rms_norm",
            sample_size=config["sample_size"],
            pos_embed_max_size=config["pos_embed_max_size"],
            out_channels=config.get("out_channels"),
        )
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG} has a value of the wrong type: {error}") from None
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} lacks {error}; is it an SD3 transformer?") from None
    try:
        state = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ValueError(f"no weights at {folder / WEIGHTS}") from None
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is truncated or no safetensors file: {error}") from None
    try:
        network.load_state_dict(from_diffusers(network, state))
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from None
    return network.eval()


def _read_config(file: Path) -> dict:
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"no transformer config at {file}") from None
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object")
    if config.get("_class_name") != "SD3Transformer2DModel":
        raise ValueError(f"{file} describes a {config.get('_class_name')}, not an SD3Transformer2DModel")
    if config.get("dual_attention_layers"):
        raise ValueError(f"{file} asks for dual attention layers, which this network does not have")
    return config


def _swap(tensor: Tensor) -> Tensor:
    return torch.roll(tensor, len(tensor) // 2, dims=0)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
