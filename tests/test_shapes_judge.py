"""The shapes' judge: what its features tell apart, and the shapes as `evaluate.py` examines them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from data import digits, shapes
from data.examined import DATA, Digits, Shapes, scenes
from data.latents import VAE
from metrics.distance import Measure
from metrics.distribution import frechet_distance
from metrics.features import DigitsJudge, ShapesJudge, load_features
from metrics.judge import Judge
from tools.train_shapes_judge import BATCH, SEED, STEPS, UNSEEN, examples, split

ASSETS = Path(__file__).parents[1] / "assets"
JUDGE = ASSETS / "shapes/judge"
REAL = 500


@pytest.fixture(scope="module")
def network() -> ShapesJudge:
    return ShapesJudge(JUDGE)


@pytest.fixture(scope="module")
def fresh() -> Tensor:
    """Scenes that neither a training nor a reference has seen."""
    return scenes(31, REAL)


@pytest.fixture(scope="module")
def measure(network: ShapesJudge) -> Measure:
    examined = Shapes.held_out(1, REAL)
    return Measure(network, examined.real["train"], examined.real["held_out"])


def ratio(measure: Measure, pictures: Tensor) -> float:
    found = measure.quality(pictures, torch.zeros(len(pictures), dtype=torch.int64)).distance_ratio
    assert found is not None
    return found


def test_real_scenes_are_as_near_as_real_ones_and_blurred_ones_far(measure: Measure, fresh: Tensor) -> None:
    assert 0.8 < ratio(measure, fresh) < 1.25
    mild, strong = (ratio(measure, gaussian_blur(fresh, [9, 9], [sigma, sigma])) for sigma in (1.0, 2.0))
    assert 2 < mild < strong


def test_other_contents_are_far(measure: Measure, fresh: Tensor) -> None:
    """Each changes one thing only: colours; places; numbers."""
    swapped = fresh[:, [2, 1, 0]]
    moved = torch.roll(fresh, 8, dims=3)
    lonely = scenes(31, 6 * REAL)[[len(shapes.scene(31, i).objects) == 1 for i in range(6 * REAL)]][:REAL]
    assert len(lonely) > 100
    for wrong in (swapped, moved, lonely):
        assert ratio(measure, wrong) > 2


def test_one_scene_only_has_little_variety(measure: Measure, fresh: Tensor) -> None:
    """The same scene a hundred times, each with a little noise of its own."""
    noise = 0.01 * torch.randn(100, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    one = (fresh[:1] + noise).clamp(0, 1)
    labels = torch.zeros(100, dtype=torch.int64)
    varied, alike = (measure.quality(pictures, labels).pairwise_distance for pictures in (fresh[:100], one))
    assert varied is not None
    assert alike is not None
    assert 0 < alike < 0.1 * varied


def test_the_judge_knows_what_there_is_and_where() -> None:
    """From 64 features, in scenes beyond those of its training."""
    judge = Judge.load(JUDGE)
    pixels, many, where = examples(STEPS * BATCH + UNSEEN, 300)
    with torch.no_grad():
        said_counts, said_places = split(judge.logits(pixels))
    assert (said_counts.argmax(1) == many).all(1).double().mean() > 0.85
    assert ((said_places > 0) == (where > 0)).all(1).double().mean() > 0.85


def test_what_the_judge_learns_is_what_the_scene_holds() -> None:
    _, many, where = examples(0, 20)
    for i in range(20):
        placed = shapes.scene(SEED, i).objects
        assert many[i].sum() == len(placed)
        assert many[i].count_nonzero() == len({(p.shape, p.colour, p.side) for p in placed})
        middles = {((p.top + p.side // 2) // 16, (p.left + p.side // 2) // 16) for p in placed}
        grid = where[i].unflatten(0, (4, 4, -1))
        assert {(int(r), int(c)) for r, c in grid.any(-1).nonzero()} == middles
        assert {shapes.SHAPES[int(s)] for s in grid[..., :4].any(0).any(0).nonzero()} == {p.shape for p in placed}


def test_features_are_those_of_the_judge_and_small_on_disk(network: ShapesJudge, fresh: Tensor) -> None:
    pooled, spatial, logits = network(fresh[:7])
    assert logits is None  # a scene is not one of some classes
    assert not network.classifies
    assert spatial is not None
    assert (pooled.shape, spatial.shape) == ((7, network.num_features), (7, network.num_spatial)) == ((7, 64), (7, 64))
    with torch.no_grad():
        torch.testing.assert_close(pooled.float(), network.judge(fresh[:7]))
    alone = torch.cat([network(picture[None]).pooled for picture in fresh[:7]])
    torch.testing.assert_close(pooled, alone, rtol=1e-4, atol=1e-4)
    assert frechet_distance(network(fresh).pooled, network(fresh.flip(0)).pooled) == pytest.approx(0, abs=1e-4)
    assert sum(file.stat().st_size for file in JUDGE.iterdir()) <= 600_000
    with pytest.raises(ValueError, match=r"needs pictures of .3, 64, 64., got .1, 8, 8."):
        network(torch.zeros(1, 1, 8, 8))


def test_judges_are_not_taken_for_each_other(tmp_path: Path) -> None:
    assert isinstance(load_features(f"shapes:{JUDGE}"), ShapesJudge)
    with pytest.raises(ValueError, match=r"holds a judge of pictures .3, 64, 64., not .1, 8, 8."):
        DigitsJudge(JUDGE)
    with pytest.raises(ValueError, match=r"holds a judge of pictures .1, 8, 8., not .3, 64, 64."):
        load_features(f"shapes:{ASSETS / 'digits/judge'}")
    shutil.copytree(JUDGE, tmp_path / "judge")
    config = json.loads((JUDGE / "config.json").read_text())
    for wrong in ({"side": 60}, {"side": 0}, {"stem": [16, 32, 64, 64, 64]}):
        (tmp_path / "judge/config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=r"no judge's config\.json: a side of"):
            Judge.load(tmp_path / "judge")


def test_a_judge_of_digits_is_written_as_ever(tmp_path: Path) -> None:
    judge = Judge.load(ASSETS / "digits/judge")
    assert (judge.channels, judge.side, judge.grid) == (1, 8, 2)
    judge.save(tmp_path)
    for file in (ASSETS / "digits/judge").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_true_scenes_are_right_and_shuffled_prompts_wrong() -> None:
    examined = Shapes.held_out(100, 100)
    true = examined.real["held_out"]

    def right(pictures: Tensor) -> int:
        return sum(verdict.right for verdict in examined.verdicts(pictures))

    assert right(true) == 100
    assert right(true.roll(1, dims=0)) <= 2
    assert right(torch.cat([true[:50], torch.full_like(true[50:], 240 / 255)])) == 50


def test_the_codec_brings_scenes_back_as_the_judge_reads_them() -> None:
    codec = VAE(ASSETS / "shapes/vae")
    drawn = [shapes.scene(77, i) for i in range(100)]
    pixels = scenes(77, 100)
    back = codec.decode(codec.encode(pixels)).movedim(1, -1).double().numpy()
    right = [shapes.fulfils(shapes.read(picture), scene.request) for picture, scene in zip(back, drawn, strict=True)]
    assert np.mean(right) >= 0.94
    latents = codec.encode(pixels)
    assert abs(latents.mean().item()) < 0.1
    assert abs(latents.std().item() - 1) < 0.1


def test_prompts_are_the_captions_of_the_held_out_scenes() -> None:
    examined = Shapes.held_out(120, 100)
    held_out = [shapes.scene(examined.SEEDS["held_out"], i) for i in range(120)]
    assert examined.prompts == [scene.request.caption() for scene in held_out]
    seeds = {*examined.SEEDS.values(), SEED}
    assert len(seeds) == 3  # neither half is what the judge has learnt from, nor the other
    assert len(examined.alike("train")) == 100
    assert torch.equal(Shapes.held_out(30, 100).alike("train"), examined.real["train"][:30])
    raw = [raw for raw, _ in zip(shapes.Shapes(5, examined.SEEDS["train"]).read(0), range(5), strict=True)]
    stored = torch.stack([torch.frombuffer(bytearray(r.picture.tobytes()), dtype=torch.uint8) for r in raw])
    first = examined.real["train"][:5].mul(255).round().byte().movedim(1, -1).flatten(1)
    assert torch.equal(first, stored)  # the store's own first pictures


def test_each_data_set_says_what_models_it_takes() -> None:
    assert set(DATA) == {"digits", "shapes"}
    examined = Shapes.held_out(1, 1)
    examined.check("m", (64, 64), 3)
    for size, channels in (((64, 64), 1), ((64, 32), 3), ((8, 8), 1)):
        with pytest.raises(ValueError, match=r"m draws pictures of .* but the shapes have 3 × 64 × 64"):
            examined.check("m", size, channels)
    with pytest.raises(ValueError, match="multiple of 10"):
        Digits.held_out(75)
    some = Digits.held_out(70)
    assert some.labels.bincount().tolist() == [7] * 10
    assert some.labels[some.shown].tolist() == list(range(10))
    assert len(some.alike("train")) == 70
    pictures = torch.rand(2, 3, 64, 64)
    assert torch.equal(some.compared(pictures), digits.reduced(pictures))
    assert torch.equal(examined.compared(pictures), pictures)
