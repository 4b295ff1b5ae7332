"""The CLIP score: how well pictures match their captions."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from metrics.features import CLIPFeatures


def clip_score(model: CLIPFeatures | str | Path, pictures: Tensor, captions: Sequence[str]) -> float:
    """Returns the mean of 100 · max(cos(image, text), 0) over the N pairs, 0 … 100.

    J. Hessel et al., "CLIPScore", 2021, equation in section 3, with w = 100 as in torchmetrics instead of 2.5. Each
    pair is clamped at 0 before the mean, as in the paper.

    Args:
        model: a CLIP, or the folder of a CLIP with its tokenizer.
        pictures: `(N, 1 or 3, H, W)` in [0, 1].
        captions: N of them.

    Raises:
        FileNotFoundError, ValueError: those of `CLIPFeatures`; ValueError also if the counts differ.
    """
    if len(pictures) != len(captions) or isinstance(captions, str):
        raise ValueError(f"each picture has a caption, got {len(pictures)} pictures and {len(captions)} captions")
    clip = model if isinstance(model, CLIPFeatures) else CLIPFeatures(model)
    cosine = torch.cosine_similarity(clip(pictures).pooled, clip.text(captions))
    return 100 * cosine.clamp(min=0).mean().item()
