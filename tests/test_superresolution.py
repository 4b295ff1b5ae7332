"""Pictures as conditions: a smaller picture to enlarge, from the data to the sample."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import stirred
from PIL import Image
from trials import ROOT, fit, refused, small

import sample
from data import digits
from data.degrade import Degrade, blurred, enlarged, noised
from data.latents import Pixels
from data.module import Digits, TrainingDigits, ValidationDigits
from data.order import Share
from data.text.clip import CLIPText
from flow.density import Steps
from flow.objective import Objective
from flow.target import X0
from mmdit.model import MMDiT
from pipeline import Pipeline
from pipeline.sampling import Sampling

CODEC = Pixels(1, 0.3, 2.66)
OVERLAY = ["--config", str(ROOT / "configs/picture/superresolution.yaml")]


@pytest.fixture
def upscaler(text: CLIPText) -> Pipeline:
    """A small random model that works from pictures."""
    network = MMDiT(
        in_channels=1, depth=1, width=32, heads=2, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8,
        picture_channels=1, level_embeds=True,
    )  # fmt: skip
    return Pipeline(stirred(network), Objective(), CODEC, text, Sampling(steps=2, guidance=2.0))


def test_a_smaller_picture_has_the_means_of_squares() -> None:
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4) / 16
    small = Degrade(factor=2).smaller(pixels)
    assert small.flatten().tolist() == [2.5 / 16, 4.5 / 16, 10.5 / 16, 12.5 / 16]
    assert torch.equal(enlarged(pixels, 4, 4), pixels)
    assert enlarged(small, 4, 4).shape == (1, 1, 4, 4)
    flat = torch.full((1, 1, 2, 2), 0.3)
    torch.testing.assert_close(enlarged(flat, 6, 6), torch.full((1, 1, 6, 6), 0.3))
    few, many = (((torch.arange(n) + 0.5) / n).expand(1, 1, n, n) for n in (8, 24))  # a slope, at the pixels' centres
    torch.testing.assert_close(enlarged(few, 24, 24)[..., 6:-6], many[..., 6:-6], rtol=0, atol=0.01)


def test_noise_is_the_straight_line_from_picture_to_noise() -> None:
    picture, noise = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    assert noised(picture, noise, torch.tensor([0.0, 0.25, 1.0]))[:, 0, 0, 0].tolist() == [1.0, 0.75, 0.0]
    assert torch.equal(noised(picture, noise, 0.5), noised(picture, noise, torch.full((3,), 0.5)))


def test_a_blur_is_gaussian_and_mirrored_and_has_the_levels_of_a_file() -> None:
    flat, point, edge = torch.full((2, 3, 8, 8), 0.4), torch.zeros(1, 1, 25, 25), torch.zeros(1, 1, 25, 25)
    torch.testing.assert_close(blurred(flat, 1.5), flat)
    point[..., 12, 12] = 1
    across = torch.arange(25.0) - 12
    gauss = torch.exp(-(across[:, None] ** 2 + across**2) / (2 * 1.5**2)) / (2 * torch.pi * 1.5**2)
    torch.testing.assert_close(blurred(point, 1.5)[0, 0], gauss, rtol=0, atol=0.6 / 255)
    assert torch.equal((255 * blurred(point, 1.5)).round() / 255, blurred(point, 1.5))
    edge[..., 12, 1] = 1  # one pixel from the edge: its mirror image lies one pixel outside of it
    assert blurred(edge, 1.5)[0, 0, 12, 0].item() == pytest.approx(
        2 * blurred(point, 1.5)[0, 0, 12, 11].item(), abs=0.006
    )
    smaller = Degrade(2, blur=1.0).smaller(point[..., :24, :24])
    assert torch.equal(smaller, F.avg_pool2d(blurred(point[..., :24, :24], 1.0), 2))
    with pytest.raises(ValueError, match=r"at most 2\.33 pixels for a side of 8, got 2\.5"):
        Degrade(1, blur=2.5).smaller(torch.zeros(1, 1, 8, 8))
    for blur in (-1.0, math.inf):
        with pytest.raises(ValueError, match=r"degrade\.blur must be a number of pixels of at least 0"):
            Degrade(1, blur=blur)


@pytest.mark.parametrize(("factor", "noise"), [(0, 0.0), (2, -0.1), (2, 1.1)])
def test_impossible_degrading_is_refused(factor: int, noise: float) -> None:
    with pytest.raises(ValueError, match="factor >= 1 and noise from 0 to 1"):
        Degrade(factor, noise)


def test_training_shows_each_digit_its_own_smaller_picture_with_noise_of_its_level(text: CLIPText) -> None:
    ids = np.arange(24)
    clean = TrainingDigits(text, CODEC, 0, 24, 0.1, degrade=Degrade(2))[Share(5, ids, ids)]
    assert clean.level is None
    small = F.avg_pool2d(digits.load("train").pixels[:24], 2)
    assert clean.picture is not None
    torch.testing.assert_close(clean.picture, CODEC.encode(enlarged(small, 8, 8)))
    rough = TrainingDigits(text, CODEC, 0, 24, 0.1, degrade=Degrade(2, 0.4))
    batch, again = rough[Share(5, ids, ids)], rough[Share(5, ids[10:], ids[10:])]
    assert batch.level is not None
    assert batch.picture is not None
    assert 0 <= batch.level.min() < 0.1
    assert 0.3 < batch.level.max() <= 0.4
    added = (batch.picture - (1 - batch.level)[:, None, None, None] * clean.picture).flatten(1)
    torch.testing.assert_close(added.std(1), batch.level, atol=0.05, rtol=0.3)
    assert F.cosine_similarity(added.flatten(), batch.noise.flatten(), 0).abs() < 0.1  # another noise than that of z
    assert again.picture is not None
    assert torch.equal(again.picture, batch.picture[10:])  # a function of (seed, step, place in the batch)
    assert not torch.equal(rough[Share(6, ids, ids)].level, batch.level)
    for name in ("x0", "noise", "text"):  # nothing else changes
        assert torch.equal(getattr(batch, name), getattr(clean, name))


def test_validation_shows_pictures_without_noise(text: CLIPText) -> None:
    ids = np.arange(6)
    batch = ValidationDigits(text, CODEC, degrade=Degrade(2, 0.4))[Share(0, ids, ids)]
    assert batch.level is not None
    assert batch.picture is not None
    assert not batch.level.any()
    small = F.avg_pool2d(digits.load("held_out").pixels[:6], 2)
    torch.testing.assert_close(batch.picture, CODEC.encode(enlarged(small, 8, 8)))


def test_examples_are_held_out_digits(text: CLIPText) -> None:
    data = Digits(text, CODEC, degrade=Degrade(2))
    examples = data.examples(3)
    assert examples is not None
    assert torch.equal(examples.real, digits.load("held_out").pixels[:3])
    assert examples.pictures.shape == (3, 1, 4, 4)
    assert Digits(text, CODEC).examples(3) is None


def test_a_picture_decides_what_is_drawn(upscaler: Pipeline) -> None:
    pictures = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    prompts, seeds = ["a one", "a two"], [0, 1]
    drawn = upscaler(prompts, seeds, picture=pictures)
    assert drawn.shape == (2, 1, 8, 8)
    torch.testing.assert_close(drawn[1:], upscaler(prompts[1:], seeds[1:], picture=pictures[1:]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        upscaler(prompts, seeds, picture=pictures[:1])[0], drawn[0], atol=1e-5, rtol=0
    )  # one for all
    assert not torch.equal(drawn, upscaler(prompts, seeds, picture=1 - pictures))
    told = upscaler(prompts, seeds, picture=pictures, level=0.5)
    assert not torch.equal(drawn, told)
    assert torch.equal(told, upscaler(prompts, seeds, picture=pictures, level=0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "works from a picture: give one"),
        ({"picture": torch.rand(3, 1, 4, 4)}, r"picture must be \(1 or 2, 1, …\)"),
        ({"picture": torch.rand(2, 3, 4, 4)}, r"picture must be \(1 or 2, 1, …\)"),
        ({"picture": torch.rand(2, 1, 4, 4), "level": 1.5}, "level must be from 0 to 1"),
    ],
)
def test_wrong_pictures_are_refused(upscaler: Pipeline, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upscaler(["a", "b"], [0, 1], **change)


def test_a_model_without_pictures_refuses_them(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="works from no picture: leave it out"):
        pipe(["a"], [0], picture=torch.rand(1, 1, 4, 4))
    with pytest.raises(ValueError, match="level must be from 0 to 1, and 0 for a network without level_embeds"):
        pipe(["a"], [0], level=0.5)


def test_it_trains_shows_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(small(tmp_path), *OVERLAY)
    with Image.open(tmp_path / "run/samples/step-0000006.png") as sheet:
        assert sheet.height > sheet.width  # three rows of two: what is given, what is made of it, the real one
    Image.fromarray(np.full((4, 4), 128, np.uint8)).save(tmp_path / "small.png")
    flags = ["--model", str(tmp_path / "run"), "--prompt", "a seven", "--out", str(tmp_path / "out"), "--steps", "2"]
    sample.main([*flags, "--picture", str(tmp_path / "small.png"), "--level", "0.1"])
    with Image.open(next((tmp_path / "out").glob("a-seven*.png"))) as drawn:
        assert drawn.size == (8, 8)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        sample.main(flags)
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().endswith("this model works from a picture: give --picture")


def test_the_regressor_sees_noise_alone_and_the_small_model_draws_small_digits(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (small(tmp_path / name) for name in ("one", "two"))
    fit(one, *OVERLAY, "--config", str(ROOT / "configs/picture/regressor.yaml"))
    regressor = Pipeline.load(tmp_path / "one/run/model")
    assert type(regressor.objective.target).__name__ == "X0"
    assert regressor.sampling.steps == 1
    objective = Objective(target=X0(), density=Steps(1))
    assert objective.times(torch.rand(3, 5), area=64)[0].tolist() == [1.0] * 5
    fit(two, "--config", str(ROOT / "configs/picture/small.yaml"))
    assert Pipeline.load(tmp_path / "two/run/model")(["a one"], [0]).shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--network.picture_channels", "0"], "network.picture_channels is 0, but the data need 1"),
        (["--network.level_embeds", "false"], "network.level_embeds is False, but the data need True"),
        (["--data.degrade.factor", "3"], "degrade.factor must divide the 8×8 pixels"),
        (["--data.degrade.blur", "3"], "a blur must be at most 2.33 pixels for a side of 8, got 3"),
        (["--data.degrade", "null"], "network.picture_channels is 1, but the data need 0"),
    ],
)
def test_bad_input_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert message in refused(capsys, small(tmp_path), *OVERLAY, *flags)
