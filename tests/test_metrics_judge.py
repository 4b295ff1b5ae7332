"""The judge of digits: right, small, kept on disk, and as a network of features."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from measured import JUDGE
from safetensors.torch import load, save_file
from torch import Tensor

from data import digits
from metrics.features import DigitsJudge, load_features
from metrics.judge import Judge


@pytest.fixture(scope="module")
def network() -> DigitsJudge:
    return DigitsJudge(JUDGE)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(JUDGE)


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
        (torch.zeros(2, 3, 8, 8), "the judge needs pictures of .1, 8, 8., got .3, 8, 8."),
    ],
)
def test_wrong_pictures_are_refused(network: DigitsJudge, pictures: Tensor, words: str):
    with pytest.raises(ValueError, match=words):
        network(pictures)


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
