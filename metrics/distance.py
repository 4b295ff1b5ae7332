"""The quality of sampled pictures: what they show, how they are distributed, and whether they copy real ones."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from metrics.distribution import (
    CHUNK,
    check_count,
    distances,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from metrics.features import FeatureNetwork

NEIGHBOURS = 3  # k of precision and recall


class Quality(NamedTuple):
    """The results of `Measure.quality`.

    All but `accuracy`, `pairwise_distance` and `duplicates` are measured without duplicates, so that no picture
    counts twice. A measure is None if it has too few samples.

    Attributes:
        accuracy: share of all samples in which the network sees the requested label; None unless it classifies.
        distance: Fréchet distance to the held-out pictures.
        distance_ratio: `distance` divided by the distance of the training pictures to the held-out pictures. At 1 the
            samples are as close to unseen pictures as real pictures are.
        kernel_distance: unbiased MMD² to the held-out pictures (KID).
        inception_score: from 1 to the number of classes; None without logits.
        spatial_distance: Fréchet distance on the spatial features (sFID); None without spatial features.
        precision: share of the samples that look like held-out pictures.
        recall: share of the held-out pictures that the samples cover.
        neighbour_ratio: mean distance of a sample to its nearest training picture, divided by that of the held-out
            pictures. Far below 1 the samples are copies of training pictures.
        pairwise_distance: mean Euclidean distance between the pooled features of two samples with the same label, over
            all such pairs, duplicates included. A model that always draws the same picture has 0. None if no two
            samples have the same label.
        duplicates: number of samples that equal an earlier sample in every pixel.
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
    """Returns the Euclidean distance `(N,)` of each picture `(N, …)` to the nearest of `reference (M, …)`."""
    rows, columns = rearrange(pictures, "n ... -> n (...)"), rearrange(reference, "m ... -> m (...)")
    found = []
    for chunk in rows.split(CHUNK):  # a matrix product is fast, but its distance of equal pictures is about 1e-7
        nearest = torch.cdist(chunk, columns, compute_mode="use_mm_for_euclid_dist").argmin(dim=1)
        found.append((chunk - columns[nearest]).norm(dim=1))
    return torch.cat(found)


def pairwise_distance(features: Tensor, labels: Tensor) -> float | None:
    """Returns the mean Euclidean distance of two rows of `features (N, F)` with the same label in `labels (N,)`.

    The mean is over all pairs, so a label counts by the square of its frequency. None if there is no pair.
    """
    total, pairs = 0.0, 0
    for label in labels.unique():
        group = features[labels == label]
        total += sum(distances(chunk, group).sum().item() for chunk in group.split(CHUNK))
        pairs += len(group) * (len(group) - 1)
    return total / pairs if pairs else None


class Measure:
    """Compares samples with real pictures. The features of the real pictures are computed once.

    Args:
        network: computes the features.
        train: real pictures `(N, C, H, W)` in [0, 1] that the model may have seen.
        held_out: real pictures `(M, C, H, W)` that it has not seen.

    Attributes:
        network: computes the features.
        real_distance: Fréchet distance of `train` to `held_out`.

    Raises:
        ValueError: `train` or `held_out` has not more pictures than there are features.
    """

    def __init__(self, network: FeatureNetwork, train: Tensor, held_out: Tensor) -> None:
        for side in (train, held_out):
            check_count(len(side), network.num_features)
        self.network = network
        self.train = train.double()
        self.held_out = network(held_out)
        self.real_distance = frechet_distance(network(train).pooled, self.held_out.pooled)
        self.real_neighbours = nearest_neighbour_distance(held_out.double(), self.train).mean().item()

    def floor(self, pictures: Tensor) -> float:
        """Returns the `distance_ratio` of real pictures `(N, C, H, W)`: about the best that N samples can reach."""
        check_count(len(pictures), self.network.num_features)
        return frechet_distance(self.network(pictures).pooled, self.held_out.pooled) / self.real_distance

    def quality(self, samples: Tensor, labels: Tensor) -> Quality:
        """Measures samples `(N, C, H, W)` in [0, 1] that should show `labels (N,)`.

        ValueError unless N is larger than the number of features and each sample has one label.
        """
        check_count(len(samples), self.network.num_features)
        if labels.shape != (len(samples),):
            raise ValueError(f"each of {len(samples)} samples has one label, got labels {tuple(labels.shape)}")
        different, inverse = torch.unique(samples, dim=0, return_inverse=True)
        pooled, spatial, logits = self.network(different)
        accuracy = None
        if self.network.classifies and logits is not None:
            seen = logits.argmax(dim=1)[inverse.cpu()]
            accuracy = (seen == labels.cpu()).double().mean().item()
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
            pairwise_distance=pairwise_distance(pooled[inverse.cpu()], labels.cpu()),
            duplicates=len(samples) - len(different),
        )
