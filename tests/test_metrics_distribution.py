"""Distances of distributions against closed forms, brute force and the libraries that others use."""

import numpy as np
import pytest
import scipy.linalg
import torch
from measured import JUDGE, normal
from torch import Tensor, nn
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from data import digits
from metrics.distribution import (
    Sums,
    check_count,
    frechet_distance,
    frechet_of_sums,
    inception_score,
    kernel_distance,
    precision_recall,
)
from metrics.features import DigitsJudge


@pytest.fixture(scope="module")
def network() -> DigitsJudge:
    return DigitsJudge(JUDGE)


@pytest.fixture(scope="module")
def features(network: DigitsJudge) -> tuple[Tensor, Tensor]:
    """The judge's features of the training and of the held-out digits."""
    return network(digits.load("train").pixels).pooled, network(digits.load("held_out").pixels).pooled


def gaussian(mean: Tensor, root: Tensor, n: int) -> Tensor:
    """Returns `(n, F)` float64 with exactly the given mean, and `root @ root.T` as covariance over n − 1."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return white @ root.T + mean


def sqrtm_distance(x: Tensor, y: Tensor) -> float:
    """The distance as in Heusel's own code: numpy's covariances, scipy's Schur method for the matrix root."""
    (m1, c1), (m2, c2) = ((f.double().mean(0).numpy(), np.cov(f.double().numpy(), rowvar=False)) for f in (x, y))
    return float(np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real))


def test_frechet_distance_of_diagonal_gaussians():
    """For commuting covariances it is |μ₁ − μ₂|² + Σ (σ₁ − σ₂)²."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.5, 0.25, 0.5]).double()
    m1, m2 = torch.tensor([0.0, 1.0, -1.0]).double(), torch.tensor([3.0, 1.0, 1.0]).double()
    expected = ((m1 - m2).square() + (s1 - s2).square()).sum().item()
    x, y = gaussian(m1, s1.diag(), 700), gaussian(m2, s2.diag(), 400)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_agrees_with_scipy_on_correlated_features():
    roots = normal(2, 24, 24)
    x, y = gaussian(torch.zeros(24).double(), roots[0], 900), gaussian(torch.ones(24).double(), roots[1], 600)
    assert frechet_distance(x, y) == pytest.approx(sqrtm_distance(x, y), rel=1e-6)


def test_frechet_distance_agrees_with_scipy_on_the_judge(features: tuple[Tensor, Tensor]):
    """A distance rounded to float32 would be off by more than 1e-9."""
    assert frechet_distance(*features) == pytest.approx(sqrtm_distance(*features), rel=1e-9)


def test_frechet_distance_of_sums_is_that_of_the_samples(features: tuple[Tensor, Tensor]):
    sums = [Sums(len(side), side.sum(0), side.T @ side) for side in features]
    assert frechet_of_sums(*sums) == pytest.approx(frechet_distance(*features), rel=1e-6)
    torch.testing.assert_close(sums[0].covariance(), features[0].T.cov())


def test_frechet_distance_to_itself_is_zero(features: tuple[Tensor, Tensor]):
    assert frechet_distance(features[1], features[1]) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_symmetric_and_does_not_depend_on_the_order(features: tuple[Tensor, Tensor]):
    train, held_out = features
    there = frechet_distance(train, held_out)
    assert frechet_distance(held_out, train) == pytest.approx(there, rel=1e-9)
    assert frechet_distance(train.flip(0), held_out) == pytest.approx(there, rel=1e-9)


class Same(nn.Identity):
    """A stand-in for torchmetrics' own network."""

    num_features = 64


def test_distances_are_those_of_torchmetrics(features: tuple[Tensor, Tensor]):
    train, held_out = features[0][:500], features[1]
    fid = FrechetInceptionDistance(Same())
    kid = KernelInceptionDistance(Same(), subsets=1, subset_size=500)  # one subset of all: its order does not matter
    for metric in (fid, kid):
        metric.update(held_out, real=True)
        metric.update(train, real=False)
    assert frechet_distance(train, held_out) == pytest.approx(fid.compute().item(), rel=1e-6)
    assert kernel_distance(train, held_out) == pytest.approx(kid.compute()[0].item(), rel=1e-6)


def test_inception_score_is_that_of_torchmetrics(network: DigitsJudge):
    logits = network(digits.load("train").pixels).logits
    assert logits is not None
    metric = InceptionScore(Same(), splits=1)
    metric.update(logits)
    assert inception_score(logits) == pytest.approx(metric.compute()[0].item(), rel=1e-6)


def test_inception_score_spans_one_to_the_number_of_classes():
    """All alike: 1. Certain, and each class as often: K. Certain, in m of the classes: m."""
    assert inception_score(normal(1, 10).expand(50, -1)) == pytest.approx(1)
    certain = 1000 * torch.eye(10, dtype=torch.float64)
    assert inception_score(certain.repeat(3, 1)) == pytest.approx(10)
    assert inception_score(certain[:4]) == pytest.approx(4)


