"""How good sampled pictures are: what they show, how they are distributed, and whether they repeat real ones."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from metrics.distribution import (
    CHUNK,
    distances,
    enough,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from metrics.features import FeatureNetwork

NEIGHBOURS = 3  # k of precision and recall


class Quality(NamedTuple):
    """What `Measure` found.

    All but `accuracy`, `pairwise_distance` and `duplicates` are of the samples without repeats, so that no picture
    counts twice. Where too few are left for a measure, it is None.

    Attributes:
        accuracy: share of all samples in which the network sees what was asked for; None unless it classifies.
        distance: Fréchet distance to the held-out pictures.
        distance_ratio: that distance over the distance of the training pictures to the held-out ones. 1 means as
            close to unseen pictures as real ones are.
        kernel_distance: unbiased MMD² to the held-out pictures (KID).
        inception_score: from 1 to the number of classes; None without logits.
        spatial_distance: Fréchet distance on the spatial features (sFID); None without such.
        precision: share of the samples that look like held-out pictures.
        recall: share of the held-out pictures that the samples reach.
        neighbour_ratio: mean distance of a sample to its nearest training picture, over the same of the held-out
            pictures. Far below 1 means that the samples repeat the training pictures.
        pairwise_distance: mean Euclidean distance between the pooled features of two samples that were asked for the
            same label, over all such pairs. A repeat is 0 away from its like, so that a model that draws one picture
            over and over has 0. None where no two samples have the same label.
        duplicates: number of samples that equal another one, already counted, in every pixel.
    """

    accuracy: float | None
    distance: float | None
    distance_ratio: float | None
    kernel_distance: float | None
    inception_score: float | None
    spatial_distance: float | None
    precision: float | None
    recall: float | None
    neighbour_ratio: float
    pairwise_distance: float | None
    duplicates: int


def nearest_neighbour_distance(pictures: Tensor, reference: Tensor) -> Tensor:
    """Returns the Euclidean distance `(N,)` of each of the pictures `(N, …)` to the nearest of `reference (M, …)`."""
    rows, columns = rearrange(pictures, "n ... -> n (...)"), rearrange(reference, "m ... -> m (...)")
    found = []
    for chunk in rows.split(CHUNK):  # by a matrix product, which is fast but puts a copy some 1e-7 from its original
        nearest = torch.cdist(chunk, columns, compute_mode="use_mm_for_euclid_dist").argmin(dim=1)
        found.append((chunk - columns[nearest]).norm(dim=1))
    return torch.cat(found)


def pairwise_distance(features: Tensor, labels: Tensor) -> float | None:
    """Returns the mean Euclidean distance of two rows of `features (N, F)` that have the same label, `labels (N,)`.

    The mean is over all pairs, so that a label counts by the square of its frequency; None without a pair.
    """
    total, pairs = 0.0, 0
    for label in labels.unique():
        group = features[labels == label]
        total += sum(distances(chunk, group).sum().item() for chunk in group.split(CHUNK))
        pairs += len(group) * (len(group) - 1)
    return total / pairs if pairs else None


class Measure:
    """Compares samples with real pictures, whose features it computes once.

    Args:
        network: makes the features.
        train: real pictures `(N, C, H, W)` in [0, 1] that the model may have seen.
        held_out: real pictures `(M, C, H, W)` that it has not.

    Attributes:
        network: the same.
        real_distance: Fréchet distance of `train` to `held_out`.

    Raises:
        ValueError: there are not more real pictures than features on both sides.
    """

    def __init__(self, network: FeatureNetwork, train: Tensor, held_out: Tensor) -> None:
        for side in (train, held_out):
            enough(len(side), network.num_features)
        self.network = network
        self.train = train.double()
        self.held_out = network(held_out)
        self.real_distance = frechet_distance(network(train).pooled, self.held_out.pooled)
        self.real_neighbours = nearest_neighbour_distance(held_out.double(), self.train).mean().item()

    def floor(self, pictures: Tensor) -> float:
        """Returns the `distance_ratio` of real pictures `(N, C, H, W)`, which samples as many cannot well undercut."""
        enough(len(pictures), self.network.num_features)
        return frechet_distance(self.network(pictures).pooled, self.held_out.pooled) / self.real_distance

    def quality(self, samples: Tensor, asked: Tensor) -> Quality:
        """Measures samples `(N, C, H, W)` in [0, 1] that should show the labels `asked (N,)`.

        ValueError unless N is more than the number of features and each sample has its label.
        """
        enough(len(samples), self.network.num_features)
        if asked.shape != (len(samples),):
            raise ValueError(f"each of {len(samples)} samples has one label, got labels {tuple(asked.shape)}")
        different, inverse = torch.unique(samples, dim=0, return_inverse=True)
        pooled, spatial, logits = self.network(different)
        accuracy = None
        if self.network.classifies and logits is not None:
            seen = logits.argmax(dim=1)[inverse.cpu()]
            accuracy = (seen == asked.cpu()).double().mean().item()
        distance = frechet_distance(pooled, self.held_out.pooled) if len(different) > pooled.shape[1] else None
        spatial_distance = None
        if spatial is not None and self.held_out.spatial is not None and len(different) > spatial.shape[1]:
            spatial_distance = frechet_distance(spatial, self.held_out.spatial)
        precision, recall = None, None
        if len(different) > NEIGHBOURS:
            precision, recall = precision_recall(pooled, self.held_out.pooled, NEIGHBOURS)
        neighbours = nearest_neighbour_distance(different.double(), self.train).mean().item()
        return Quality(
            accuracy=accuracy,
            distance=distance,
            distance_ratio=None if distance is None else distance / self.real_distance,
            kernel_distance=kernel_distance(pooled, self.held_out.pooled) if len(different) > 1 else None,
            inception_score=None if logits is None else inception_score(logits),
            spatial_distance=spatial_distance,
            precision=precision,
            recall=recall,
            neighbour_ratio=neighbours / self.real_neighbours,
            pairwise_distance=pairwise_distance(pooled[inverse.cpu()], asked.cpu()),
            duplicates=len(samples) - len(different),
        )
