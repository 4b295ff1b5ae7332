"""Pipeline: network, process, codec and text joined for inference."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from data.latents import Codec
from data.sizes import SIZE_FEATURES, size_features
from data.text.encoder import TextEncoder
from flow.guidance import ClassifierFree, Weak, known
from flow.objective import Estimate, Model, Objective
from flow.sampler import Callback, Denoiser
from mmdit.model import Condition, MMDiT
from pipeline import folder as disk
from pipeline.folder import Network, Parts, Reading
from pipeline.sampling import Sampling, Walk, random_normals

TOKENS = 4096  # of pictures at a time


class Pipeline:
    """Prompts to pictures.

    Args:
        network: the trained network.
        objective: path, target, shift and variance that it was trained with.
        codec: latents to pixels.
        text: prompts to conditions.
        sampling: defaults for `__call__`.

    Attributes:
        sized: the network is told of sizes and crops, as its longer pooled vector says (`data.sizes`).
        knows_guidance: the network has learned to be guided and is told the scale, at one evaluation a step.

    Raises:
        ValueError: if the network's channels are not those of codec, text and objective, or the objective cannot be
            sampled as `sampling` says.
    """

    def __init__(
        self, network: Network, objective: Objective, codec: Codec, text: TextEncoder, sampling: Sampling | None = None
    ) -> None:
        outputs = codec.channels * (2 if objective.variance else 1)
        self.sized = getattr(network, "pooled_dim", None) == text.pooled_dim + SIZE_FEATURES
        for key, needed in (
            ("in_channels", codec.channels),
            ("out_channels", outputs),
            ("text_dim", text.tokens_dim),
            ("pooled_dim", text.pooled_dim + (SIZE_FEATURES if self.sized else 0)),
        ):
            given = getattr(network, key, None)
            if given != needed:
                raise ValueError(f"the network's {key} is {given}, but codec, text and objective need {needed}")
        self.knows_guidance = getattr(network, "guidance_embeds", False)
        self.network, self.objective, self.codec, self.text = network, objective, codec, text
        self.sampling = sampling or Sampling()
        self.sampling.walk(objective)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def condition(self, prompts: Sequence[str], height: int | None = None, width: int | None = None) -> Condition:
        """The prompts' condition, on the network's device. The empty prompt's is the null condition.

        Args:
            prompts: B texts.
            height: of the pictures in pixels, for a network that is told of sizes; none takes the training's.
            width: likewise.
        """
        text, pooled = self.text.encode(prompts)
        if self.sized:
            h, w = (side * self.codec.factor for side in self.latent_size(height, width))
            whole = torch.tensor([h, w, 0, 0, h, w]).expand(len(pooled), -1)  # not cropped
            pooled = torch.cat([pooled.float(), size_features(whole).to(pooled.device)], dim=-1)
        return Condition(text.to(self.device), pooled.to(self.device))

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
        image: Tensor | None = None,
        strength: float = 0.6,
        mask: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One picture for each prompt.

        Args:
            prompts: B texts; an empty one is unconditional.
            seeds: B seeds; picture i starts from `torch.randn` of a CPU generator seeded with seeds[i], from which a
                stochastic sampler draws on.
            negative: what guidance moves away from.
            sampling: sampler, steps and guidance; none takes the model's own.
            shift: α of the time grid; none takes that of the training for this size.
            height: of the picture in pixels, a multiple of unit × codec factor; none takes the image's, or without one
                the training's.
            width: likewise.
            image: what to start from, pixels in [0, 1], (B or 1, C, height, width); none starts from noise.
            strength: share of the steps that change the image (SDEdit, Meng et al. 2022), with an image only: 1 forgets
                it but for what the mask keeps.
            mask: 1 where the image is to be made anew and 0 where it stays, (B or 1, 1, height, width); a latent pixel
                with any 1 in it is made anew. None makes all anew.
            callback: called with (steps done, z, x̂0), first with (0, z, z) and then after each step.

        Returns:
            Pixels in [0, 1], (B, C, height, width), on the CPU.

        Raises:
            ValueError: for a size or number of steps that cannot be, a sampler that does not fit the process, and
                numbers that overflow.
        """
        sampling = sampling or self.sampling
        if image is not None:
            height, width = height or image.shape[-2], width or image.shape[-1]
        elif mask is not None:
            raise ValueError("a mask needs an image")
        latent, walk, times = self.plan(sampling, shift, height, width, 1.0 if image is None else strength)
        draw = random_normals(seeds, (self.network.in_channels, *latent), self.device)
        estimate = self.denoiser(prompts, negative, sampling, times, height, width)
        a, b = self.objective.path(times[0])
        noise = draw()
        if image is None:
            x0 = torch.zeros_like(noise)
            z = self.scale_at(times[0]) * noise
        else:
            x0 = self._encode(image, noise)
            z = a * x0 + b * noise
        denoise = estimate
        if mask is not None:
            covered = F.max_pool2d(mask.to(self.device, noise.dtype), self.codec.factor)
            if covered.shape[-2:] != latent:
                raise ValueError(f"the mask must have the picture's size, got {tuple(mask.shape[-2:])}")
            denoise = known(estimate, x0, noise, covered)
        if callback:
            callback(0, z, z)
        z = walk(denoise, z, draw, callback)
        if not z.isfinite().all():  # would be a black picture
            dtype = str(next(self.network.parameters()).dtype).removeprefix("torch.")
            raise ValueError(f"the network overflowed in {dtype}: take bfloat16 or float32, or less guidance")
        return self.codec.decode(z / self.scale_at(times[-1])).cpu()

    @torch.inference_mode()
    def integrate(
        self, z: Tensor, prompts: Sequence[str], sampling: Sampling | None = None, backward: bool = False
    ) -> Tensor:
        """Where the model's path leads from z, in latents and in the training's size: pure noise to a picture, or back.

        Args:
            z: noise at the first time of the sampling, or latents of pictures, (B, C, h, w).
            prompts: B texts.
            sampling: a sampler without noise of its own; none takes the model's.
            backward: from pictures to noise, by euler, heun, midpoint or reference.

        Returns:
            (B, C, h, w) on the network's device.

        Raises:
            ValueError: the sampling does not fit, or not in this direction.
        """
        sampling = sampling or self.sampling
        walk, times = sampling.walk(self.objective, self.shift(), backward=backward)
        if sampling.noisy:
            raise ValueError(f"sampler {sampling.sampler} draws noise on the way: take euler, heun or dpmpp_2m")
        self.plan(sampling)
        denoise = self.denoiser(prompts, "", sampling, times)
        first, last = (self.scale_at(t) for t in (times[0], times[-1]))
        return walk(denoise, first * z.to(self.device), lambda: z, None) / last

    def scale_at(self, t: Tensor) -> Tensor:
        """z at t over what is told of it: pictures at t = 0, unit noise elsewhere, where data have unit variance."""
        a, b = self.objective.path(t)
        return a if t == 0 else (a**2 + b**2).sqrt()

    def denoiser(
        self,
        prompts: Sequence[str],
        negative: str,
        sampling: Sampling,
        times: Tensor,
        height: int | None = None,
        width: int | None = None,
    ) -> Denoiser:
        """The estimate of the network, guided as told, for these prompts."""
        condition = self.condition(prompts, height, width)
        if self.knows_guidance:
            if negative:
                raise ValueError("a network that has learned its guidance cannot be told what to move away from")
            scales = torch.full((len(prompts),), float(sampling.guidance), device=self.device)
            condition = condition._replace(guidance=scales)
        model = self._guided(sampling, lambda: self.condition([negative], height, width), times)

        def estimate(z: Tensor, t: Tensor, end: Tensor | None = None) -> Estimate:
            return self.objective.denoise(model, z, t, condition, end)

        return estimate

    def _guided(self, sampling: Sampling, negative: Callable[[], Condition], times: Tensor) -> Model:
        """The network, guided as told."""
        if sampling.guidance == 1 or self.knows_guidance:
            return self.network
        weak = None
        if interval := sampling.skipping(times):
            weak = Weak(partial(self.network, skip_layers=sampling.skip_layers), sampling.skip_scale, interval)
        return ClassifierFree(
            self.network,
            negative(),
            sampling.guidance,
            sampling.rescale,
            sampling.interval,
            self.codec.channels if self.objective.variance else None,
            weak,
        )

    def _encode(self, image: Tensor, noise: Tensor) -> Tensor:
        """The image's latents, one for each noise (B, C, h, w)."""
        wanted = (self.codec.pixel_channels, *(side * self.codec.factor for side in noise.shape[-2:]))
        if image.shape[1:] != wanted or len(image) not in (1, len(noise)):
            raise ValueError(f"the image must be (1 or {len(noise)}, {', '.join(map(str, wanted))}), "
                             f"got {tuple(image.shape)}")  # fmt: skip
        return self.codec.encode(image.to(self.device)).to(noise).expand_as(noise)

    def plan(
        self,
        sampling: Sampling,
        shift: float | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
    ) -> tuple[tuple[int, int], Walk, Tensor]:
        """The latent's size, the sampler and its times: what can be known to fail before anything is drawn.

        Raises:
            ValueError: in one line, if there is no such size, or the sampling does not fit process or network.
        """
        latent = self.latent_size(height, width)
        blocks = range(self.network.depth if isinstance(self.network, MMDiT) else 0)
        if not set(sampling.skip_layers) <= set(blocks):
            raise ValueError(f"skip_layers must be blocks of an MMDiT, got {sampling.skip_layers}")
        if sampling.method == "meanflow" and not getattr(self.network, "two_times", False):
            raise ValueError("sampler meanflow needs a network of two times, and this one has one: use euler")
        if self.knows_guidance and (sampling.rescale or sampling.skip_layers or sampling.interval != (0, 1)):
            raise ValueError(
                "this network has learned its guidance: rescale, interval and skip_layers cannot change it"
            )
        shift = self.shift(height, width) if shift is None else shift
        walk, times = sampling.walk(self.objective, shift, strength)
        if sampling.skip_layers and not sampling.skipping(times):
            raise ValueError(
                f"skip-layer guidance works in the shares {sampling.skip_interval} of the steps, where none of "
                f"{len(times) - 1} lies: take more steps or another skip_interval"
            )
        return latent, walk, times

    def shift(self, height: int | None = None, width: int | None = None) -> float:
        """α of the time grid for a picture's size, that of the training."""
        h, w = self.latent_size(height, width)
        return self.objective.alpha(h * w)

    def batch_size(self, height: int | None = None, width: int | None = None) -> int:
        """How many pictures of a size to draw at a time: as many as make 4,096 tokens, which is one of 1024² pixels."""
        h, w = self.latent_size(height, width)
        return max(1, TOKENS * self.network.unit**2 // (h * w))

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

    @property
    def parts(self) -> Parts:
        """What it is made of."""
        return Parts(self.network, self.objective, self.codec, self.text, self.sampling)

    def save(self, folder: Path) -> None:
        """Writes a model folder (`pipeline.folder.write`)."""
        disk.write(self.parts, folder)

    @classmethod
    def load(cls, path: Path, how: Reading | None = None) -> Self:
        """Reads a model folder, a single file or a LoRA's folder (`pipeline.folder.read`)."""
        return cls(*disk.read(path, how))
