import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from data import digits
from metrics.distance import frechet_distance, measure, nearest_neighbour_distance
from metrics.judge import Judge

JUDGE = Path(__file__).parents[1] / "assets" / "digits" / "judge"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(JUDGE)


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
    assert frechet_distance(nn.Identity(), x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_agrees_with_scipy_on_correlated_features():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(2, 24, 24, dtype=torch.float64, generator=generator)
    x, y = gaussian(torch.zeros(24).double(), roots[0], 900), gaussian(torch.ones(24).double(), roots[1], 600)
    assert frechet_distance(nn.Identity(), x, y) == pytest.approx(sqrtm_distance(x, y), rel=1e-6)


def test_frechet_distance_agrees_with_scipy_on_the_judge(judge: Judge):
    """The judge's features are float32; a distance rounded to float32 with them would be off by more than 1e-9."""
    train, held_out = digits.load("train").pixels, digits.load("held_out").pixels
    with torch.no_grad():
        expected = sqrtm_distance(judge(train), judge(held_out))
    assert frechet_distance(judge, train, held_out) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_to_itself_is_zero(judge: Judge):
    held_out = digits.load("held_out").pixels
    assert frechet_distance(judge, held_out, held_out) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_symmetric_and_does_not_depend_on_the_order(judge: Judge):
    train, held_out = digits.load("train").pixels, digits.load("held_out").pixels
    there = frechet_distance(judge, train, held_out)
    assert frechet_distance(judge, held_out, train) == pytest.approx(there, rel=1e-9)
    assert frechet_distance(judge, train.flip(0), held_out) == pytest.approx(there, rel=1e-5)


def test_nearest_neighbours_by_hand():
    reference = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]])
    pictures = torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[3.0, 3.0]], [[6.0, 8.0]]])
    assert nearest_neighbour_distance(pictures, reference).tolist() == [0, 1, 1, 5]


def test_nearest_neighbour_of_a_member_is_exactly_itself():
    pictures = torch.rand(600, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert nearest_neighbour_distance(pictures, pictures).max() == 0


def test_quality_of_real_pictures_and_of_copies(judge: Judge):
    train, held_out = digits.load("train"), digits.load("held_out")
    best = measure(judge, held_out.pixels, held_out.labels, train.pixels, held_out.pixels)
    assert best.accuracy >= 0.97
    assert best.distance == pytest.approx(0, abs=1e-6)
    assert best.neighbour_ratio == pytest.approx(1)
    assert best.duplicates == 0

    copies = measure(judge, train.pixels, (train.labels + 1) % 10, train.pixels, held_out.pixels)
    assert copies.accuracy <= 0.03
    assert copies.distance_ratio == pytest.approx(1)
    assert copies.neighbour_ratio == 0

    twice = torch.cat([train.pixels, train.pixels[:7], train.pixels[:2]])
    labels = torch.cat([train.labels, train.labels[:7], train.labels[:2]])
    assert measure(judge, twice, labels, train.pixels, held_out.pixels).duplicates == 9


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
