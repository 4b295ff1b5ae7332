"""How good sampled pictures are: Fréchet distance, nearest neighbours, and whether they show what was asked for."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from metrics.judge import Judge

CHUNK = 512  # pictures at a time, which bounds the memory


class Quality(NamedTuple):
    """What `measure` found.

    Attributes:
        accuracy: share of the samples in which the judge sees the digit that was asked for.
        distance: Fréchet distance of the samples to the held-out pictures on the judge's features.
        distance_ratio: that distance over the distance of the training pictures to the held-out ones. 1 means as
            close to unseen digits as real digits are.
        neighbour_ratio: mean distance of a sample to its nearest training picture, over the same of the held-out
            pictures. Far below 1 means that the samples repeat the training pictures.
        duplicates: number of samples that equal an earlier sample in every pixel.
    """

    accuracy: float
    distance: float
    distance_ratio: float
    neighbour_ratio: float
    duplicates: int


class DoubleFeatures(nn.Module):
    """The features of `network` in float64: torchmetrics rounds the distance to the type that the features have."""

    def __init__(self, network: nn.Module, num_features: int) -> None:
        super().__init__()
        self.network = network
        self.num_features = num_features

    def forward(self, pictures: Tensor) -> Tensor:
        return self.network(pictures).double()


def frechet_distance(network: nn.Module, pictures: Tensor, reference: Tensor) -> float:
    """Returns |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of the features, in float64; two or more pictures on each side.

    `network` maps pictures `(B, …)` to features `(B, F)`. M. Heusel et al., "GANs Trained by a Two Time-Scale Update
    Rule Converge to a Local Nash Equilibrium", 2017, equation 6, with covariances over n − 1.
    """
    with torch.no_grad():
        num_features = network(pictures[:1]).shape[-1]
    metric = FrechetInceptionDistance(DoubleFeatures(network, num_features)).to(pictures.device)
    for real, side in ((True, reference), (False, pictures)):
        for chunk in side.split(CHUNK):
            metric.update(chunk, real=real)
    return metric.compute().item()


def nearest_neighbour_distance(pictures: Tensor, reference: Tensor) -> Tensor:
    """Returns the Euclidean distance `(N,)` of each of the pictures `(N, …)` to the nearest of `reference (M, …)`."""
    rows, columns = rearrange(pictures, "n ... -> n (...)"), rearrange(reference, "m ... -> m (...)")
    # The matrix-product form is faster, but gives about 1e-3 instead of 0 for equal pictures.
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(chunk, columns, compute_mode=exact).amin(dim=1) for chunk in rows.split(CHUNK)])


def measure(judge: Judge, samples: Tensor, labels: Tensor, train: Tensor, held_out: Tensor) -> Quality:
    """Compares samples `(N, 1, 8, 8)` that should show the digits `labels (N,)` with real pictures; all in [0, 1]."""
    distance = frechet_distance(judge, samples, held_out)
    neighbours = nearest_neighbour_distance(samples, train).mean() / nearest_neighbour_distance(held_out, train).mean()
    return Quality(
        accuracy=(judge.classify(samples) == labels).double().mean().item(),
        distance=distance,
        distance_ratio=distance / frechet_distance(judge, train, held_out),
        neighbour_ratio=neighbours.item(),
        duplicates=len(samples) - len(torch.unique(samples, dim=0)),
    )
