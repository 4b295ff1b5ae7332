"""Colour profiles: pictures become sRGB by their own profile, and one that cannot be used changes nothing."""

import io
from pathlib import Path

import numpy as np
import pytest
from captioned import PHOTOS, coded
from PIL import Image, ImageCms
from profiles import ADOBE, ADOBE_RGB, GREY, INKS, SRGB, encoded

from data.raw.pictures import load_picture, open_picture
from data.raw.profiles import BROKEN, read_profile

COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
PLAIN_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def levels(content: bytes, channels: int = 3) -> np.ndarray:
    image = open_picture(content, channels)
    assert BROKEN not in image.info
    return np.asarray(image).astype(int)


def by_adobe_rgb(levels: np.ndarray) -> np.ndarray:
    return encoded((levels / 255) ** 2.2 @ (np.linalg.inv(SRGB) @ ADOBE).T)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_colours_are_converted_by_primaries_and_gamma(format: str) -> None:
    content = coded(Image.fromarray(COLOURS), format, icc_profile=ADOBE_RGB, lossless=True)
    assert np.abs(levels(content) - by_adobe_rgb(COLOURS)).max() <= 2
    assert np.abs(by_adobe_rgb(COLOURS) - COLOURS).max() > 40  # what it amounts to


def test_a_jpeg_a_palette_and_a_picture_with_holes_are_converted() -> None:
    photo = Image.fromarray(PHOTOS[2][:64, :64])
    near = levels(coded(photo, "JPEG", quality=100, icc_profile=ADOBE_RGB)) - by_adobe_rgb(np.asarray(photo))
    assert np.abs(near).mean() < 1.5
    palette = photo.quantize(8)
    wanted = by_adobe_rgb(np.asarray(palette.convert("RGB")))
    assert np.abs(levels(coded(palette, icc_profile=ADOBE_RGB)) - wanted).max() <= 2
    alpha = np.full((64, 64, 1), 255, np.uint8)
    alpha[:32] = 0
    holes = Image.fromarray(np.concatenate([np.asarray(photo), alpha], axis=-1))
    shown = levels(coded(holes, icc_profile=ADOBE_RGB))
    assert shown[:32].max() == 0
    assert np.array_equal(shown[32:], levels(coded(photo, icc_profile=ADOBE_RGB))[32:])


def test_grey_pictures_are_converted_by_a_profile_of_grey_or_of_colours() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    light = encoded((grey / 255) ** 1.8)
    for picture in (Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)):
        for channels in (1, 3):
            made = levels(coded(picture, icc_profile=GREY), channels).reshape(16, 16, -1)
            assert np.abs(made - light[..., None]).max() <= 2
    assert (
        np.abs(levels(coded(Image.fromarray(grey), icc_profile=ADOBE_RGB), 1) - encoded((grey / 255) ** 2.2)).max() <= 2
    )


def test_inks_are_converted_by_their_own_profile() -> None:
    for inks, lightness in (((255, 0, 0, 0), 2 / 3), ((0, 0, 0, 128), 0.5), ((0, 0, 0, 0), 1.0)):
        content = coded(Image.new("CMYK", (8, 8), inks), "TIFF", icc_profile=INKS)
        grey = encoded(np.array(((100 * lightness + 16) / 116) ** 3))
        assert np.abs(levels(content) - grey).max() <= 4


@pytest.mark.parametrize(
    ("picture", "profile"),
    [
        (Image.fromarray(COLOURS), b"no profile"),
        (Image.fromarray(COLOURS), ADOBE_RGB[:200]),
        (Image.fromarray(COLOURS), GREY),
        (Image.fromarray(COLOURS).convert("CMYK"), ADOBE_RGB),
        (Image.fromarray(COLOURS).convert("L"), INKS),
        (Image.fromarray(COLOURS).convert("RGBA"), INKS),
        (Image.fromarray(COLOURS), bytes(2**24 + 1)),
    ],
)
def test_a_profile_that_is_broken_or_of_another_kind_is_ignored(picture: Image.Image, profile: bytes) -> None:
    read = open_picture(coded(picture, "TIFF", icc_profile=profile), 3)
    assert read.info[BROKEN]
    assert np.array_equal(read, open_picture(coded(picture, "TIFF"), 3))


def test_pictures_without_a_profile_or_in_srgb_keep_every_bit() -> None:
    for profile in (None, PLAIN_SRGB):
        assert np.array_equal(levels(coded(Image.fromarray(COLOURS), icc_profile=profile)), COLOURS)


def test_a_profile_is_read_once() -> None:
    read_profile.cache_clear()
    for _ in range(3):
        open_picture(coded(Image.fromarray(COLOURS), icc_profile=ADOBE_RGB), 3)
    assert (read_profile.cache_info().misses, read_profile.cache_info().hits) == (1, 2)


def test_a_picture_to_start_from_is_converted_and_a_broken_profile_is_told(tmp_path: Path) -> None:
    photo = Image.open(io.BytesIO(coded(Image.fromarray(COLOURS))))
    photo.save(tmp_path / "a.png", icc_profile=ADOBE_RGB)
    made = load_picture(tmp_path / "a.png", 3, None, None, 1)[0].movedim(0, -1).numpy() * 255
    assert np.abs(made - by_adobe_rgb(COLOURS)).max() <= 2
    photo.save(tmp_path / "b.png", icc_profile=b"no profile")
    with pytest.warns(UserWarning, match=r"the colour profile of .*b.png is ignored: ") as told:
        load_picture(tmp_path / "b.png", 3, None, None, 1)
    assert len(told) == 1
