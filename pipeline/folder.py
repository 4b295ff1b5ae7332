"""The model on disk: a folder in diffusers' SD3 layout, a released single file, or a LoRA on top of either."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from data.clip import CLIPImage
from data.latents import PREFIX as VAE_PREFIX
from data.latents import VAE, Codec
from data.latents import load_codec as load_continuous
from data.sizes import SIZE_FEATURES
from data.text.clip import CLIPText
from data.text.encoder import TextEncoder
from data.text.inversion import FOLDER, NewWord
from data.text.sd3 import SD3Text
from data.text.words import Words
from flow import path as paths
from flow.describe import restore
from flow.objective import Objective
from flow.target import Target
from flow.variance import LearnedVariance
from mmdit import adapters, checkpoint, control, lora
from mmdit.model import MMDiT
from mmdit.network import Network
from pipeline import networks
from pipeline.networks import parts_of
from pipeline.residual import Regressor
from pipeline.sampling import Sampling
from storage import updates
from storage.checksums import verify, write_checksums
from storage.files import commit_json, replace_folder
from storage.modules import CONFIG
from storage.text import parse_json, read_json
from storage.updates import Adapter
from storage.weights import DType, open_file
from tokens import codec as codes
from tokens.process import NextCode

INDEX = "model_index.json"
SIZED = "size_conditioning"  # in the index, if the network's pooled vector also holds sizes
SCHEDULER = Path("scheduler") / "scheduler_config.json"
IMAGE_ENCODER = "image_encoder"  # the subfolder of what makes the image embeddings in the pooled vector
REGRESSOR = "regressor"  # the subfolder of a regressor: its network as in a model folder, and the residual's scale
OURS = {"shift", "path", "target", "variance", "sampling"}  # keys of a scheduler config that this project wrote
OTHER_GRIDS = (
    "use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
    "stochastic_sampling", "shift_terminal",
)  # fmt: skip
FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"
RELEASED_SHIFT = 3.0  # shift of all released models; a single file does not hold it


class Parts(NamedTuple):
    """The parts of a pipeline."""

    network: Network
    objective: Objective
    codec: Codec
    text: TextEncoder
    sampling: Sampling
    regressor: Regressor | None = None
    image_encoder: CLIPImage | None = None

    def pooled_dim(self, sized: bool) -> int:
        """Numbers of the pooled vector: text, perhaps an image embedding, perhaps sizes and crops (`data.sizes`)."""
        image = self.image_encoder.channels if self.image_encoder else 0
        return self.text.pooled_dim + (SIZE_FEATURES if sized else 0) + image

    @property
    def sized(self) -> bool:
        """Whether the pooled vector of the network also holds sizes and crops."""
        return self.network.pooled_dim == self.pooled_dim(True)


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Args:
        device: device of network and codec.
        dtype: type of network and VAE; "stored" keeps each as it is stored. None means float32 on a CPU, and elsewhere
            the stored type of the network.
        parts: a model folder with what a single file lacks: the tokenizers, perhaps text encoders and VAE.
        lora: LoRAs and the like of any tool (`storage.updates`), files or folders, each as PATH or PATH:STRENGTH, which
            are merged into the network and the text encoders of Stable Diffusion 3 in this order.
        embedding: new words of the text encoders (`data.text.inversion`), each as FILE or FILE:WORD.
        text_device: device of the text encoders; None means `device`.
        text_dtype: type of Stable Diffusion 3's text encoders; None means `dtype`.
        max_sequence_length: tokens that T5 reads, at most 512; None means as many as its tokenizer, at most 256.
        text_cache: a folder that keeps encoded prompts.
    """

    device: str = "cpu"
    dtype: DType | Literal["stored"] | None = None
    parts: Path | None = None
    lora: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    text_device: str | None = None
    text_dtype: DType | None = None
    max_sequence_length: int | None = None
    text_cache: Path | None = None

    def dtype_of(self, stored: torch.dtype) -> DType:
        """The type in memory of weights, from the type in which they are stored."""
        if self.dtype and self.dtype != "stored":
            return self.dtype
        if stored == torch.float32 or (self.device == "cpu" and self.dtype != "stored"):
            return "float32"
        return "float16" if stored == torch.float16 else "bfloat16"


