"""What the tests of metrics/ share: the committed judge of digits, and features that are the same at each call."""

from pathlib import Path

import torch
from torch import Tensor

ASSETS = Path(__file__).parents[1] / "assets" / "digits"
JUDGE = ASSETS / "judge"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
