"""A drawn picture as a workflow of ComfyUI, which draws it there with the same settings.

It has the format of ComfyUI's API: number of a node → its class and inputs, where `[number, output]` is a link. The
server takes it at `/prompt`, and the page opens it as a file; only the places of the nodes on the page are not in it.
Nodes and their inputs are those of ComfyUI's core, without custom nodes.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data.drawn import recorded
from data.latents import PREFIX as VAE_PREFIX
from data.raw.pictures import PictureError, size_of
from data.text.adapters import ENCODERS as TEXT
from data.text.inversion import FOLDER
from data.text.sd3 import CLIP_G, CLIP_L, T5, T5_LENGTH, Kind, named
from flow.objective import Objective
from mmdit import checkpoint
from mmdit.lora import PREFIX
from pipeline.folder import FLOW_MATCH, INDEX, base_of, describe_process, learned, process_of
from pipeline.sampling import SAMPLERS, Sampling, parse_choice
from storage import updates
from storage.models import find_model
from storage.text import read_json
from storage.updates import Adapter
from storage.weights import open_file

Link = list[str | int]
OTHER_FLAGS = (  # of `sample.py`, for which no core node does the same
    "mask", "picture", "prior", "control", "autoguidance", "refiner", "classifier", "clip_guidance", "upscale",
    "embedding",
)  # fmt: skip
SIZES = {"in_channels": 16, "patch_size": 2, "text_dim": 4096, "pooled_dim": 2048}  # that ComfyUI's SD3 has
VAE = {  # likewise of its VAE
    "_class_name": "AutoencoderKL", "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "block_out_channels": [128, 256, 512, 512],
}  # fmt: skip
ENCODERS = {CLIP_L: "clip_l", CLIP_G: "clip_g", T5: "t5xxl_fp16"}  # and how their files are called
CLIP_NAMES = list(enumerate(ENCODERS.values(), start=1))
READ_OTHERWISE = ("{", "}", "//", "/*", "embedding:")  # choices, comments and learned words in a prompt
TIMES = 1000  # sigmas of its discrete schedule
GENERIC = ("model", "lora", "pytorch_lora_weights", "adapter_model")  # names that do not tell what something is
LARGEST, MOST, MOST_SKIP = 16384, 100, 10  # sides, numbers and scales of skip-layer guidance that its nodes take


class Workflow(NamedTuple):
    """The nodes, and the files that they read: place in ComfyUI's folder → where the file comes from."""

    nodes: dict[str, dict[str, Any]]
    files: dict[str, str]

    def add(self, kind: str, **inputs: Any) -> str:
        """Adds a node of a class with its inputs. Returns its number."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs}
        return number

    def needs(self, folder: str, path: Path, source: str) -> str:
        """Adds a file that is called as `path` is. Returns its name. ValueError if another one is called so."""
        name = f"{title(path)}.safetensors"
        if self.files.setdefault(f"{folder}/{name}", source) != source:
            raise ValueError(f"{path} and another file would both be {folder}/{name} in ComfyUI: rename one of them")
        return name


class Model(NamedTuple):
    """What a picture was drawn with.

    Attributes:
        path: a single file or a model folder.
        updates: the LoRAs, in order.
        encoders: whether its single file, or that of an export, holds all text encoders.
    """

    path: Path
    updates: list[Adapter]
    encoders: bool


def workflow(picture: Path) -> Workflow:
    """The workflow that draws a picture of `sample.py` again.

    Raises:
        FileNotFoundError: the picture, its model or a LoRA is not there.
        ValueError: in one line, what cannot be said to ComfyUI.
    """
    flags = recorded(picture)
    if given := [name for name in OTHER_FLAGS if flags.get(name)]:
        raise ValueError(f"{picture} was drawn with --{given[0].replace('_', '-')}, which ComfyUI has no core node for")
    prompts = [escaped(flags["prompt"], picture), escaped(flags.get("negative", ""), picture)]
    try:
        sampling = sampling_of(flags)
        shift, seed, height, width = float(flags["shift"]), *(int(flags[key]) for key in ("seed", "height", "width"))
        tokens, strength = int(flags.get("max_sequence_length", T5_LENGTH)), float(flags.get("strength", 1))
        path, loras = Path(flags["model"]), [str(text) for text in flags.get("lora", ())]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{picture} says wrongly how it was drawn, {error}: give a PNG of sample.py") from None
    check(picture, sampling, shift, height, width)
    parts, image = Path(flags.get("parts", "")), Path(flags["image"]) if "image" in flags else None
    model = model_of(path, loras, parts)
    _, times = sampling.walk(objective_of(model, parts), shift, strength)
    if not image and times[0] != 1:
        raise ValueError(f"{picture}: its times begin at {times[0]:g}, where ComfyUI would begin with less noise")

    made = Workflow({}, {})
    source = str(model.path)
    if model.path.is_dir():
        source = f"python -m pipeline export {model.path} --format single-file --out FOLDER"
    loader = made.add("CheckpointLoaderSimple", ckpt_name=made.needs("models/checkpoints", model.path, source))
    network: Link = [loader, 0]
    for update in model.updates:
        file = updates.find(update.path)
        added = {"lora_name": made.needs("models/loras", file, str(file)), "strength_model": update.strength}
        network = [made.add("LoraLoaderModelOnly", model=network, **added), 0]
    network = [made.add("ModelSamplingSD3", model=network, shift=shift), 0]
    if interval := sampling.skip_times(times):
        start, end = shares(times, interval, shift)
        skip = {"scale": sampling.skip_scale, "start_percent": start, "end_percent": end}
        layers = ", ".join(map(str, sampling.skip_layers))
        network = [made.add("SkipLayerGuidanceSD3", model=network, layers=layers, **skip), 0]
    clip: Link = [loader, 1]
    if not model.encoders:
        clip = [made.add("TripleCLIPLoader", **{f"clip_name{i}": f"{n}.safetensors" for i, n in CLIP_NAMES}), 0]
        for _, name in CLIP_NAMES:
            made.needs("models/text_encoders", Path(name), f"as released, or of {parts}")
    clip = [made.add("T5TokenizerOptions", clip=clip, min_padding=0, min_length=tokens), 0]
    positive, negative = ([made.add("CLIPTextEncode", text=text, clip=clip), 0] for text in prompts)
    guider = made.add("CFGGuider", model=network, positive=positive, negative=negative, cfg=sampling.guidance)
    if image:
        check_image(image, height, width)
        made.files[f"input/{image.name}"] = str(image)
        loaded = made.add("LoadImage", image=image.name)
        latent = made.add("VAEEncode", pixels=[loaded, 0], vae=[loader, 2])
    else:
        latent = made.add("EmptySD3LatentImage", width=width, height=height, batch_size=1)
    if known := None if image else scheduler(sampling, shift):
        sigmas = made.add("BasicScheduler", model=network, scheduler=known, steps=sampling.steps, denoise=1.0)
    else:
        sigmas = made.add("ManualSigmas", sigmas=", ".join(map(decimal, times)))
    noise = made.add("RandomNoise", noise_seed=seed)
    sampler = made.add("KSamplerSelect", sampler_name=solver(sampling))
    inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    drawn = made.add("SamplerCustomAdvanced", **{name: [number, 0] for name, number in inputs.items()})
    pixels = made.add("VAEDecode", samples=[drawn, 0], vae=[loader, 2])
    made.add("SaveImage", images=[pixels, 0], filename_prefix=picture.stem)
    return made


def sampling_of(flags: dict[str, Any]) -> Sampling:
    """The sampling that a picture's flags describe. ValueError, TypeError or KeyError if they do not."""
    given: dict[str, Any] = {name: float(flags[name]) for name in ("rescale", "skip_scale") if name in flags}
    given |= {name: tuple(map(float, flags[name])) for name in ("interval", "skip_interval") if name in flags}
    given["guider"] = flags.get("guider", "cfg")
    given["skip_layers"] = tuple(map(int, flags.get("skip_layers", ())))
    return Sampling(int(flags["steps"]), float(flags["guidance"]), flags["sampler"], flags["spacing"], **given)


