"""The image embedding that a network is shown: of a picture or from a prior, with noise (Ramesh et al. 2022, §2.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.clip import CLIPImage
from data.degrade import noised
from flow.sampler import Noise


def shown(
    encoder: CLIPImage, count: int, picture: Tensor | None, embedding: Tensor | None, level: float, draw: Noise
) -> Tensor:
    """The latents of image embeddings, (count, D, 1, 1): zeros, which mean none, without a picture and an embedding.

    Args:
        encoder: of the model.
        count: number of prompts.
        picture: pixels in [0, 1] of any size, (count or 1, 3, h, w).
        embedding: unit embeddings, (count or 1, D), in the picture's place.
        level: how much noise is added, 0 to 1.
        draw: returns noise, (count, …).

    Raises:
        ValueError: a picture and an embedding, neither 1 nor count of them, or they have a wrong shape.
    """
    if picture is not None and embedding is not None:
        raise ValueError("an embedding takes the place of the picture: give one of them")
    if picture is not None:
        side = (encoder.factor, encoder.factor)
        if picture.shape[-2:] != side:
            picture = F.interpolate(picture, side, mode="bicubic", antialias=True).clamp(0, 1)
        latents = encoder.encode(picture)
    elif embedding is not None:
        latents = encoder.latents(embedding)
    else:
        return torch.zeros(count, encoder.channels, 1, 1)
    if len(latents) not in (1, count):
        raise ValueError(f"there must be 1 or {count} pictures to embed, got {len(latents)}")
    latents = latents.expand(count, -1, -1, -1)
    if not level:
        return latents
    drawn: list[Tensor] = []
    while sum(part.shape[1] for part in drawn) < encoder.channels:
        drawn.append(draw().flatten(1).to(latents.device))
    return noised(latents, torch.cat(drawn, dim=1)[:, : encoder.channels, None, None], level)
