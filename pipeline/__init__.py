"""Pipeline: network, process, codec and text joined for inference."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from data.degrade import enlarged, noised
from data.latents import Codec
from data.sizes import SIZE_FEATURES, size_features
from data.text.encoder import TextEncoder
from flow.guidance import ClassifierFree, Weak, inpaint
from flow.objective import Estimate, Model, Objective
from flow.sampler import Callback, Denoiser, Noise
from mmdit.network import Condition, Network
from pipeline import folder as disk
from pipeline.folder import Parts, Reading
from pipeline.sampling import Sampling, Walk, random_normals
from storage.models import find_model

TOKENS = 4096  # of pictures at a time


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

    Example:
        Of the digits' text encoder, with a network that has learned nothing:

        >>> from data.latents import Pixels
        >>> from data.text.clip import CLIPText
        >>> from mmdit.model import MMDiT
        >>> text = CLIPText("assets/digits/text")
        >>> network = MMDiT(in_channels=1, depth=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=4)
        >>> pipe = Pipeline(network, Objective(), Pixels(1), text, Sampling(steps=2, guidance=1.0))
        >>> pipe(["a handwritten seven"], seeds=[0]).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(
        self, network: Network, objective: Objective, codec: Codec, text: TextEncoder, sampling: Sampling | None = None
    ) -> None:
        self.network, self.objective, self.codec, self.text = network, objective, codec, text
        for key, needed in (
            ("in_channels", codec.channels),
            ("out_channels", codec.channels * objective.outputs),
            ("text_dim", text.tokens_dim),
            ("pooled_dim", text.pooled_dim + (SIZE_FEATURES if self.sized else 0)),
        ):
            given = getattr(network, key, None)
            if given != needed:
                raise ValueError(f"the network's {key} is {given}, but codec, text and objective need {needed}")
        if objective.two_times and not network.two_times:
            raise ValueError(f"{type(objective).__name__} needs a network of two times: set network.two_times")
        if network.picture_channels not in (0, codec.channels):
            raise ValueError(f"the network's picture_channels are {network.picture_channels}, and a picture has "
                             f"{codec.channels} channels of latents")  # fmt: skip
        self.sampling = sampling or Sampling()
        self.sampling.walk(objective)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def sized(self) -> bool:
        """Whether the network is told of sizes and crops, as its longer pooled vector says (`data.sizes`)."""
        return self.network.pooled_dim == self.text.pooled_dim + SIZE_FEATURES

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
        mask = self.text.mask(prompts).to(self.device) if self.network.text_mask else None
        return Condition(text.to(self.device), pooled.to(self.device), mask)

    def shown(self, picture: Tensor, latent: tuple[int, int], level: float, draw: Noise) -> Tensor:
        """The latents (B, C, *latent) of a picture to work from, enlarged to the size of what is drawn.

        Args:
            picture: pixels in [0, 1], (B, pixel_channels, h, w).
            latent: height and width of the latents.
            level: how much noise it is given, 0 to 1.
            draw: gives the noise, (B, C, *latent).
        """
        height, width = (side * self.codec.factor for side in latent)
        latents = self.codec.encode(enlarged(picture.to(self.device), height, width))
        return noised(latents, draw(), level) if level else latents

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
        picture: Tensor | None = None,
        level: float = 0.0,
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
            picture: what a network with picture_channels works from, such as a small picture to enlarge: pixels in
                [0, 1], (B or 1, C, h, w).
            level: how much noise that picture is given, 0 to 1, for a network with level_embeds.
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
        noise = draw()
        told = self._told(len(prompts), latent, picture, level, draw)
        estimate = self.denoiser(prompts, negative, sampling, times, height, width, told)
        a, b = self.objective.path(times[0])
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
            denoise = inpaint(estimate, x0, noise, covered)
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

    def _told(
        self, count: int, latent: tuple[int, int], picture: Tensor | None, level: float, draw: Noise
    ) -> dict[str, Tensor]:
        """The parts of the condition that come from a picture. ValueError where network and picture do not fit."""
        network = self.network
        if (picture is not None) != bool(network.picture_channels):
            raise ValueError("this network works from a picture: give one" if picture is None else
                             "this network works from no picture: leave it out")  # fmt: skip
        if not 0 <= level <= 1 or (level and not network.level_embeds):
            raise ValueError(f"level must be from 0 to 1, and 0 for a network without level_embeds, got {level}")
        if picture is None:
            return {}
        if picture.shape[1] != self.codec.pixel_channels or len(picture) not in (1, count):
            wanted = f"(1 or {count}, {self.codec.pixel_channels}, …)"
            raise ValueError(f"the picture must be {wanted}, got {tuple(picture.shape)}")
        told = {"picture": self.shown(picture.expand(count, -1, -1, -1), latent, level, draw)}
        return told | ({"level": torch.full((count,), level, device=self.device)} if network.level_embeds else {})

    def denoiser(
        self,
        prompts: Sequence[str],
        negative: str,
        sampling: Sampling,
        times: Tensor,
        height: int | None = None,
        width: int | None = None,
        told: Mapping[str, Tensor] | None = None,
    ) -> Denoiser:
        """The network's estimate for these prompts, guided as `sampling` says.

        Args:
            prompts: B texts.
            negative: what guidance moves away from.
            sampling: the guidance.
            times: of the walk.
            height: of the pictures in pixels; none takes the training's.
            width: likewise.
            told: further parts of the condition, by name.
        """
        condition = self.condition(prompts, height, width)._replace(**(told or {}))
        if self.network.guidance_embeds:
            if negative:
                raise ValueError("a network that has learned its guidance cannot be told what to move away from")
            scales = torch.full((len(prompts),), float(sampling.guidance), device=self.device)
            condition = condition._replace(guidance=scales)
        model = self._guided(sampling, lambda: condition.null(self.condition([negative], height, width)), times)

        def estimate(z: Tensor, t: Tensor, end: Tensor | None = None) -> Estimate:
            return self.objective.denoise(model, z, t, condition, end)

        return estimate

    def _guided(self, sampling: Sampling, negative: Callable[[], Condition], times: Tensor) -> Model:
        """The network, guided as `sampling` says."""
        if sampling.guidance == 1 or self.network.guidance_embeds:
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
            None if self.objective.outputs == 1 else self.codec.channels,
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
        if not set(sampling.skip_layers) <= set(range(self.network.skippable)):
            raise ValueError(f"skip_layers must be blocks of an MMDiT, got {sampling.skip_layers}")
        if sampling.method == "meanflow" and not self.network.two_times:
            raise ValueError("sampler meanflow needs a network of two times, and this one has one: use euler")
        if self.network.guidance_embeds and (sampling.rescale or sampling.skip_layers or sampling.interval != (0, 1)):
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
    def load(cls, path: str | os.PathLike[str], how: Reading | None = None) -> Self:
        """Reads a model folder, a run's folder, a single file or a LoRA's folder (`pipeline.folder.read`)."""
        return cls(*disk.read(find_model(Path(path)), how))
