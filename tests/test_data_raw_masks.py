"""Masks from files: what is drawn anew, and that a mask stays on its picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.raw.pictures import load_masked

LEFT = np.arange(32)[None, :].repeat(16, 0) < 12  # (16, 32)


def saved(place: Path, name: str, *bands: np.ndarray) -> Path:
    pixels = np.stack([np.broadcast_to(band, LEFT.shape) for band in bands], -1).astype(np.uint8)
    Image.fromarray(pixels.squeeze(-1) if len(bands) == 1 else pixels).save(place / name)
    return place / name


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return saved(tmp_path, "photo.png", *(255 * LEFT,) * 3)


GREY = np.full(LEFT.shape, 90)


@pytest.mark.parametrize(
    "bands",
    [
        (255 * LEFT,),  # white
        (255 * LEFT, np.array(255)),  # white, with an alpha channel that says nothing
        (GREY, 255 * ~LEFT),  # transparent, as editors save it
        (GREY, GREY, GREY, 255 * ~LEFT),
        (GREY, GREY, GREY, 100 + 100 * ~LEFT),
        (np.array(0), np.array(0), np.array(0), 255 * ~LEFT),  # the rest is black
    ],
    ids=["grey", "opaque", "grey and alpha", "colour and alpha", "half", "black"],
)
def test_white_or_else_transparent_is_drawn_anew(photo: Path, tmp_path: Path, bands: tuple) -> None:
    picture, mask = load_masked(photo, saved(tmp_path, "mask.png", *bands), 3, None, None, 8)
    assert torch.equal(mask[0, 0].bool(), torch.from_numpy(LEFT))
    assert picture.shape == (1, 3, 16, 32)


def test_a_mask_that_says_two_things_is_refused(photo: Path, tmp_path: Path) -> None:
    strokes = saved(tmp_path, "strokes.png", *(np.array(255),) * 3, 255 * LEFT)  # white on nothing
    with pytest.raises(ValueError, match=r"strokes\.png is black and white, and transparent in part: save it without"):
        load_masked(photo, strokes, 3, None, None, 8)


@pytest.mark.parametrize("scale", [0.5, 1, 2])
@pytest.mark.parametrize("size", [(None, None), (16, 16), (None, 16), (32, 32), (24, 64)])
def test_a_mask_is_cut_as_its_picture(photo: Path, tmp_path: Path, scale: float, size: tuple) -> None:
    """The mask is white where the picture is, so that both are equal afterwards."""
    Image.fromarray(255 * LEFT.astype(np.uint8)).resize((int(32 * scale), int(16 * scale)), 0).save(tmp_path / "m.png")
    picture, mask = load_masked(photo, tmp_path / "m.png", 1, *size, 8)
    assert torch.equal(mask, (picture >= 0.5).float())
    assert 0 < mask.mean() < 1


@pytest.mark.parametrize("size", [(None, None), (16, 16)])
@pytest.mark.parametrize(("shape", "fits"), [((32, 32), False), ((16, 32), False), ((30, 16), False), ((13, 7), True)])
def test_another_shape_is_refused_by_the_sizes_of_both_files(
    photo: Path, tmp_path: Path, size: tuple, shape: tuple[int, int], fits: bool
) -> None:
    Image.new("L", shape).save(tmp_path / "mask.png")
    if fits:  # to rounding
        load_masked(photo, tmp_path / "mask.png", 3, *size, 8)
        return
    with pytest.raises(ValueError, match=rf"mask.png has {shape[0]}×{shape[1]} pixels and .*photo.png 32×16"):
        load_masked(photo, tmp_path / "mask.png", 3, *size, 8)
