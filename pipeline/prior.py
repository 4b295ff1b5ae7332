"""Image embeddings for prompts from a prior: several are drawn, and the best is kept (Ramesh et al. 2022, §2.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from data.clip import CLIPImage
from pipeline import Pipeline
from pipeline.sampling import Sampling, random_normals


def draw(
    pipe: Pipeline, prompts: Sequence[str], seeds: Sequence[int], count: int = 2, sampling: Sampling | None = None
) -> Tensor:
    """Draws an image embedding for each prompt, the best of `count`: unit vectors (B, D). The rest as `candidates`."""
    return best(candidates(pipe, prompts, seeds, count, sampling), text_embeddings(pipe, prompts))


@torch.inference_mode()
def candidates(
    pipe: Pipeline, prompts: Sequence[str], seeds: Sequence[int], count: int, sampling: Sampling | None = None
) -> Tensor:
    """Draws several image embeddings for each prompt.

    Args:
        pipe: a model whose codec is a `data.clip.CLIPImage`.
        prompts: B texts; an empty one is unconditional.
        seeds: B seeds. All draws of a prompt take their noise from one generator, one after the other, so that the
            first is that of `count=1`.
        count: draws for each prompt.
        sampling: sampler, steps and guidance; none means the model's own.

    Returns:
        Unit vectors (count, B, D), on the network's device.

    Raises:
        ValueError: in one line, if the model draws no embeddings, or the count is below 1.
    """
    codec, sampling = pipe.codec, sampling or pipe.sampling
    if not isinstance(codec, CLIPImage):
        raise ValueError(f"this model draws latents of {type(codec).__name__}, not image embeddings of CLIPImage")
    if count < 1:
        raise ValueError(f"there must be at least 1 draw for each prompt, got {count}")
    latent, walk, times = pipe.plan(sampling)
    estimate = pipe.denoiser(prompts, "", sampling, times)
    noise = random_normals(seeds, (codec.channels, *latent), pipe.device)
    first, last = (pipe.scale_at(t) for t in (times[0], times[-1]))
    return torch.stack([codec.embedding(walk(estimate, first * noise(), noise, None) / last) for _ in range(count)])


def best(drawn: Tensor, text: Tensor) -> Tensor:
    """Of the candidates (n, B, D) of each prompt, the one with the largest dot product with its text (B, D): (B, D)."""
    chosen = (drawn * text).sum(-1).argmax(0)  # b
    return drawn[chosen, torch.arange(len(text), device=text.device)]


def text_embeddings(pipe: Pipeline, prompts: Sequence[str]) -> Tensor:
    """Unit text embeddings (B, D) in the space of the images: of the first text tower whose pooled vector has length D.

    Raises:
        ValueError: there is no such tower.
    """
    wanted = pipe.codec.channels
    for slot in pipe.text.slots:
        if slot.pooled.stop - slot.pooled.start == wanted:
            with torch.inference_mode():
                pooled = pipe.text.encode(prompts).pooled
            return normalize(pooled[:, slot.pooled].float(), dim=-1).to(pipe.device)
    raise ValueError(f"no text tower has embeddings of {wanted} numbers, as the images have: take a CLIP's both towers")
