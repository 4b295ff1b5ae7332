"""Pipeline: network, objective, codec and text encoder joined for inference."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from data.clip import CLIPImage
from data.degrade import enlarged, noised
from data.latents import Codec
from data.sizes import size_features
from data.text.encoder import TextEncoder
from flow.guidance import Weak, inpaint, refined
from flow.objective import Estimate, Objective
from flow.sampler import Callback, Denoiser, Noise
from mmdit.control import Control, Controlled
from mmdit.model import MMDiT
from mmdit.network import Condition, Network
from pipeline import folder as disk
from pipeline.embedding import shown
from pipeline.folder import LoadOptions, Parts
from pipeline.guidance import Guides, Pull
from pipeline.residual import Regressor, Residual
from pipeline.sampling import Sampling, Walk, random_normals
from storage.models import find_model

TOKENS = 4096  # image tokens in a batch, by default


class Refiner(NamedTuple):
    """A second model that takes over in the middle of the walk (SDXL, Podell et al. 2023, §2.5)."""

    pipe: "Pipeline"  # on the same path, in the same latents
    handover: float  # the time, between 0 and 1, below which it estimates picture and noise


class Pipeline:
    """Draws a picture for each prompt.

    Args:
        network: the trained network.
        objective: the objective that it was trained with: path, target, shift and perhaps a learned variance.
        codec: turns latents into pixels.
        text: turns prompts into conditions.
        sampling: the default sampler, steps and guidance.
        regressor: gives the mean of the latents, if the network draws the residual.
        image_encoder: makes the image embeddings that are a part of the network's pooled vector, if it takes any.

    Raises:
        ValueError: the sizes of the parts do not fit together, or `sampling` does not fit the objective.

    Example:
        The text encoder of the digits with an untrained network:

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
        self,
        network: Network,
        objective: Objective,
        codec: Codec,
        text: TextEncoder,
        sampling: Sampling | None = None,
        regressor: Regressor | None = None,
        image_encoder: CLIPImage | None = None,
    ) -> None:
        self.network, self.objective, self.codec, self.text = network, objective, codec, text
        self.sampling = sampling or Sampling()
        self.regressor, self.image_encoder = regressor, image_encoder
        for key, needed in (
            ("in_channels", codec.channels),
            ("out_channels", codec.channels * objective.outputs),
            ("text_dim", text.tokens_dim),
            ("pooled_dim", self.parts.pooled_dim(self.sized)),
            ("words", text.vocabulary),
            ("text_length", text.length if getattr(network, "text_length", 0) else 0),
        ):
            given = getattr(network, key, None if needed else 0)
            if given != needed:
                raise ValueError(f"the network's {key} is {given}, but codec, text and objective need {needed}")
        learned = objective.outputs if objective.discrete else 0
        if codec.vocabulary != learned:
            kinds = [f"{count} codes" if count else "numbers" for count in (codec.vocabulary, learned)]
            raise ValueError(f"the codec's latents are {kinds[0]}, and the objective learns {kinds[1]}: make them fit")
        if objective.two_times and not network.two_times:
            raise ValueError(f"{type(objective).__name__} needs a network of two times: set network.two_times")
        if network.picture_channels % codec.channels:
            raise ValueError(f"the network's picture_channels are {network.picture_channels}, and a picture has "
                             f"{codec.channels} channels of latents")  # fmt: skip
        if network.picture_channels and image_encoder:
            raise ValueError("a network works from a picture or from its embedding: leave one of them out")
        if regressor:
            regressor.check(network)
        self.sampling.walk(objective)
        self.guides = Guides()

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @property
    def sized(self) -> bool:
        """Whether the pooled vector of the network also holds sizes and crops (`data.sizes`)."""
        return self.parts.sized

    def steered(self, controls: Sequence[Control]) -> "Pipeline":
        """This pipeline with a network that is steered by ControlNets. It shares all weights.

        Raises:
            ValueError: in one line, if the network is no MMDiT, a ControlNet does not fit it, or there is autoguidance,
                whose model no ControlNet steers.
        """
        if self.guides.weak:
            raise ValueError("a ControlNet and autoguidance exclude each other: leave one of them out")
        if not isinstance(self.network, MMDiT):
            kind = "one already" if isinstance(self.network, Controlled) else "no MMDiT"
            raise ValueError(f"a ControlNet steers an MMDiT, and this model has {kind}: leave the ControlNet out")
        steered = Pipeline(Controlled(self.network, controls).eval(), *self.parts[1:])
        steered.guides = self.guides
        return steered

    def away_from(self, weak: "Pipeline", scale: float) -> "Pipeline":
        """This pipeline with autoguidance y = y_weak + scale·(y − y_weak) by a worse model (Karras et al. 2024, eq. 3).

        Args:
            weak: a smaller model of the same kind, or one that was trained for less time.
            scale: 1 is none, larger values move away from the worse model.

        Raises:
            ValueError: in one line, if the models do not fit each other.
        """
        if not 1 < scale < math.inf:
            raise ValueError(f"autoguidance needs a finite scale above 1, which is none, got {scale:g}")
        self.check_alike(weak, "weak model")
        for name in ("target", "variance"):
            if self.objective.describe()[name] != weak.objective.describe()[name]:
                raise ValueError(f"the weak model has another {name} than the model: take one of the same {name}")
        fields = ("text_dim", "pooled_dim", "two_times", *self.network.CONDITION_FIELDS.values())
        if wrong := [name for name in fields if getattr(self.network, name) != getattr(weak.network, name)]:
            raise ValueError(f"the weak model has another {wrong[0]} than the model: take one of the same kind")
        if (weak.network.largest or math.inf) < (self.network.largest or math.inf):
            raise ValueError("the weak model draws smaller pictures at most than the model: take another one")
        if self.text.fingerprint() != weak.text.fingerprint():
            raise ValueError("the weak model has other text encoders than the model: take one with the same")
        guided = copy.copy(self)
        guided.guides = self.guides._replace(weak=Weak(weak.network, scale - 1))
        return guided

    def pulled(self, pulls: Sequence[Pull]) -> "Pipeline":
        """This pipeline guided by gradients, in addition to its other guidance.

        With a guidance of 0 the network is unconditional, and the gradients alone follow the prompts.

        Raises:
            ValueError: in one line, if a scale is not finite or 0, an interval contains a time without any picture, or
                the network has learned average velocities.
        """
        if self.network.two_times:
            raise ValueError("a gradient guides no average velocities: take a model of velocities")
        if self.regressor:
            raise ValueError("a gradient reads noisy pictures, and this model draws the residual of a regressor: leave "
                             "the gradient out")  # fmt: skip
        for pull in pulls:
            pull.check(self.objective.path)
        guided = copy.copy(self)
        guided.guides = self.guides._replace(pulls=(*self.guides.pulls, *pulls))
        return guided

    def check_prompts(self, sampling: Sampling, prompts: Sequence[str]) -> None:
        """ValueError if guidance is 0 and there is a prompt: nothing would follow it, or not only the gradients."""
        self.guides.check_prompts(sampling, self.network, prompts)

    def refuse_picture(self) -> None:
        """ValueError if the network works from a picture, for commands that have none."""
        if self.network.picture_channels:
            raise ValueError("this model works from a picture, and this command has none: use sample.py --picture")

    def refuse_codes(self) -> None:
        """ValueError if the model writes codes, for commands that need a path."""
        if self.objective.discrete:
            raise ValueError("this model writes codes, and this command walks a path: take another model")

    def check_drawn(self, image: bool) -> None:
        """ValueError if the model draws no pictures, or has an image to start from and cannot."""
        if not self.codec.decodes:
            raise ValueError("this model draws image embeddings, which have no pixels: see pipeline.prior.draw")
        if image and self.objective.discrete:
            raise ValueError("a model of codes writes a picture from its beginning: leave the image out")

    def check_alike(self, other: "Pipeline", name: str) -> None:
        """ValueError, in one line with the other's name, if a second model has another path or other latents."""
        for what, own, theirs in (
            ("path", self.objective.describe()["path"], other.objective.describe()["path"]),
            ("codec", *({**p.codec.fingerprint(), "dtype": None} for p in (self, other))),
            ("regressor", *(p.regressor and p.regressor.fingerprint() for p in (self, other))),
        ):
            if own != theirs:
                raise ValueError(f"the {name} has another {what} than the model: take one of the same {what}")

    def condition(
        self,
        prompts: Sequence[str],
        height: int | None = None,
        width: int | None = None,
        embedding: Tensor | None = None,
    ) -> Condition:
        """The condition of the prompts, on the network's device. An empty prompt gives the null condition.

        Args:
            prompts: B texts.
            height: height of the pictures in pixels, for a network with size conditioning; None means the training's.
            width: the same for the width.
            embedding: latents of image embeddings, (B, D, 1, 1), for a network that takes any; None means none.
        """
        text, pooled = self.text.encode(prompts)
        if self.image_encoder:
            image = torch.zeros(len(pooled), self.image_encoder.channels) if embedding is None else embedding
            pooled = torch.cat([pooled.float(), image.flatten(1).to(pooled.device)], dim=-1)
        if self.sized:
            h, w = (side * self.codec.factor for side in self.latent_size(height, width))
            whole = torch.tensor([h, w, 0, 0, h, w]).expand(len(pooled), -1)  # not cropped
            pooled = torch.cat([pooled.float(), size_features(whole).to(pooled.device)], dim=-1)
        mask = self.text.mask(prompts).to(self.device) if self.network.text_mask else None
        level = self._levels(len(prompts), 0.0).get("level") if self.image_encoder else None
        return Condition(text.to(self.device), pooled.to(self.device), mask, level=level)

    def picture_latents(self, picture: Tensor, latent: tuple[int, int], level: float, draw: Noise) -> Tensor:
        """The latents (B, C, *latent) of an input picture, which is enlarged to the size of the output.

        Args:
            picture: pixels in [0, 1], (B, pixel_channels, h, w).
            latent: height and width of the latents.
            level: how much noise is added to the latents, 0 to 1.
            draw: returns the noise, (B, C, *latent).
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
        embedding: Tensor | None = None,
        refiner: Refiner | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draws one picture for each prompt.

        Args:
            prompts: B texts; an empty one is unconditional.
            seeds: B seeds; picture i starts from `torch.randn` of a CPU generator seeded with seeds[i]. A stochastic
                sampler draws its further noise from the same generator.
            negative: the negative prompt, which guidance moves away from.
            sampling: sampler, steps and guidance; None means the model's own.
            shift: α of the time grid; None means that of the training for this size.
            height: height of the picture in pixels, a multiple of unit × codec factor; None means the image's, or
                without an image the training's.
            width: the same for the width.
            image: the image to start from, pixels in [0, 1], (B or 1, C, height, width); None starts from noise.
            strength: share of the steps that change the image (SDEdit, Meng et al. 2022). At 1 nothing of the image
                remains but what the mask keeps.
            mask: 1 where the image is drawn anew and 0 where it is kept, (B or 1, 1, height, width). A latent pixel
                with any 1 in it is drawn anew. None draws everything anew.
            picture: the input of a network with picture_channels, such as a small picture to enlarge: pixels in
                [0, 1], (B or 1, C, h, w). Those of several ControlNets follow each other in the channels. For a model
                with an image encoder, a picture whose embedding is shown to the network.
            level: how much noise is added to that picture or embedding, 0 to 1, for a network with level_embeds.
            embedding: in place of a picture, unit image embeddings, (B or 1, D), as `pipeline.prior.draw` makes them.
            refiner: a second model for the late times. It has its own prompt's condition and target, and the same
                guidance.
            callback: called with (steps done, z, x̂0): first with (0, z, z), then after each step. A residual's x̂0 comes
                with the regressor's mean added, its z without.

        Returns:
            Pixels in [0, 1], (B, C, height, width), on the CPU.

        Raises:
            ValueError: an impossible size or number of steps, a sampler that does not fit the objective, a refiner of
                another kind, or an overflow.
        """
        sampling = sampling or self.sampling
        self.check_drawn(image is not None)
        if image is not None:
            height, width = height or image.shape[-2], width or image.shape[-1]
        elif mask is not None:
            raise ValueError("a mask needs an image: give one, or leave the mask out")
        latent, walk, times = self.plan(sampling, shift, height, width, 1.0 if image is None else strength)
        draw = random_normals(seeds, (self.network.in_channels, *latent), self.device)
        noise = draw()
        if self.image_encoder:
            latents = shown(self.image_encoder, len(prompts), picture, embedding, level, draw)
            extra = {"embedding": latents, **self._levels(len(prompts), level)}
        elif embedding is not None:
            raise ValueError("this model takes no image embedding: leave it out")
        else:
            extra = self._picture_condition(len(prompts), latent, picture, level, draw)
        estimate = self.denoiser(prompts, negative, sampling, times, height, width, extra)
        residual = Residual()
        if self.regressor:
            condition = self.condition(prompts, height, width)._replace(**extra)
            residual = self.regressor.residual(condition, noise.shape)
        if refiner:
            self.check_refiner(refiner, sampling, times, height, width)
            late = refiner.pipe.denoiser(prompts, negative, sampling, times, height, width)
            estimate = refined(estimate, late, refiner.handover)
        a, b = self.objective.path(times[0])
        if image is None:
            x0 = torch.zeros_like(noise)
            z = self.scale_at(times[0]) * noise
        else:
            x0 = residual.of(self._encode(image, noise))
            z = a * x0 + b * noise
        denoise = estimate
        if mask is not None:
            covered = F.max_pool2d(mask.to(self.device, noise.dtype), self.codec.factor)
            if covered.shape[-2:] != latent:
                raise ValueError(f"the mask must have the picture's size, got {tuple(mask.shape[-2:])}")
            denoise = inpaint(estimate, x0, noise, covered)
        report = callback and (lambda done, z, x0: callback(done, z, residual.whole(x0)))
        if report:
            report(0, z, torch.zeros_like(z) if self.objective.discrete else z)
        try:
            z = walk(denoise, z, draw, report)
        finally:
            self.network.forget()
        if not z.isfinite().all():  # it would give a black picture
            dtype = str(next(self.network.parameters()).dtype).removeprefix("torch.")
            cure = "less guidance" if dtype == "float32" else "bfloat16 or float32, or less guidance"
            raise ValueError(f"the network overflowed in {dtype}: take {cure}")
        return self.codec.decode(residual.whole(z / self.scale_at(times[-1]))).cpu()

    @torch.inference_mode()
    def integrate(
        self, z: Tensor, prompts: Sequence[str], sampling: Sampling | None = None, backward: bool = False
    ) -> Tensor:
        """Solves the model's ODE from z, in latents of the training's size: from noise to a picture, or back.

        Args:
            z: unit noise, or latents of pictures, (B, C, h, w).
            prompts: B texts.
            sampling: a deterministic sampler; None means the model's.
            backward: solve from pictures to noise, by euler, heun, midpoint or reference.

        Returns:
            The end of the trajectory, (B, C, h, w), on the network's device.

        Raises:
            ValueError: the sampler draws noise, or does not fit the model or the direction.
        """
        sampling = sampling or self.sampling
        walk, times = sampling.walk(self.objective, self.shift(), backward=backward)
        sampling.refuse_noise()
        self.plan(sampling)
        return self.walked(walk, times, self.denoiser(prompts, "", sampling, times), z.to(self.device))

    def walked(self, walk: Walk, times: Tensor, denoise: Denoiser, z: Tensor) -> Tensor:
        """The end of a walk without noise from z to the last of the times, each for data of unit variance."""
        first, last = (self.scale_at(t) for t in (times[0], times[-1]))
        return walk(denoise, first * z, lambda: z, None) / last

    def scale_at(self, t: Tensor) -> Tensor:
        """The standard deviation of z at t, for data of unit variance; at t = 0 the factor of the picture in z."""
        a, b = self.objective.path(t)
        return a if t == 0 else (a**2 + b**2).sqrt()

    def check_refiner(
        self,
        refiner: Refiner,
        sampling: Sampling,
        times: Tensor,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """ValueError, in one line, if a refiner does not fit this model, its sampling or the times of the walk."""
        pipe, handover = refiner
        if not 0 < handover < 1:
            raise ValueError(f"the handover must be a time between 0 and 1, got {handover:g}")
        if not (times[:-1] < handover).any():
            raise ValueError(f"no step begins below the handover at {handover:g}, the last at {times[-2]:.3g}: "
                             "take more steps or a larger handover")  # fmt: skip
        self.check_alike(pipe, "refiner")
        if pipe.network.picture_channels:
            raise ValueError("the refiner works from a picture, and a refiner gets none: take another one")
        pipe.plan(sampling, None, height, width)

    def _picture_condition(
        self, count: int, latent: tuple[int, int], picture: Tensor | None, level: float, draw: Noise
    ) -> dict[str, Tensor]:
        """The fields `picture` and `level` of the condition. ValueError if network and picture do not fit."""
        network = self.network
        if (picture is not None) != bool(network.picture_channels):
            raise ValueError("this network works from a picture: give one" if picture is None else
                             "this network works from no picture: leave it out")  # fmt: skip
        levels = self._levels(count, level)
        if picture is None:
            return {}
        channels = self.codec.pixel_channels
        several = network.picture_channels // self.codec.channels
        if picture.shape[1] != several * channels or len(picture) not in (1, count):
            wanted = f"(1 or {count}, {several * channels}, …)"
            raise ValueError(f"the picture must be {wanted}, got {tuple(picture.shape)}")
        pictures = picture.expand(count, -1, -1, -1).split(channels, dim=1)
        latents = [self.picture_latents(one, latent, level, draw) for one in pictures]
        if isinstance(network, Controlled):
            for one, control in zip(latents, network.settings, strict=True):
                if control.network.zero_pooled:
                    one += self.codec.shift * self.codec.scale  # as it learned: latents without the codec's shift
        return {"picture": torch.cat(latents, dim=1), **levels}

    def _levels(self, count: int, level: float) -> dict[str, Tensor]:
        """The field `level` of the condition, (B,), for a network that has it. ValueError if it does not fit."""
        if not 0 <= level <= 1 or (level and not self.network.level_embeds):
            raise ValueError(f"level must be from 0 to 1, and 0 for a network without level_embeds, got {level}")
        return {"level": torch.full((count,), level, device=self.device)} if self.network.level_embeds else {}

    def denoiser(
        self,
        prompts: Sequence[str],
        negative: str,
        sampling: Sampling,
        times: Tensor,
        height: int | None = None,
        width: int | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Denoiser:
        """The denoiser for these prompts, with the guidance of `sampling`.

        Args:
            prompts: B texts.
            negative: the negative prompt, which guidance moves away from.
            sampling: the guidance.
            times: the times of the sampler.
            height: height of the pictures in pixels; None means the training's.
            width: the same for the width.
            extra: further fields of the condition, by name, and `embedding` as of `condition`.

        Raises:
            ValueError: guidance 0 with a prompt but no gradient, or a negative prompt for a network that has learned
                its guidance.
        """
        self.check_prompts(sampling, prompts)
        if unconditional := self.guides.one_branch(sampling, self.network):
            sampling = replace(sampling, guidance=1.0)
        read = [negative] * len(prompts) if unconditional else prompts
        fields = dict(extra or {})
        condition = self.condition(read, height, width, fields.pop("embedding", None))._replace(**fields)
        if self.network.guidance_embeds:
            if negative:
                raise ValueError("this network has learned its guidance and takes no negative prompt: leave it out")
            scales = torch.full((len(prompts),), float(sampling.guidance), device=self.device)
            condition = condition._replace(guidance=scales)

        def null() -> Condition:
            return condition.null(self.condition([negative], height, width))

        model_at = self.guides.model_at(self.network, self.objective, sampling, times, null)

        def estimate(z: Tensor, t: Tensor, end: Tensor | None = None) -> Estimate:
            return self.objective.denoise(model_at(t), z, t, condition, end)

        return self.guides.pulled(estimate, self.objective.path, prompts)

    def _encode(self, image: Tensor, noise: Tensor) -> Tensor:
        """The latents of the image, expanded to the shape of the noise (B, C, h, w)."""
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
        """The size of the latents, the sampler and its times. All checks that need no drawing are made here.

        Raises:
            ValueError: in one line, if the size is impossible, or the sampling does not fit objective or network.
        """
        latent = self.latent_size(height, width)
        if self.objective.discrete and sampling.steps != (count := self.codec.channels * latent[0] * latent[1]):
            raise ValueError(f"this model writes {count} codes, one a step: give {count} steps, not {sampling.steps}")
        if self.objective.discrete and (sampling.rescale or shift not in (None, 1.0)):
            raise ValueError("rescale and shift do nothing for codes: leave them out")
        if sampling.method == "meanflow" and not self.network.two_times:
            raise ValueError("sampler meanflow needs a network of two times, and this one has only one: use euler")
        if self.regressor and sampling.guidance != 1:
            raise ValueError("guidance would mix two prompts, and this model draws the residual of a mean under one: "
                             f"give guidance 1, not {sampling.guidance:g}")  # fmt: skip
        shift = self.shift(height, width) if shift is None else shift
        walk, times = sampling.walk(self.objective, shift, strength)
        self.guides.check(sampling, self.network, times)
        return latent, walk, times

    def shift(self, height: int | None = None, width: int | None = None) -> float:
        """α of the time grid for a picture of this size, as in training."""
        h, w = self.latent_size(height, width)
        return self.objective.alpha(h * w)

    def batch_size(self, height: int | None = None, width: int | None = None) -> int:
        """The default batch size for pictures of this size: 4,096 tokens, which is one picture of 1024² pixels."""
        h, w = self.latent_size(height, width)
        return max(1, TOKENS * self.network.unit**2 // (h * w))

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the latents for a size in pixels. ValueError if the model cannot draw this size."""
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
        """The parts of the pipeline."""
        return Parts(
            self.network, self.objective, self.codec, self.text, self.sampling, self.regressor, self.image_encoder
        )

    def save(self, folder: Path) -> None:
        """Writes a model folder (`pipeline.folder.write`)."""
        disk.write(self.parts, folder)

    @classmethod
    def load(cls, path: str | os.PathLike[str], options: LoadOptions | None = None) -> Self:
        """Loads a model folder, a run's folder, a single file or a LoRA's folder (`pipeline.folder.read`)."""
        return cls(*disk.read(find_model(Path(path)), options))
