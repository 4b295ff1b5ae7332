"""Updates of layers in files of any tool: LoRA, LoHa, LoKr, DoRA, and differences of weights and biases.

A tool names a tensor by a layer and a kind: `lora_unet_joint_blocks_0_x_block_attn_proj.alpha`. `TENSORS` has the
kinds. What the layers are called is known by those who have them, networks and text encoders: each is a `Receiver`.
Every tensor of a file must be understood by one of them.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from storage.checksums import verify
from storage.text import read_json
from storage.weights import Weights, digest, open_file, shorten

FILE, CONFIG = "pytorch_lora_weights.safetensors", "adapter_config.json"
FILES = (FILE, "adapter_model.safetensors")  # of diffusers and of PEFT
TENSORS = {  # end of a name → what the tensor is
    **{f"{side}.weight": "down" for side in ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down")},
    **{f"{side}.weight": "up" for side in ("lora_B", "lora_up", "lora.up", "lora_linear_layer.up")},
    "alpha": "alpha", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "diff": "diff", "w_norm": "diff", "diff_b": "bias", "b_norm": "bias",
    "lora_B.bias": "up_bias",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
}  # fmt: skip
KINDS = [  # the tensors of an update of a weight, without alpha and magnitude; beside each may be a bias
    {"down", "up"},
    {"down", "up", "up_bias"},
    {"diff"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
]
RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # the rows of the first of these are the rank


class Update(NamedTuple):
    """An update of some rows of a layer: of its weight W, its bias, or both.

    Attributes:
        rows: the rows.
        tensors: kind → tensor, float32. ΔW is computed when it is needed; until then its factors are in memory.
        scale: s, the factor of a product.
        ordered: puts rows of the file into the order of the layer's.
    """

    rows: slice
    tensors: Mapping[str, Tensor]
    scale: float
    ordered: Callable[[Tensor], Tensor] | None = None

    def applied(self, name: str, value: Tensor, strength: float) -> Tensor:
        """The rows of the layer's "weight" or "bias", float32, with so much of the update: W + strength·(W' − W).

        With the magnitude m of a DoRA, W' = m·(W + ΔW)/|W + ΔW| (Liu et al. 2024, eq. 5). The norm is over the
        dimension in which m has length 1. Without it W' = W + ΔW.
        """
        delta = self.bias() if name == "bias" else self.weight()
        if delta is None:
            return value
        delta = delta.to(value.device).reshape(value.shape)
        if name == "weight" and "magnitude" in self.tensors:
            magnitude = self.magnitude(value.shape).to(value.device)
            whole = value + delta
            delta = magnitude * whole / whole.norm(dim=magnitude.shape.index(1), keepdim=True) - value
        return value + strength * delta

    def weight(self) -> Tensor | None:
        """ΔW, (rows, inputs) or as the convolution is, None if it is zero. RuntimeError if the tensors do not fit."""
        tensors, delta = self.tensors, None
        if "diff" in tensors:
            delta = tensors["diff"]
        elif "down" in tensors:
            delta = torch.tensordot(self.scale * tensors["up"].flatten(1), tensors["down"], dims=1)
        elif "hada_w1_a" in tensors:  # LoHa: Hyeon-Woo et al. 2022, "FedPara", proposition 1
            one, two = (tensors[f"hada_{w}_a"] @ tensors[f"hada_{w}_b"] for w in ("w1", "w2"))
            delta = self.scale * one * two
        elif {"lokr_w1", "lokr_w1_a"} & tensors.keys():  # LoKr: Yeh et al. 2024, "LyCORIS", §3.2
            one, two = (
                tensors[f"lokr_{w}"] if f"lokr_{w}" in tensors else tensors[f"lokr_{w}_a"] @ tensors[f"lokr_{w}_b"]
                for w in ("w1", "w2")
            )
            delta = torch.kron(one, two) * self.scale
        return delta if delta is None else self._ours(delta)

    def bias(self) -> Tensor | None:
        """The bias's difference, (rows,); None if it is zero. That of PEFT's B is scaled, a plain one is not."""
        factors = {"up_bias": self.scale, "bias": 1.0}
        found = [factor * self.tensors[kind] for kind, factor in factors.items() if kind in self.tensors]
        return self._ours(torch.stack(found).sum(0)) if found else None

    def magnitude(self, shape: Sequence[int]) -> Tensor:
        """m of a DoRA of (rows, inputs), as (rows, 1) or (1, inputs). ValueError if it is neither."""
        found = self.tensors["magnitude"]
        found = found[:, None] if found.dim() == 1 else found
        if len(shape) != 2 or tuple(found.shape) not in ((shape[0], 1), (1, shape[1])):
            raise ValueError(f"{tuple(found.shape)} is not a magnitude of {tuple(shape)}")
        return self._ours(found) if len(found) == shape[0] else found

    def _ours(self, tensor: Tensor) -> Tensor:
        return self.ordered(tensor) if self.ordered else tensor


Updates = dict[str, list[tuple[Update, float]]]  # module → updates in their order, with strengths


class Place(NamedTuple):
    """Where the update of a layer in a file goes.

    Attributes:
        name: the layer in the file.
        layer: the same without the tool's prefix, as PEFT's settings name it.
        module: the module that it is a part of.
        rows: these of its rows.
        shape: of these rows of the weight, as the file has it.
        bias: the module has a bias.
        ordered: as of `Update`.
    """

    name: str
    layer: str
    module: str
    rows: slice
    shape: tuple[int, ...]
    bias: bool
    ordered: Callable[[Tensor], Tensor] | None = None


class Receiver(NamedTuple):
    """What takes updates: a network, or a text encoder.

    Attributes:
        title: for messages.
        component: the start of its settings in diffusers' metadata, such as `transformer.`.
        places: where updates may go, under the names of all tools; none for what this model does not have.
        take: takes all updates for it; those that it has stay.
        prefixes: the starts of its layers' names, by which what is absent is recognised.
    """

    title: str
    component: str
    places: Sequence[Place]
    take: Callable[[Updates], None]
    prefixes: tuple[str, ...] = ()


class Adapter(NamedTuple):
    """A file of updates, or its folder, and how much of them is added."""

    path: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Adapter":
        """PATH or PATH:STRENGTH. ValueError in one line if the strength is no finite number."""
        path, colon, number = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(Path(text))
        try:
            strength = float(number)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            raise ValueError(
                f"{text} is neither a file nor PATH:STRENGTH: after the colon stands a number, such as 0.8"
            )
        return cls(Path(path), strength)


def holds(folder: Path) -> bool:
    """Whether a folder is one of an adapter."""
    return any((folder / name).is_file() for name in FILES)


def find(path: Path) -> Path:
    """The file of an adapter, given the file or its folder. FileNotFoundError if there is none."""
    for file in (path, *(path / name for name in FILES), path / "lora" / FILE):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{path} is not a LoRA: give a safetensors file or a folder with {FILES[0]} or {FILES[1]}")


def opened(path: Path) -> tuple[Weights, dict[str, Any]]:
    """The tensors of an adapter, given the file or its folder, and PEFT's settings in adapter_config.json beside it.

    Only the file that PEFT itself writes has its settings there. FileNotFoundError or ValueError in one line.
    """
    file = find(path)
    verify(file.parent, file.name)
    config = file.with_name(CONFIG)
    settings = dict(read_json(config)) if file.name == FILES[1] and config.is_file() else {}
    return open_file(file, unwrap=False), settings


def merge(
    adapters: Sequence[Adapter], receivers: Sequence[Receiver], guess: Callable[[set[str]], str] = lambda left: ""
) -> None:
    """Gives each receiver the updates in files, one file after the other.

    Updates of what the model does not have are left out with a warning: they would change nothing.

    Args:
        adapters: the files.
        receivers: all that may be updated, also what this model does not have.
        guess: names that no receiver knows → what they may belong to, as the end of a sentence.

    Raises:
        FileNotFoundError, ValueError: in one line that names all that does not fit, before anything is changed.
    """
    given: list[Updates] = [{} for _ in receivers]
    for adapter in adapters:
        weights, settings = opened(adapter.path)
        found = [read(weights, settings, receiver) for receiver in receivers]
        left = set(weights).difference(*(one.keys for one in found))
        strange = {receiver.title: {key for key in left if key.startswith(receiver.prefixes)}
                   for receiver in receivers if not receiver.places}  # fmt: skip
        absent = " and ".join(title for title, keys in strange.items() if keys)
        left = left.difference(*strange.values())
        misfits = [fault for one in found for fault in one.misfits]
        problems = [f"{len(left)} left over ({shorten(sorted(left))})"] * bool(left)
        problems += [f"{len(misfits)} damaged ({shorten(misfits)})"] * bool(misfits)
        if not problems and not any(one.updates for one in found):
            problems = [f"it updates {absent} alone, which this model does not have" if absent else "it is empty"]
        if problems:
            raise ValueError(f"{weights.source} is not a LoRA of this model: {', '.join(problems)}{guess(left)}")
        if absent:
            missing = f"{weights.source} also updates {absent}, which this model does not have: that part does nothing"
            warnings.warn(missing, stacklevel=2)
        for one, updates in zip(found, given, strict=True):
            for module, update in one.updates:
                updates.setdefault(module, []).append((update, adapter.strength))
    for receiver, updates in zip(receivers, given, strict=True):
        if updates:
            receiver.take(updates)


class Found(NamedTuple):
    """What a file has for a receiver."""

    updates: list[tuple[str, Update]]  # module and its update
    keys: set[str]  # their tensors
    misfits: list[str]  # what is damaged


def read(weights: Weights, settings: Mapping[str, Any], receiver: Receiver) -> Found:
    """The updates in a file for a receiver; ValueError if the file's settings are broken.

    Args:
        weights: the file.
        settings: PEFT's settings from outside the file.
        receiver: who may be updated.
    """
    scale, layers, found = Scale(weights, settings, receiver.component), by_layer(weights), Found([], set(), [])
    for place in receiver.places:
        keys = layers.get(place.name, {})
        if not _whole(set(keys)):
            continue
        found.keys.update(keys.values())
        tensors = {kind: weights[key].float() for kind, key in keys.items()}
        try:
            update = _update(place, tensors, scale)
        except (RuntimeError, ValueError, TypeError, ArithmeticError):  # also of tensors without dimensions or rows
            found.misfits.append(" and ".join(f"{key} {weights.shape(key)}" for key in keys.values()))
            continue
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            found.misfits.append(f"{place.name} is not finite")
        if scale.settings.get("use_dora") and "magnitude" not in tensors:
            found.misfits.append(f"{place.name} is a DoRA without its magnitude")
        found.updates.append((place.module, update))
    return found


def by_layer(weights: Weights) -> dict[str, dict[str, str]]:
    """Name of a layer in the file → kind of tensor → name of the tensor, of all that have a known end."""
    found: dict[str, dict[str, str]] = {}
    for key in weights:
        for end, kind in TENSORS.items():
            if key.endswith(f".{end}"):
                found.setdefault(key[: -len(end) - 1], {})[kind] = key
                break
    return found


def _whole(kinds: set[str]) -> bool:
    """Whether these tensors make up an update. PEFT has no DoRA with a bias of B."""
    if {"up_bias", "magnitude"} <= kinds:
        return False
    return kinds - {"alpha", "magnitude", "bias"} in KINDS or kinds == {"bias"}


def _update(place: Place, tensors: Mapping[str, Tensor], scale: "Scale") -> Update:
    """The update that the tensors are; RuntimeError, ValueError, TypeError or ArithmeticError if they do not fit."""
    rank = next((len(tensors[kind]) for kind in RANKED if kind in tensors), None)
    factor = scale(place.layer, tensors.get("alpha"), rank)
    update = Update(place.rows, {k: t for k, t in tensors.items() if k != "alpha"}, factor, place.ordered)
    shapes = update._replace(tensors={kind: tensor.to("meta") for kind, tensor in update.tensors.items()})
    weight, bias = shapes.weight(), shapes.bias()
    if weight is not None and weight.shape != place.shape:
        raise ValueError(f"{tuple(weight.shape)} is not {place.shape}")
    if bias is not None and (not place.bias or bias.shape != place.shape[:1]):
        raise ValueError(f"{tuple(bias.shape)} is no bias of {place.shape}")
    if "magnitude" in tensors:
        shapes.magnitude(place.shape)
    return update


def updated(name: str, value: Tensor, updates: Sequence[tuple[Update, float]]) -> Tensor:
    """A layer's "weight" or "bias" with its updates, one after the other, in float32."""
    value = value.to(torch.float32, copy=True)
    for update, strength in updates:
        value[update.rows] = update.applied(name, value[update.rows], strength)
    return value


