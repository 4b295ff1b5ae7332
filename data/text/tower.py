"""A text encoder on disk, and its tokenizer: checked first, then read tensor by tensor."""

import copy
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar, cast, get_args

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer
from transformers.utils import logging

from data.text.encoder import CutCaptions, Text
from data.text.inversion import Vocabulary
from storage import updates
from storage.configs import CLIP_TEXT, T5, described, tokenizer_files
from storage.files import commit_json
from storage.weights import DType, Weights, check_tensors, digest, open_file, open_folder, write_tensors

PROJECTION = "text_projection.weight"  # of the pooled vector, in a CLIP tower
TABLE = "encoder.embed_tokens.weight"  # T5's second name for `shared.weight`
KEYS = {CLIPTextModelWithProjection: CLIP_TEXT, T5EncoderModel: T5}  # of the settings that describe a tower
ONE_LAYER = {"num_hidden_layers": 1, "num_layers": 1}
Tokenizer = TypeVar("Tokenizer", bound=CLIPTokenizer | T5Tokenizer)


class Tower:
    """A text encoder on disk. The constructor checks settings and weights; `load` reads the weights.

    Args:
        kind: its class.
        settings: the content of its `config.json`, of which only the keys in KEYS have an effect.
        source: the folder of its weights, or a single file that holds several models.
        prefix: of its names in the single file; empty for a folder.
        identity: the projection is the identity, also if the single file holds another.

    Attributes:
        config: the settings as transformers' object.
        shapes: the parameters' names and shapes.
        updates: merged into the weights wherever these are read, except by `weights`.
        rows: the vectors of new tokens, (n, width).

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the settings describe no such encoder, or the weights are damaged or of another encoder.
    """

    def __init__(
        self,
        kind: type[CLIPTextModelWithProjection] | type[T5EncoderModel],
        settings: dict[str, Any],
        source: Path,
        prefix: str = "",
        identity: bool = False,
    ) -> None:
        self.kind, self.source, self.prefix = kind, source, prefix
        self.rows, self.first, self.end = torch.empty(0), 0, 0
        self.named = settings.get("dtype", settings.get("torch_dtype"))
        weights = self.weights()
        try:
            self.settings, config = described(settings, KEYS[kind]), cast(Any, kind.config_class)
            if (found := self.settings.get("model_type")) != config.model_type:
                raise ValueError(f"they have the model_type {found!r} instead of {config.model_type!r}")
            with quiet():
                self.config = config.from_dict(self.settings)
                self.shapes = {name: tuple(value.shape) for name, value in self._blank().named_parameters()}
                with torch.device("meta"):  # computes nothing; some values fail only in use
                    kind(config.from_dict(self.settings | ONE_LAYER))(torch.ones(1, 2, dtype=torch.long))
        except Exception as error:  # wrong settings may raise anything
            raise ValueError(f"the settings of {source} describe no {kind.__name__}: {one_line(error)}") from error
        self.updates: updates.Updates = {}
        self.identity = identity and len(set(self.shapes[PROJECTION])) == 1
        stored = {name: shape for name, shape in self.shapes.items() if not (self.identity and name == PROJECTION)}
        if self.identity:
            weights = weights.renamed(lambda name: None if name == PROJECTION else name)
        check_tensors(weights, stored, kind.__name__)

    def grown(self, rows: Tensor, tokenizer: CLIPTokenizer | T5Tokenizer) -> Self:
        """This encoder with the vectors (n, width) of all new tokens, which are the last of a tokenizer."""
        new = copy.copy(self)
        new.updates = dict(self.updates)
        new.rows, new.first, new.end = rows, len(tokenizer) - len(rows), cast(int, tokenizer.eos_token_id)
        return new

    def require(self, tokenizer: CLIPTokenizer | T5Tokenizer, length: int) -> None:
        """ValueError if the tower cannot read `length` tokens of this tokenizer."""
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

    def tensors(self) -> dict[str, Tensor]:
        """The parameters in their stored type, mapped into memory, those with updates merged.

        Decoded or merged ones that are stored in 8 bits come in bfloat16.
        """
        weights = self.weights()
        scaled = {name for name, place in weights.places.items() if place.scale}
        tensors = {name: weights[name].to(weights.kept) if name in scaled else weights[name] for name in weights}
        if self.identity:
            tensors[PROJECTION] = torch.eye(self.config.hidden_size).to(weights.dtype)
        for name, value in tensors.items():
            if name.rpartition(".")[0] in self.updates:
                dtype = torch.bfloat16 if value.dtype.itemsize == 1 else value.dtype
                tensors[name] = self._updated(name, value).to(dtype)
        return tensors

    def _updated(self, name: str, value: Tensor) -> Tensor:
        """A parameter with its updates, if there are any, in float32."""
        module, _, kind = name.rpartition(".")
        return updates.updated(kind, value, self.updates[module]) if module in self.updates else value

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The module for inference, read tensor by tensor, so that memory never holds it twice."""
        weights = self.weights()
        module = self._blank()
        # As in transformers: T5's widest layers overflow in half precision.
        wide = module._keep_in_fp32_modules if dtype == torch.float16 else set()
        state = {}
        for name, parameter in module.named_parameters():
            value = torch.eye(len(parameter)) if self.identity and name == PROJECTION else weights[name]
            value = self._updated(name, value.to(device))
            state[name] = value.to(device, torch.float32 if wide & set(name.split(".")) else dtype, copy=True)
        module.config.dtype = dtype  # written into the config when the module is saved
        module.load_state_dict(state, strict=False, assign=True)
        module.tie_weights()
        if isinstance(module, CLIPTextModelWithProjection):
            positions = torch.arange(self.config.max_position_embeddings, device=device)
            module.text_model.embeddings.position_ids = positions[None]  # (1, N); in no file
        if len(self.rows):
            module.set_input_embeddings(Vocabulary(module.get_input_embeddings(), self.rows.to(device), self.first))
            if isinstance(module, CLIPTextModelWithProjection):  # the end is not the highest number any more
                module.text_model.eos_token_id = self.end
        return module.eval().requires_grad_(False)

    def fingerprint(self, held: Mapping[str, Tensor] | None = None) -> str:
        """A hash of the settings and the weights, those in `held` or else those on disk, and of updates."""
        content = json.dumps(self.settings, sort_keys=True) + digest(self.weights() if held is None else held)
        if self.updates:
            content += updates.fingerprint(self.updates)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes `config.json` and the weights in their stored type; weights of a folder as hard links if possible."""
        whole, stored = folder / "model.safetensors", self.weights()
        dtype = stored.kept  # other tools do not read 8 bits
        places = {} if self.prefix else open_folder(self.source, "model").places
        # The type that other tools read a folder's weights in, which need not be the stored one.
        named = self.named if places and self.named in get_args(DType) else str(dtype).removeprefix("torch.")
        notes = {"architectures": [self.kind.__name__], "dtype": named}
        commit_json(folder / "config.json", self.settings | notes)
        if self.prefix or self.updates or any(name != place.name or place.scale for name, place in places.items()):
            tensors = self.tensors()
            write_tensors(
                {name: value.to(dtype) if dtype != stored.dtype else value for name, value in tensors.items()}, whole
            )
            return
        files = {place.file for place in places.values()}
        for file in files:
            put(file, whole if len(files) == 1 else folder / file.name, link=True)
        if len(files) > 1:
            size = sum(math.prod(place.shape) * place.dtype.itemsize for place in places.values())
            table = {name: place.file.name for name, place in places.items()}
            commit_json(folder / f"{whole.name}.index.json", {"metadata": {"total_size": size}, "weight_map": table})

    def _blank(self) -> Any:
        with torch.device("meta"):
            return self.kind(self.config)


