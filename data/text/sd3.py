"""Captions → text tokens and a pooled vector by SD3's three encoders, one at a time in memory."""

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from data.text import adapters
from data.text.cache import Rows
from data.text.encoder import Slot, Text, TextEncoder, listed
from data.text.inversion import NewWord, Spelling, write_numbers
from data.text.tower import (
    PROJECTION,
    TABLE,
    Tower,
    one_line,
    own_names,
    put,
    read_tokenizer,
    real_tokens,
    run_clip,
    tokenize,
)
from storage.text import read_json
from storage.updates import Receiver, Updates
from storage.weights import DType, Weights, digest, dtype_of, open_file

LENGTH = 77  # tokens that stand for CLIP towers where both are absent
T5_LENGTH = 256  # tokens that T5 reads by default, at most
BATCH = 32  # captions in a forward pass


class Kind(NamedTuple):
    """The constants of one of the three encoders."""

    title: str
    suffix: str  # of text_encoder and tokenizer in a model folder
    prefix: str  # of its names in a single file
    tower: type[CLIPTextModelWithProjection] | type[T5EncoderModel]
    tokenizer: type[CLIPTokenizer] | type[T5Tokenizer]


CLIP_L = Kind("CLIP-L", "", "text_encoders.clip_l.transformer.", CLIPTextModelWithProjection, CLIPTokenizer)
CLIP_G = Kind("CLIP-G", "_2", "text_encoders.clip_g.transformer.", CLIPTextModelWithProjection, CLIPTokenizer)
T5 = Kind("T5", "_3", "text_encoders.t5xxl.transformer.", T5EncoderModel, T5Tokenizer)


class Part(NamedTuple):
    """An encoder with its tokenizer and the place of its results."""

    kind: Kind
    tower: Tower
    tokenizer: CLIPTokenizer | T5Tokenizer
    vocabulary: list[Path]  # the tokenizer's files
    rows: slice  # among the tokens
    columns: slice  # of a token's vector
    pooled: slice  # of the pooled vector
    spelling: Spelling  # of the new words

    @property
    def name(self) -> str:
        """Its subfolder in a model folder."""
        return f"text_encoder{self.kind.suffix}"


