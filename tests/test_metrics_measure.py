"""A model's quality from its pictures: all measures together, neighbours and repeats."""

import pytest
import torch
from measured import JUDGE, normal
from torch import Tensor, nn

from data import digits
from metrics.distance import Measure, nearest_neighbour_distance, pairwise_distance
from metrics.distribution import frechet_distance, inception_score, kernel_distance, precision_recall
from metrics.features import DigitsJudge, FeatureNetwork, Features


@pytest.fixture(scope="module")
def network() -> DigitsJudge:
    return DigitsJudge(JUDGE)


def test_nearest_neighbours_by_hand():
    reference = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]])
    pictures = torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[3.0, 3.0]], [[6.0, 8.0]]])
    assert nearest_neighbour_distance(pictures, reference).tolist() == [0, 1, 1, 5]


def test_nearest_neighbour_of_a_member_is_exactly_itself():
    pictures = torch.rand(600, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert nearest_neighbour_distance(pictures, pictures).max() == 0


@pytest.fixture(scope="module")
def measure(network: DigitsJudge) -> Measure:
    return Measure(network, digits.load("train").pixels, digits.load("held_out").pixels)


def test_quality_of_held_out_digits(measure: Measure):
    best = measure.quality(*digits.load("held_out"))
    assert best.accuracy is not None
    assert best.accuracy >= 0.97
    assert [best.distance, best.spatial_distance] == pytest.approx([0, 0], abs=1e-6)
    assert best.inception_score is not None
    assert 9 < best.inception_score < 10
    assert (best.precision, best.recall, best.duplicates) == (1, 1, 0)
    assert best.neighbour_ratio == pytest.approx(1)


def test_quality_of_training_digits_under_wrong_labels(measure: Measure):
    train = digits.load("train")
    copies = measure.quality(train.pixels, (train.labels + 1) % 10)
    assert copies.accuracy is not None
    assert copies.accuracy <= 0.03
    assert copies.distance_ratio == pytest.approx(1, rel=1e-6)
    assert copies.neighbour_ratio == 0
    assert measure.floor(train.pixels) == pytest.approx(1, rel=1e-6)
    assert measure.floor(train.pixels[:200]) > 1


def test_quality_is_made_of_the_measures(measure: Measure, network: DigitsJudge):
    samples = digits.load("train").pixels[:200] / 2
    mine, real = network(samples), network(digits.load("held_out").pixels)
    found = measure.quality(samples, torch.zeros(200))
    assert mine.spatial is not None
    assert real.spatial is not None
    assert mine.logits is not None
    assert found.distance == pytest.approx(frechet_distance(mine.pooled, real.pooled), rel=1e-6)
    assert found.kernel_distance == pytest.approx(kernel_distance(mine.pooled, real.pooled), rel=1e-6)
    assert found.spatial_distance == pytest.approx(frechet_distance(mine.spatial, real.spatial), rel=1e-6)
    assert found.inception_score == pytest.approx(inception_score(mine.logits), rel=1e-6)
    assert found.precision is not None
    assert found.precision != found.recall
    assert (found.precision, found.recall) == pytest.approx(precision_recall(mine.pooled, real.pooled), rel=1e-6)


def test_a_repeated_sample_counts_once_in_all_but_the_accuracy(measure: Measure):
    pixels, labels = (x[:300] for x in digits.load("held_out"))
    logits = measure.network(pixels).logits
    assert logits is not None
    right = logits.argmax(dim=1) == labels
    once = measure.quality(pixels, labels)
    again = torch.tensor([5] * 40 + [7] * 2)
    twice = measure.quality(torch.cat([pixels, pixels[again]]), torch.cat([labels, labels[again] + 1]))
    assert twice.accuracy == pytest.approx((right.sum() / 342).item())
    assert twice.duplicates == 42
    assert once[1:-2] == twice[1:-2]  # without accuracy, pairwise distance and duplicates


def test_a_collapsed_model_has_no_distances(measure: Measure):
    """A hundred samples, of two pictures: too few for a covariance, but not for the rest."""
    pixels, labels = (x[:2].repeat_interleave(50, dim=0) for x in digits.load("train"))
    collapsed = measure.quality(pixels, labels)
    assert collapsed.duplicates == 98
    assert collapsed.distance is collapsed.distance_ratio is collapsed.spatial_distance is collapsed.recall is None
    assert collapsed.inception_score == pytest.approx(2, abs=0.1)
    assert collapsed.kernel_distance is not None
    assert collapsed.neighbour_ratio == 0


class Plain(FeatureNetwork):
    """The pixels' means over pairs as features, and nothing else."""

    name, preprocessing, num_features, num_spatial, chunk = "plain", "none", 32, None, 100
    network = nn.Linear(1, 1)

    def forward(self, pictures: Tensor) -> Features:
        return Features(pictures.flatten(1).unflatten(1, (32, 2)).mean(dim=2), None, None)


def test_a_network_without_classes_or_places_leaves_them_out():
    train, held_out = digits.load("train"), digits.load("held_out")
    found = Measure(Plain(), train.pixels, held_out.pixels).quality(*train)
    assert found.accuracy is found.inception_score is found.spatial_distance is None
    assert found.distance_ratio == pytest.approx(1)


def test_measure_refuses_what_it_cannot_measure(measure: Measure):
    pixels, labels = digits.load("held_out")
    for few in (lambda: Measure(measure.network, pixels, pixels[:64]), lambda: measure.floor(pixels[:64])):
        with pytest.raises(ValueError, match="needs more than 64 samples, got 64"):
            few()
    with pytest.raises(ValueError, match="needs more than 64 samples, got 50"):
        measure.quality(pixels[:50], labels[:50])
    with pytest.raises(ValueError, match="500 samples has one label"):
        measure.quality(pixels, labels[:1])


def test_pairwise_distance_by_hand():
    """Three points of one label, 3, 4 and 5 apart, and two of another, 1 apart: (3 + 4 + 5 + 1) / 4."""
    features = torch.tensor([[0.0, 0.0], [9.0, 0.0], [3.0, 0.0], [0.0, 4.0], [9.0, 1.0]]).double()
    labels = torch.tensor([7, 2, 7, 7, 2])
    assert pairwise_distance(features, labels) == pytest.approx(13 / 4)
    assert pairwise_distance(features, torch.arange(5)) is None
    repeated = features[:1].expand(4, -1)
    assert pairwise_distance(repeated, torch.zeros(4)) == 0
    more = normal(700, 3)  # more than one chunk
    assert pairwise_distance(more, torch.zeros(700)) == pytest.approx(torch.pdist(more).mean().item())


def test_pairwise_distance_falls_with_repeats_and_looks_at_the_asked_labels_only(measure: Measure):
    pixels, labels = digits.load("train")
    once = measure.quality(pixels[:300], labels[:300]).pairwise_distance
    anyhow = measure.quality(pixels[:300], torch.zeros(300, dtype=torch.int64)).pairwise_distance
    repeated = measure.quality(pixels[:100].repeat(3, 1, 1, 1), labels[:100].repeat(3)).pairwise_distance
    assert once is not None
    assert anyhow is not None
    assert repeated is not None
    assert 0 < repeated < once < anyhow  # digits of one kind look more alike than any two
    everything_once = measure.quality(pixels[:100], labels[:100]).pairwise_distance
    assert everything_once is not None
    assert repeated < everything_once


def test_the_nearest_of_many_close_pictures_is_found():
    """Far from 0 and close to each other, where squares cancel."""
    reference = 10 + 1e-3 * normal(600, 50)
    pictures = reference[:520] + 1e-5 * normal(520, 50, seed=1)
    brute = torch.stack([(reference - picture).norm(dim=1).min() for picture in pictures])
    torch.testing.assert_close(nearest_neighbour_distance(pictures, reference), brute)
