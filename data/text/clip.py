"""Captions → text tokens and a pooled vector by one or two CLIP towers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from data.text.encoder import Slot, Text, TextEncoder, listed
from data.text.tower import Tower, digest_of, read_tokenizer, real_tokens, run_clip, tokenize
from storage.text import read_json
from storage.weights import write_tensors


class Clip(NamedTuple):
    """A CLIP text tower in memory."""

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModelWithProjection
    fingerprint: str


@final
class CLIPText(TextEncoder):
    """One or two frozen CLIP text towers with their tokenizers, as SD3 uses them (P. Esser et al., 2024, section 4).

    The tokens are the hidden states before the last layer, without the final norm, as in diffusers' SD3; the pooled
    vector is the projection of the final state of the end token. The vectors of two towers are concatenated. Captions
    are padded to the length of the tokenizer, without a mask: attention is causal, so the caption's tokens do not see
    the padding, but the padding sees the caption. Results are float32, on the device of the towers.

    Args:
        folder: holds `text_encoder/` (`config.json`, `model.safetensors`) and `tokenizer/` (`tokenizer_config.json`,
            and either `tokenizer.json` or both `vocab.json` and `merges.txt`), as in a diffusers model folder; the
            second tower is `text_encoder_2/` and `tokenizer_2/`, if they exist.

    Attributes:
        length: N, tokens per caption, start and end included.
        towers: in order.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another kind, or the files do not fit each other.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.towers: list[Clip] = []
        slots: list[Slot] = []
        self.tokens_dim = self.pooled_dim = 0
        for suffix in ("", "_2"):
            source = Path(folder) / f"text_encoder{suffix}"
            if suffix and not source.is_dir():
                break
            tokenizer = read_tokenizer(CLIPTokenizer, Path(folder) / f"tokenizer{suffix}")
            tower = Tower(CLIPTextModelWithProjection, read_json(source / "config.json"), source)
            tower.require(tokenizer, tokenizer.model_max_length)
            encoder = tower.load(torch.float32, torch.device("cpu"))
            # Of the weights in memory, since `save` writes these, whatever their type on disk.
            self.towers.append(Clip(tokenizer, encoder, tower.fingerprint(dict(encoder.named_parameters()))))
            width, projection = tower.config.hidden_size, tower.config.projection_dim
            columns = slice(self.tokens_dim, self.tokens_dim + width)
            pooled = slice(self.pooled_dim, self.pooled_dim + projection)
            slots.append(Slot(source.name, slice(None), columns, pooled))
            self.tokens_dim, self.pooled_dim = columns.stop, pooled.stop
        self.slots = tuple(slots)
        lengths = {tower.tokenizer.model_max_length for tower in self.towers}
        if len(lengths) > 1:
            raise ValueError(f"the tokenizers in {folder} give different numbers of tokens: {sorted(lengths)}")
        self.length: int = lengths.pop()

    def to(self, device: torch.device | str) -> Self:
        """Moves the towers to `device`, on which `encode` then computes and returns its results."""
        for tower in self.towers:
            tower.encoder.to(device)  # type: ignore[arg-type]  # the decorator of `to` hides that it is a method
        return self

    def encode(self, captions: Sequence[str]) -> Text:
        made = []
        for tokenizer, encoder, _ in self.towers:
            ids = tokenize(tokenizer, listed(captions), self.length, "the text tower")
            with torch.no_grad():
                made.append(run_clip(encoder, ids.to(encoder.device)))
        return Text(*(torch.cat(parts, dim=-1) for parts in zip(*made, strict=True)))

    def mask(self, captions: Sequence[str]) -> Tensor:
        masks = [real_tokens(tower.tokenizer, listed(captions), self.length) for tower in self.towers]
        return torch.stack(masks).any(0)

    def keep(self, kept: bool) -> None:
        """Does nothing: the towers always stay in memory."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        for suffix, tower in zip(("", "_2"), self.towers, strict=False):
            write(folder, tower.encoder, tower.tokenizer, suffix)

    def index(self) -> dict[str, list[str | None]]:
        return {
            f"{name}{suffix}": ["transformers", kind.__name__]
            for suffix, _ in zip(("", "_2"), self.towers, strict=False)
            for name, kind in (("text_encoder", CLIPTextModelWithProjection), ("tokenizer", CLIPTokenizer))
        }

    def fingerprint(self) -> dict[str, Any]:
        encoders = {
            slot.name: {"weights": tower.fingerprint, "tokenizer": digest_of(tower.tokenizer)}
            for slot, tower in zip(self.slots, self.towers, strict=True)
        }
        return {"class": "CLIPText", "dtype": "float32", "length": self.length, **encoders}


def write(
    folder: str | os.PathLike[str], encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, suffix: str = ""
) -> None:
    """Writes a tower and its tokenizer, safetensors and JSON only, into the subfolders that `CLIPText` reads."""
    source = Path(folder) / f"text_encoder{suffix}"
    encoder.config.save_pretrained(source)
    tokenizer.save_pretrained(Path(folder) / f"tokenizer{suffix}")
    tensors = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    write_tensors(tensors, source / "model.safetensors")