def check(picture: Path, sampling: Sampling, shift: float, height: int, width: int) -> None:
    """ValueError, in one line, if ComfyUI's nodes do not do the same."""
    if solver(sampling) is None:
        raise ValueError(
            f"{picture} was drawn by the sampler {sampling.sampler}, and ComfyUI's samplers differ from it: "
            "euler, ddim without noise and heun are the same there"
        )
    for name, off in (("rescale", 0.0), ("interval", (0.0, 1.0))):
        if (value := getattr(sampling, name)) != off:
            raise ValueError(f"{picture} was drawn with --{name} {value}, which ComfyUI has no core node for")
    if sampling.guider != "cfg":
        raise ValueError(f"{picture} was drawn with --guider {sampling.guider}, which the workflow does not carry")
    for name, value in (("guidance", sampling.guidance), ("shift", shift)):
        if value > MOST:
            raise ValueError(f"ComfyUI's {name} is at most {MOST}, and that of {picture} is {value:g}")
    if sampling.skip_layers and not 0 < sampling.skip_scale <= MOST_SKIP:
        raise ValueError(
            f"ComfyUI's skip-layer guidance has a scale above 0 and at most {MOST_SKIP}, and that of {picture} "
            f"is {sampling.skip_scale:g}"
        )
    if not all(16 <= side <= LARGEST and side % 16 == 0 for side in (height, width)):
        raise ValueError(f"ComfyUI's sides are multiples of 16, at most {LARGEST}, and {picture} is {width}×{height}")