@final
class SD3Text(TextEncoder):
    """SD3's frozen text encoders: CLIP-L, CLIP-G and T5 (P. Esser et al., 2024, section 4 and appendix B.3).

    The first tokens, as many as the CLIPs read, which is 77 for the released ones, are theirs: their hidden states
    before the last layer, concatenated and padded with zeros to the width of T5. Then come `max_sequence_length` final
    states of T5. The pooled vector concatenates the projected end tokens of CLIP-L and CLIP-G. No encoder masks its
    padding, as in diffusers' StableDiffusion3Pipeline.

    The part of an absent encoder is zero; the released networks were trained with dropped encoders as zeros.

    Encoders are read one after the other for captions that are not in memory or cache, and released again. Results are
    on the CPU, in `dtype`. Those of the last 256 captions stay in memory.

    Args:
        folder: a model folder, with `tokenizer{,_2,_3}/` and `text_encoder{,_2,_3}/` (`config.json`, weights as
            safetensors) of the encoders that are present: those that its `model_index.json` names, or without it those
            whose folders exist.
        tokens_dim: D, length of a token's vector, T5's width.
        pooled_dim: P, length of the pooled vector, the sum of the CLIPs' projections.
        max_sequence_length: T5's number of tokens, 1 to 512, end included. None means as many as its tokenizer reads,
            and at most 256.
        dtype: of the encoders and their results.
        device: where the encoders compute.
        single_file: a checkpoint in SD3's original format, whose encoders take precedence over the folder's; they need
            no `config.json` there.
        cache: a folder for the results, a file for each caption, which processes share. Names are hashes of the
            caption, the encoders, `dtype` and the lengths.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another kind, widths do not fit each other, or there is no encoder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tokens_dim: int = 4096,
        pooled_dim: int = 2048,
        max_sequence_length: int | None = None,
        dtype: DType = "float32",
        device: str = "cpu",
        single_file: str | os.PathLike[str] | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if max_sequence_length is not None and not 1 <= max_sequence_length <= 512:
            raise ValueError(f"max_sequence_length must be from 1 to 512, got {max_sequence_length}")
        self.tokens_dim, self.pooled_dim = tokens_dim, pooled_dim
        self.dtype = dtype_of(dtype)
        self.kept: dict[Kind, Any] | None = None  # encoders, if they are to stay
        self.to(device)
        folder, single = Path(folder), None if single_file is None else Path(single_file)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        towers = {kind: tower for kind in (CLIP_L, CLIP_G, T5) if (tower := find(kind, folder, single))}
        if not towers:
            raise ValueError(f"there is no text encoder in {folder}" + (f" and {single}" if single else ""))
        tokenizers = {kind: read_tokenizer(kind.tokenizer, folder / f"tokenizer{kind.suffix}") for kind in towers}
        lengths = {
            min(tokenizer.model_max_length, towers[kind].config.max_position_embeddings)
            for kind, tokenizer in tokenizers.items()
            if kind is not T5
        } or {LENGTH}
        if len(lengths) > 1:
            raise ValueError(f"the CLIP towers in {folder} read different numbers of tokens: {sorted(lengths)}")
        self.length: int = lengths.pop()
        most = min(T5_LENGTH, tokenizers[T5].model_max_length) if T5 in tokenizers else T5_LENGTH
        self.max_sequence_length: int = max_sequence_length or most
        self.parts = self._parts(towers, tokenizers, folder)
        self.slots = tuple(
            Slot(f"text_encoder{part.kind.suffix}", part.rows, part.columns, part.pooled) for part in self.parts
        )
        self.words: tuple[NewWord, ...] = ()
        self.cache = None if cache is None else Path(cache)
        self.rows = self._rows()

    def taught(self, words: Sequence[NewWord]) -> Self:
        """These text encoders with new words. Encoders for which a word has no vectors spell it in pieces.

        Raises:
            ValueError: in one line, if a word exists already, is given twice, or is one of other encoders.
        """
        names = [word.name for word in (*self.words, *words)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the new word {twice[0]} is given twice: give each word once")
        own = {part.name: part for part in self.parts}
        for word in words:
            if missing := sorted(word.vectors.keys() - own.keys()):
                raise ValueError(f"the new word {word.name} has vectors for {missing[0]}, which this model lacks")
            for encoder, vectors in word.vectors.items():
                width = own[encoder].tower.config.hidden_size
                if vectors.shape[1] != width:
                    raise ValueError(
                        f"the new word {word.name} has vectors of {vectors.shape[1]} numbers, and {encoder} of {width}"
                    )
        new = copy.copy(self)
        new.words = (*self.words, *words)
        new.parts = [self._taught(part, words) for part in self.parts]
        new.kept = None if self.kept is None else {}
        new.rows = new._rows()
        return new

    def numbered(self, encoders: Sequence[str]) -> Self:
        """These text encoders, of which some are left to a network that learns them: their slots hold token numbers."""
        new = copy.copy(self)
        new.unread = frozenset(encoders)
        new.rows = new._rows()
        return new

    def encoder(self, name: str) -> Any:
        """The module of an encoder, frozen, with its new words."""
        (part,) = (part for part in self.parts if part.name == name)
        return part.tower.load(self.dtype, self.device)

    def to(self, device: torch.device | str) -> Self:
        """Sets the device of the encoders."""
        try:
            self.device = torch.device(device)
            for encoder in (self.kept or {}).values():
                encoder.to(device)
        except RuntimeError as error:
            raise ValueError(one_line(error)) from None
        return self

    def keep(self, kept: bool) -> None:
        self.kept = self.kept or {} if kept else None

    def encode(self, captions: Sequence[str]) -> Text:
        """As `TextEncoder.encode`, warning once for each caption; ValueError if an encoder overflows."""
        captions = listed(captions)
        unique = [*dict.fromkeys(captions)]
        fresh = [caption for caption in unique if caption not in self.rows.memory]  # warned of once if too long
        parts = self.parts if fresh else ()
        ids = [
            tokenize(part.tokenizer, [*map(part.spelling, fresh)], self._length(part.kind), part.kind.title)
            for part in parts
        ]
        # Results in memory may be used in training later, so they must not be inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            rows = {caption: row for caption in unique if (row := self.rows.get(caption))}
            new = [i for i, caption in enumerate(fresh) if caption not in rows]
            if new:
                for i, tokens, pooled in zip(new, *self._run([numbers[new] for numbers in ids]), strict=True):
                    rows[fresh[i]] = Text(tokens.clone(), pooled.clone())
                    self.rows.put(fresh[i], rows[fresh[i]])
            return Text(*(torch.stack(made) for made in zip(*(rows[c] for c in captions), strict=True)))

    def mask(self, captions: Sequence[str]) -> Tensor:
        masks = torch.zeros(len(captions), self.length + self.max_sequence_length, dtype=torch.bool)
        for part in self.parts:
            spelled = [*map(part.spelling, listed(captions))]
            masks[:, part.rows] |= real_tokens(part.tokenizer, spelled, self._length(part.kind))
        return masks

    def save(self, folder: str | os.PathLike[str]) -> None:
        """As `TextEncoder.save`; diffusers reads it as well.

        If the disk allows it, weights are hard links to the files they were read from. They take no space, but writing
        into one of the two files changes both.
        """
        self._refuse_words()
        for part in self.parts:
            part.tower.save(Path(folder) / f"text_encoder{part.kind.suffix}")
            tokenizer = Path(folder) / f"tokenizer{part.kind.suffix}"
            tokenizer.mkdir(parents=True, exist_ok=True)
            for file in part.vocabulary:
                put(file, tokenizer / file.name)

    def index(self) -> dict[str, list[str | None]]:
        present = {part.kind for part in self.parts}
        return {
            f"{name}{kind.suffix}": ["transformers", thing.__name__] if kind in present else [None, None]
            for kind in (CLIP_L, CLIP_G, T5)
            for name, thing in (("text_encoder", kind.tower), ("tokenizer", kind.tokenizer))
        }

    def fingerprint(self) -> dict[str, Any]:
        encoders = {}
        for slot, part in zip(self.slots, self.parts, strict=True):
            content = hashlib.sha256()
            for file in part.vocabulary:
                content.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
            encoders[slot.name] = {"weights": part.tower.fingerprint(), "tokenizer": content.hexdigest()}
        sizes = {"tokens_dim": self.tokens_dim, "pooled_dim": self.pooled_dim, "length": self.length}
        sizes["max_sequence_length"] = self.max_sequence_length
        more: dict[str, Any] = {"unread": sorted(self.unread)} if self.unread else {}
        if self.words:
            more["words"] = {word.name: digest(word.vectors) for word in self.words}
        return {"class": "SD3Text", "dtype": str(self.dtype).removeprefix("torch."), **sizes, **encoders, **more}

    def original_state(self) -> dict[str, Tensor]:
        """The encoders' tensors under the names of SD3's original single file, mapped into memory or with updates.

        Those with a scale (`storage.float8`) come decoded, in bfloat16 if most of the encoder has 8 bits.

        Raises:
            ValueError: CLIP-L's projection is not the identity, which that format assumes, or there are new words.
        """
        self._refuse_words()
        tensors = {}
        for part in self.parts:
            own = part.tower.tensors()
            for name, value in own.items():
                if part.kind is not CLIP_L or name != PROJECTION:
                    tensors[part.kind.prefix + name] = value
                elif not torch.equal(value.float(), torch.eye(len(value))):
                    raise ValueError(
                        "a single file cannot hold CLIP-L's projection, which is not the identity: save a folder"
                    )
            if part.kind is T5:
                tensors[T5.prefix + TABLE] = own["shared.weight"].clone()  # diffusers needs both names
        return tensors

    def receivers(self) -> list[Receiver]:
        towers = {part.kind: part.tower for part in self.parts}
        return [
            adapters.receiver(names, towers[kind].shapes if kind in towers else {}, partial(self._take, kind))
            for kind, names in zip((CLIP_L, CLIP_G, T5), adapters.ENCODERS, strict=True)
        ]

    def _take(self, kind: Kind, given: Updates) -> None:
        """Adds updates to an encoder, and forgets what was read and encoded without them."""
        (tower,) = (part.tower for part in self.parts if part.kind is kind)
        for module, updates in given.items():
            tower.updates.setdefault(module, []).extend(updates)
        if self.kept:
            self.kept.clear()
        self.rows = self._rows()

    def _refuse_words(self) -> None:
        """ValueError if there are new words, which no model folder holds."""
        if self.words:
            raise ValueError(f"a model holds no new words, such as {self.words[0].name}: keep their files beside it")

    def _taught(self, part: Part, words: Sequence[NewWord]) -> Part:
        """An encoder with new words. ValueError if one exists already."""
        fresh = [word for word in words if part.name in word.vectors]
        if not fresh:
            return part
        tokenizer = copy.deepcopy(part.tokenizer)
        Spelling(fresh, part.name).teach(tokenizer)
        rows = torch.cat([part.tower.rows, *(word.vectors[part.name] for word in fresh)])
        tower = part.tower.grown(rows, tokenizer)
        return part._replace(tokenizer=tokenizer, tower=tower, spelling=Spelling([*self.words, *words], part.name))

    def _rows(self) -> Rows:
        """The cache of encoded captions."""
        shapes = {"tokens": (self.length + self.max_sequence_length, self.tokens_dim), "pooled": (self.pooled_dim,)}
        return Rows(shapes, self.cache, json.dumps(self.fingerprint()) if self.cache else "")

    def _length(self, kind: Kind) -> int:
        return self.max_sequence_length if kind is T5 else self.length

    def _parts(
        self, towers: dict[Kind, Tower], tokenizers: dict[Kind, CLIPTokenizer | T5Tokenizer], folder: Path
    ) -> list[Part]:
        """The encoders with the places of their results; errors as the class."""
        widths = {kind: tower.config.hidden_size for kind, tower in towers.items()}
        pooled = {kind: towers[kind].config.projection_dim for kind in towers if kind is not T5}
        if widths.get(T5, self.tokens_dim) != self.tokens_dim:
            raise ValueError(f"T5 in {folder} is {widths[T5]} wide, but tokens_dim is {self.tokens_dim}")
        rest = self.pooled_dim - sum(pooled.values())  # the width of an absent CLIP is what the other one leaves
        if rest < 0 or (rest and len(pooled) == 2):
            found = " and ".join(f"{kind.title} {width}" for kind, width in pooled.items())
            raise ValueError(f"the pooled vectors in {folder}, {found}, do not fit pooled_dim {self.pooled_dim}")
        start = {CLIP_G: widths.get(CLIP_L, rest)}
        parts = []
        for kind, tower in towers.items():
            vocabulary = folder / f"tokenizer{kind.suffix}"
            first, last = start.get(kind, 0), start.get(kind, 0) + widths[kind]
            if last > self.tokens_dim:
                raise ValueError(
                    f"the CLIPs in {folder} are {last} wide, which is more than tokens_dim {self.tokens_dim}"
                )
            part = Part(
                kind,
                tower,
                tokenizers[kind],
                sorted(file for file in vocabulary.iterdir() if file.suffix in (".json", ".txt", ".model")),
                rows=slice(self.length, None) if kind is T5 else slice(self.length),
                columns=slice(first, last),
                pooled=slice(self.pooled_dim - pooled[kind], None) if kind is CLIP_G else slice(pooled.get(kind, 0)),
                spelling=Spelling((), ""),
            )
            tower.require(part.tokenizer, self._length(kind))
            parts.append(part)
        return parts

    def _run(self, ids: list[Tensor]) -> Text:
        """Encodes B captions, given as token numbers `(B, N)` for each encoder."""
        count = len(ids[0])
        tokens = torch.zeros(count, self.length + self.max_sequence_length, self.tokens_dim, dtype=self.dtype)
        pooled = torch.zeros(count, self.pooled_dim, dtype=self.dtype)
        for part, numbers in zip(self.parts, ids, strict=True):
            self._fill(part, numbers, tokens[:, part.rows, part.columns], pooled[:, part.pooled])
        return Text(tokens, pooled)

    def _fill(self, part: Part, ids: Tensor, tokens: Tensor, pooled: Tensor) -> None:
        """Writes one encoder's results for `ids (B, N)` into `tokens (B, N, width)` and `pooled (B, projection)`."""
        if part.name in self.unread:
            write_numbers(ids, tokens)
            return
        encoder = (self.kept or {}).get(part.kind) or part.tower.load(self.dtype, self.device)
        if self.kept is not None:
            self.kept[part.kind] = encoder
        for batch, *slots in zip(*(x.split(BATCH) for x in (ids, tokens, pooled)), strict=True):
            made = (run_t5 if part.kind is T5 else run_clip)(encoder, batch.to(self.device))
            for slot, values in zip(slots, made, strict=True):
                if not slot.copy_(values).isfinite().all():
                    cure = "take bfloat16 or float32" if self.dtype == torch.float16 else "its weights are damaged"
                    dtype = str(self.dtype).removeprefix("torch.")
                    raise ValueError(f"the {part.kind.title} encoder overflowed in {dtype}: {cure}")