def read(path: Path, options: LoadOptions | None = None) -> Parts:
    """Loads a model: a model folder, a single file, or a folder with a LoRA that names its base model.

    Raises:
        ValueError, FileNotFoundError: in one line, if a file is missing, truncated or of another kind.
    """
    options = options or LoadOptions()
    words = [NewWord.read(file) for file in options.embedding]
    given = [Adapter.parse(text) for text in options.lora]
    for update in given:
        updates.find(update.path)  # fails before the model is read
    if path.is_file():
        parts = _read_file(path, options)
    elif (path / INDEX).is_file():
        parts = _read_folder(path, options)
    elif (path / updates.CONFIG).is_file():
        verify(path)
        own = (str(path),) if updates.holds(path) else ()
        embedding = (*map(str, sorted((path / FOLDER).glob("*.safetensors"))), *options.embedding)
        return read(base_of(path), replace(options, lora=(*own, *options.lora), embedding=embedding))
    else:
        raise FileNotFoundError(f"{path} is no model folder: it has no {INDEX}")
    if words:
        if not isinstance(parts.text, SD3Text):
            raise ValueError(f"{path} has no text encoders of Stable Diffusion 3: leave the new words out")
        parts = parts._replace(text=parts.text.taught(words))
    if given:
        if not isinstance(parts.network, MMDiT):
            raise ValueError(
                f"{path} is a {type(parts.network).__name__}, and only an MMDiT takes a LoRA: leave it out"
            )
        adapters.merge(parts.network, given, parts.text.receivers())
        for update in given:
            if process := learned(update.path):
                parts = parts._replace(objective=process[0], sampling=process[1])
    return parts


def base_of(folder: Path) -> Path:
    """The model that a LoRA's folder names. ValueError if it names none, or another LoRA."""
    base = read_json(folder / updates.CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{folder / updates.CONFIG} lacks base_model_name_or_path: give --model BASE --lora {folder}")
    if (Path(base) / updates.CONFIG).is_file():
        raise ValueError(f"{folder / updates.CONFIG} names {base}, which is a LoRA and no model: name a whole model")
    return Path(base)


def _read_folder(folder: Path, options: LoadOptions) -> Parts:
    verify(folder)
    index = read_json(folder / INDEX)
    kind = index.get("_class_name")
    if kind != "Pipeline" and not str(kind).startswith("StableDiffusion3"):
        raise ValueError(f"{folder} is a {kind}; this project reads StableDiffusion3Pipeline and its own models")
    if options.parts:
        raise ValueError(f"--parts is for single files, and {folder} is a model folder: leave it out")
    objective, sampling = read_process(folder / SCHEDULER)
    network, dtype = networks.load(folder, options.device, options.dtype_of)
    regressor = _read_regressor(folder / REGRESSOR, options) if REGRESSOR in index else None
    codec = load_codec(folder / "vae", None if options.dtype == "stored" else dtype).to(options.device)
    image_encoder = None
    if index.get(IMAGE_ENCODER, (None,))[0] == CLIPImage.__module__:
        image_encoder = CLIPImage(folder / IMAGE_ENCODER).to(options.device)
    text: TextEncoder
    if "text_encoder_3" in index:  # null if T5 is absent; a model with two CLIPs and no such key is no SD3
        pooled_dim = network.pooled_dim - (SIZE_FEATURES if index.get(SIZED) else 0)
        pooled_dim -= image_encoder.channels if image_encoder else 0
        text = _triple(folder, network.text_dim, pooled_dim, options, dtype)
    else:
        if options.text_dtype or options.text_cache or options.max_sequence_length:
            raise ValueError(
                f"{folder} has no encoders of Stable Diffusion 3: leave out text dtype, cache and sequence length"
            )
        kind = CLIPText if "text_encoder" in index else Words
        text = kind(folder).to(options.text_device or options.device)
    return Parts(network, objective, codec, text, sampling, regressor, image_encoder)


def _read_regressor(folder: Path, options: LoadOptions) -> Regressor:
    scale = read_json(folder / CONFIG).get("scale")
    if not isinstance(scale, int | float):
        raise ValueError(f"{folder / CONFIG} lacks a number scale: save the model again")
    return Regressor(networks.load(folder, options.device, options.dtype_of)[0], scale)


def load_codec(folder: Path, dtype: DType | None = "float32") -> Codec:
    """The codec of a folder: of codes (`tokens.codec.load`), or another (`data.latents.load_codec`)."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"no codec config at {folder / CONFIG}")
    return codes.load(folder) or load_continuous(folder, dtype)


def read_network(folder: Path, options: LoadOptions) -> tuple[Network, Objective, Codec]:
    """Loads network, objective and codec of a model folder, without its text encoders. Errors are those of `read`."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} is no model folder: it has no {INDEX}")
    if (folder / REGRESSOR).is_dir():
        raise ValueError(f"{folder} draws the residual of its regressor, and a model of whole pictures is needed")
    verify(folder, "transformer", control.FOLDER, "unet", "scheduler", "vae")
    objective, _ = read_process(folder / SCHEDULER)
    return networks.load(folder, options.device, options.dtype_of)[0], objective, load_codec(folder / "vae")