def check_image(image: Path, height: int, width: int) -> None:
    """ValueError if a picture to start from was scaled or cut, which ComfyUI would not do in the same way."""
    if not image.is_file():
        raise FileNotFoundError(f"there is no picture {image}, from which the drawing started")
    try:
        found = size_of(image)
    except PictureError as error:
        raise ValueError(f"{image} can't be read: {error}") from None
    if found != (height, width):
        raise ValueError(f"{image} is {found[1]}×{found[0]} and was drawn as {width}×{height}: scale it before drawing")


def model_of(path: Path, loras: Sequence[str], parts: Path) -> Model:
    """The model of a picture, given what it records.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: ComfyUI does not read one of them.
    """
    given, path = [Adapter.parse(text) for text in loras], find_model(path)
    if path.is_dir() and not (path / INDEX).is_file():
        if (path / FOLDER).is_dir():
            raise ValueError(f"{path} has new words, and a workflow loads updates of the network alone")
        given, path = [Adapter(path), *given], find_model(base_of(path))
    for update in given:
        check_update(update)
    inside: Collection[Kind] = ()
    if path.is_file():
        weights = open_file(path)
        own = weights.under(checkpoint.PREFIX)
        arguments = checkpoint.infer(own or weights)[1]
        inside = [kind for kind in ENCODERS if weights.under(kind.prefix)]
        whole = bool(own and weights.under(VAE_PREFIX))
    else:
        parts, whole = path, True
        config, codec = path / "transformer" / checkpoint.CONFIG, path / "vae" / checkpoint.CONFIG
        arguments = checkpoint.arguments_of(read_json(config), config, (checkpoint.DIFFUSERS_CLASS,))
        vae = read_json(codec)
        if wrong := [f"{name} {vae.get(name)!s:.80}" for name, value in VAE.items() if vae.get(name) != value]:
            raise ValueError(f"{codec} has {wrong[0]}, and ComfyUI reads the VAE of Stable Diffusion 3")
    wanted = SIZES | {"width": 64 * arguments["depth"], "heads": arguments["depth"]}
    wanted |= {name: False for name in checkpoint.EXTENSIONS if name not in checkpoint.NOT_IN_SHAPES}
    if wrong := [f"{name} {arguments[name]}" for name, value in wanted.items() if arguments[name] != value]:
        raise ValueError(f"{path} has {wrong[0]}, and ComfyUI reads networks of Stable Diffusion 3's shapes")
    if missing := [kind.title for kind in ENCODERS if kind not in inside and not named(kind, parts)]:
        raise ValueError(f"{path} has no {missing[0]}, whose place ComfyUI does not fill with zeros")
    if not whole:
        cure = f"python -m pipeline export {path} --parts {parts} --format single-file --out FOLDER"
        raise ValueError(f"{path} is no checkpoint of ComfyUI, as it has no VAE: {cure}, and draw with that")
    return Model(path, given, path.is_dir() or len(inside) == len(ENCODERS))


