"""Vector quantisation: a codebook that follows the features, and codes in several depths."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Quantized(NamedTuple):
    """Features in codes."""

    vectors: Tensor  # (B, D, H, W) the sum of the codes' vectors, with the gradient of the features
    codes: Tensor  # (B, depth, H, W) long
    commitment: Tensor  # (B,) mean square distance of the features from the vectors, which do not learn from it


class Quantizer(nn.Module):
    """Features to the nearest of K vectors, by one codebook for all depths.

    Each depth codes what the depths before it have left (RQ-VAE, Lee et al. 2022, §3.1). The gradient goes straight
    through to the features (van den Oord et al. 2017, §3.2). The codebook takes no gradient: in training mode each
    vector follows the mean of its features, by moving averages of their number and sum (appendix A.1). All depths of
    all processes count in one update.

    Args:
        codes: K, how many vectors the codebook has.
        dim: D, their length.
        depth: codes of each place.
        decay: γ of the moving averages.
        epsilon: of the Laplace smoothing of the numbers.
        restart: a vector whose number falls below this becomes a random feature of the batch; 0 leaves it.

    Attributes:
        codebook: (K, D). A buffer, so that averages of the weights copy it.

    Example:
        >>> quantizer = Quantizer(codes=2, dim=1).eval()
        >>> quantizer.codebook.copy_(torch.tensor([[-1.0], [1.0]]))
        tensor([[-1.],
                [ 1.]])
        >>> quantizer(torch.tensor([0.8, -3.0]).reshape(1, 1, 1, 2)).codes
        tensor([[[[1, 0]]]])
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(
        self, codes: int, dim: int, depth: int = 1, decay: float = 0.99, epsilon: float = 1e-5, restart: float = 1.0
    ) -> None:
        super().__init__()
        if min(codes, dim, depth) < 1 or not 0 < decay < 1 or epsilon < 0 or restart < 0:
            raise ValueError("a quantiser needs codes, dim and depth of at least 1, a decay between 0 and 1, and an "
                             f"epsilon and a restart of at least 0, got {codes}, {dim}, {depth}, {decay}, {epsilon} "
                             f"and {restart}")  # fmt: skip
        self.depth, self.decay, self.epsilon, self.restart = depth, decay, epsilon, restart
        self.register_buffer("codebook", torch.randn(codes, dim))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.codebook.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def start(self, features: Tensor, iterations: int = 10) -> None:
        """Sets the codebook by k-means (Lloyd 1982) on features (n, D), from the first of them that are spread evenly.

        Raises:
            ValueError: there are fewer features than codes.
        """
        count = len(self.codebook)
        if len(features) < count:
            raise ValueError(f"k-means needs at least as many features as the {count} codes, got {len(features)}")
        features = features.detach().float()
        centres = features[torch.linspace(0, len(features) - 1, count).long().to(features.device)]
        for _ in range(iterations):
            nearest = self._nearest(features, centres)
            numbers = torch.zeros(count, device=features.device).index_add_(0, nearest, torch.ones_like(features[:, 0]))
            totals = torch.zeros_like(centres).index_add_(0, nearest, features)
            centres = torch.where(numbers[:, None] > 0, totals / numbers.clamp(min=1)[:, None], centres)
        self.codebook.copy_(centres)
        self.counts.fill_(1)
        self.sums.copy_(centres)

    def forward(self, features: Tensor) -> Quantized:
        """Quantises features (B, D, H, W); in training mode the codebook follows them."""
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 would choose other codes
            features = features.float()
            rows = rearrange(features, "b d h w -> (b h w) d")
            rest, total = rows.detach(), torch.zeros_like(rows)
            codes, inputs, errors = [], [], []
            for _ in range(self.depth):
                nearest = self._nearest(rest, self.codebook)
                inputs.append(rest)
                codes.append(nearest)
                vector = self.codebook[nearest]
                rest, total = rest - vector, total + vector
                errors.append((rows - total).square().mean(1))
            batch, _, height, width = features.shape
            commitment = torch.stack(errors).mean(0).reshape(batch, -1).mean(1)
            through = rows + (total - rows).detach()
            if self.training:
                self._follow(torch.stack(inputs, 1).flatten(0, 1), torch.stack(codes, 1).flatten())
        shape = {"b": batch, "h": height, "w": width}
        return Quantized(
            rearrange(through, "(b h w) d -> b d h w", **shape),
            rearrange(torch.stack(codes), "k (b h w) -> b k h w", **shape),
            commitment,
        )

    def vectors(self, codes: Tensor) -> Tensor:
        """The sums (B, D, H, W) of the vectors of codes (B, depth, H, W) long.

        Fewer depths than the quantiser's give a coarser result.

        Raises:
            ValueError: there is a code outside of the codebook.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < len(self.codebook):
            raise ValueError(f"codes must be from 0 to {len(self.codebook) - 1}, the size of this codebook, got "
                             f"{int(codes.min())} to {int(codes.max())}")  # fmt: skip
        return rearrange(F.embedding(codes, self.codebook).sum(1), "b h w d -> b d h w")

    @staticmethod
    def _nearest(rows: Tensor, codebook: Tensor) -> Tensor:
        """The number (n,) of the nearest vector of a codebook (K, D) for each row (n, D)."""
        return (codebook.square().sum(1) - 2 * rows @ codebook.T).argmin(1)  # |row|² is the same for all

    @torch.no_grad()
    def _follow(self, rows: Tensor, nearest: Tensor) -> None:
        """One update of the codebook: N ← γN + (1 − γ)n, m ← γm + (1 − γ)Σ, e = m/Ñ, then restarts."""
        counts, sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        counts.index_add_(0, nearest, torch.ones_like(rows[:, 0]))
        sums.index_add_(0, nearest, rows)
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum()
        smooth = (self.counts + self.epsilon) / (total + len(self.counts) * self.epsilon) * total
        self.codebook.copy_(self.sums / smooth[:, None])
        self.updates += 1
        if self.restart:
            self._restart(rows, ranks)

    def _restart(self, rows: Tensor, ranks: int) -> None:
        """Gives vectors that are hardly used the place of random features, the same on all processes."""
        dead = (self.counts < self.restart).nonzero()[:, 0]
        draw = torch.Generator().manual_seed(int(self.updates))
        # The features of all processes, numbered as one batch.
        chosen = torch.randperm(ranks * len(rows), generator=draw)[: len(dead)].to(rows.device)
        dead = dead[: len(chosen)]
        first = len(rows) * (dist.get_rank() if ranks > 1 else 0)
        here = (chosen >= first) & (chosen < first + len(rows))
        fresh = torch.zeros(len(dead), rows.shape[1], device=rows.device)
        fresh[here] = rows[chosen[here] - first]
        if ranks > 1:
            dist.all_reduce(fresh)
        self.codebook[dead], self.sums[dead] = fresh, fresh
        self.counts[dead] = 1.0


def usage(codes: Tensor, size: int) -> tuple[float, float]:
    """Perplexity of codes, exp(entropy), and the share of a codebook of this size that occurs among them."""
    share = torch.bincount(codes.flatten(), minlength=size).double() / codes.numel()
    return float(torch.special.entr(share).sum().exp()), float((share > 0).double().mean())
