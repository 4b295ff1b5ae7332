"""The model on disk: a folder in diffusers' SD3 layout, a released single file, or a LoRA on top of either."""

import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from baselines.dit import KINDS, DiffusionTransformer
from data.latents import PREFIX as VAE_PREFIX
from data.latents import VAE, Codec, load_codec
from data.sizes import SIZE_FEATURES
from data.text.clip import CLIPText
from data.text.encoder import TextEncoder
from data.text.sd3 import SD3Text
from flow import path as paths
from flow.objective import Objective
from flow.path import RectifiedFlow
from flow.target import Target, Velocity
from flow.variance import LearnedVariance
from mmdit import checkpoint, lora
from mmdit.model import MMDiT
from pipeline.sampling import Sampling
from storage.weights import DType, dtype_of, open_file, open_folder, read_json, write_json

if TYPE_CHECKING:
    from baselines.unet import UNet  # diffusers is slow to import

INDEX = "model_index.json"
SIZED = "size_conditioning"  # in the index, if the network's pooled vector also tells sizes
SCHEDULER = Path("scheduler") / "scheduler_config.json"
OURS = {"shift", "path", "target", "variance", "sampling"}  # of the scheduler's config, if this project wrote it
OTHER_GRIDS = (
    "use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
    "stochastic_sampling", "shift_terminal",
)  # fmt: skip
RELEASED_SHIFT = 3.0  # of all released models; a single file does not tell it

# A network has: in_channels, out_channels, text_dim, pooled_dim; sample_size, the side of the latents in its training;
# unit, of which a latent's height and width are multiples; largest, the most that they can be, or none.
Network: TypeAlias = "MMDiT | DiffusionTransformer | UNet"


class Parts(NamedTuple):
    """What a pipeline is made of."""

    network: Network
    objective: Objective
    codec: Codec
    text: TextEncoder
    sampling: Sampling


@dataclass(frozen=True)
class Reading:
    """How a model is read.

    Args:
        device: of network and codec.
        dtype: of network and VAE; "stored" is each as stored, none is float32 on a CPU and elsewhere as the network
            is stored.
        parts: a model folder with what a single file lacks: the tokenizers, perhaps text encoders and VAE.
        lora: a LoRA in diffusers' layout, a file or a folder, to be merged into the network.
        text_device: where the text encoders compute; none is `device`.
        text_dtype: of Stable Diffusion 3's text encoders; none is `dtype`.
        max_sequence_length: tokens that T5 reads, at most 512.
        text_cache: a folder where encoded prompts are kept.
    """

    device: str = "cpu"
    dtype: DType | Literal["stored"] | None = None
    parts: Path | None = None
    lora: Path | None = None
    text_device: str | None = None
    text_dtype: DType | None = None
    max_sequence_length: int = 256
    text_cache: Path | None = None

    def dtype_of(self, stored: torch.dtype) -> DType:
        """The type in memory of weights that are stored in another."""
        if self.dtype and self.dtype != "stored":
            return self.dtype
        if stored == torch.float32 or (self.device == "cpu" and self.dtype != "stored"):
            return "float32"
        return "float16" if stored == torch.float16 else "bfloat16"


def read(path: Path, how: Reading | None = None) -> Parts:
    """Reads a model: a model folder, a single file, or a folder with a LoRA that names the model it belongs to.

    Raises:
        ValueError, FileNotFoundError: in one line, if anything is missing, truncated or of another kind.
    """
    how = how or Reading()
    if path.is_file():
        parts = _read_file(path, how)
    elif (path / INDEX).is_file():
        parts = _read_folder(path, how)
    elif (path / lora.FILE).is_file():
        base = read_json(path / lora.CONFIG).get("base_model_name_or_path")
        if not isinstance(base, str):
            raise ValueError(
                f"{path / lora.CONFIG} does not tell base_model_name_or_path: give --model BASE --lora {path}"
            )
        if (Path(base) / lora.FILE).is_file():
            raise ValueError(f"{path / lora.CONFIG} names {base}, which is a LoRA and no model")
        if how.lora:
            raise ValueError(f"{path} is a LoRA itself: give its base as --model, and one of the two as --lora")
        return read(Path(base), replace(how, lora=path))
    else:
        raise FileNotFoundError(f"{path} is no model folder: it has no {INDEX}")
    if how.lora:
        if not isinstance(parts.network, MMDiT):
            raise ValueError(f"{path} is a {type(parts.network).__name__}, and only an MMDiT takes a LoRA")
        lora.merge(parts.network, how.lora)
    return parts


