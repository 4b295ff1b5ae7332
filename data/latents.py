"""Codecs: pixels ↔ normalised latents."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from data.codec import Codec as Codec
from storage import configs, weights
from storage.configs import described
from storage.files import commit_json
from storage.text import read_json

CONFIG, STEM = "config.json", "diffusion_pytorch_model"
LIKELIHOOD = "likelihood.json"  # beside a VAE that was trained on the evidence lower bound: levels and log_variance
PREFIX = "first_stage_model."  # of the VAE's tensors in a single file
NUMBERS = (  # of a VAE's config that building it does not check: key, type, and what is below it
    ("scaling_factor", float, 0), ("shift_factor", float, -math.inf), ("sample_size", int, 0),
    ("norm_num_groups", int, 0),
)  # fmt: skip
TILE = 1024  # pixels; the sample_size of SD3's VAE, which a single file does not contain

Shape = tuple[int, ...]


class Pixels(Codec):
    """The latent is the picture itself, shifted and scaled.

    Args:
        channels: 1 for grey, 3 for colour.
        shift: the data's mean.
        scale: one over the data's standard deviation, > 0.
    """

    factor = 1

    def __init__(self, channels: int = 3, shift: float = 0.5, scale: float = 2.0) -> None:
        if channels not in (1, 3):
            raise ValueError(f"the codec's channels must be 1 or 3, got {channels}")
        if not scale > 0:
            raise ValueError(f"the codec's scale must be > 0, got {scale}")
        self.channels = self.pixel_channels = channels
        self.shift, self.scale = shift, scale

    def encode(self, pixels: Tensor) -> Tensor:
        return (pixels - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / self.scale + self.shift).clamp(0, 1)

    def width(self, levels: int) -> float:
        """The distance of two of so many levels in latents."""
        return self.scale / (levels - 1)

    def dequantize(self, latents: Tensor, normal: Tensor, levels: int) -> Tensor:
        """Latents with uniform noise of one level's width, made of standard normal numbers."""
        return latents + self.width(levels) * (torch.special.ndtr(normal) - 0.5)

    def save(self, folder: Path) -> None:
        commit_json(folder / CONFIG, {"_class_name": "Pixels"} | self._config)

    def index(self) -> list[str]:
        return ["data.latents", "Pixels"]

    def fingerprint(self) -> dict[str, Any]:
        return {"class": "Pixels"} | self._config

    @property
    def _config(self) -> dict[str, Any]:
        return {"channels": self.channels, "shift_factor": self.shift, "scaling_factor": self.scale}


