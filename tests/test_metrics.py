"""The measures against closed forms, brute force and the libraries that others use."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from data import digits
from metrics.clip_score import clip_score
from metrics.distance import Measure, nearest_neighbour_distance, pairwise_distance
from metrics.distribution import (
    enough,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from metrics.features import CLIPFeatures, DigitsJudge, FeatureNetwork, Features, Inception, load_features
from metrics.judge import Judge
from metrics.straightness import path_length, straightness

ASSETS = Path(__file__).parents[1] / "assets" / "digits"
JUDGE = ASSETS / "judge"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(JUDGE)


@pytest.fixture(scope="module")
def network() -> DigitsJudge:
    return DigitsJudge(JUDGE)


@pytest.fixture(scope="module")
def features(network: DigitsJudge) -> tuple[Tensor, Tensor]:
    """The judge's features of the training and of the held-out digits."""
    return network(digits.load("train").pixels).pooled, network(digits.load("held_out").pixels).pooled


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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


def test_enough():
    enough(65, 64)
    with pytest.raises(ValueError, match="needs more than 64 samples, got 64: a covariance of fewer is singular"):
        enough(64, 64)


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_straightness_of_a_straight_line_is_zero(n: int):
    """At constant speed in τ, whatever the steps, up or down."""
    start, way = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    tau = torch.rand(n + 1, generator=torch.Generator().manual_seed(n)).sort().values
    for times in (tau, tau.flip(0)):
        walk = [start + t * way for t in times.double()]
        torch.testing.assert_close(straightness(walk, times), torch.zeros(3).double(), atol=1e-12, rtol=0)
        expected = (times[-1] - times[0]).abs().double() * way.flatten(1).norm(dim=1)
        torch.testing.assert_close(path_length(walk), expected)


def test_a_straight_line_at_a_changing_speed_is_not_straight_in_tau():
    """w = τ² v has the length |v| of its chord, but S = ∫ (2τ − 1)² dτ |v|² = |v|² / 3."""
    way, tau = normal(3, 5), torch.linspace(0, 1, 1001).double()
    walk = [t**2 * way for t in tau]
    torch.testing.assert_close(path_length(walk), way.norm(dim=1))
    torch.testing.assert_close(straightness(walk, tau), way.norm(dim=1) ** 2 / 3, rtol=1e-5, atol=0)


def test_quarter_circle():
    """n chords of a quarter: 2n sin(π/4n) long → π/2, and S = 4n² sin²(π/4n) − 2 → π²/4 − 2."""

    def walk(n: int) -> tuple[list[Tensor], Tensor]:
        tau = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        angle = tau * torch.pi / 2
        return list(torch.stack([angle.cos(), angle.sin()], dim=1)[:, None]), tau

    for n in (1, 2, 5, 40):
        w, tau = walk(n)
        length = 2 * n * np.sin(np.pi / (4 * n))
        assert path_length(w).item() == pytest.approx(length, rel=1e-12)
        assert straightness(w, tau).item() == pytest.approx(length**2 - 2, abs=1e-12)
        assert straightness(w[::-1], tau.flip(0)).item() == pytest.approx(length**2 - 2, abs=1e-12)
    w, tau = walk(1000)
    assert path_length(w).item() == pytest.approx(np.pi / 2, rel=1e-6)
    assert straightness(w, tau).item() == pytest.approx(np.pi**2 / 4 - 2, rel=1e-5)


@pytest.mark.parametrize("tau", [[0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.5, 0.5]])
def test_walks_without_proper_times_are_refused(tau: list[float]):
    with pytest.raises(ValueError, match="τ"):
        straightness([torch.zeros(1, 2)] * 3, torch.tensor(tau))


def test_a_walk_of_one_state_is_refused():
    with pytest.raises(ValueError, match="two states"):
        path_length([torch.zeros(1, 2)])


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


def test_digits_judge_gives_what_the_judge_computes(judge: Judge, network: DigitsJudge):
    pixels = digits.load("held_out").pixels
    pooled, spatial, logits = network(pixels)
    assert spatial is not None
    assert logits is not None
    assert {x.dtype for x in (pooled, spatial, logits)} == {torch.float64}
    assert (pooled.shape, spatial.shape) == ((500, network.num_features), (500, network.num_spatial))
    with torch.no_grad():
        torch.testing.assert_close(pooled.float(), judge(pixels), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits.float(), judge.logits(pixels), rtol=1e-4, atol=1e-4)
        maps = judge.trunk(2 * pixels - 1)
    torch.testing.assert_close(spatial.float(), maps[:, :16].flatten(1), rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_the_chunks(network: DigitsJudge):
    pixels = digits.load("held_out").pixels[:50]
    small = DigitsJudge(JUDGE)
    small.chunk = 7
    for whole, parts in zip(network(pixels), small(pixels), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "floats"),
        (torch.zeros(2, 8, 8), "floats .N, C, H, W., got torch.float32 .2, 8, 8."),
        (torch.zeros(0, 1, 8, 8), "floats"),
        (torch.full((2, 1, 8, 8), -0.1), "in .0, 1., got -0.1"),
        (torch.full((2, 1, 8, 8), torch.nan), "in .0, 1."),
        (torch.zeros(2, 3, 8, 8), "the judge knows pictures of .1, 8, 8., got .3, 8, 8."),
    ],
)
def test_wrong_pictures_are_refused(network: DigitsJudge, pictures: Tensor, words: str):
    with pytest.raises(ValueError, match=words):
        network(pictures)


