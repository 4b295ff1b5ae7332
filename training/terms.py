"""Loss terms that are added to the objective. They read the hidden states of the same forward pass."""

import math
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


class Dispersive(LossTerm):
    """weight·log mean over pairs i, j of exp(−‖h_i − h_j‖²/(n·temperature)): features of pictures move apart.

    Dispersive loss (Wang and He 2025, InfoNCE with the squared distance). h_i are the n numbers of all image tokens of
    picture i after a block, in the first quarter of the network in the paper. The pairs are those of the micro-batch,
    i = j too. The term needs no other network or pass.

    Args:
        block: counted from 0.
        weight: factor of the term.
        temperature: of the distances.

    Example:
        >>> import torch
        >>> h = torch.tensor([[[0.0]], [[1.0]]])  # two pictures of one token of one number
        >>> expected = 0.5 * torch.log((1 + torch.exp(torch.tensor(-2.0))) / 2)
        >>> bool(torch.allclose(Dispersive(block=0)({0: h}), expected))
        True
    """

    def __init__(self, block: int, weight: float = 0.5, temperature: float = 0.5) -> None:
        if not (block >= 0 and weight > 0 and temperature > 0):
            raise ValueError(
                f"Dispersive needs block >= 0, weight > 0 and temperature > 0, got {block}, {weight} and {temperature}"
            )
        self.block, self.weight, self.temperature = block, weight, temperature
        self.blocks = (block,)

    def __call__(self, tokens: Mapping[int, Tensor]) -> Tensor:
        features = tokens[self.block].float().flatten(1)  # (B, n)
        gram = features @ features.T
        squares = gram.diagonal()
        distances = (squares[:, None] + squares - 2 * gram).clamp(min=0) / features.shape[1]
        spread = (-distances / self.temperature).flatten().logsumexp(0) - 2 * math.log(len(features))
        return (self.weight * spread).expand(len(features))
