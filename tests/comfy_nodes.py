"""What the tests know of ComfyUI: its nodes' inputs and outputs, and what they compute, with our network in the place
of its own.

Read in ComfyUI's source: `nodes.py`, `comfy_extras/nodes_model_advanced.py`, `comfy/samplers.py`,
`comfy/model_sampling.py`, `comfy/sample.py`, `comfy/sd1_clip.py`, `comfy/k_diffusion/sampling.py` at commit a125cd84;
`comfy_extras/nodes_custom_sampler.py` at be91880b, `nodes_sd3.py` at 45e9c52c and `nodes_cond.py` at 0f3391f5.
"""

import copy
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.raw.pictures import load_picture
from mmdit import adapters
from pipeline import Pipeline
from storage.updates import Adapter

NODES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {  # class → (required input → type, types of the outputs)
    "CheckpointLoaderSimple": ({"ckpt_name": "STRING"}, ("MODEL", "CLIP", "VAE")),
    "TripleCLIPLoader": ({f"clip_name{i}": "STRING" for i in (1, 2, 3)}, ("CLIP",)),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": "STRING", "strength_model": "FLOAT"}, ("MODEL",)),
    "ModelSamplingSD3": ({"model": "MODEL", "shift": "FLOAT"}, ("MODEL",)),
    "SkipLayerGuidanceSD3": (
        {"model": "MODEL", "layers": "STRING", "scale": "FLOAT", "start_percent": "FLOAT", "end_percent": "FLOAT"},
        ("MODEL",),
    ),
    "T5TokenizerOptions": ({"clip": "CLIP", "min_padding": "INT", "min_length": "INT"}, ("CLIP",)),
    "CLIPTextEncode": ({"text": "STRING", "clip": "CLIP"}, ("CONDITIONING",)),
    "CFGGuider": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "cfg": "FLOAT"},
        ("GUIDER",),
    ),
    "EmptySD3LatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ("LATENT",)),
    "LoadImage": ({"image": "STRING"}, ("IMAGE", "MASK")),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, ("LATENT",)),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "BasicScheduler": ({"model": "MODEL", "scheduler": "STRING", "steps": "INT", "denoise": "FLOAT"}, ("SIGMAS",)),
    "ManualSigmas": ({"sigmas": "STRING"}, ("SIGMAS",)),
    "RandomNoise": ({"noise_seed": "INT"}, ("NOISE",)),
    "KSamplerSelect": ({"sampler_name": "STRING"}, ("SAMPLER",)),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ("LATENT", "LATENT"),
    ),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, ()),
}
LIMITS = {  # (least, most) of numbers
    "strength_model": (-100, 100), "shift": (0, 100), "scale": (0, 10), "start_percent": (0, 1), "end_percent": (0, 1),
    "min_padding": (0, 10_000), "min_length": (0, 10_000), "cfg": (0, 100), "width": (16, 16384), "denoise": (0, 1),
    "height": (16, 16384), "batch_size": (1, 4096), "steps": (1, 10_000), "noise_seed": (0, 2**64 - 1),
}  # fmt: skip
PYTHON = {"STRING": str, "INT": int, "FLOAT": float}


def check(nodes: dict[str, Any]) -> None:
    """What the server checks of a prompt: known classes, all inputs, links of the right type, numbers in range."""
    for node in nodes.values():
        required, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == required.keys(), node
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                number, output = value
                assert NODES[nodes[number]["class_type"]][1][output] == required[name], (node, name)
            else:
                assert type(value) is PYTHON[required[name]], (node, name)
                least, most = LIMITS.get(name, (-math.inf, math.inf))
                assert isinstance(value, str) or least <= value <= most, (node, name)


