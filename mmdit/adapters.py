"""Updates of linear layers in files of any tool, merged into a network: LoRA, LoHa, LoKr, DoRA, differences.

A tool names a tensor by a prefix, a layer and a kind: `lora_unet_joint_blocks_0_x_block_attn_proj.alpha`. `DIALECTS`
has the prefixes and how layers are written, `TENSORS` the kinds. Every tensor of a file must be understood.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit import lora
from mmdit.checkpoint import Naming, Part, parts, swap
from mmdit.model import MMDiT
from storage.checksums import verify
from storage.text import read_json
from storage.weights import Weights, open_file, shorten

FILES = (lora.FILE, "adapter_model.safetensors")  # of diffusers and of PEFT


class Dialect(NamedTuple):
    """How a tool names a layer: a prefix and the name in a naming; flat names have _ in the place of dots."""

    prefix: str
    naming: Naming
    flat: bool


DIALECTS = {
    "diffusers": Dialect("transformer.", "diffusers", flat=False),
    "PEFT": Dialect("base_model.model.", "diffusers", flat=False),
    "kohya": Dialect("lora_unet_", "original", flat=True),
    "ComfyUI": Dialect("diffusion_model.", "original", flat=False),
    "OneTrainer": Dialect("lora_transformer_", "diffusers", flat=True),
    "LyCORIS": Dialect("lycoris_", "diffusers", flat=True),
}
TENSORS = {  # end of a name → what the tensor is
    "lora_A.weight": "down", "lora_down.weight": "down", "lora.down.weight": "down",
    "lora_B.weight": "up", "lora_up.weight": "up", "lora.up.weight": "up",
    "alpha": "alpha", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "diff": "diff",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
}  # fmt: skip
KINDS = [  # the tensors of an update, without alpha and magnitude
    {"down", "up"},
    {"diff"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
]
STRANGERS = {  # words in the names of other models' updates
    "double_blocks": "Flux", "single_transformer_blocks": "Flux", "single_blocks": "Flux",
    "down_blocks": "a UNet, such as SDXL", "input_blocks": "a UNet, such as SDXL", "mid_block": "a UNet, such as SDXL",
}  # fmt: skip
TEXT = ("lora_te", "text_encoder", "lora_prior_te")


class Update(NamedTuple):
    """An update of some rows of a layer's weight W.

    Attributes:
        rows: the rows.
        delta: gives ΔW, (rows, inputs) float32. Until then only its factors are in memory.
        magnitude: m of a DoRA, broadcast over W: W becomes m·(W + ΔW)/|W + ΔW| (Liu et al. 2024, eq. 5); none means
            W + ΔW. The norm is over the dimension in which m has length 1.
    """

    rows: slice
    delta: Callable[[], Tensor]
    magnitude: Tensor | None = None

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """The rows W (rows, inputs) float32 with so much of the update: W + strength·(W' − W)."""
        delta = self.delta().to(weight.device)
        if self.magnitude is not None:
            magnitude = self.magnitude.to(weight.device)
            whole = weight + delta
            delta = magnitude * whole / whole.norm(dim=magnitude.shape.index(1), keepdim=True) - weight
        return weight + strength * delta


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
    for file in (path, *(path / name for name in FILES), path / "lora" / lora.FILE):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{path} is not a LoRA: give a safetensors file or a folder with {FILES[0]} or {FILES[1]}")


@torch.no_grad()
def merge(network: MMDiT, adapters: Sequence[Adapter]) -> None:
    """Adds adapters, one after the other, to the network's weights. Sums are float32 and rounded once.

    Raises:
        FileNotFoundError, ValueError: in one line that names all that does not fit, before anything is changed.
    """
    files = [(read(network, *opened(adapter.path)), adapter.strength) for adapter in adapters]
    modules = dict(network.named_modules())
    for name in dict.fromkeys(name for updates, _ in files for name in updates):
        weight = modules[name].weight
        merged = weight.float()
        for updates, strength in files:
            for update in updates.get(name, ()):
                merged[update.rows] = update.applied(merged[update.rows], strength)
        weight.copy_(merged)


def opened(path: Path) -> tuple[Weights, dict[str, Any]]:
    """The tensors of an adapter, given the file or its folder, and PEFT's settings in adapter_config.json beside it.

    Only the file that PEFT itself writes has its settings there. FileNotFoundError or ValueError in one line.
    """
    file = find(path)
    verify(file.parent, file.name)
    config = file.with_name(lora.CONFIG)
    settings = dict(read_json(config)) if file.name == FILES[1] and config.is_file() else {}
    return open_file(file, unwrap=False), settings


def read(network: MMDiT, weights: Weights, settings: Mapping[str, Any] | None = None) -> dict[str, list[Update]]:
    """The updates of each layer.

    Args:
        network: whose layers they are.
        weights: the file.
        settings: PEFT's settings from outside the file.

    Raises:
        ValueError: the file holds anything but updates of this network's linear layers.
    """
    scale = Scale(weights, settings or {})
    found, left, misfits = by_layer(weights), set(weights), []
    updates: dict[str, list[Update]] = {}
    for ours, inputs, start, part, dialect, name in _places(network):
        keys = found.get(name)
        if not keys or set(keys) - {"alpha", "magnitude"} not in KINDS:
            continue
        left -= set(keys.values())
        tensors = {kind: weights[key].float() for kind, key in keys.items()}
        try:
            factor = partial(scale, name.removeprefix(DIALECTS[dialect].prefix), tensors.get("alpha"))
            delta = partial(_delta, tensors, factor, part.swapped)
            shape = _delta({kind: tensor.to("meta") for kind, tensor in tensors.items()}, factor).shape
            if shape != (part.rows, inputs):
                raise ValueError(f"{tuple(shape)} is not {(part.rows, inputs)}")
            magnitude = _magnitude(tensors.get("magnitude"), (part.rows, inputs))
        except (RuntimeError, ValueError):
            misfits.append(" and ".join(f"{key} {weights.shape(key)}" for key in keys.values()))
            continue
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            misfits.append(f"{name} is not finite")
        if scale.settings.get("use_dora") and magnitude is None:
            misfits.append(f"{name} is a DoRA without its magnitude")
        if part.swapped and magnitude is not None and len(magnitude) == part.rows:
            magnitude = swap(magnitude)
        updates.setdefault(ours, []).append(Update(slice(start, start + part.rows), delta, magnitude))
    if left or misfits or not updates:
        problems = [f"{len(left)} left over ({shorten(sorted(left))})"] * bool(left)
        problems += [f"{len(misfits)} damaged ({shorten(misfits)})"] * bool(misfits)
        raise ValueError(
            f"{weights.source} is not a LoRA of this network: {', '.join(problems) or 'it is empty'}{guess(left)}"
        )
    return updates


def by_layer(weights: Weights) -> dict[str, dict[str, str]]:
    """Name of a layer in the file → kind of tensor → name of the tensor, of all that have a known end."""
    found: dict[str, dict[str, str]] = {}
    for key in weights:
        for end, kind in TENSORS.items():
            if key.endswith(f".{end}"):
                found.setdefault(key[: -len(end) - 1], {})[kind] = key
                break
    return found


def _places(network: MMDiT) -> Iterator[tuple[str, int, int, Part, str, str]]:
    """Our layer, its inputs, first row, part of the layer, dialect and name there, for all of each."""
    for ours, module in network.named_modules():
        if not isinstance(module, nn.Linear) or ours == "patch":
            continue
        for dialect, (prefix, naming, flat) in DIALECTS.items():
            start = 0
            for part in parts(network, ours, module.out_features, naming):
                name = prefix + (part.name.replace(".", "_") if flat else part.name)
                yield ours, module.in_features, start, part, dialect, name
                start += part.rows


def _delta(tensors: Mapping[str, Tensor], scale: Callable[[int | None], float], swapped: bool = False) -> Tensor:
    """ΔW of an update, with its halves swapped if so asked. RuntimeError if the tensors do not fit.

    Args:
        tensors: kind → tensor, float32.
        scale: the factor s as a function of the rank.
        swapped: the file has scale before shift.
    """
    if "diff" in tensors:
        delta = tensors["diff"]
    elif "down" in tensors:
        delta = scale(len(tensors["down"])) * tensors["up"] @ tensors["down"]
    elif "hada_w1_a" in tensors:  # LoHa: Hyeon-Woo et al. 2022, "FedPara", proposition 1
        one, two = (tensors[f"hada_{w}_a"] @ tensors[f"hada_{w}_b"] for w in ("w1", "w2"))
        delta = scale(len(tensors["hada_w1_b"])) * one * two
    else:  # LoKr: Yeh et al. 2024, "LyCORIS", §3.2
        one, two = (
            tensors[f"lokr_{w}"] if f"lokr_{w}" in tensors else tensors[f"lokr_{w}_a"] @ tensors[f"lokr_{w}_b"]
            for w in ("w1", "w2")
        )
        inner = [len(tensors[f"lokr_{w}_b"]) for w in ("w1", "w2") if f"lokr_{w}_b" in tensors]
        delta = torch.kron(one, two) * scale(inner[-1] if inner else None)
    return swap(delta) if swapped else delta


def _magnitude(magnitude: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """m of a DoRA of (rows, inputs), as (rows, 1) or (1, inputs). ValueError if it is neither."""
    if magnitude is None:
        return None
    magnitude = magnitude[:, None] if magnitude.dim() == 1 else magnitude
    if magnitude.shape not in ((shape[0], 1), (1, shape[1])):
        raise ValueError(f"{tuple(magnitude.shape)} is not a magnitude of {shape}")
    return magnitude


def guess(left: set[str]) -> str:
    """What the tensors that are not understood may belong to, as the end of a sentence."""
    for word, model in STRANGERS.items():
        if any(word in key for key in left):
            return f"; it looks like one of {model}"
    if any(key.startswith(TEXT) for key in left):
        return "; updates of text encoders are not supported"
    return ""


class Scale:
    """The factor s = alpha / rank of an update, or alpha / √rank (Kalajdzievski 2023, "rsLoRA").

    alpha is a tensor in the file, or in PEFT's settings in its metadata or beside it. Otherwise it is the rank.

    Args:
        weights: the file.
        settings: PEFT's settings from outside the file.

    Raises:
        ValueError: the settings are broken.
    """

    def __init__(self, weights: Weights, settings: Mapping[str, Any]) -> None:
        try:
            content = json.loads(weights.metadata.get("lora_adapter_metadata", "{}"))
            prefix = DIALECTS["diffusers"].prefix
            inside = {key.removeprefix(prefix): value for key, value in content.items() if value is not None}
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
