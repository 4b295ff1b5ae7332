"""Distances between a set of samples and a set of real pictures, on the features of a network.

All functions take features `(N, F)` in float64 of any network, and always return the same number for the same input.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

CHUNK = 512  # rows at a time, to limit the memory


class Identity(nn.Identity):
    """Returns its input. It replaces the network that torchmetrics expects, because features are given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def check_count(samples: int, features: int) -> None:
    """Raises ValueError unless there are more samples than features. A Fréchet distance needs that."""
    if samples <= features:
        raise ValueError(
            f"Fréchet distance on {features} features needs more than {features} samples, got {samples}: "
            "with fewer the covariance is singular"
        )


def check_features(features: Tensor, reference: Tensor, least: int) -> None:
    """Raises ValueError unless both are finite float64 `(least or more, F)` with the same F."""
    for x in (features, reference):
        if x.dim() != 2 or x.dtype != torch.float64:
            raise ValueError(f"features are float64 (N, F), got {x.dtype} {tuple(x.shape)}")
        if len(x) < least:
            raise ValueError(f"this measure needs {least} samples or more on each side, got {len(x)}")
        if not x.isfinite().all():
            raise ValueError(f"{int((~x.isfinite()).any(dim=1).sum())} of {len(x)} samples have features not finite")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of two networks: F is {features.shape[1]} and {reference.shape[1]}")


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Returns |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of `(N, F)` and `(M, F)`; N, M > F.

    M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017,
    equation 6, with covariances over n − 1. On spatial features it is the sFID.
    """
    check_features(features, reference, least=2)
    metric = FrechetInceptionDistance(Identity(features.shape[1]))
    for real, side in ((True, reference), (False, features)):
        check_count(*side.shape)
        for chunk in side.split(CHUNK):
            metric.update(chunk, real=real)
    return metric.compute().item()


class Sums(NamedTuple):
    """What a Fréchet distance needs of N samples, which can be added up over parts of them.

    Attributes:
        number: N, at least 2.
        features: their sum, (F,) float64.
        products: the sum of their outer products, (F, F) float64.
    """

    number: int
    features: Tensor
    products: Tensor

    def covariance(self) -> Tensor:
        """(F, F), over N − 1."""
        mean = self.features / self.number
        return (self.products - self.number * torch.outer(mean, mean)) / (self.number - 1)


def frechet_of_sums(samples: Sums, reference: Sums) -> float:
    """As `frechet_distance` (Heusel et al. 2017, eq. 6), from sums.

    The trace of (Σ₁Σ₂)^½ is the sum of the roots of the eigenvalues of Σ₁Σ₂. With N ≤ F the distance is
    biased, and can be compared for the same N only.
    """
    apart = samples.features / samples.number - reference.features / reference.number
    one, other = samples.covariance(), reference.covariance()
    root = torch.linalg.eigvals(one @ other).sqrt().real.sum()
    return (apart @ apart + one.trace() + other.trace() - 2 * root).item()


def kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Σ_ij k(x_i, y_j), with k(x, y) = (x·y / F + 1)³."""
    return torch.stack([(chunk @ y.T / x.shape[1] + 1).pow(3).sum() for chunk in x.split(CHUNK)]).sum()


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Returns the unbiased estimate of MMD² between `(N, F)` and `(M, F)`; N, M ≥ 2. It may be below 0.

    The KID of M. Bińkowski et al., "Demystifying MMD GANs", 2018, section 3 with the kernel (x·y / F + 1)³ of section
    4, but over all samples at once and not over random subsets. There may be fewer samples than features.
    """
    check_features(features, reference, least=2)
    within = 0.0
    for x in (features, reference):
        itself = (x.square().sum(dim=1) / x.shape[1] + 1).pow(3).sum()
        within += ((kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1))).item()
    return within - 2 * kernel_sum(features, reference).item() / (len(features) * len(reference))


def inception_score(logits: Tensor) -> float:
    """Returns exp E KL(p(y|x) ‖ p(y)) of logits `(N, K)`, from 1 to K, over all N ≥ 1 samples at once.

    T. Salimans et al., "Improved Techniques for Training GANs", 2016, section 4, without their ten splits.
    """
    check_features(logits, logits, least=1)
    given = logits.log_softmax(dim=1)  # ln p(y|x), (N, K)
    overall = given.logsumexp(dim=0) - torch.tensor(len(logits), dtype=logits.dtype).log()  # ln p(y), (K,)
    return (given.exp() * (given - overall)).sum(dim=1).mean().exp().item()


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances `(N, M)`. They are exact; the faster form by a matrix product gives about 1e-7 for 0."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def covered_share(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of `points (N, F)` in a ball around any centre `(M, F)`; its radius reaches the k-th nearest centre."""
    radii = torch.cat([distances(chunk, centres).kthvalue(k + 1).values for chunk in centres.split(CHUNK)])
    inside = [(distances(chunk, centres) <= radii).any(dim=1) for chunk in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def precision_recall(features: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Returns the share of samples that look real, and the share of real pictures that the samples cover.

    T. Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019, equations 1
    and 2: a set's manifold is the union of balls around its members that reach the k-th nearest other member. N, M > k.
    Recall grows with N, so only results with equal N can be compared.
    """
    check_features(features, reference, least=k + 1)
    return covered_share(features, reference, k), covered_share(reference, features, k)
