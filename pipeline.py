"""Pipeline: network, process, codec and text joined for inference, and the model folder that holds them on disk."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.latents import Codec, load_codec
from data.text import CLIPText
from flow.guidance import ClassifierFree
from flow.objective import Model, Objective
from flow.path import RectifiedFlow
from flow.sampler import euler, linear_grid
from flow.target import Velocity
from mmdit import checkpoint
from mmdit.model import Condition, MMDiT

INDEX = "model_index.json"
SCHEDULER = Path("scheduler") / "scheduler_config.json"


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled unless the caller says otherwise. Stored with the model.

    Args:
        steps: steps of Euler's method, at least 1.
        guidance: scale of classifier-free guidance; 1 is none and costs half.
    """

    steps: int = 28
    guidance: float = 4.5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")


class Pipeline:
    """Prompts to pictures.

    Args:
        network: the trained network.
        objective: path, target and shift that it was trained with.
        codec: latents to pixels.
        text: prompts to conditions.
        sampling: defaults for `__call__`.

    Raises:
        ValueError: if the network's channels are not those of codec and text.
    """

    def __init__(
        self, network: MMDiT, objective: Objective, codec: Codec, text: CLIPText, sampling: Sampling | None = None
    ) -> None:
        for key, given, needed in (
            ("in_channels", network.in_channels, codec.channels),
            ("text_dim", network.text_dim, text.tokens_dim),
            ("pooled_dim", network.pooled_dim, text.pooled_dim),
        ):
            if given != needed:
                raise ValueError(f"the network's {key} is {given}, but codec and text give {needed}")
        self.network, self.objective, self.codec, self.text = network, objective, codec, text
        self.sampling = sampling or Sampling()

    def condition(self, prompts: Sequence[str]) -> Condition:
        """The prompts' condition, on the network's device. The empty prompt's is the null condition."""
        device = self.network.positions.device
        return Condition(*(part.to(device) for part in self.text.encode(prompts)))

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        height: int | None = None,
        width: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """One picture for each prompt.

        Args:
            prompts: B texts; an empty one is unconditional.
            seeds: B seeds; picture i starts from `torch.randn` of a CPU generator seeded with seeds[i].
            negative: what guidance moves away from.
            steps: network evaluations, or pairs of them under guidance; none takes the model's own.
            guidance: scale; 1 is none, none takes the model's own.
            shift: α of the time grid; none takes the one of the training.
            height: of the picture in pixels, a multiple of patch × codec factor; none takes the training's size.
            width: likewise.
            progress: called with the number of steps done, after each.

        Returns:
            Pixels in [0, 1], (B, C, height, width), on the CPU.

        Raises:
            ValueError: for a size or number of steps that cannot be.
        """
        steps = self.sampling.steps if steps is None else steps
        guidance = self.sampling.guidance if guidance is None else guidance
        grid = self.time_grid(steps, shift)
        shape = (self.network.in_channels, *self.latent_size(height, width))
        device = self.network.positions.device

        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        condition = self.condition(prompts)
        model: Model = self.network
        if guidance != 1:
            model = ClassifierFree(self.network, self.condition([negative]), guidance)
        z = euler(
            lambda z, t: self.objective.denoise(model, z, t, condition),
            self.objective.path,
            noise.to(device),
            grid.to(device),
            None if progress is None else lambda done, z, x0: progress(done),
        )
        return self.codec.decode(z).cpu()

    def time_grid(self, steps: int, shift: float | None = None) -> Tensor:
        """Times from 1 to 0, (steps + 1,), shifted as in training unless told otherwise; ValueError for no steps."""
        return linear_grid(steps, self.objective.shift if shift is None else shift)

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The latent's size for a picture's; ValueError if there is none."""
        unit = self.network.patch_size * self.codec.factor
        largest = self.network.pos_embed_max_size * unit
        sizes = [self.network.sample_size * self.codec.factor if s is None else s for s in (height, width)]
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size < unit or size % unit:
                raise ValueError(f"{name} must be a multiple of {unit} (patch × codec factor), got {size}")
            if size > largest:
                raise ValueError(f"{name} must be at most {largest}, the size of the positional table, got {size}")
        return sizes[0] // self.codec.factor, sizes[1] // self.codec.factor

    def save(self, folder: Path) -> None:
        """Writes the model folder, safetensors and JSON only, in diffusers' SD3 layout.

        The folder is written beside its place and then renamed, so that a full disk leaves the old one as it was.
        """
        if not isinstance(self.objective.path, RectifiedFlow) or not isinstance(self.objective.target, Velocity):
            raise ValueError("a model folder holds a rectified flow that predicts its velocity, nothing else yet")
        new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
        shutil.rmtree(new, ignore_errors=True)
        try:
            self._write(new)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise OSError(f"could not write {folder}: {error}") from error
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def _write(self, new: Path) -> None:
        checkpoint.save(self.network, new / "transformer")
        self.codec.save(new / "vae")
        self.text.save(new)
        scheduler = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": self.objective.shift,
            "grid": "linear",  # from 1 to 0, shifted once; diffusers' own list starts from an already shifted end
            "steps": self.sampling.steps,
            "guidance": self.sampling.guidance,
        }
        index = {
            "_class_name": "StableDiffusion3Pipeline",
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "vae": ["data.latents", type(self.codec).__name__],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
        for file, content in ((new / SCHEDULER, scheduler), (new / INDEX, index)):
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content, indent=2) + "\n")
        for file in new.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> "Pipeline":
        """Reads a model folder.

        Raises:
            ValueError, FileNotFoundError: in one line, if anything is missing, truncated or of another kind.
        """
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"{folder} is no model folder: it has no {INDEX}")
        try:
            scheduler = json.loads((folder / SCHEDULER).read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} has no {SCHEDULER}") from None
        except ValueError as error:
            raise ValueError(f"{folder / SCHEDULER} is no JSON: {error}") from None
        if not isinstance(scheduler, dict) or not {"shift", "steps", "guidance"} <= scheduler.keys():
            raise ValueError(f"{folder / SCHEDULER} lacks shift, steps or guidance: this project did not write it")
        if scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or scheduler.get("grid") != "linear":
            raise ValueError(f"{folder / SCHEDULER} describes a time grid that this project did not write")
        network = checkpoint.load(folder / "transformer").to(device)
        codec = load_codec(folder / "vae")
        text = CLIPText(folder)
        objective = Objective(shift=scheduler["shift"])
        return cls(network, objective, codec, text, Sampling(scheduler["steps"], scheduler["guidance"]))
