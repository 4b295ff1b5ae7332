"""Captions → text tokens and a pooled vector: the contract, text towers on disk, and the encoder of one CLIP tower."""

import hashlib
import json
import math
import os
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, final

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer
from transformers.utils import logging

from weights import Weights, digest, fit, open_file, open_folder, read_json, write_json, write_tensors

PROJECTION = "text_projection.weight"  # of the pooled vector, in a CLIP tower
TABLE = "encoder.embed_tokens.weight"  # T5's second name for `shared.weight`
NOTES = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}  # that change no result
Tokenizer = TypeVar("Tokenizer", bound=CLIPTokenizer | T5Tokenizer)


class Text(NamedTuple):
    """Encoded captions: one vector per token `(B, N, D)` and one per caption `(B, P)`."""

    tokens: Tensor
    pooled: Tensor


class CutCaptions(UserWarning):
    """Captions that are too long for an encoder.

    Attributes:
        count: how many.
    """

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


class Slot(NamedTuple):
    """Where the results of one of several encoders stand."""

    name: str  # its subfolder in a model folder
    rows: slice  # of the tokens
    columns: slice  # of a token's vector
    pooled: slice  # of the pooled vector


class TextEncoder(ABC):
    """Captions to conditions.

    Attributes:
        tokens_dim: D, length of a token's vector.
        pooled_dim: P, length of a caption's pooled vector.
        slots: where each encoder's results stand; what no slot covers is zero.
    """

    tokens_dim: int
    pooled_dim: int
    slots: tuple[Slot, ...]

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Text:
        """Returns `tokens (B, N, D)` and `pooled (B, P)` of B ≥ 1 captions; "" is the null condition.

        Captions that are too long lose their tail, with a warning that says how many did. ValueError for no captions,
        TypeError for one bare string.
        """

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the encoders and tokenizers into a model folder, from which the constructor reads them again."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Sets where captions are encoded."""

    @abstractmethod
    def keep(self, kept: bool) -> None:
        """Whether encoders that are read for each call stay in memory, as for a whole data set; others always do."""

    @abstractmethod
    def index(self) -> dict[str, list[str | None]]:
        """What `save` writes, as in diffusers' `model_index.json`: subfolder → library and class."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What the results depend on besides the captions, as JSON: encoders by their content, lengths, type."""


class Clip(NamedTuple):
    """A CLIP text tower in memory."""

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModelWithProjection
    fingerprint: str


