"""Loss terms that are added to the objective. They read the hidden states of the same forward pass."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor


class LossTerm(ABC):
    """One loss term. The YAML file names it in `terms`. The validation loss does not include it.

    Attributes:
        blocks: the blocks of the network, counted from 0, whose image tokens the term reads.
    """

    blocks: tuple[int, ...]

    @abstractmethod
    def __call__(self, tokens: Mapping[int, Tensor]) -> Tensor:
        """The term for each picture, (B,).

        Args:
            tokens: block → image tokens after it, (B, M, width).
        """


class LayerSync(LossTerm):
    """weight·(1 − mean cos(h_weak, sg(h_strong))): the features of an early block learn those of a later one.

    LayerSync (Haghighi et al. 2025). No gradient flows into the later block. The term needs no other network or pass.

    Args:
        weak: the early block, which learns; counted from 0.
        strong: the later block, which it learns from.
        weight: factor of the term.

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
