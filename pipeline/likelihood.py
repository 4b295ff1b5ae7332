"""Bits per dimension of pictures: exact for codes, solved for a flow, a bound for a chain and for an autoencoder."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from data.latents import LIKELIHOOD, VAE, Pixels
from flow.likelihood import (
    bits_per_dimension,
    continuous_bound,
    discretised,
    importance_weighted,
    log_likelihood,
    log_weights,
    variational_bound,
)
from flow.path import Discrete
from flow.target import determinant
from pipeline import Pipeline
from pipeline.sampling import random_normals
from storage.text import read_json
from tokens.codec import Levels
from tokens.process import NextCode

TOLERANCE = 1e-4  # of a step of the solver; 1e-6 gives 0.002 bits more for digits and takes twelve times as long
DRAWS = 64  # of latents, for the importance-weighted bound


def refuse(pipe: Pipeline, guidance: float) -> None:
    """ValueError, in one line, if a model has no likelihood of pictures."""
    if not isinstance(pipe.codec, Pixels | Levels):
        raise ValueError("it works in an autoencoder's latents, whose likelihood is not that of pictures: "
                         "take a model of pixels")  # fmt: skip
    if guidance != 1 or pipe.network.guidance_embeds or any(pipe.guides):
        raise ValueError("guidance changes the field, and then its pictures have no known likelihood: "
                         "take a model without, and --guidance 1")  # fmt: skip
    if pipe.network.two_times:
        raise ValueError("it has learned average velocities: take a model of velocities")
    path, target = pipe.objective.path, pipe.objective.target
    exact = isinstance(path, Discrete) or pipe.objective.discrete
    for t in () if exact else torch.tensor([0.0, 1.0], dtype=torch.float64):
        if not 1e-9 < determinant(path, target, t).abs() < math.inf:
            raise ValueError(f"at t = {t:g} {type(target).__name__} does not determine picture and noise on its path: "
                             "train on V, or on rectified flow Velocity")  # fmt: skip
    pipe.refuse_picture()


def bits(
    pipe: Pipeline,
    pixels: Tensor,
    captions: Sequence[str],
    levels: int,
    seeds: Sequence[int],
    exact_trace: bool = False,
) -> dict[str, Tensor]:
    """Bits per dimension of pictures, given their captions: what is measured → (B,) float64.

    For a continuous path "ODE", ln p of the ODE (`flow.likelihood.log_likelihood`), and "bound", the integral over all
    noise levels (`flow.likelihood.continuous_bound`), both at the same pictures that are dequantised by uniform noise;
    the mean over that noise is an upper bound on the bits of the levels. For a chain "bound", all terms of it
    (`flow.likelihood.variational_bound`). For a model of codes "exact", the sum of −ln p of its codes.

    Args:
        pipe: the model.
        pixels: pictures in [0, 1] whose numbers are multiples of 1/(levels − 1), (B, C, H, W).
        captions: B texts.
        levels: how many values a number can have.
        seeds: B numbers that draw the noise, so that a picture does not depend on its batch.
        exact_trace: compute the divergence exactly, with one backward pass for each number of a picture, in place of
            Hutchinson's estimate with one random probe.

    Raises:
        ValueError: the model has no likelihood, or the pixels are not on these levels.
    """
    refuse(pipe, 1.0)
    steps = on_levels(pixels, levels)
    if isinstance(pipe.objective, NextCode):
        if pipe.codec.vocabulary != levels:
            raise ValueError(f"this model writes {pipe.codec.vocabulary} levels, and these pictures have {levels}")
        codes, condition = pipe.codec.encode(steps).float().to(pipe.device), pipe.condition(captions)
        with torch.no_grad():
            nats = pipe.objective.nats(pipe.network(codes, codes.new_zeros(len(codes)), condition), codes)
        return {"exact": bits_per_dimension(-nats.double().flatten(1).sum(1), pixels[0].numel(), 1.0)}
    assert isinstance(pipe.codec, Pixels)
    width, count = pipe.codec.width(levels), pixels[0].numel()
    denoise = pipe.denoiser(captions, "", replace(pipe.sampling, guidance=1.0, skip_layers=()), torch.ones(1))
    x0 = pipe.codec.encode(steps).to(pipe.device)
    normal = random_normals(seeds, tuple(pixels.shape[1:]), pipe.device)
    if isinstance(pipe.objective.path, Discrete):
        ends = [pipe.codec.encode(torch.tensor(end)).item() for end in (0.0, 1.0)]
        with torch.no_grad():
            nats = variational_bound(denoise, pipe.objective.path, x0, normal, width, (ends[0], ends[1]))
        return {"bound": bits_per_dimension(-nats.sum(0), count, 1.0)}
    x0 = pipe.codec.dequantize(x0, normal().double(), levels)
    probe = None if exact_trace else torch.where(normal() > 0, 1.0, -1.0)
    exact = log_likelihood(denoise, pipe.objective.path, x0, probe, TOLERANCE)
    with torch.no_grad():
        bound = continuous_bound(denoise, pipe.objective.path, x0, normal)
    return {"ODE": bits_per_dimension(exact, count, width), "bound": bits_per_dimension(-bound, count, width)}


def on_levels(pixels: Tensor, levels: int) -> Tensor:
    """The pixels in float64, exactly on the levels. ValueError if they are not near multiples of 1/(levels − 1)."""
    steps = pixels.double() * (levels - 1)
    if (steps - steps.round()).abs().max() > 1e-3 or pixels.min() < 0 or pixels.max() > 1:
        raise ValueError(f"the pixels are not multiples of 1/{levels - 1} in [0, 1], so {levels} levels are wrong")
    return steps.round() / (levels - 1)


class Autoencoder(NamedTuple):
    """An autoencoder that was trained on the evidence lower bound (`training.autoencoder`)."""

    vae: VAE
    levels: int  # that a number of a picture can have
    log_variance: float  # of the decoder, in pixels from −1 to 1

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether a folder says that it holds one."""
        return (folder / LIKELIHOOD).is_file()

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Self:
        """Loads one onto a device. FileNotFoundError or ValueError in one line if a file is missing or damaged."""
        held = read_json(folder / LIKELIHOOD)
        try:
            levels, log_variance = int(held["levels"]), float(held["log_variance"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{folder / LIKELIHOOD} must hold levels and log_variance, two numbers") from None
        return cls(VAE(folder).to(device), levels, log_variance)

    @torch.no_grad()
    def bits(self, pixels: Tensor, seeds: Sequence[int], draws: int = DRAWS) -> dict[str, Tensor]:
        """Bounds on the bits per dimension of pictures, (B,) float64: the ELBO, and that of several weighted draws.

        Args:
            pixels: pictures in [0, 1] whose numbers are multiples of 1/(levels − 1), (B, C, H, W).
            seeds: B numbers that draw the latents.
            draws: of latents, for each picture.

        Raises:
            ValueError: the pixels are not on the levels, or their sides no multiples of the autoencoder's factor.
        """
        device = self.vae.vae.device
        x = 2 * on_levels(pixels, self.levels).to(device) - 1
        mean, log_variance = self.vae.posterior(pixels)  # of normalised latents; the prior is that of raw ones
        mean, log_variance = mean / self.vae.scale + self.vae.shift, log_variance - 2 * math.log(self.vae.scale)
        spread = torch.full_like(x, self.log_variance)

        def log_probability(z: Tensor) -> Tensor:
            decoded = 2 * self.vae.mean(((z - self.vae.shift) * self.vae.scale).float()).double() - 1
            return discretised(x, decoded, spread, 2 / (self.levels - 1), -1.0, 1.0)

        normal = random_normals(seeds, tuple(mean.shape[1:]), device)
        weights = log_weights(mean.double(), log_variance.double(), log_probability, lambda: normal().double(), draws)
        return {
            name: bits_per_dimension(importance_weighted(weights, k), pixels[0].numel(), 1.0).cpu()
            for name, k in (("ELBO", 1), (f"IWAE-{draws}", draws))
        }