def fingerprint(updates: Updates) -> str:
    """A hash of updates and their strengths."""
    content = [
        [module, update.rows.start, update.scale, strength, digest(update.tensors)]
        for module, given in sorted(updates.items())
        for update, strength in given
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Scale:
    """The factor s = alpha / rank of an update, or alpha / √rank (Kalajdzievski 2023, "rsLoRA").

    alpha is a tensor in the file, or in PEFT's settings in its metadata or beside it. Otherwise it is the rank.

    Args:
        weights: the file.
        settings: PEFT's settings from outside the file.
        component: the start of the settings' names in the metadata, which diffusers has for each part of a model.

    Raises:
        ValueError: the settings are broken.
    """

    def __init__(self, weights: Weights, settings: Mapping[str, Any], component: str) -> None:
        try:
            content = json.loads(weights.metadata.get("lora_adapter_metadata", "{}"))
            inside = {key.removeprefix(component): value for key, value in content.items() if value is not None}
            self.settings = dict(settings) | inside
            self.patterns = {
                str(key): float(alpha) for key, alpha in (self.settings.get("alpha_pattern") or {}).items()
            }
            alpha = self.settings.get("lora_alpha", self.settings.get("alpha"))  # the latter of LoHa and LoKr
            self.alpha = None if alpha is None else float(alpha)
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"{weights.source} has broken adapter metadata: save the LoRA again") from None

    def __call__(self, layer: str, tensor: Tensor | None, rank: int | None) -> float:
        """The factor.

        Args:
            layer: its name in the file, without the prefix.
            tensor: alpha in the file, if there is one.
            rank: of the update; None if its matrices are whole, which only PEFT scales.
        """
        if rank is None:
            rank = int(self.settings.get("r") or 0)
            if not rank:
                return 1.0
        alpha = float(rank) if self.alpha is None else self.alpha
        for pattern, value in self.patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                alpha = value
        if tensor is not None:
            alpha = float(tensor)
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
