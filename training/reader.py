"""Text encoders that learn: a network with encoders of its own, low-rank updates of them, and new words."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from data.text.encoder import Slot, TextEncoder
from data.text.inversion import MOST, NewWord, Vocabulary, check_name, read_numbers
from data.text.sd3 import SD3Text, run_clip, run_t5
from mmdit import lora
from mmdit.lora import LoRA
from mmdit.network import Condition, HiddenStates, Network

TARGETS = {"clip": ("q_proj", "k_proj", "v_proj", "out_proj"), "t5": ("q", "k", "v", "o")}  # updated layers


@dataclass(frozen=True)
class NewWords:
    """Words whose vectors are learned (textual inversion, Gal et al. 2022). All else is frozen, but for a LoRA.

    Args:
        words: word → the text from whose tokens its vectors start: `{<toy>: dog}`.
        vectors: tokens that a word is read as.
        encoders: the text encoders that get vectors. The others spell the word in pieces.
    """

    words: dict[str, str] = field(default_factory=dict)
    vectors: int = 1
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")

    def __post_init__(self) -> None:
        if not self.words or not self.encoders or not 1 <= self.vectors <= MOST:
            raise ValueError(f"new_words needs words, encoders and vectors from 1 to {MOST}, got {self}")
        for word in self.words:
            check_name(word)

    def start(self, text: SD3Text) -> list[NewWord]:
        """The words before training: the vectors of their start's tokens, again and again."""
        vectors: dict[str, dict[str, Tensor]] = {word: {} for word in self.words}
        for part in text.parts:
            if part.name not in self.encoders:
                continue
            table = text.encoder(part.name).get_input_embeddings().weight.float()
            for word, start in self.words.items():
                ids = part.tokenizer(start, add_special_tokens=False, verbose=False).input_ids
                if not ids:
                    raise ValueError(f"new_words.words: {word} starts from {start!r}, which has no token: give a text")
                vectors[word][part.name] = table[[ids[i % len(ids)] for i in range(self.vectors)]].cpu()
        return [NewWord(word, own) for word, own in vectors.items()]


class Reader(Network):
    """A network with text encoders of its own. In the condition their slots hold the numbers of tokens.

    Args:
        network: which takes what the encoders make of the tokens.
        encoders: name → module, frozen but for its updates and the vectors of new words.
        slots: the places of all encoders' results.
    """

    def __init__(self, network: Network, encoders: Mapping[str, nn.Module], slots: Collection[Slot]) -> None:
        super().__init__()
        for name in Network.__annotations__.keys() - {"CONDITION_FIELDS"}:
            setattr(self, name, getattr(network, name))
        self.network, self.encoders = network, nn.ModuleDict(encoders)
        self.slots = [slot for slot in slots if slot.name in encoders]

    @property
    def blocks(self) -> Any:
        """Those of the network."""
        return self.network.blocks

    def train(self, mode: bool = True) -> "Reader":
        """Sets the mode of the network. Encoders drop nothing out."""
        super().train(mode)
        self.encoders.eval()
        return self

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        condition: Condition,
        end: Tensor | None = None,
        skip_layers: Collection[int] = (),
        hidden_states: HiddenStates | None = None,
    ) -> Tensor:
        """The network's output. Arguments are those of `MMDiT`."""
        return self.network(z, t, self.read(condition), end, skip_layers, hidden_states)

    def read(self, condition: Condition) -> Condition:
        """The condition with the encoders' states in the place of the numbers of their tokens."""
        text, pooled = condition.text.clone(), condition.pooled.clone()
        for slot in self.slots:
            run = run_t5 if is_t5(self.encoders[slot.name]) else run_clip
            made = run(self.encoders[slot.name], read_numbers(text[:, slot.rows, slot.columns]))  # type: ignore[arg-type]
            text[:, slot.rows, slot.columns] = made.tokens.to(text.dtype)
            pooled[:, slot.pooled] = made.pooled.to(pooled.dtype)
        return condition._replace(text=text, pooled=pooled)

    def updates(self) -> dict[str, Tensor]:
        """The low-rank updates of the encoders, as diffusers names them."""
        found: dict[str, Tensor] = {}
        for name, layer in lora.layers(self.encoders):
            down, up = (side["default"].weight.detach() for side in (layer.lora_A, layer.lora_B))
            found[f"{name}.lora_A.weight"] = down.clone()
            found[f"{name}.lora_B.weight"] = up * layer.scaling["default"]
        return found

    def new_words(self, started: Collection[NewWord]) -> list[NewWord]:
        """New words as they are now, from those that the training started with."""
        learned: dict[str, dict[str, Tensor]] = {word.name: {} for word in started}
        for name, encoder in self.encoders.items():
            table = encoder.get_input_embeddings()  # type: ignore[operator]
            own = [word for word in started if name in word.vectors]
            if isinstance(table, Vocabulary):
                rows = table.rows.detach().split([len(word.vectors[name]) for word in own])
                for word, vectors in zip(own, rows, strict=True):
                    learned[word.name][name] = vectors
        return [NewWord(name, vectors) for name, vectors in learned.items()]


def reading(
    network: Network, text: TextEncoder, updates: LoRA | None, new_words: NewWords | None
) -> tuple[Reader, SD3Text]:
    """A network with the text encoders that learn, and the text encoders without them.

    Raises:
        ValueError: in one line, if the model has no such encoders, or a new word exists already.
    """
    if not isinstance(text, SD3Text):
        raise ValueError(f"only Stable Diffusion 3's text encoders learn, and text is a {type(text).__name__}")
    names = {part.name: part.kind for part in text.parts}
    updated, worded = updates.text_encoders if updates else (), new_words.encoders if new_words else ()
    for setting, asked in (("lora.text_encoders", updated), ("new_words.encoders", worded)):
        if strange := [name for name in asked if name not in names]:
            raise ValueError(f"{setting}: this model has no {strange[0]}, only {', '.join(names)}")
    if new_words:
        text = text.taught(new_words.start(text))
    encoders = {name: text.encoder(name) for name in names if name in {*updated, *worded}}
    for name, encoder in encoders.items():
        if updates and name in updated:
            lora.inject(encoder, updates, TARGETS["t5" if is_t5(encoder) else "clip"])
        if name in worded:
            encoder.get_input_embeddings().rows.requires_grad_(True)
    return Reader(network, encoders, text.slots), text.numbered(list(encoders))


def is_t5(encoder: nn.Module) -> bool:
    """Whether an encoder is a T5, and otherwise a CLIP tower."""
    return encoder.config.model_type == "t5"  # type: ignore[union-attr]


def of_network(network: Network) -> Network:
    """The network itself, without text encoders that learn with it."""
    return network.network if isinstance(network, Reader) else network
