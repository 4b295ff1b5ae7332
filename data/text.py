"""Captions → text tokens and a pooled vector, by a CLIP text tower through transformers."""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging


class Text(NamedTuple):
    """Encoded captions: one vector per token `(B, N, D)` and one per caption `(B, P)`, float32."""

    tokens: Tensor
    pooled: Tensor


@final
class CLIPText:
    """A frozen CLIP text tower with its tokenizer, as SD3 uses it (P. Esser et al., 2024, section 4).

    The tokens are the hidden states before the last layer, without the final norm, as diffusers' SD3 takes them; the
    pooled vector is the projection of the final state of the end token. Captions are padded to the length of the
    tokenizer without a mask: attention is causal, so padding never reaches the caption, but it does carry its summary.

    Args:
        folder: holds `text_encoder/` (`config.json`, `model.safetensors`) and `tokenizer/` (`tokenizer_config.json`,
            and either `tokenizer.json` or both `vocab.json` and `merges.txt`), as in a diffusers model folder.

    Attributes:
        tokens_dim: D, length of a token's vector.
        pooled_dim: P, length of a caption's pooled vector.
        length: N, tokens per caption, start and end included.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another kind, or the files do not fit each other.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.tokenizer = read_tokenizer(Path(folder) / "tokenizer")
        self.encoder = read_encoder(Path(folder) / "text_encoder")
        config = self.encoder.config
        self.tokens_dim: int = config.hidden_size
        self.pooled_dim: int = self.encoder.text_projection.out_features
        self.length: int = self.tokenizer.model_max_length
        if self.length > config.max_position_embeddings or len(self.tokenizer) > config.vocab_size:
            raise ValueError(
                f"the tokenizer and the text encoder in {folder} do not fit: {len(self.tokenizer)} entries and "
                f"{self.length} tokens a caption, against {config.vocab_size} and {config.max_position_embeddings}"
            )

    def to(self, device: torch.device | str) -> "CLIPText":
        """Moves the tower to `device`, where `encode` then computes and leaves its results."""
        self.encoder.to(device)  # type: ignore[arg-type]  # the decorator of `to` hides that it is a method
        return self

    def encode(self, captions: Sequence[str]) -> Text:
        """Returns `tokens (B, N, D)` and `pooled (B, P)` of B ≥ 1 captions; "" is the null condition.

        Captions of more than `length` tokens lose their tail, with a warning that says how many did. ValueError for
        no captions, TypeError for one bare string.
        """
        if isinstance(captions, str):
            raise TypeError(f"encode takes a list of captions, not the single string {captions!r}")
        if not captions:
            raise ValueError("there are no captions to encode: give at least one, which may be empty")
        captions = list(captions)
        whole = self.tokenizer(captions, verbose=False).input_ids
        if cut := sum(len(ids) > self.length for ids in whole):
            warnings.warn(
                f"{cut} of {len(whole)} captions are longer than the {self.length} tokens that the text tower reads, "
                "start and end included: their tails were cut",
                stacklevel=2,
            )
        batch = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        ids = batch.input_ids.to(self.encoder.device)  # (B, N)
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            output = self.encoder(ids, output_hidden_states=True)
        return Text(tokens=output.hidden_states[-2], pooled=output.text_embeds)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `text_encoder/` and `tokenizer/` into `folder`, such that `CLIPText(folder)` reads them again."""
        write(folder, self.encoder, self.tokenizer)


def write(folder: str | os.PathLike[str], encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> None:
    """Writes a tower and its tokenizer, safetensors and JSON only, into the subfolders that `CLIPText` reads."""
    encoder.config.save_pretrained(Path(folder) / "text_encoder")
    tokenizer.save_pretrained(Path(folder) / "tokenizer")
    weights = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    # Not save_pretrained, which leaves a file that only its owner can read; nor over an old file, which may be mapped
    # into memory as the very weights that are saved.
    target = Path(folder) / "text_encoder" / "model.safetensors"
    part = target.with_suffix(".part")
    part.write_bytes(save(weights, metadata={"format": "pt"}))
    os.replace(part, target)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Reads a CLIP tokenizer from disk; the errors are those of `CLIPText`."""
    require(folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file():
        require(folder / "vocab.json")
        require(folder / "merges.txt")
    try:
        with quiet():
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"{folder} holds no readable CLIP tokenizer: {first_line(error)}") from error


def read_encoder(folder: Path) -> CLIPTextModelWithProjection:
    """Reads a CLIP text tower in float32 for inference from disk; the errors are those of `CLIPText`."""
    config, weights = require(folder / "config.json"), require(folder / "model.safetensors")
    try:
        kind = json.loads(config.read_text()).get("model_type")
        if kind != "clip_text_model":
            raise ValueError(f"it has the model_type {kind!r} instead of 'clip_text_model'")
        with safe_open(weights, framework="pt"):
            pass
        with quiet():
            loaded: Any = CLIPTextModelWithProjection.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise ValueError(f"{weights} is truncated or no safetensors file: {first_line(error)}") from error
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{config} describes no CLIP text encoder: {first_line(error)}") from error
    encoder, report = loaded
    # transformers fills missing weights with random numbers, and only logs it.
    mismatched = [key[0] for key in report["mismatched_keys"]]
    for fault, names in (
        ("lacks", report["missing_keys"]),
        ("has unknown", report["unexpected_keys"]),
        ("has misshapen", mismatched),
    ):
        if names:
            raise ValueError(
                f"{weights} does not fit its config.json: it {fault} weights, {len(names)} in all, such as {min(names)}"
            )
    return encoder.eval().requires_grad_(False)


def require(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: a CLIP text tower is a folder with text_encoder/ and tokenizer/")
    return file


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from printing its progress bar and its report of what it loaded."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