class VAE(Codec):
    """Stable Diffusion's autoencoder (R. Rombach et al., 2022; SD3's has 16 channels), frozen, by diffusers.

    The raw latent is the mean of the posterior of 2·pixels − 1. Everything is computed in `dtype`, as in diffusers'
    pipelines, also inside autocast. Results are float32, without gradients, on the device of the weights.

    Args:
        path: a diffusers `vae/` folder, sharded or not, a model folder with a `vae/` in it, or an original single
            .safetensors file of SD3's kind.
        dtype: of the weights in memory; None is the stored one.
    Attributes:
        vae: the network, diffusers' `AutoencoderKL`.

    Raises:
        FileNotFoundError: config or weights are missing.
        ValueError: they are damaged, of another kind, or do not fit each other.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: weights.DType | None = "float32") -> None:
        path = Path(path)
        if single := path.is_file() or path.suffix == ".safetensors":
            stored = weights.open_file(path).under(PREFIX)
            try:
                config = original_config({name: stored.shape(name) for name in stored}) | {"sample_size": TILE}
            except LookupError as error:
                raise ValueError(f"{path} holds no whole VAE of SD3's kind under {PREFIX}: {error}") from None
        else:
            path = path / "vae" if (path / "vae").is_dir() else path
            config = read_json(path / CONFIG)
            if config.get("_class_name") != "AutoencoderKL":
                raise ValueError(f"{path / CONFIG} describes a {config.get('_class_name')}, not an AutoencoderKL")
            stored = weights.open_folder(path, STEM)
        self.vae = build(config, path if single else path / CONFIG)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.vae.state_dict().items()}
        layout = original_layout(shapes) if single else {name: (name, shape) for name, shape in shapes.items()}
        weights.check_tensors(stored, dict(layout.values()), "this VAE's config")
        kept = stored.kept if dtype is None else weights.dtype_of(dtype)
        self.vae.load_state_dict(
            {name: stored[there].reshape(shapes[name]).to(kept, copy=True) for name, (there, _) in layout.items()},
            assign=True,
        )
        self.vae.eval().requires_grad_(False)
        own = self.vae.config
        self.channels, self.pixel_channels = own.latent_channels, own.in_channels
        self.factor = 2 ** (len(own.block_out_channels) - 1)
        self.scale, self.shift = own.scaling_factor, own.shift_factor or 0.0

    def to(self, device: torch.device | str) -> Self:
        self.vae.to(device)
        return self

    def save_memory(self, tiling: bool, slicing: bool) -> None:
        """Encodes and decodes with less memory, in more time.

        Args:
            tiling: splits pictures larger than the config's `sample_size` into overlapping tiles and blends them. The
                result changes, since a tile does not see the others.
            slicing: one picture of a batch after the other; the result stays the same.
        """
        self.vae.use_tiling, self.vae.use_slicing = tiling, slicing

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pixels; ValueError if a side is not a multiple of `factor` or a number is not finite."""
        return self.posterior(pixels)[0]

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the normalised latents; errors as `encode`."""
        if pixels.shape[-2] % self.factor or pixels.shape[-1] % self.factor:
            raise ValueError(f"a picture's sides must be multiples of {self.factor}, got {tuple(pixels.shape[-2:])}")

        def network(x: Tensor) -> Tensor:
            q = self.vae.encode(x).latent_dist
            return torch.cat([(q.mean - self.shift) * self.scale, q.logvar + 2 * math.log(self.scale)], dim=1)

        mean, logvar = self._run(network, 2 * pixels - 1).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents, clamped to [0, 1]; ValueError if a number is not finite."""
        return self.mean(latents).clamp(0, 1)

    def mean(self, latents: Tensor) -> Tensor:
        """As `decode`, but not clamped: the means of the decoder's distribution."""
        return self._run(lambda z: self.vae.decode(z / self.scale + self.shift).sample / 2 + 0.5, latents)

    def _run(self, network: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        if not given.isfinite().all():
            raise ValueError("the VAE was given numbers that are not finite")
        device, dtype = self.vae.device, self.vae.dtype
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            result = network(given.to(device, dtype))
        if not result.isfinite().all():  # would be a black picture
            wider = ": take bfloat16 or float32" if dtype == torch.float16 else ""
            raise ValueError(f"the VAE overflowed in {str(dtype).removeprefix('torch.')}{wider}")
        return result.float()

    def save(self, folder: Path) -> None:
        """Writes config and weights, in their type in memory, as `AutoencoderKL.from_pretrained` reads them."""
        commit_json(folder / CONFIG, self._config)
        weights.write_tensors(self.vae.state_dict(), folder / f"{STEM}.safetensors")

    def index(self) -> list[str]:
        return ["diffusers", "AutoencoderKL"]

    def original_state(self) -> dict[str, Tensor]:
        """The weights under the names of a single file, prefix included. They are views of the weights in memory.

        Raises:
            ValueError: the config is not the one that this format implies.
        """
        state = self.vae.state_dict()
        layout = original_layout({name: tuple(tensor.shape) for name, tensor in state.items()})
        implied = original_config(dict(layout.values())).items()
        config = self._config
        if other := [f"{key} is {config[key]}, not {value}" for key, value in implied if config[key] != value]:
            raise ValueError(f"a single file cannot tell this VAE's config: {', '.join(other)}: save a folder instead")
        return {PREFIX + there: state[name].reshape(shape) for name, (there, shape) in layout.items()}

    def fingerprint(self) -> dict[str, Any]:
        dtype = str(self.vae.dtype).removeprefix("torch.")
        unused = ("sample_size", "force_upcast")  # without effect on the results here
        config = {key: value for key, value in self._config.items() if key[0] != "_" and key not in unused}
        return {
            "class": "VAE",
            "weights": weights.digest(self.vae.state_dict()),
            "dtype": dtype,
            "shift and scale": "applied",
            "config": config,
        }

    @property
    def _config(self) -> dict[str, Any]:
        return json.loads(self.vae.to_json_string())


def build(config: Mapping[str, Any], source: Path) -> Any:
    """An `AutoencoderKL` without weights, on the meta device. ValueError, naming the source, if the config is wrong.

    Only the keys in `storage.configs.VAE` have an effect.
    """
    from diffusers import AutoencoderKL  # takes seconds

    try:
        with torch.device("meta"):  # takes no time and no random numbers
            vae: Any = AutoencoderKL(**described(config, configs.VAE))
        own = vae.config
        for key, kind, least in NUMBERS:
            value = 0 if own[key] is None and key == "shift_factor" else own[key]
            if type(value) not in (int, kind) or not least < value < math.inf:
                raise ValueError(f"{key} is {own[key]!r}")
    except Exception as error:  # a wrong value may raise anything where it is used
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} describes no AutoencoderKL that could be built: {reason}") from None
    if own.in_channels != own.out_channels or own.latents_mean or own.latents_std:
        raise ValueError(f"{source} asks for latents_mean, latents_std or unequal in_channels and out_channels")
    return vae


