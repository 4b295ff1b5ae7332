"""Updates of Stable Diffusion 3's text encoders in files of any tool (`storage.updates`): what the tools call them."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from storage.factors import named, read_factors
from storage.updates import Place, Receiver, Scale, Updates, by_layer
from storage.weights import Weights

CLIP = (  # the linear layers of a CLIP tower and of T5, with {} for the number of a block
    "text_projection",
    *(f"text_model.encoder.layers.{{}}.self_attn.{layer}_proj" for layer in ("q", "k", "v", "out")),
    *(f"text_model.encoder.layers.{{}}.mlp.{layer}" for layer in ("fc1", "fc2")),
)
T5 = (
    *(f"encoder.block.{{}}.layer.0.SelfAttention.{layer}" for layer in ("q", "k", "v", "o")),
    *(f"encoder.block.{{}}.layer.1.DenseReluDense.{layer}" for layer in ("wi_0", "wi_1", "wo")),
)


class Names(NamedTuple):
    """How tools call an encoder.

    Attributes:
        title: its name.
        diffusers: before its layers in diffusers' files, and before its settings in their metadata.
        single: before its layers in ComfyUI's files and in single files of models.
        kohya: before its layers in kohya's and OneTrainer's files, which have _ in the place of dots.
        layers: its linear layers.
    """

    title: str
    diffusers: str
    single: str
    kohya: str
    layers: tuple[str, ...]


ENCODERS = (
    Names("CLIP-L", "text_encoder.", "text_encoders.clip_l.transformer.", "lora_te1_", CLIP),
    Names("CLIP-G", "text_encoder_2.", "text_encoders.clip_g.transformer.", "lora_te2_", CLIP),
    Names("T5", "text_encoder_3.", "text_encoders.t5xxl.transformer.", "lora_te3_", T5),
)


def receiver(names: Names, shapes: Mapping[str, tuple[int, ...]], take: Callable[[Updates], None]) -> Receiver:
    """An encoder as what takes updates.

    Args:
        names: how tools call it.
        shapes: its parameters' names and shapes; none if the model does not have it.
        take: takes the updates.
    """
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    places = [
        Place(name, layer, layer, slice(shape[0]), shape, f"{layer}.bias" in shapes)
        for layer, shape in layers.items()
        for name in (names.diffusers + layer, names.single + layer, names.kohya + layer.replace(".", "_"))
    ]
    return Receiver(names.title, names.diffusers, places, take, (names.diffusers, names.single, names.kohya))


def convert(weights: Weights, to: str) -> tuple[dict[str, Tensor], set[str]]:
    """The LoRA of text encoders in a file under the names of another tool, and what it came from.

    Args:
        weights: the file.
        to: "kohya", or "diffusers" for names with dots.
    """
    state: dict[str, Tensor] = {}
    read: set[str] = set()
    for names in ENCODERS:
        scale = Scale(weights, {}, names.diffusers)
        for name, keys in by_layer(weights).items():
            layer = _layer(name, names)
            update = read_factors(weights, keys, layer, scale) if layer else None
            if layer and update:
                whole = names.kohya + layer.replace(".", "_") if to == "kohya" else names.diffusers + layer
                state |= named(whole, update, flat=to == "kohya")
                read.update(keys.values())
    return state, read


def _layer(name: str, names: Names) -> str | None:
    """The linear layer of an encoder that a name in a file means; None if it means none."""
    for prefix, dot in ((names.diffusers, "."), (names.single, "."), (names.kohya, "_")):
        for layer in names.layers if name.startswith(prefix) else ():
            pattern = re.escape(layer.replace(".", dot)).replace(r"\{\}", r"(\d+)")
            if match := re.fullmatch(pattern, name.removeprefix(prefix)):
                return layer.format(*match.groups())
    return None
