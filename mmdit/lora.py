"""LoRA: low-rank updates W + s·B·A of linear layers (Hu et al. 2021, eq. 3), made by peft, saved in diffusers' layout.

One of our linear layers may be several of diffusers' layers concatenated. To save an update, B is cut into the rows of
these layers and A is repeated for each. Files of other tools are merged by `mmdit.adapters`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from mmdit.checkpoint import parts, swap
from mmdit.model import MMDiT
from storage.checksums import write_checksums
from storage.files import commit_json
from storage.updates import CONFIG, FILE
from storage.weights import shorten, write_tensors

PREFIX = "transformer."
PROCESS = "mmdit.process"  # in the file's metadata: how a LoRA is sampled, if otherwise than its base


@dataclass(frozen=True)
class LoRA:
    """Which layers get an update, and how large it may be.

    Args:
        rank: rows of A and columns of B.
        alpha: the update is scaled by alpha / rank; none means rank.
        targets: ends of the names of the linear layers; by default those of the joint attention.
        quantize: how the frozen weights of the blocks are kept while training (QLoRA, Dettmers et al. 2023); none
            leaves them as they were loaded.
        text_encoders: those whose attention gets updates of the same rank, such as `[text_encoder, text_encoder_2]`,
            which are CLIP-L and CLIP-G.
    """

    rank: int = 16
    alpha: int | None = None
    targets: tuple[str, ...] = ("image.qkv", "image.proj", "text.qkv", "text.proj")
    quantize: Literal["none", "int8", "nf4"] = "none"
    text_encoders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets or not (self.alpha is None or self.alpha > 0):
            raise ValueError(f"lora needs rank >= 1, alpha > 0 and targets, got {self}")


def add(network: MMDiT, lora: LoRA) -> None:
    """Adds updates in float32, which start at zero, and freezes all other weights. ValueError for unknown targets."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(f"lora.targets: no linear layer's name ends in {target!r}; there are {shorten(linear)}")
    if any(name.startswith("patch") and f".{name}".endswith(f".{t}") for name in linear for t in lora.targets):
        raise ValueError("lora.targets: the patch embedding is a convolution in other tools: remove it")
    inject(network, lora, lora.targets)


def inject(module: nn.Module, lora: LoRA, targets: Sequence[str]) -> None:
    """Adds updates in float32, which start at zero, to the linear layers whose names end so. Freezes all else."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    alpha = lora.rank if lora.alpha is None else lora.alpha
    inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(targets)), module)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small steps would round to nothing in half precision


def layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with updates, peft's `LoraLayer`s, and their names."""
    from peft.tuners.lora import LoraLayer

    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@contextmanager
def off(network: nn.Module) -> Iterator[None]:
    """Within it the network is its base alone."""
    held = [layer for _, layer in layers(network)]
    for layer in held:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in held:
            layer.enable_adapters(True)


def export(network: MMDiT) -> dict[str, Tensor]:
    """The network's updates under the names of diffusers' SD3 pipelines, with the scale s inside B."""
    theirs = {}
    for name, layer in layers(network):
        down, up = (cast(nn.Linear, side["default"]).weight.detach() for side in (layer.lora_A, layer.lora_B))
        up = up * layer.scaling["default"]
        sections = parts(network, name, len(up), "diffusers")
        for part, rows in zip(sections, up.split([part.rows for part in sections]), strict=True):
            theirs[f"{PREFIX}{part.name}.lora_A.weight"] = down.clone()
            theirs[f"{PREFIX}{part.name}.lora_B.weight"] = swap(rows) if part.swapped else rows.clone()
    return theirs


def save(tensors: Mapping[str, Tensor], folder: Path, base: str, notes: Mapping[str, str] | None = None) -> None:
    """Writes updates so that diffusers' `load_lora_weights(folder)` reads them. OSError on failure.

    Args:
        tensors: those of `export`, and others under diffusers' names; none writes no file of updates.
        folder: the output folder; what it holds already is listed in its checksums, too.
        base: path or name of the model that the updates belong to, stored in the folder's config.
        notes: further metadata of the file, such as PROCESS.
    """
    commit_json(folder / CONFIG, {"peft_type": "LORA", "base_model_name_or_path": base})
    if tensors:
        write_tensors(tensors, folder / FILE, notes)
    write_checksums(folder, [file for file in folder.rglob("*") if file.is_file()])