@final
class CLIPText(TextEncoder):
    """One or two frozen CLIP text towers with their tokenizers, as SD3 uses them (P. Esser et al., 2024, section 4).

    The tokens are the hidden states before the last layer, without the final norm, as diffusers' SD3 takes them; the
    pooled vector is the projection of the final state of the end token. Two towers' vectors are laid end to end.
    Captions are padded to the length of the tokenizer without a mask: attention is causal, so padding never reaches the
    caption, but it does carry its summary. Both are float32, on the device of the towers.

    Args:
        folder: holds `text_encoder/` (`config.json`, `model.safetensors`) and `tokenizer/` (`tokenizer_config.json`,
            and either `tokenizer.json` or both `vocab.json` and `merges.txt`), as in a diffusers model folder; the
            second tower is `text_encoder_2/` and `tokenizer_2/`, if they are there.

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
            # The weights as they are held, since `save` writes these, whatever type they were stored in.
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
        """Moves the towers to `device`, where `encode` then computes and leaves its results."""
        for tower in self.towers:
            tower.encoder.to(device)  # type: ignore[arg-type]  # the decorator of `to` hides that it is a method
        return self

    def encode(self, captions: Sequence[str]) -> Text:
        made = []
        for tokenizer, encoder, _ in self.towers:
            ids = tokenize(tokenizer, listed(captions), self.length, "the text tower")
            made.append(run_clip(encoder, ids.to(encoder.device)))
        return Text(*(torch.cat(parts, dim=-1) for parts in zip(*made, strict=True)))

    def keep(self, kept: bool) -> None:
        """The towers always stay."""

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


class Tower:
    """A text encoder on disk, checked as a whole, but with weights that stay there until `load`.

    Args:
        kind: its class.
        settings: what its `config.json` holds.
        source: the folder of its weights, or a single file in which it is one of several models.
        prefix: of its names in the single file; none for a folder.
        identity: the projection is the identity, whatever the single file says.

    Attributes:
        config: the settings as transformers' object.

    Raises:
        FileNotFoundError: no weights.
        ValueError: the settings describe no such encoder, or the weights are damaged or those of another.
    """

    def __init__(
        self,
        kind: type[CLIPTextModelWithProjection] | type[T5EncoderModel],
        settings: dict[str, Any],
        source: Path,
        prefix: str = "",
        identity: bool = False,
    ) -> None:
        self.kind, self.settings, self.source, self.prefix = kind, settings, source, prefix
        weights = self.weights()
        try:
            config: Any = kind.config_class
            if (told := settings.get("model_type")) != config.model_type:
                raise ValueError(f"they have the model_type {told!r} instead of {config.model_type!r}")
            with quiet():
                self.config = config.from_dict(settings)
                shapes = {name: tuple(value.shape) for name, value in self._blank().named_parameters()}
        except Exception as error:  # settings may hold anything, and building from them may raise anything
            raise ValueError(f"the settings of {source} describe no {kind.__name__}: {one_line(error)}") from error
        self.identity = identity and len(set(shapes[PROJECTION])) == 1
        if self.identity:
            del shapes[PROJECTION]
            weights = weights.renamed(lambda name: None if name == PROJECTION else name)
        fit(weights, shapes, kind.__name__)

    def require(self, tokenizer: CLIPTokenizer | T5Tokenizer, length: int) -> None:
        """Raises ValueError if the tower cannot read `length` tokens of this tokenizer."""
        entries, positions = self.config.vocab_size, getattr(self.config, "max_position_embeddings", length)
        if length > positions or len(tokenizer) > entries:
            raise ValueError(
                f"the tokenizer and the text encoder in {self.source} do not fit: {len(tokenizer)} entries and "
                f"{length} tokens a caption, against {entries} and {positions}"
            )

    def weights(self) -> Weights:
        """The tensors, under the names of the module's parameters."""
        return own_names(
            open_file(self.source).under(self.prefix) if self.prefix else open_folder(self.source, "model")
        )

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The module for inference; tensor by tensor, so that memory never holds it twice."""
        weights = self.weights()
        module = self._blank()
        # As transformers itself does: T5's widest layers overflow in half precision.
        wide = module._keep_in_fp32_modules if dtype == torch.float16 else set()
        state = {}
        for name, parameter in module.named_parameters():
            value = torch.eye(len(parameter)) if self.identity and name == PROJECTION else weights[name]
            state[name] = value.to(device, torch.float32 if wide & set(name.split(".")) else dtype, copy=True)
        module.config.dtype = dtype  # which is noted where the module is saved
        module.load_state_dict(state, strict=False, assign=True)
        module.tie_weights()
        if isinstance(module, CLIPTextModelWithProjection):
            positions = torch.arange(self.config.max_position_embeddings, device=device)
            module.text_model.embeddings.position_ids = positions[None]  # (1, N); in no file
        return module.eval().requires_grad_(False)

    def fingerprint(self, held: Mapping[str, Tensor] | None = None) -> str:
        """A hash of the settings and the weights, those on disk or those that are held."""
        settings = {name: value for name, value in self.settings.items() if name not in NOTES}
        told = json.dumps(settings, sort_keys=True) + digest(self.weights() if held is None else held)
        return hashlib.sha256(told.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes `config.json` and the weights as they are, as hard links where they are files of their own."""
        whole = folder / "model.safetensors"
        if self.prefix:
            stored = self.weights()
            eighth = stored.dtype.itemsize == 1  # which other tools do not read
            dtype = torch.bfloat16 if eighth else stored.dtype
            tensors = {name: value.to(dtype) if eighth else value for name, value in stored.items()}
            if self.identity:
                tensors[PROJECTION] = torch.eye(self.config.hidden_size).to(dtype)
            write_json(self.settings | {"dtype": str(dtype).removeprefix("torch.")}, folder / "config.json")
            write_tensors(tensors, whole)
            return
        write_json(self.settings, folder / "config.json")
        places = open_folder(self.source, "model").places
        files = {place.file for place in places.values()}
        for file in files:
            put(file, whole if len(files) == 1 else folder / file.name, link=True)
        if len(files) > 1:
            size = sum(math.prod(place.shape) * place.dtype.itemsize for place in places.values())
            table = {name: place.file.name for name, place in places.items()}
            write_json({"metadata": {"total_size": size}, "weight_map": table}, folder / f"{whole.name}.index.json")

    def _blank(self) -> Any:
        with torch.device("meta"):
            return self.kind(self.config)