def brute_kernel_distance(x: Tensor, y: Tensor) -> float:
    """The estimator as a double sum over pairs of different samples."""

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        terms = [
            (float(u @ v) / len(u) + 1) ** 3 for i, u in enumerate(a) for j, v in enumerate(b) if not same or i != j
        ]
        return sum(terms) / len(terms)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def long_kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The same in numpy's longest floats, 80 bits where the machine has them."""
    xx, yy, xy = (
        (a.astype(np.longdouble) @ b.T.astype(np.longdouble) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))
    )
    return float(sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy)) - 2 * xy.mean())


def test_kernel_distance_of_unequal_sets_by_brute_force():
    x, y = normal(23, 5), normal(11, 5, seed=1) + 0.3
    assert kernel_distance(x, y) == pytest.approx(brute_kernel_distance(x, y), rel=1e-10)


def test_kernel_distance_is_unbiased():
    """Over many small samples of one distribution its mean is 0; the plain estimator's would be about 1 here."""
    values = torch.tensor([kernel_distance(*normal(2, 20, 4, seed=seed)) for seed in range(400)])
    error = values.std() / 20
    assert values.mean().abs() < 3 * error < 0.1
    assert (values < 0).any()


def test_distances_need_float64():
    """Features far from 0 and close to each other: in float32 the features and their products are rounded away."""
    x, y = 1000 + 0.01 * normal(400, 8), 1000 + 0.01 * normal(300, 8, seed=1)
    distance = frechet_distance(x, y)
    assert distance == pytest.approx(frechet_distance(x - 1000, y - 1000), rel=1e-4)
    assert abs(frechet_distance(x.float().double(), y.float().double()) / distance - 1) > 1e-4
    kid = KernelInceptionDistance(Same(), subsets=1, subset_size=300)
    kid.update(x[:300].float() / 100, real=True)
    kid.update(y.float() / 100, real=False)
    exact = kernel_distance(x[:300] / 100, y / 100)
    assert abs(kid.compute()[0].item() / exact - 1) > 0.1
    assert exact == pytest.approx(long_kernel_distance(x[:300].numpy() / 100, y.numpy() / 100), rel=1e-3)
    with pytest.raises(ValueError, match="float64"):
        frechet_distance(x.float(), y.float())


def brute_precision(x: Tensor, reference: Tensor, k: int) -> float:
    """Equations 1 and 2 of Kynkäänniemi et al. word for word."""
    inside = 0
    for sample in x:
        for i, real in enumerate(reference):
            others = sorted(float((real - other).norm()) for j, other in enumerate(reference) if j != i)
            if float((sample - real).norm()) <= others[k - 1]:
                inside += 1
                break
    return inside / len(x)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k: int):
    x, y = normal(40, 2), normal(30, 2, seed=1) + 1
    precision, recall = precision_recall(x, y, k)
    assert (precision, recall) == (brute_precision(x, y, k), brute_precision(y, x, k))
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_precision_and_recall_of_closed_cases():
    x = normal(600, 3)  # more than one chunk
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    mode, other = normal(100, 3, seed=1), normal(300, 3, seed=2) + 100
    assert precision_recall(mode, torch.cat([mode, other])) == (1, 0.25)
    assert precision_recall(torch.cat([mode, other]), mode) == (0.25, 1)
    line = torch.arange(4.0).double()[:, None]
    assert precision_recall(line - 4, line, k=1) == (0.25, 0.25)  # a ball's rim belongs to it: −1 and 0 touch


def test_precision_and_recall_are_those_of_torch_fidelity(features: tuple[Tensor, Tensor]):
    precision, recall = precision_recall(*features)
    expected = calculate_precision_recall_full(*features)
    assert (precision, recall) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("function", "x", "y", "words"),
    [
        (frechet_distance, normal(64, 64), normal(65, 64), "on 64 features needs more than 64 samples, got 64"),
        (frechet_distance, normal(65, 64), normal(50, 64), "on 64 features needs more than 64 samples, got 50"),
        (kernel_distance, normal(1, 4), normal(9, 4), "needs 2 samples or more"),
        (precision_recall, normal(9, 4), normal(3, 4), "needs 4 samples or more"),
        (precision_recall, normal(9, 4), normal(9, 5), "features of two networks"),
        (kernel_distance, normal(9, 4).float(), normal(9, 4), "float64"),
        (frechet_distance, normal(9), normal(9), "N, F"),
        (frechet_distance, normal(9, 2) / 0, normal(9, 2), "9 of 9 samples have features not finite"),
    ],
)
def test_features_that_cannot_be_compared_are_refused_in_one_line(function, x: Tensor, y: Tensor, words: str):
    with pytest.raises(ValueError, match=words) as error:
        function(x, y)
    assert "\n" not in str(error.value)


def test_a_covariance_needs_more_samples_than_features() -> None:
    check_count(65, 64)
    with pytest.raises(ValueError, match="needs more than 64 samples, got 64: with fewer the covariance is singular"):
        check_count(64, 64)
