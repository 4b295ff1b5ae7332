"""Guidance by the gradients of models that read noisy pictures, from files (`baselines.classifier`)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flow.guidance import Score
from flow.sampler import Denoiser
from pipeline import Pipeline, Pull
from pipeline.steering import model_and_scale


def pulled(
    pipe: Pipeline,
    classifier: str | None,
    clip: str | None,
    interval: tuple[float, float] | None,
    prompts: Sequence[str],
    height: int | None = None,
    width: int | None = None,
) -> Pipeline:
    """The pipeline with the gradients of a classifier and of a CLIP, each MODEL:SCALE; itself without one.

    Args:
        pipe: the model.
        classifier: folder and scale of a `baselines.classifier.Classifier`.
        clip: folder and scale of a `baselines.classifier.NoisyCLIP`.
        interval: the times (from, to) at which they work; none means as for `flow.guidance.uphill`.
        prompts: all that will be drawn.
        height: of the pictures to draw, in pixels; none means the training's.
        width: the same for the width.

    Raises:
        FileNotFoundError, ValueError: in one line, if a file is missing or damaged, or model, prompts and size do not
            fit each other.
    """
    if classifier is None and clip is None:
        if interval:
            raise ValueError("--gradient-interval needs --classifier or --clip-guidance: give one, or leave it out")
        return pipe
    from baselines.classifier import PROBE, Classifier, NoisyCLIP  # diffusers is slow to import

    asked: dict[str, tuple[str | None, type[Classifier | NoisyCLIP]]] = {
        "classifier": (classifier, Classifier),
        "clip-guidance": (clip, NoisyCLIP),
    }
    pulls = []
    for flag, (text, kind) in asked.items():
        if text is None:
            continue
        path, scale = model_and_scale(flag, text, "assets/digits/classifier:2")
        try:
            reader = kind.load(path).to(pipe.device)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--{flag} {path} is no {kind.__name__} of noisy pictures: {error}") from None
        latent = (reader.in_channels, reader.sample_size, reader.sample_size)
        drawn = (pipe.codec.channels, *pipe.latent_size(height, width))
        if latent != drawn:
            raise ValueError(f"{path} reads {_times(latent)} numbers, and the model draws {_times(drawn)}")
        if not _alike(reader.codec, pipe.codec.fingerprint()):
            raise ValueError(f"{path} reads the latents of another codec than the model's: train it with the same")
        if isinstance(reader, Classifier):
            reader.labels(prompts)
            read = reader.labels
        elif reader.knows(_pooled(pipe, [PROBE])[0].to(pipe.device)):
            read = partial(_pooled, pipe)
        else:
            raise ValueError(f"{path} reads other text encoders than the model's: train it with the same")
        pulls.append(Pull(partial(_score, pipe, reader, read), scale, interval))
    return pipe.pulled(pulls)


def _alike(codec: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one codec; weights in another type cannot be compared."""
    ignored = {"dtype"} if codec.get("dtype") == own.get("dtype") else {"dtype", "weights"}
    return all(codec.get(key) == own.get(key) for key in (codec.keys() | own.keys()) - ignored)


def _pooled(pipe: Pipeline, prompts: Sequence[str]) -> Tensor:
    return pipe.text.encode(prompts).pooled.float()


def _score(
    pipe: Pipeline, reader: Any, read: Callable[[Sequence[str]], Tensor], prompts: Sequence[str], denoise: Denoiser
) -> Score:
    """The score that a network gives to noisy pictures, which it reads as w = z/(a + b) at τ = b/(a + b)."""
    asked = read(prompts).to(pipe.device)

    def score(z: Tensor, t: Tensor) -> Tensor:
        a, b = pipe.objective.path(t)
        tau = torch.full((len(z),), float(b / (a + b)), device=z.device)
        return reader.score((z / (a + b)).float(), tau, asked)

    return score


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