class RandomInception(FeatureExtractorInceptionV3):
    """torch-fidelity's own network with the weights it is born with."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return None


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, file)
    torch.manual_seed(0)
    born = RandomInception("inception", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(born.state_dict(), file)
    return file


def test_inception_gives_what_torch_fidelity_computes(inception_file: Path):
    """Grey pictures as RGB, 8 bits, and the layers by their own names."""
    inception = load_features(f"inception:{inception_file}")
    inception.chunk = 2
    grey = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    pooled, spatial, logits = inception(grey)
    assert spatial is not None
    assert logits is not None
    own = FeatureExtractorInceptionV3(
        "own", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    maps: list[Tensor] = []
    own.Mixed_6d.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    features, expected = own(torch.cat([grey, grey, grey], dim=1).mul(255).round().byte())
    scale = features.std().item()
    torch.testing.assert_close(pooled.float(), features, rtol=1e-3, atol=1e-3 * scale)
    torch.testing.assert_close(logits.float(), expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    torch.testing.assert_close(spatial.float(), maps[0][:, :7].flatten(1), rtol=1e-3, atol=1e-3 * maps[0].std().item())
    assert (pooled.shape[1], spatial.shape[1]) == (inception.num_features, inception.num_spatial) == (2048, 2023)
    assert inception.name.startswith("inception-")
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        inception(torch.zeros(1, 4, 12, 12))


class Code:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("fault", ["missing", "truncated", "empty", "text", "foreign", "code"])
def test_damaged_inception_is_one_clear_line(inception_file: Path, tmp_path: Path, fault: str):
    file, words = tmp_path / "weights.pth", "is damaged or not torch-fidelity's"
    match fault:
        case "missing":
            words = "is missing: .*inception-2015-12-05"
        case "truncated":
            file.write_bytes(inception_file.read_bytes()[:-100_000])
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("<html>not found</html>")
        case "foreign":
            torch.save({"weight": torch.zeros(3)}, file)
        case "code":
            torch.save({"weight": Code(tmp_path / "trace")}, file)
    with pytest.raises(FileNotFoundError if fault == "missing" else ValueError, match=words) as error:
        Inception(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights, and the digits' tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 700, "max_position_embeddings": 10, "bos_token_id": 698, "eos_token_id": 699}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=shared | words, vision_config=shared | {"image_size": 16, "patch_size": 4}, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    for file in (ASSETS / "text/tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


class TensorCLIP(CLIPModel):
    """CLIP with features as torchmetrics expects them: tensors, as before transformers 5."""

    def get_image_features(self, *args):
        return super().get_image_features(*args).pooler_output

    def get_text_features(self, *args):
        return super().get_text_features(*args).pooler_output


def test_clip_score_is_that_of_torchmetrics(clip_folder: Path):
    """One pair at a time: torchmetrics clips at 0 only after the mean, the paper before."""
    clip = CLIPFeatures(clip_folder)
    clip.chunk = 4
    pictures = torch.rand(10, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    captions = [digits.captions(i, digits.HELD_OUT_TEMPLATES)[i % 4] for i in range(10)]
    model, processor = (
        TensorCLIP.from_pretrained(clip_folder),
        CLIPProcessor(CLIPImageProcessor.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)),
    )
    expected = [
        torchmetrics_clip_score(picture, caption, lambda: (model, processor)).item()
        for picture, caption in zip(pictures.mul(255).round().byte(), captions, strict=True)
    ]
    assert 0 < sum(score > 0 for score in expected) < 10  # both sides of the clip are seen
    assert clip_score(clip, pictures, captions) == pytest.approx(np.mean(expected), rel=1e-4)
    assert clip_score(clip_folder, pictures, captions) == pytest.approx(np.mean(expected), rel=1e-4)
    for wrong in (captions[:9], "ten digits"):
        with pytest.raises(ValueError, match="each picture has a caption"):
            clip_score(clip, pictures, wrong)


def test_clip_features(clip_folder: Path):
    """Grey is RGB of three equal channels, a longer caption loses its tail, and chunks change nothing."""
    clip = load_features(f"clip:{clip_folder}")
    assert isinstance(clip, CLIPFeatures)
    grey = torch.rand(5, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    pooled, spatial, logits = clip(grey)
    assert pooled.shape == (5, clip.num_features)
    assert spatial is logits is None
    torch.testing.assert_close(clip(grey.expand(-1, 3, -1, -1)).pooled, pooled)
    torch.testing.assert_close(
        torch.cat([clip(picture[None]).pooled for picture in grey]), pooled, rtol=1e-4, atol=1e-5
    )
    assert json.loads(clip.preprocessing.partition("CLIPImageProcessor ")[2])["size"] == {"shortest_edge": 16}
    assert clip.text(["a seven", "seven " * 50]).shape == (2, clip.num_features)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("config.json", FileNotFoundError, "config.json is missing"),
        ("model.safetensors", FileNotFoundError, "model.safetensors is missing"),
        ("preprocessor_config.json", FileNotFoundError, "preprocessor_config.json is missing"),
        ("tokenizer.json", FileNotFoundError, "tokenizer.json is missing"),
        ("truncated", ValueError, "is damaged"),
        ("another size", ValueError, "is damaged or of another model"),
        ("one weight too few", ValueError, "1 weights are absent, such as logit_scale"),
        ("other model", ValueError, "model_type is 'bert'"),
        ("bad config", ValueError, "describes no CLIP model"),
        ("bad processor", ValueError, "no CLIP image processor's"),
        ("bad tokenizer", ValueError, "no readable CLIP tokenizer"),
    ],
)
def test_damaged_clip_is_one_clear_line(clip_folder: Path, tmp_path: Path, fault: str, kind, words: str):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    weights = folder / "model.safetensors"
    match fault:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "another size":
            save_file(load_file(weights) | {"visual_projection.weight": torch.zeros(13, 32)}, weights)
        case "one weight too few":
            save_file({name: value for name, value in load_file(weights).items() if name != "logit_scale"}, weights)
        case "other model":
            (folder / "config.json").write_text('{"model_type": "bert"}')
        case "bad config":
            (folder / "config.json").write_text("{")
        case "bad processor":
            (folder / "preprocessor_config.json").write_text("{")
        case "bad tokenizer":
            (folder / "tokenizer.json").write_text("{")
        case file:
            (folder / file).unlink()
    with pytest.raises(kind, match=words) as error:
        clip_score(folder, torch.zeros(1, 3, 16, 16), ["one"])
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_load_features_knows_three_kinds(tmp_path: Path):
    assert isinstance(load_features(f"judge:{JUDGE}"), DigitsJudge)
    for spec in ("resnet:weights.pt", "judge", "judge:", str(JUDGE)):
        with pytest.raises(ValueError, match="judge:FOLDER, inception:FILE or clip:FOLDER"):
            load_features(spec)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_features(f"judge:{tmp_path}")


def test_committed_judge_is_right_and_small(judge: Judge):
    pixels, labels = digits.load("held_out")
    assert (judge.classify(pixels) == labels).double().mean() >= 0.97
    assert judge(pixels[:3]).shape == (3, judge.num_features)
    assert sum(file.stat().st_size for file in JUDGE.iterdir()) <= 500_000


def test_judge_sees_each_picture_alone(judge: Judge):
    pixels = digits.load("held_out").pixels[:5]
    alone = torch.cat([judge(picture[None]) for picture in pixels])
    torch.testing.assert_close(judge(pixels), alone, rtol=1e-4, atol=1e-5)


def test_judge_saved_and_loaded_is_the_same(judge: Judge, tmp_path: Path):
    judge.save(tmp_path / "new")
    pixels = digits.load("held_out").pixels
    assert torch.equal(Judge.load(tmp_path / "new")(pixels), judge(pixels))


def damage(folder: Path, fault: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load(weights.read_bytes())
    match fault:
        case "no folder":
            shutil.rmtree(folder)
        case "no weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "empty":
            weights.write_bytes(b"")
        case "one weight too few":
            save_file({name: value for name, value in tensors.items() if name != "head.bias"}, weights)
        case "one weight too many":
            save_file(tensors | {"head.extra": torch.zeros(1)}, weights)
        case "another size":
            save_file(tensors | {"head.bias": torch.zeros(11)}, weights)
        case "bad config":
            (folder / "config.json").write_text('{"width": ')
        case "foreign config":
            (folder / "config.json").write_text(json.dumps({"depth": 12}))


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("no folder", FileNotFoundError, "config.json is missing"),
        ("no weights", FileNotFoundError, "model.safetensors is missing"),
        ("truncated", ValueError, "damaged"),
        ("empty", ValueError, "damaged"),
        ("one weight too few", ValueError, "head.bias should be .10. but is absent"),
        ("one weight too many", ValueError, "head.extra should be absent but is .1."),
        ("another size", ValueError, "head.bias should be .10. but is .11."),
        ("bad config", ValueError, "no judge's config.json"),
        ("foreign config", ValueError, "no judge's config.json"),
    ],
)
def test_damaged_judge_is_one_clear_line(tmp_path: Path, fault: str, kind: type[Exception], words: str):
    folder = tmp_path / "judge"
    shutil.copytree(JUDGE, folder)
    damage(folder, fault)
    with pytest.raises(kind, match=words) as error:
        Judge.load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


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