def _read_folder(folder: Path, how: Reading) -> Parts:
    index = read_json(folder / INDEX)
    kind = index.get("_class_name")
    if kind != "Pipeline" and not str(kind).startswith("StableDiffusion3"):
        raise ValueError(f"{folder} is a {kind}; this project reads StableDiffusion3Pipeline and its own models")
    if how.parts:
        raise ValueError(f"--parts is for single files, and {folder} is a model folder")
    objective, sampling = read_process(folder / SCHEDULER)
    network, dtype = _read_network(folder, how)
    codec = load_codec(folder / "vae", None if how.dtype == "stored" else dtype).to(how.device)
    text: TextEncoder
    if "text_encoder_3" in index:  # with null where it is absent; two CLIPs alone are another model's
        pooled_dim = network.pooled_dim - (SIZE_FEATURES if index.get(SIZED) else 0)
        text = _triple(folder, network.text_dim, pooled_dim, how, dtype)
    else:
        if how.text_dtype or how.text_cache or how.max_sequence_length != Reading.max_sequence_length:
            raise ValueError(
                f"text dtype, cache and length are for Stable Diffusion 3's encoders, not that of {folder}"
            )
        text = CLIPText(folder).to(how.text_device or how.device)
    return Parts(network, objective, codec, text, sampling)


def _read_network(folder: Path, how: Reading) -> tuple[Network, DType]:
    """The network of a model folder and the type of its weights; what the codec's are to be, too."""
    if (folder / "unet").is_dir():
        from baselines.unet import UNet

        if how.dtype not in (None, "stored", "float32"):
            raise ValueError(f"{folder} holds a UNet, which is read in float32 only")
        return UNet.load(folder / "unet").to(how.device), "float32"
    place = folder / "transformer"
    dtype = how.dtype_of(open_folder(place, checkpoint.STEM).dtype)
    kind = read_json(place / checkpoint.CONFIG).get("_class_name")
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind].load(place).to(how.device, dtype_of(dtype)), dtype
    return checkpoint.load(place, dtype, how.device), dtype