def _read_file(file: Path, options: LoadOptions) -> Parts:
    weights = open_file(file)
    own = weights.under(checkpoint.PREFIX) or weights
    checkpoint.infer(own)  # a foreign file is the first error to report
    if options.parts is None:
        raise ValueError(
            f"{file} is a single file, which holds no tokenizers: give --parts FOLDER with tokenizer/, tokenizer_2/ "
            "and tokenizer_3/, such as a Stable Diffusion 3 folder of diffusers"
        )
    verify(options.parts)
    dtype = options.dtype_of(own.dtype)
    network = checkpoint.load(file, dtype, options.device)
    with_vae = bool(weights.under(VAE_PREFIX))
    codec_dtype = None if options.dtype == "stored" else dtype
    codec = VAE(file, codec_dtype) if with_vae else load_codec(options.parts / "vae", codec_dtype)
    text = _triple(options.parts, network.text_dim, network.pooled_dim, options, dtype, file)
    objective, sampling = process_of(options.parts)
    return Parts(network, objective, codec.to(options.device), text, sampling)


def _triple(
    folder: Path, tokens_dim: int, pooled_dim: int, options: LoadOptions, dtype: DType, file: Path | None = None
) -> SD3Text:
    return SD3Text(
        folder, tokens_dim, pooled_dim, options.max_sequence_length, options.text_dtype or dtype,
        options.text_device or options.device, file, options.text_cache,
    )  # fmt: skip


def process_of(path: Path) -> tuple[Objective, Sampling]:
    """Objective and sampling of a model folder; those of the released models for a file, which does not hold them."""
    if (path / SCHEDULER).is_file():
        return read_process(path / SCHEDULER)
    return Objective(shift=RELEASED_SHIFT), Sampling(spacing="flow_match")


def process_note(objective: Objective, sampling: Sampling, base: Path) -> dict[str, str]:
    """The metadata of a LoRA's file that say how it is sampled; empty if as its base."""
    own = describe_process(objective, sampling)
    return {} if own == describe_process(*process_of(base)) else {lora.PROCESS: json.dumps(own)}


def learned(path: Path) -> tuple[Objective, Sampling] | None:
    """How a LoRA is sampled by its own metadata; None if they do not say. ValueError if they are damaged."""
    if (path / FOLDER).is_dir() and not updates.holds(path):
        return None  # new words alone
    file = updates.find(path)
    note = open_file(file, unwrap=False).metadata.get(lora.PROCESS)
    return None if note is None else _restored(parse_json(note, file), file)


def read_process(file: Path) -> tuple[Objective, Sampling]:
    """Reads objective and sampling from a scheduler's config, of this project or of a released model.

    Raises:
        ValueError, FileNotFoundError: in one line, if the config is missing, damaged or not supported.
    """
    config = read_json(file)
    if config.get("_class_name") == FLOW_MATCH and "path" not in config:
        unsupported = [key for key in OTHER_GRIDS if config.get(key)]
        if config.get("num_train_timesteps", 1000) != 1000:
            unsupported.append("num_train_timesteps other than 1000")
        if unsupported:
            raise ValueError(f"{file} sets {', '.join(unsupported)}, which no Stable Diffusion 3 uses: remove it")
        config |= {"path": {"class": "RectifiedFlow"}, "target": {"class": "Velocity"}, "variance": None}
        config |= {"shift": config.get("shift", 1.0), "sampling": {"spacing": "flow_match"}}
    return _restored(config, file)


def _restored(config: Any, file: Path) -> tuple[Objective, Sampling]:
    """Objective and sampling that `describe_process` described. ValueError, naming the file, if it did not."""
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no description of a process: save it again")
    if missing := sorted(OURS - config.keys()):
        raise ValueError(f"{file} lacks {', '.join(missing)}: another program or version wrote it; export it anew")
    try:
        if vocabulary := config.get("vocabulary"):
            return NextCode(vocabulary), Sampling(**config["sampling"])
        path, target = restore(paths.Path, config["path"]), restore(Target, config["target"])
        shifts = {"shift": config["shift"], "shift_area": config.get("shift_area")}
        for name, value in shifts.items():
            number = type(value) in (int, float) and value < math.inf
            if not number and not (value is None and name == "shift_area"):
                raise ValueError(f"{name} must be a number, got {value!r:.80}")
        objective = Objective(path, target, **shifts)
        if variance := config["variance"]:
            if variance.get("class") != LearnedVariance.__name__:
                raise ValueError(f"there is no learned variance {variance}: only {LearnedVariance.__name__} is known")
            objective = LearnedVariance(path, target, vlb_weight=variance["weight"], **shifts)
        return objective, Sampling(**config["sampling"])
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None


