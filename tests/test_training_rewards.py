"""Rewards: what the judges say of true and wrong pictures, captions read back, sums, and rewards that are none."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from trials import ROOT

from data import digits, shapes
from data.examined import scenes
from data.order import Use, stream
from data.shapes import CATEGORIES, Group, Request
from metrics.judge import Judge
from training.rewards import Function, Ink, Reward, RewardError, RightDigit, RightShapes, total

JUDGE = str(ROOT / "assets/digits/judge")


def test_every_caption_of_the_shapes_is_read_back() -> None:
    asked = [request for category in CATEGORIES for request in shapes.requests(category, 50, seed=8)]
    asked += [shapes.scene(3, number).request for number in range(300)]
    assert [shapes.asked_for(request.caption()) for request in asked] == asked
    for number in range(200):
        for caption in shapes.captions(shapes.scene(3, number), stream(3, Use.CAPTION, 0, number)):
            assert shapes.asked_for(caption).caption() == caption


@pytest.mark.parametrize("caption", ["", "a dog", "a circle and", "five circles", "a circle above", "red", "A circle"])
def test_another_caption_is_no_request_for_shapes(caption: str) -> None:
    with pytest.raises(ValueError, match="none of the shapes'"):
        shapes.asked_for(caption)


def test_every_caption_of_the_digits_names_its_digit() -> None:
    for label in range(10):
        for caption in digits.captions(label, (*digits.TRAIN_TEMPLATES, *digits.HELD_OUT_TEMPLATES)):
            assert digits.asked_for(caption) == label


@pytest.mark.parametrize("caption", ["", "a digit", "three or four", "12"])
def test_a_caption_without_one_digit_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="does not name one digit"):
        digits.asked_for(caption)


def test_true_scenes_have_the_whole_reward_and_others_less() -> None:
    captions = [shapes.scene(9, number).request.caption() for number in range(100)]
    pictures = scenes(9, 100)
    assert torch.equal(RightShapes()(pictures, captions), torch.ones(100))
    moved = RightShapes()(pictures.roll(1, 0), captions)
    for reward, caption, found in zip(moved, captions, pictures.roll(1, 0), strict=True):
        seen = shapes.read(found.permute(1, 2, 0).double().numpy())
        assert (reward == 1) == shapes.fulfils(seen, shapes.asked_for(caption))
        assert 0 <= reward <= 1
    assert moved.mean() < 0.5


def test_a_picture_that_is_nearer_to_its_caption_has_more() -> None:
    """For "two red circles above a square", one part after the other is made right."""
    drawn = [
        [("triangle", "blue", 20, 8, 8)],
        [("square", "blue", 20, 8, 40)],
        [("square", "blue", 20, 8, 40), ("circle", "blue", 12, 40, 8), ("circle", "blue", 12, 40, 24)],
        [("square", "blue", 20, 8, 40), ("circle", "red", 12, 40, 8), ("circle", "blue", 12, 40, 24)],
        [("square", "blue", 20, 8, 40), ("circle", "red", 12, 40, 8), ("circle", "red", 12, 40, 24)],
        [("square", "blue", 20, 40, 40), ("circle", "red", 12, 8, 8), ("circle", "red", 12, 8, 24)],
    ]
    asked = Request((Group(2, "circle", "red"), Group(1, "square")), "above")
    pictures = [shapes.picture(shapes.Scene(asked, tuple(shapes.Placed(*shape) for shape in some))) for some in drawn]
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2) / 255
    rewards = RightShapes()(pixels, [asked.caption()] * len(pixels)).tolist()
    assert rewards == sorted(set(rewards))
    assert rewards[-1] == 1
    assert rewards[-2] < 0.5
    assert RightShapes()(pixels[-1:], [replace(asked, relation="below").caption()]) < 0.5


def test_the_digit_that_is_asked_for_has_the_judges_probability() -> None:
    pixels, labels = (part[:50] for part in digits.load("held_out"))
    captions = [digits.captions(int(label), digits.HELD_OUT_TEMPLATES)[1] for label in labels]
    wanted = Judge.load(JUDGE).logits(pixels).softmax(1)[torch.arange(50), labels]
    torch.testing.assert_close(RightDigit(JUDGE)(pixels, captions), wanted)
    enlarged = digits.resized(pixels, 8, 3)
    torch.testing.assert_close(RightDigit(JUDGE)(enlarged, captions), wanted)


def test_rewards_are_added_with_their_weights() -> None:
    def first(pictures: Tensor, captions: Sequence[str]) -> list[int]:
        return [len(caption) for caption in captions]

    pictures, captions = torch.rand(3, 1, 8, 8), ["a", "bb", "ccc"]
    found = total([Ink(weight=-2.0), Function(first, 0.5)], pictures, captions)
    torch.testing.assert_close(found, -2 * pictures.mean((1, 2, 3)) + 0.5 * torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([0.0, float("nan"), 1.0], "the reward nan for the caption 'bb': a reward must be finite"),
        ([float("inf"), 0.0, 1.0], "the reward inf for the caption 'a'"),
        ([0.0, 1.0], r"Function must give 3 rewards, got the shape \(2,\)"),
        (1.0, r"Function must give 3 rewards, got the shape \(\)"),
    ],
)
def test_a_reward_that_is_none_stops_with_its_caption(rewards: object, message: str) -> None:
    reward: Reward = Function(lambda pictures, captions: rewards)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=message):
        total([reward], torch.rand(3, 1, 8, 8), ["a", "bb", "ccc"])


def test_a_judge_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        RightDigit(str(tmp_path))


def test_a_caption_that_a_judge_cannot_read_is_named() -> None:
    with pytest.raises(RewardError, match="RightShapes: the caption 'zero' is none of the shapes'"):
        total([RightShapes()], torch.rand(1, 3, 64, 64), ["zero"])
