"""Updates of an MMDiT in files of any tool (`storage.updates`): what the tools call its layers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mmdit.checkpoint import Naming, layout, swap
from mmdit.model import MMDiT
from storage import updates
from storage.updates import Adapter, Place, Receiver, Updates, updated


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
STRANGERS = {  # words in the names of other models' updates
    "double_blocks": "Flux", "single_transformer_blocks": "Flux", "single_blocks": "Flux",
    "down_blocks": "a UNet, such as SDXL", "input_blocks": "a UNet, such as SDXL", "mid_block": "a UNet, such as SDXL",
}  # fmt: skip
TEXT = ("lora_te", "text_encoder", "lora_prior_te")


@torch.no_grad()
def merge(network: MMDiT, adapters: Sequence[Adapter], others: Sequence[Receiver] = ()) -> None:
    """Adds adapters, one after the other, to the network's weights. Sums are float32 and rounded once.

    Args:
        network: the network.
        adapters: the files.
        others: what else the files may update, such as text encoders.

    Raises:
        FileNotFoundError, ValueError: in one line that names all that does not fit, before anything is changed.
    """
    modules = dict(network.named_modules())

    def take(given: Updates) -> None:
        for module, found in given.items():
            for name, parameter in modules[module].named_parameters(recurse=False):
                parameter.copy_(updated(name, parameter, found))

    receiver = Receiver("the network", DIALECTS["diffusers"].prefix, [*_places(network)], take)
    updates.merge(adapters, [receiver, *others], guess)


def guess(left: set[str]) -> str:
    """What the tensors that are not understood may belong to, as the end of a sentence."""
    for word, model in STRANGERS.items():
        if any(word in key for key in left):
            return f"; it looks like one of {model}"
    if any(key.startswith(TEXT) for key in left):
        return "; updates of text encoders are read if they are Stable Diffusion 3's"
    return ""


def _places(network: MMDiT) -> Iterator[Place]:
    """Where updates of all weights may go, in all dialects."""
    for dialect in DIALECTS.values():
        for ours, pieces in layout(network, dialect.naming).items():
            module, _, kind = ours.rpartition(".")
            if kind != "weight":
                continue
            bias, start = getattr(network.get_submodule(module), "bias", None) is not None, 0
            for piece in pieces:
                layer = piece.name.removesuffix(".weight")
                name = dialect.prefix + (layer.replace(".", "_") if dialect.flat else layer)
                rows = slice(start, start + piece.shape[0])
                yield Place(name, layer, module, rows, piece.shape, bias, swap if piece.swapped else None)
                start = rows.stop
