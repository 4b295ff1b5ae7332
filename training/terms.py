"""Loss terms beside the objective, on the hidden states of the same forward pass."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor


class LossTerm(ABC):
    """One term. The YAML names it in `terms`; validation does not count it.

    Attributes:
        blocks: of the network, from 0, whose image tokens it reads.
    """

    blocks: tuple[int, ...]

    @abstractmethod
    def __call__(self, tokens: Mapping[int, Tensor]) -> Tensor:
        """What it adds to each picture's loss, (B,), for block → image tokens (B, M, width) after it."""


class LayerSync(LossTerm):
    """weight·(1 − mean cos(h_weak, sg(h_strong))): an early block learns to say what a later one does.

    LayerSync (Haghighi et al. 2025). No gradient flows into the later block; it needs no further network or pass.

    Args:
        weak: the block that learns, from 0.
        strong: the later one that it learns from.
        weight: of the term.

    Example:
        >>> import torch
        >>> h = torch.randn(2, 5, 8)
        >>> LayerSync(weak=1, strong=3)({1: 2 * h, 3: h}).abs().max() < 1e-6  # only directions count
        tensor(True)
    """

    def __init__(self, weak: int, strong: int, weight: float = 0.2) -> None:
        if not (0 <= weak < strong and weight > 0):
            raise ValueError(f"LayerSync needs 0 <= weak < strong and weight > 0, got {weak}, {strong} and {weight}")
        self.weak, self.strong, self.weight = weak, strong, weight
        self.blocks = (weak, strong)

    def __call__(self, tokens: Mapping[int, Tensor]) -> Tensor:
        similarity = F.cosine_similarity(tokens[self.weak].float(), tokens[self.strong].detach().float(), dim=-1)
        return self.weight * (1 - similarity.mean(1))