def original_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The config that a single file implies.

    Args:
        shapes: original name, without prefix → shape.

    Raises:
        LookupError: a tensor that determines the config is missing, or has too few dimensions.
    """

    def count(pattern: str) -> int:
        return 1 + max((int(found[1]) for name in shapes if (found := re.match(pattern, name))), default=-1)

    levels = count(r"encoder\.down\.(\d+)\.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,  # mean and log-variance
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": count(r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": True,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def original_layout(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, Shape]]:
    """diffusers' name → the original's name and shape, without prefix (diffusers' `convert_ldm_vae_checkpoint`).

    Args:
        shapes: diffusers' name → shape.
    """
    levels = len({name.split(".")[2] for name in shapes if name.startswith("decoder.up_blocks.")})
    parts = {f"up_blocks.{i}.": f"up.{levels - 1 - i}." for i in range(levels)} | {
        "down_blocks.": "down.",
        "mid_block.resnets.0.": "mid.block_1.",
        "mid_block.resnets.1.": "mid.block_2.",
        "mid_block.attentions.0.": "mid.attn_1.",
        "resnets.": "block.",
        "downsamplers.0.": "downsample.",
        "upsamplers.0.": "upsample.",
        "conv_shortcut.": "nin_shortcut.",
        "conv_norm_out.": "norm_out.",
        "group_norm.": "norm.",
        "to_q.": "q.",
        "to_k.": "k.",
        "to_v.": "v.",
        "to_out.0.": "proj_out.",
    }

    def renamed(name: str) -> str:
        for theirs, original in parts.items():
            name = name.replace(theirs, original)
        return name

    # The linear layers of attention, the only matrices, are 1×1 convolutions in the original.
    return {name: (renamed(name), (*shape, 1, 1) if len(shape) == 2 else shape) for name, shape in shapes.items()}


def load_codec(folder: Path, dtype: weights.DType | None = "float32") -> Codec:
    """The codec that `save` or diffusers wrote.

    Args:
        folder: holds `config.json` and, for a VAE, its weights.
        dtype: of a VAE's weights; None is the stored one. Pixels have no weights.

    Raises:
        ValueError, FileNotFoundError: in one line, if the folder holds no codec of this project, or a damaged one.
    """
    try:
        config = read_json(folder / CONFIG)
    except FileNotFoundError:
        raise ValueError(f"no codec config at {folder / CONFIG}") from None
    match config.get("_class_name"):
        case "AutoencoderKL":
            return VAE(folder, dtype)
        case "Pixels":
            try:
                return Pixels(config["channels"], config["shift_factor"], config["scaling_factor"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{folder / CONFIG} is no whole config of Pixels: {error}") from None
        case "CLIPImage":
            from data.clip import CLIPImage  # transformers is slow to import

            return CLIPImage(folder)
        case other:
            known = "AutoencoderKL, Pixels, CLIPImage, VQVAE, Levels"
            raise ValueError(f"{folder / CONFIG} describes a {other}, no codec of this project: {known}")