def objective_of(model: Model, parts: Path) -> Objective:
    """What the model was trained on. ValueError if it is not what ComfyUI takes it for."""
    objective, sampling = process_of(parts if model.path.is_file() else model.path)
    for update in model.updates:
        objective, sampling = learned(update.path) or (objective, sampling)
    if describe_process(objective, sampling)["_class_name"] != FLOW_MATCH:
        raise ValueError(f"{model.path} does not predict the velocity on rectified flow, as ComfyUI's SD3 does")
    return objective


def check_update(update: Adapter) -> None:
    """ValueError if ComfyUI would add another update, as it knows no scale but that in a file's own tensors."""
    weights, settings = updates.opened(update.path)
    prefixes = tuple(prefix for names in TEXT for prefix in (names.diffusers, names.single, names.kohya))
    if any(name.startswith(prefixes) for name in weights):
        raise ValueError(f"{update.path} updates text encoders, and a workflow loads updates of the network alone")
    scale = updates.Scale(weights, settings, PREFIX)
    for name, tensors in updates.by_layer(weights).items():
        rank = weights.shape(tensors["down"])[0] if "down" in tensors else None
        plain = "alpha" in tensors or scale(name, None, rank) == 1
        if not plain or tensors.get("magnitude", "dora_scale").rpartition(".")[2] != "dora_scale":
            raise ValueError(
                f"ComfyUI does not read the scale of {update.path}, which is in its settings: "
                f"python -m pipeline convert {update.path} --to kohya --out FILE, and draw with that"
            )
    if abs(update.strength) > MOST:
        raise ValueError(f"ComfyUI's LoRAs have a strength of at most {MOST}, and {update.path} {update.strength:g}")


def escaped(prompt: str, picture: Path) -> str:
    r"""A prompt in which parentheses are text: `\(`. ValueError if ComfyUI reads another part of it as no text."""
    if found := [mark for mark in READ_OTHERWISE if mark in prompt]:
        raise ValueError(f"{picture}: ComfyUI does not read {found[0]!r} in a prompt as text: draw without it")
    return prompt.replace("(", r"\(").replace(")", r"\)")


def solver(sampling: Sampling) -> str | None:
    """ComfyUI's sampler that takes the same steps; None if there is none."""
    if sampling.method == "ddim" and not parse_choice(SAMPLERS, "sampler", sampling.sampler).keywords.get("eta"):
        return "euler"
    return sampling.sampler if sampling.sampler in ("euler", "heun") else None


def scheduler(sampling: Sampling, shift: float) -> str | None:
    """The scheduler of ComfyUI that has the times of this grid, rounded to float32; None if there is none.

    `normal` is the grid of the released models. `simple` takes every so many of 1,000 shifted times, so it is the
    trailing grid where the steps divide 1,000. Its page keeps two digits of the shift.
    """
    if shift < 0.2 or round(shift, 2) != shift:
        return None
    if sampling.spacing == "flow_match":
        return "normal"
    return "simple" if sampling.spacing == "trailing" and TIMES % sampling.steps == 0 else None


def shares(times: Tensor, interval: tuple[float, float], shift: float) -> tuple[float, float]:
    """`start_percent` and `end_percent` of the steps whose times lie in an interval, ends included.

    ComfyUI compares the noise of a step with shift(1 − share). The shares are those in the middle between two steps.
    """
    inside = [i for i, t in enumerate(times.float().tolist()[:-1]) if interval[0] <= t <= interval[1]]
    plain = 1 - times / (shift - (shift - 1) * times)  # before the shift
    start, end = (float(plain[max(i - 1, 0)] + plain[i]) / 2 for i in (inside[0], inside[-1] + 1))
    return start, end


def decimal(number: Tensor) -> str:
    """A float32 in digits without an exponent, which ComfyUI would read as two numbers."""
    return np.format_float_positional(np.float32(number), trim="0")


def title(path: Path) -> str:
    """A name for a file in ComfyUI's folders, of what it or the folders above it are called."""
    stem = path.stem if path.suffix == ".safetensors" else path.name
    above = path.resolve().parent
    return title(above) if stem in GENERIC and above.name else stem