def write(parts: Parts, folder: Path, more: Mapping[str, str] | None = None) -> None:
    """Writes the model folder, safetensors and JSON only, in diffusers' SD3 layout.

    The folder is written under another name and then renamed, so that a full disk leaves the old one as it was.

    Args:
        parts: the model.
        folder: the folder to write.
        more: further text files in the folder, name → content.
    """

    def fill(new: Path) -> None:
        stored = parts_of(parts.network)
        for subfolder, part in stored.items():
            part.save(new / subfolder)
        parts.codec.save(new / "vae")
        parts.text.save(new)
        scheduler = describe_process(parts.objective, parts.sampling)
        commit_json(new / SCHEDULER, scheduler)
        ours = scheduler["_class_name"] == "Objective"
        index: dict[str, Any] = {
            **{subfolder: part.entry for subfolder, part in stored.items()},
            "scheduler": ["flow.objective" if ours else "diffusers", scheduler["_class_name"]],
            "vae": parts.codec.index(),
            **parts.text.index(),
        }
        if parts.sized:
            index[SIZED] = True
        if parts.regressor:
            for subfolder, part in parts_of(parts.regressor.network).items():
                part.save(new / REGRESSOR / subfolder)
            commit_json(new / REGRESSOR / CONFIG, {"scale": parts.regressor.scale})
            index[REGRESSOR] = ["pipeline.residual", "Regressor"]
        if parts.image_encoder:
            parts.image_encoder.save(new / IMAGE_ENCODER)
            index[IMAGE_ENCODER] = parts.image_encoder.index()
        whole = opens_in_diffusers(parts)
        if whole:
            index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}  # diffusers requires them
        theirs = "StableDiffusion3ControlNetPipeline" if control.FOLDER in stored else "StableDiffusion3Pipeline"
        commit_json(new / INDEX, {"_class_name": theirs if whole else "Pipeline", **index})
        for name, content in (more or {}).items():
            (new / name).write_text(content, encoding="utf-8")
        files = {file for file in new.rglob("*") if file.is_file()}
        write_checksums(new, files - {new / name for name in more or {}})

    replace_folder(folder, fill)


def opens_in_diffusers(parts: Parts) -> bool:
    """Whether one of diffusers' pipelines of Stable Diffusion 3 can load all parts of the model."""
    process = describe_process(parts.objective, parts.sampling)["_class_name"]
    return (
        process == FLOW_MATCH
        and all(
            part.entry in (["diffusers", checkpoint.DIFFUSERS_CLASS], ["diffusers", control.DIFFUSERS_CLASS])
            for part in parts_of(parts.network).values()
        )
        and parts.codec.index()[0] == "diffusers"
        and "text_encoder_3" in parts.text.index()
        and not parts.sized
        and parts.regressor is None
        and parts.image_encoder is None
    )


def describe_process(objective: Objective, sampling: Sampling) -> dict[str, Any]:
    """The scheduler's config. Diffusers can read it if the process is rectified flow."""
    described = objective.describe()
    theirs = (described["path"], described["target"]) == ({"class": "RectifiedFlow"}, {"class": "Velocity"})
    return {
        "_class_name": FLOW_MATCH if theirs else "Objective",
        "num_train_timesteps": 1000,
        **described,
        "sampling": asdict(sampling),
    }


def single_file(parts: Parts) -> dict[str, Tensor]:
    """The model's tensors, named as in the released single files: the network, and VAE and text encoders of SD3.

    Raises:
        ValueError: the single-file format cannot describe the network or the VAE, or there is a part that it has not.
    """
    network = parts.network
    for name in (REGRESSOR, IMAGE_ENCODER):
        if getattr(parts, name):
            raise ValueError(f"the single-file format holds no {name.replace('_', ' ')}: write a folder")
    if not isinstance(network, MMDiT):
        raise ValueError(f"the single-file format holds an MMDiT, not a {type(network).__name__}: write a folder")
    return checkpoint.single_file(network) | parts.codec.original_state() | parts.text.original_state()