def own_names(tensors: Weights) -> Weights:
    """A tower's tensors under the names of its module's parameters.

    T5's embedding table has two names, and files hold either or both; old CLIP files also hold `position_ids`.
    """
    tensors = tensors.renamed(lambda name: None if name.endswith("position_ids") else name)
    if "shared.weight" in tensors:
        return tensors.renamed(lambda name: None if name == TABLE else name)
    return tensors.renamed(lambda name: "shared.weight" if name == TABLE else name)


def put(file: Path, target: Path, link: bool = False) -> None:
    """Copies a file, or hard-links it if `link` and possible. Replaces an older file, which may be in use."""
    if target.exists() and target.samefile(file):
        return
    target.unlink(missing_ok=True)
    if link:
        with suppress(OSError):  # another disk, or a disk without links
            os.link(file.resolve(), target)
            return
    shutil.copyfile(file, target)


def run_clip(encoder: CLIPTextModelWithProjection, ids: Tensor) -> Text:
    """SD3's two outputs of a CLIP tower, for token numbers `(B, N)`."""
    with torch.autocast(ids.device.type, enabled=False):
        output = encoder(ids, output_hidden_states=True)
    return Text(tokens=output.hidden_states[-2], pooled=output.text_embeds)


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int, reader: str) -> Tensor:
    """Token numbers `(B, length)` on the CPU, padded, and cut with the warning of `TextEncoder.encode`."""
    whole = tokenizer(captions, verbose=False).input_ids
    if cut := [caption for caption, ids in zip(captions, whole, strict=True) if len(ids) > length]:
        most = f"the {length} tokens that {reader} reads, start and end included"
        # From this line for all callers, since Python shows a warning once for each place.
        warnings.warn(CutCaptions(f"captions are longer than {most}: their tails were cut", cut), stacklevel=1)
    return tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def real_tokens(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int) -> Tensor:
    """(B, length) bool on the CPU: which of `tokenize`'s tokens are not padding."""
    cut = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return tokenizer(captions, verbose=False, **cut).attention_mask.bool()


def digest_of(tokenizer: CLIPTokenizer | T5Tokenizer) -> str:
    """A hash of a tokenizer's vocabulary, rules and length."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"padding": None, "truncation": None}  # they depend on the latest use
    content = [rules, tokenizer.model_max_length, tokenizer.pad_token]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_tokenizer(kind: type[Tokenizer], folder: Path) -> Tokenizer:
    """Reads a tokenizer from disk; errors as `CLIPText`."""
    names = dict(kind.vocab_files_names)
    needed = ["tokenizer_config.json"]
    if not (folder / names.pop("tokenizer_file")).is_file():
        needed += names.values()
    for name in needed:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing")
    try:
        with quiet(), tokenizer_files(folder, kind.vocab_files_names.values()) as files:
            return kind.from_pretrained(files, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"{folder} holds no readable {kind.__name__}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def quiet() -> Iterator[None]:
    """Silences progress bars, settings and advice of transformers."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