def shifted(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


def schedule(name: str, shift: float, steps: int) -> Tensor:
    """The sigmas of a scheduler on a model with this shift, float32."""
    sigmas = shifted(torch.arange(1, 1001) / 1000, shift)
    if name == "simple":
        return torch.tensor([float(sigmas[-(1 + int(i * (1000 / steps)))]) for i in range(steps)] + [0.0])
    assert name in ("normal", "sgm_uniform")
    start, end = float(sigmas[-1]) * 1000, float(sigmas[0]) * 1000  # sigmas, which were shifted, taken as timesteps
    if name == "sgm_uniform":
        times = torch.linspace(start, end, steps + 1)[:-1]
    elif math.isclose(float(shifted(torch.tensor(end / 1000), shift)), 0, abs_tol=1e-5):
        return shifted(torch.linspace(start, end, steps + 1) / 1000, shift)
    else:
        times = torch.linspace(start, end, steps)
    return torch.cat([shifted(times / 1000, shift), torch.zeros(1)])


def manual(text: str) -> Tensor:
    """The numbers that ManualSigmas finds in a text."""
    return torch.tensor([float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", text)])


def weighted(text: str) -> list[tuple[str, float]]:
    """A prompt as segments with their weights: of (text) 1.1, of (text:w) w; backslashes keep parentheses."""
    text = text.replace("\\)", "\0").replace("\\(", "\1")
    found = []
    for inner, plain in re.findall(r"\(([^()]*)\)|([^()]+)", text):
        words, _, weight = inner.rpartition(":")
        segment = (words, float(weight)) if words else (inner, 1.1) if inner else (plain, 1.0)
        found.append((segment[0].replace("\0", ")").replace("\1", "("), segment[1]))
    return found


class Model(NamedTuple):
    """A network with what nodes have said of its sampling."""

    pipe: Pipeline
    shift: float = 3.0
    skip: tuple[list[int], float, float, float] | None = None  # layers, scale, and from and to of sigma


@torch.no_grad()
def run(nodes: dict[str, Any], files: dict[str, str], pipe: Pipeline) -> Tensor:
    """The picture that a workflow draws, (1, 3, height, width) in [0, 1].

    Args:
        nodes: the workflow.
        files: place in ComfyUI's folder → file.
        pipe: the model that its checkpoint holds.
    """
    made: dict[str, tuple] = {}

    def compute(kind: str, inputs: dict[str, Any]) -> tuple:
        def given(*names: str) -> Any:
            found = [made[x[0]][x[1]] if isinstance(x := inputs[name], list) else x for name in names]
            return found[0] if len(found) == 1 else found

        match kind:
            case "CheckpointLoaderSimple":
                return Model(pipe), pipe.text, pipe.codec
            case "TripleCLIPLoader":
                return (pipe.text,)
            case "T5TokenizerOptions":
                assert given("min_length") == pipe.text.max_sequence_length
                return (given("clip"),)
            case "LoraLoaderModelOnly":
                model, name, strength = given("model", "lora_name", "strength_model")
                network = copy.deepcopy(model.pipe.network)
                adapters.merge(network, [Adapter(Path(files[f"models/loras/{name}"]), strength)])
                changed = copy.copy(model.pipe)
                changed.network = network
                return (model._replace(pipe=changed),)
            case "ModelSamplingSD3":
                return (given("model")._replace(shift=given("shift")),)
            case "SkipLayerGuidanceSD3":
                model, layers, scale = given("model", "layers", "scale")
                ends = [1 - torch.tensor(given(name)) for name in ("start_percent", "end_percent")]
                sigmas = (float(shifted(t, model.shift)) for t in ends)
                return (model._replace(skip=([int(n) for n in re.findall(r"\d+", layers)], scale, *sigmas)),)
            case "CLIPTextEncode":
                text = weighted(given("text"))
                assert all(weight == 1 for _, weight in text)
                return ("".join(part for part, _ in text),)
            case "CFGGuider":
                return (given("model", "positive", "negative", "cfg"),)
            case "EmptySD3LatentImage":
                return (torch.zeros(given("batch_size"), 16, given("height") // 8, given("width") // 8),)
            case "LoadImage":
                return (load_picture(Path(files[f"input/{given('image')}"]), 3, None, None, 8),)
            case "VAEEncode":
                return (given("vae").encode(given("pixels")),)
            case "VAEDecode":
                return (given("vae").decode(given("samples")),)
            case "BasicScheduler":
                return (schedule(given("scheduler"), given("model").shift, given("steps")),)
            case "ManualSigmas":
                return (manual(given("sigmas")),)
            case "RandomNoise":
                return (given("noise_seed"),)
            case "KSamplerSelect":
                return (given("sampler_name"),)
            case "SamplerCustomAdvanced":
                return (sample(*given("noise", "guider", "sampler", "sigmas", "latent_image")),)
            case "SaveImage":
                return (given("images"),)
        raise AssertionError(kind)

    for number, node in nodes.items():
        made[number] = compute(node["class_type"], node["inputs"])
    return made[number][0]


def sample(seed: int, guider: list, sampler: str, sigmas: Tensor, latent: Tensor) -> Tensor:
    """The solvers of k-diffusion on a model that predicts the velocity; noise is drawn for the whole batch at once."""
    model, positive, negative, cfg = guider
    network = model.pipe.network
    height, width = (8 * side for side in latent.shape[-2:])
    conditions = [model.pipe.condition([prompt], height, width) for prompt in (positive, negative)]

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        """(x − denoised)/sigma, where denoised is x − sigma·v."""
        one = sigma.reshape(1)
        cond = x - sigma * network(x, one, conditions[0])
        guided = cond
        if cfg != 1:
            uncond = x - sigma * network(x, one, conditions[1])
            guided = uncond + (cond - uncond) * cfg
        if model.skip and model.skip[3] <= float(sigma) <= model.skip[2]:
            layers, scale, *_ = model.skip
            guided = guided + (cond - (x - sigma * network(x, one, conditions[0], skip_layers=layers))) * scale
        return (x - guided) / sigma

    noise = torch.randn(latent.size(), generator=torch.manual_seed(seed))
    x = sigmas[0] * noise + (1 - sigmas[0]) * latent
    for sigma, following in pairwise(sigmas):
        d = slope(x, sigma)
        if sampler == "heun" and following > 0:
            d = (d + slope(x + d * (following - sigma), following)) / 2
        x = x + d * (following - sigma)
    return x