def run_t5(encoder: T5EncoderModel, ids: Tensor) -> Text:
    """T5's final states for token numbers `(B, N)`, and pooled vectors of length 0."""
    with torch.autocast(ids.device.type, enabled=False):
        states = encoder(ids).last_hidden_state
    return Text(tokens=states, pooled=states.new_zeros(len(ids), 0))


def find(kind: Kind, folder: Path, single: Path | None) -> Tower | None:
    """The encoder in the single file, or else in the model folder; None if it is in neither."""
    source = folder / f"text_encoder{kind.suffix}"
    config = source / "config.json"
    if single and (weights := open_file(single).under(kind.prefix)):
        settings = read_json(config) if config.is_file() else config_from_shapes(kind, own_names(weights))
        return Tower(kind.tower, settings, single, kind.prefix, identity=kind is CLIP_L)
    return Tower(kind.tower, read_json(config), source) if named(kind, folder) else None


def named(kind: Kind, folder: Path) -> bool:
    """Whether a model folder has an encoder: its `model_index.json` names it, or without one its folder exists."""
    index, name = folder / "model_index.json", f"text_encoder{kind.suffix}"
    return read_json(index).get(name) not in (None, [None, None]) if index.is_file() else (folder / name).is_dir()


def config_from_shapes(kind: Kind, weights: Weights) -> dict[str, Any]:
    """The `config.json` of a single file's encoder, from the shapes of its tensors; ValueError if one is missing."""

    def layers(prefix: str) -> int:
        return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})

    try:
        if kind is T5:
            first = "encoder.block.0.layer"
            buckets, heads = weights.shape(f"{first}.0.SelfAttention.relative_attention_bias.weight")
            return {
                "model_type": "t5",
                "vocab_size": weights.shape("shared.weight")[0],
                "d_model": weights.shape("shared.weight")[1],
                "d_kv": weights.shape(f"{first}.0.SelfAttention.q.weight")[0] // heads,
                "d_ff": weights.shape(f"{first}.1.DenseReluDense.wo.weight")[1],
                "num_layers": layers("encoder.block."),
                "num_heads": heads,
                "relative_attention_num_buckets": buckets,
                "feed_forward_proj": "gated-gelu",  # as in T5 v1.1, the only version with these names
                "is_encoder_decoder": False,
            }
        entries, width = weights.shape("text_model.embeddings.token_embedding.weight")
        return {
            "model_type": "clip_text_model",
            "vocab_size": entries,
            "hidden_size": width,
            "intermediate_size": weights.shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
            "projection_dim": weights.shape(PROJECTION)[0] if PROJECTION in weights else width,
            "num_hidden_layers": layers("text_model.encoder.layers."),
            "num_attention_heads": max(1, width // 64),
            "max_position_embeddings": weights.shape("text_model.embeddings.position_embedding.weight")[0],
            "hidden_act": "quick_gelu" if kind is CLIP_L else "gelu",
            "eos_token_id": 2,  # which means the highest number in a caption, as in the released settings
        }
    except KeyError as error:
        raise ValueError(f"{weights.source} lacks {kind.prefix}{error.args[0]}") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{weights.source} holds no {kind.title}: {error}") from None
