"""Pipeline: network, process, codec and text joined for inference, and the model folder that holds them on disk."""

import inspect
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from data.latents import Codec, load_codec
from data.text import CLIPText
from flow import path as paths
from flow.guidance import ClassifierFree
from flow.objective import Model, Objective
from flow.path import RectifiedFlow
from flow.sampler import Callback
from flow.target import Target, Velocity
from flow.variance import LearnedVariance
from mmdit import checkpoint
from mmdit.model import Condition, MMDiT
from sampling import Sampling, random_normals

if TYPE_CHECKING:
    from baselines.unet import UNet  # diffusers is slow to import

INDEX = "model_index.json"
SCHEDULER = Path("scheduler") / "scheduler_config.json"


# A network has: in_channels, out_channels, text_dim, pooled_dim; sample_size, the side of the latents in its training;
# unit, of which a latent's height and width are multiples; largest, the most that they can be, or none.
Network: TypeAlias = "MMDiT | UNet"


class Pipeline:
    """Prompts to pictures.

    Args:
        network: the trained network.
        objective: path, target, shift and variance that it was trained with.
        codec: latents to pixels.
        text: prompts to conditions.
        sampling: defaults for `__call__`.

    Raises:
        ValueError: if the network's channels are not those of codec, text and objective, or the objective cannot be
            sampled as `sampling` says.
    """

    def __init__(
        self, network: Network, objective: Objective, codec: Codec, text: CLIPText, sampling: Sampling | None = None
    ) -> None:
        outputs = codec.channels * (2 if objective.variance else 1)
        for key, needed in (
            ("in_channels", codec.channels),
            ("out_channels", outputs),
            ("text_dim", text.tokens_dim),
            ("pooled_dim", text.pooled_dim),
        ):
            given = getattr(network, key, None)
            if given != needed:
                raise ValueError(f"the network's {key} is {given}, but codec, text and objective need {needed}")
        self.network, self.objective, self.codec, self.text = network, objective, codec, text
        self.sampling = sampling or Sampling()
        self.sampling.walk(objective)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def condition(self, prompts: Sequence[str]) -> Condition:
        """The prompts' condition, on the network's device. The empty prompt's is the null condition."""
        return Condition(*(part.to(self.device) for part in self.text.encode(prompts)))

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative: str = "",
        sampling: Sampling | None = None,
        shift: float | None = None,
        height: int | None = None,
        width: int | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One picture for each prompt.

        Args:
            prompts: B texts; an empty one is unconditional.
            seeds: B seeds; picture i starts from `torch.randn` of a CPU generator seeded with seeds[i], from which a
                stochastic sampler draws on.
            negative: what guidance moves away from.
            sampling: sampler, steps and guidance; none takes the model's own.
            shift: α of the time grid; none takes the one of the training.
            height: of the picture in pixels, a multiple of unit × codec factor; none takes the training's size.
            width: likewise.
            callback: called with (steps done, z, x̂0), first with (0, z, z) and then after each step.

        Returns:
            Pixels in [0, 1], (B, C, height, width), on the CPU.

        Raises:
            ValueError: for a size or number of steps that cannot be, and a sampler that does not fit the process.
        """
        sampling = sampling or self.sampling
        walk, times = sampling.walk(self.objective, shift)
        shape = (self.network.in_channels, *self.latent_size(height, width))
        draw = random_normals(seeds, shape, self.device)
        condition = self.condition(prompts)
        model: Model = self.network
        if sampling.guidance != 1:
            null = self.condition([negative])
            guided = self.codec.channels if self.objective.variance else None
            model = ClassifierFree(self.network, null, sampling.guidance, sampling.rescale, sampling.interval, guided)
        a, b = self.objective.path(times[0])
        z = (a**2 + b**2).sqrt() * draw()  # the variance at times[0] of data of unit variance
        if callback:
            callback(0, z, z)
        z = walk(lambda z, t: self.objective.denoise(model, z, t, condition), z, draw, callback)
        return self.codec.decode(z / self.objective.path(times[-1])[0]).cpu()

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The latent's size for a picture's; ValueError if there is none."""
        unit, largest = self.network.unit * self.codec.factor, self.network.largest
        sizes = [self.network.sample_size * self.codec.factor if s is None else s for s in (height, width)]
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size < unit or size % unit:
                raise ValueError(f"{name} must be a multiple of {unit} (patch or unit × codec factor), got {size}")
            if largest and size > largest * self.codec.factor:
                most = largest * self.codec.factor
                raise ValueError(f"{name} must be at most {most}, the size of the positional table, got {size}")
        return sizes[0] // self.codec.factor, sizes[1] // self.codec.factor

    def save(self, folder: Path) -> None:
        """Writes the model folder, safetensors and JSON only, in diffusers' SD3 layout.

        The folder is written beside its place and then renamed, so that a full disk leaves the old one as it was.
        """
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
        if isinstance(self.network, MMDiT):
            checkpoint.save(self.network, new / "transformer")
            network = {"transformer": ["diffusers", "SD3Transformer2DModel"]}
        else:
            self.network.save(new / "unet")
            network = {"unet": ["diffusers", "UNet2DConditionModel"]}
        self.codec.save(new / "vae")
        self.text.save(new)
        o = self.objective
        flow_match = isinstance(o.path, RectifiedFlow) and isinstance(o.target, Velocity)
        name = "FlowMatchEulerDiscreteScheduler" if flow_match else "Objective"  # diffusers knows only the first
        scheduler = {
            "_class_name": name,
            "num_train_timesteps": 1000,
            "shift": o.shift,
            "path": describe(o.path),
            "target": describe(o.target),
            "variance": o.variance and describe(o.variance),
            "sampling": asdict(self.sampling),  # its grid goes from 1 to 0, shifted once; diffusers' starts elsewhere
        }
        index = {
            "_class_name": "StableDiffusion3Pipeline" if "transformer" in network else "Pipeline",
            **network,
            "scheduler": ["diffusers" if flow_match else "flow.objective", name],
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
        needed = {"shift", "path", "target", "variance", "sampling"}
        missing = sorted(needed - scheduler.keys()) if isinstance(scheduler, dict) else sorted(needed)
        if missing:
            raise ValueError(f"{folder / SCHEDULER} lacks {', '.join(missing)}: another program or version wrote it")
        try:
            objective = Objective(
                restore(paths.Path, scheduler["path"]),
                restore(Target, scheduler["target"]),
                shift=scheduler["shift"],
                variance=scheduler["variance"] and restore(LearnedVariance, scheduler["variance"]),
            )
            sampling = Sampling(**scheduler["sampling"])
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{folder / SCHEDULER}: {error}") from None
        network: Any
        if (folder / "unet").is_dir():
            from baselines.unet import UNet

            network = UNet.load(folder / "unet")
        else:
            network = checkpoint.load(folder / "transformer")
        codec = load_codec(folder / "vae")
        return cls(network.to(device), objective, codec, CLIPText(folder), sampling)


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
