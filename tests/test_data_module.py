"""Batches of captioned digits, codecs and pictures."""

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import digits
from data.latents import Pixels, load_codec
from data.module import Digits, TrainingDigits, ValidationDigits
from data.order import GlobalBatches, Share
from data.raw.pictures import load_picture, sheet, to_image
from data.text.clip import CLIPText

CODEC = Pixels(1, 0.3, 2.66)


def test_a_share_of_training_data_is_the_slice_of_the_whole(text: CLIPText) -> None:
    data = TrainingDigits(text, CODEC, seed=0, batch_size=16, caption_dropout=0.5)
    whole = data[GlobalBatches([np.arange(1297)], 16, 0).share(3)]
    part = data[GlobalBatches([np.arange(1297)], 16, 0, 0, 1, 2).share(3)]
    for name in ("x0", "noise", "text", "pooled"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[8:]), name
    parts = [data[share] for share in islice(GlobalBatches([np.arange(1297)], 16, 0, 3, 0, 1, 4), 4)]
    assert {part.step for part in parts} == {3}
    for name in ("x0", "noise", "text", "pooled"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert not torch.equal(data[GlobalBatches([np.arange(1297)], 16, 0).share(4)].noise, whole.noise)


def test_captions_fit_their_pictures_and_dropped_ones_are_the_empty_caption(text: CLIPText) -> None:
    data = TrainingDigits(text, CODEC, seed=0, batch_size=2000, caption_dropout=0.3)
    samples = np.arange(2000) % 1297
    batch = data[Share(0, np.arange(2000), samples)]
    null = text.encode([""])
    dropped = (batch.pooled - null.pooled).norm(dim=1) < 1e-3
    without_tokens = (batch.text - null.tokens).flatten(1).norm(dim=1) < 1e-3
    assert torch.equal(dropped, without_tokens)  # the pooled part goes with the tokens
    assert abs(dropped.float().mean().item() - 0.3) < 0.04
    used = set()
    labels = digits.load("train").labels
    for i in np.flatnonzero(~dropped.numpy())[:40]:
        own = text.encode(digits.captions(int(labels[samples[i]]), digits.TRAIN_TEMPLATES))
        distance = (own.pooled - batch.pooled[i]).norm(dim=1)
        assert distance.min() < 1e-3
        used.add(int(distance.argmin()))
    assert len(used) == len(digits.TRAIN_TEMPLATES)


def test_validation_data_is_fixed(text: CLIPText) -> None:
    data = ValidationDigits(text, CODEC)
    whole, part = (data[Share(0, ids, ids)] for ids in (np.arange(20), np.array([7])))
    assert torch.equal(part.noise[0], whole.noise[7])
    assert torch.equal(part.text[0], whole.text[7])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_nothing(text: CLIPText, workers: int) -> None:
    loader = iter(Digits(text, CODEC, seed=2, batch_size=8, workers=workers).train_dataloader())
    data = TrainingDigits(text, CODEC, 2, 8, 0.1)
    for k in range(3):
        batch = next(loader)
        assert batch.step == k
        assert torch.equal(batch.noise, data[GlobalBatches([np.arange(1297)], 8, 2).share(k)].noise)


def test_pixels_round_trip_normalise_and_clamp(tmp_path: Path) -> None:
    pixels = digits.load("train").pixels
    latents = CODEC.encode(pixels)
    assert abs(latents.mean().item()) < 0.05
    assert abs(latents.std().item() - 1) < 0.05
    torch.testing.assert_close(CODEC.decode(latents), pixels)
    assert CODEC.decode(latents * 10).max() == 1
    CODEC.save(tmp_path)
    torch.testing.assert_close(load_codec(tmp_path).encode(pixels), latents)
    with pytest.raises(ValueError, match="scale must be > 0"):
        Pixels(scale=0)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no codec config"), ("{", "no JSON"), ('{"_class_name": "VQModel"}', "no codec")]
)
def test_a_foreign_codec_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_codec(tmp_path)


def test_pictures_round_half_to_even_and_stand_side_by_side() -> None:
    grey = to_image(torch.tensor([[[0.0, 0.5 / 255, 1.5 / 255, 1.0]]]))
    assert (grey.mode, list(grey.tobytes())) == ("L", [0, 0, 2, 255])
    assert to_image(torch.zeros(3, 2, 5)).size == (5, 2)
    assert sheet(torch.rand(6, 1, 8, 8), columns=3, side=64).size == (3 * 68 + 4, 2 * 68 + 4)


def test_pictures_of_other_depths_and_with_holes_are_read_as_they_look(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    deep = load_picture(tmp_path / "deep.png", 1, None, None, 2)
    torch.testing.assert_close(deep[0, 0], torch.from_numpy(ramp / 65535).float(), atol=1 / 255, rtol=0)
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "holes.png")
    assert load_picture(tmp_path / "holes.png", 1, None, None, 2).max() == 0
    Image.new("RGB", (9, 11), "red").save(tmp_path / "red.png")
    assert load_picture(tmp_path / "red.png", 3, None, None, 4).shape == (1, 3, 8, 8)
    assert load_picture(tmp_path / "red.png", 3, 16, 4, 4).shape == (1, 3, 16, 4)
    for file, message in (("nowhere.png", "there is no picture"), ("red.png", "is smaller than 12 pixels")):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            load_picture(tmp_path / file, 3, None, None, 12)


def test_digits_are_enlarged_for_other_codecs_and_come_back() -> None:
    pixels = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(digits.resized(pixels, 8, 1), pixels)
    large = digits.resized(pixels, 32, 3)
    assert large.shape == (5, 3, 32, 32)
    assert torch.equal(large[:, 0], large[:, 2])
    assert (digits.reduced(large) - pixels).abs().mean() < 0.1
    tiny = digits.resized(pixels, 4, 3)
    assert tiny.shape == (5, 3, 4, 4)
    torch.testing.assert_close(tiny[:, 1, 1, 2], pixels[:, 0, 2:4, 4:6].mean((1, 2)))
    torch.testing.assert_close(digits.reduced(pixels.expand(-1, 3, -1, -1)), pixels)


def test_dequantised_numbers_stay_within_their_level_and_are_fresh_at_every_step(text: CLIPText) -> None:
    ids = np.arange(40)
    codec = Pixels(1, 0.3, 2.66)
    plain = TrainingDigits(text, codec, 0, 40, 0.1)[Share(3, ids, ids)].x0
    data = TrainingDigits(text, codec, 0, 40, 0.1, dequantize=True)
    first, again, later = (data[Share(step, ids, ids)].x0 for step in (3, 3, 4))
    off = (first - plain) / (2.66 / 16)  # in levels
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert off.abs().max() <= 0.5
    assert off.mean().item() == pytest.approx(0, abs=0.03)
    assert off.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.03)
    with pytest.raises(ValueError, match="needs the codec Pixels"):
        Digits(text, codec, side=16, dequantize=True)