def read_network(folder: Path, how: Reading) -> tuple[Network, Objective, Codec]:
    """A model folder without its text encoders: for one that works with those of another. Errors as `read`'s."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} is no model folder: it has no {INDEX}")
    objective, _ = read_process(folder / SCHEDULER)
    return _read_network(folder, how)[0], objective, load_codec(folder / "vae")


def _read_file(file: Path, how: Reading) -> Parts:
    weights = open_file(file)
    own = weights.under(checkpoint.PREFIX) or weights
    checkpoint.infer(own)  # a foreign file is told first
    if how.parts is None:
        raise ValueError(
            f"{file} is a single file, which holds no tokenizers: give --parts FOLDER with tokenizer/, tokenizer_2/ "
            "and tokenizer_3/, such as a Stable Diffusion 3 folder of diffusers"
        )
    dtype = how.dtype_of(own.dtype)
    network = checkpoint.load(file, dtype, how.device)
    with_vae = bool(weights.under(VAE_PREFIX))
    codec_dtype = None if how.dtype == "stored" else dtype
    codec = VAE(file, codec_dtype) if with_vae else load_codec(how.parts / "vae", codec_dtype)
    text = _triple(how.parts, network.text_dim, network.pooled_dim, how, dtype, file)
    if (how.parts / SCHEDULER).is_file():
        objective, sampling = read_process(how.parts / SCHEDULER)
    else:
        objective, sampling = Objective(shift=RELEASED_SHIFT), Sampling(spacing="flow_match")
    return Parts(network, objective, codec.to(how.device), text, sampling)


def _triple(
    folder: Path, tokens_dim: int, pooled_dim: int, how: Reading, dtype: DType, file: Path | None = None
) -> SD3Text:
    return SD3Text(
        folder, tokens_dim, pooled_dim, how.max_sequence_length, how.text_dtype or dtype,
        how.text_device or how.device, file, how.text_cache,
    )  # fmt: skip


def read_process(file: Path) -> tuple[Objective, Sampling]:
    """What a scheduler's config says of process and sampling: this project's own, or a released model's.

    Raises:
        ValueError, FileNotFoundError: in one line, if it says what cannot be done here.
    """
    config = read_json(file)
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler" and "path" not in config:
        beyond = [key for key in OTHER_GRIDS if config.get(key)]
        if config.get("num_train_timesteps", 1000) != 1000:
            beyond.append("num_train_timesteps other than 1000")
        if beyond:
            raise ValueError(f"{file} asks for what no Stable Diffusion 3 does: {', '.join(beyond)}")
        config |= {"path": {"class": "RectifiedFlow"}, "target": {"class": "Velocity"}, "variance": None}
        config |= {"shift": config.get("shift", 1.0), "sampling": {"spacing": "flow_match"}}
    if missing := sorted(OURS - config.keys()):
        raise ValueError(f"{file} lacks {', '.join(missing)}: another program or version wrote it")
    try:
        objective = Objective(
            restore(paths.Path, config["path"]),
            restore(Target, config["target"]),
            shift=config["shift"],
            shift_area=config.get("shift_area"),
            variance=config["variance"] and restore(LearnedVariance, config["variance"]),
        )
        return objective, Sampling(**config["sampling"])
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None


def write(parts: Parts, folder: Path, more: Mapping[str, str] | None = None) -> None:
    """Writes the model folder, safetensors and JSON only, in diffusers' SD3 layout.

    The folder is written beside its place and then renamed, so that a full disk leaves the old one as it was.

    Args:
        parts: what to write.
        folder: where to.
        more: text files to lay beside it, name → content.
    """

    def fill(new: Path) -> None:
        network = parts.network
        if isinstance(network, MMDiT):
            checkpoint.save(network, new / "transformer")
            theirs = not checkpoint.beyond(network)
            kind = ["diffusers", checkpoint.THEIRS] if theirs else ["mmdit.model", checkpoint.OWN]
            index: dict[str, Any] = {"transformer": kind}
        elif isinstance(network, DiffusionTransformer):
            network.save(new / "transformer")
            index = {"transformer": ["baselines.dit", type(network).__name__]}
        else:
            network.save(new / "unet")
            index = {"unet": ["diffusers", "UNet2DConditionModel"]}
        parts.codec.save(new / "vae")
        parts.text.save(new)
        scheduler = describe_process(parts.objective, parts.sampling)
        write_json(scheduler, new / SCHEDULER)
        flow_match = scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
        vae = isinstance(parts.codec, VAE)
        sized = network.pooled_dim != parts.text.pooled_dim
        whole = flow_match and vae and isinstance(parts.text, SD3Text) and not sized
        whole = whole and isinstance(network, MMDiT) and theirs
        index |= {
            "scheduler": ["diffusers" if flow_match else "flow.objective", scheduler["_class_name"]],
            "vae": ["diffusers", "AutoencoderKL"] if vae else ["data.latents", type(parts.codec).__name__],
            **parts.text.index(),
        }
        if sized:
            index[SIZED] = True
        if whole:
            index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}  # diffusers asks for them
        write_json({"_class_name": "StableDiffusion3Pipeline" if whole else "Pipeline", **index}, new / INDEX)
        for name, content in (more or {}).items():
            (new / name).write_text(content, encoding="utf-8")

    replace_folder(folder, fill)


def describe_process(objective: Objective, sampling: Sampling) -> dict[str, Any]:
    """The scheduler's config, which diffusers reads, too, if the process is rectified flow."""
    flow_match = isinstance(objective.path, RectifiedFlow) and isinstance(objective.target, Velocity)
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler" if flow_match else "Objective",
        "num_train_timesteps": 1000,
        "shift": objective.shift,
        "shift_area": objective.shift_area,
        "path": describe(objective.path),
        "target": describe(objective.target),
        "variance": objective.variance and describe(objective.variance),
        "sampling": asdict(sampling),
    }


def single_file(parts: Parts) -> dict[str, Tensor]:
    """The model's tensors as released single files name them: of the network, and of VAE and text if they are SD3's.

    Raises:
        ValueError: if the format could not tell what the network or the VAE is.
    """
    if not isinstance(parts.network, MMDiT):
        raise ValueError(f"the single-file format holds an MMDiT, not a {type(parts.network).__name__}")
    tensors = checkpoint.single_file(parts.network)
    if isinstance(parts.codec, VAE):
        tensors |= parts.codec.original_state()
    if isinstance(parts.text, SD3Text):
        tensors |= parts.text.original_state()
    return tensors


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a new folder and puts it in the place of an old one. OSError if it cannot; the old one is then unharmed."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        fill(new)
        for file in new.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"could not write {folder}: {error}") from error
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def describe(thing: Any) -> dict[str, Any]:
    """A path or target as its class and its constructor's arguments, which it must keep under their own names."""
    names = list(inspect.signature(type(thing)).parameters)
    values = {name: getattr(thing, name) for name in names}
    nested = {name: describe(v) if isinstance(v, paths.Path) else v for name, v in values.items()}
    return {"class": type(thing).__name__} | nested


def restore(base: type, described: Any) -> Any:
    """What `describe` described, if it is a `base`; ValueError or TypeError otherwise."""
    known, found = [base], {}
    while known:
        found[known[0].__name__] = known[0]
        known = [*known[1:], *known[0].__subclasses__()]
    if not isinstance(described, dict) or described.get("class") not in found:
        raise ValueError(f"there is no {base.__name__} {described}")
    values = {k: restore(paths.Path, v) if isinstance(v, dict) else v for k, v in described.items() if k != "class"}
    return found[described["class"]](**values)