def own_names(tensors: Weights) -> Weights:
    """A tower's tensors as its module names its parameters.

    T5 has two names for its table, of which files hold either or both; old CLIP files hold the positions' numbers.
    """
    tensors = tensors.renamed(lambda name: None if name.endswith("position_ids") else name)
    if "shared.weight" in tensors:
        return tensors.renamed(lambda name: None if name == TABLE else name)
    return tensors.renamed(lambda name: "shared.weight" if name == TABLE else name)


def put(file: Path, target: Path, link: bool = False) -> None:
    """Copies a file, or gives it a second name if that can be. What was there may be in use and is not written to."""
    if target.exists() and target.samefile(file):
        return
    target.unlink(missing_ok=True)
    if link:
        with suppress(OSError):  # another disk, or one without links
            os.link(file.resolve(), target)
            return
    shutil.copyfile(file, target)


def run_clip(encoder: CLIPTextModelWithProjection, ids: Tensor) -> Text:
    """SD3's two outputs of a CLIP tower, for token numbers `(B, N)`."""
    with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
        output = encoder(ids, output_hidden_states=True)
    return Text(tokens=output.hidden_states[-2], pooled=output.text_embeds)


def listed(captions: Sequence[str]) -> list[str]:
    """The captions, unless there are none or they are one string; the errors are those of `TextEncoder.encode`."""
    if isinstance(captions, str):
        raise TypeError(f"encode takes a list of captions, not the single string {captions!r}")
    if not captions:
        raise ValueError("there are no captions to encode: give at least one, which may be empty")
    return list(captions)


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int, reader: str) -> Tensor:
    """Token numbers `(B, length)` on the CPU, padded, and cut with the warning of `TextEncoder.encode`."""
    whole = tokenizer(captions, verbose=False).input_ids
    if cut := sum(len(ids) > length for ids in whole):
        told = f"{cut} of {len(whole)} captions are longer than the {length} tokens that {reader} reads, start and end"
        warnings.warn(CutCaptions(f"{told} included: their tails were cut", cut), stacklevel=3)
    return tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def digest_of(tokenizer: CLIPTokenizer | T5Tokenizer) -> str:
    """A hash of a tokenizer's vocabulary, rules and length."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"padding": None, "truncation": None}  # which are those of its latest use
    told = [rules, tokenizer.model_max_length, tokenizer.pad_token]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_tokenizer(kind: type[Tokenizer], folder: Path) -> Tokenizer:
    """Reads a tokenizer from disk; the errors are those of `CLIPText`."""
    names = dict(kind.vocab_files_names)
    needed = ["tokenizer_config.json"]
    if not (folder / names.pop("tokenizer_file")).is_file():
        needed += names.values()
    for name in needed:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing")
    try:
        with quiet():
            return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"{folder} holds no readable {kind.__name__}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from printing progress bars, settings and advice."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
