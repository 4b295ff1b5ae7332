"""A small CLIP image tower with random weights, on disk."""

from pathlib import Path

import torch
from networks import stirred
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from data.clip import write

SIDE, SIZE = 64, 64  # of a picture, of an embedding: as the shapes have them


def tower(side: int = SIDE, size: int = SIZE) -> CLIPVisionModelWithProjection:
    """Always the same, with every weight random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPVisionConfig(**sizes, projection_dim=size, image_size=side, patch_size=side // 4)
        return stirred(CLIPVisionModelWithProjection(config))


def pictures(count: int, side: int = SIDE) -> Tensor:
    """Blotches (count, 3, side, side) uint8."""
    coarse = torch.randint(256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    return torch.nn.functional.interpolate(coarse, size=side, mode="bilinear").byte()


def written(folder: Path) -> Path:
    """A folder that `CLIPImage` reads."""
    write(folder, tower(), pictures(300))
    return folder
