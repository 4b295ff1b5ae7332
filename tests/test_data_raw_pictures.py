"""Pictures as they are decoded: every format and mode, what is refused, and their scale and crop."""

import io
import pickle
import runpy
import struct
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captioned import PHOTOS, coded
from PIL import Image

from data.raw.pictures import LARGEST, PictureError, cover, open_picture, size_of


def test_each_picture_of_the_list_has_its_outcome(tmp_path: Path) -> None:
    still, frames = Image.new("RGB", (20, 10), "red"), [Image.new("RGB", (20, 10), c) for c in ("red", "blue")]
    photo = coded(Image.fromarray(PHOTOS[2]), "JPEG")
    animated = {f: coded(frames[0], f, save_all=True, append_images=frames[1:]) for f in ("GIF", "WEBP", "PNG")}
    outcomes: list[tuple[bytes, str]] = [
        (b"", "empty file"), (b"no picture", "unreadable"), (photo[: len(photo) // 2], "unreadable"),
        (coded(still)[:50], "unreadable"), (coded(still, "TGA"), "unreadable"),
        (animated["GIF"], "animated"), (animated["WEBP"], "animated"), (animated["PNG"], "animated"),
        (coded(Image.new("F", (3, 3)), "TIFF"), "unreadable"), (coded(still, "GIF"), ""), (coded(still, "WEBP"), ""),
        (coded(still, "MPO", save_all=True, append_images=frames[1:]), ""), (photo, ""),
    ]  # fmt: skip
    for content, reason in outcomes:
        (tmp_path / "x").write_bytes(content)
        for source in (content, tmp_path / "x"):
            assert outcome(source) == reason
    assert outcome(tmp_path / "nowhere") == "unreadable"
    with pytest.raises(PictureError, match="20×10 pixels, more than 199"):
        open_picture(coded(still), 3, largest=199)
    again = pickle.loads(pickle.dumps(PictureError("animated", "it has 2 frames")))
    assert (again.reason, str(again)) == ("animated", "it has 2 frames")


def outcome(source: Any) -> str:
    try:
        image = open_picture(source, 3)
    except PictureError as error:
        return error.reason
    assert image.mode == "RGB"
    assert size_of(source) == (image.height, image.width)
    return ""


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM", "JPEG2000"])
def test_no_format_is_read_when_it_is_cut(format: str) -> None:
    content = coded(Image.fromarray(PHOTOS[2][:128, :128]), format)
    assert outcome(content) == ""
    assert {outcome(content[: int(part * len(content))]) for part in (0.01, 0.3, 0.7, 0.98)} == {"unreadable"}


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    levels = np.linspace(200, 65535, 256).reshape(16, 16).astype(np.uint16)
    wanted = np.round(levels / 257).astype(int)
    for format in ("PNG", "TIFF"):
        grey = np.asarray(open_picture(coded(Image.fromarray(levels), format), 1)).astype(int)
        assert np.array_equal(grey, wanted)
    triple = np.stack([levels, levels[::-1], levels.T], axis=-1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in triple)
    colour = np.asarray(open_picture(png(16, 16, 16, 2, rows), 3)).astype(int)
    assert np.abs(colour - triple / 257).max() <= 1
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    holes = open_picture(png(16, 16, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 65535))), 1)
    assert holes.getpixel((15, 15)) == 0
    assert holes.getpixel((14, 15)) == 254


def test_grey_cmyk_and_transparent_pictures_are_converted_correctly() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert np.array_equal(np.asarray(open_picture(coded(grey), 3))[..., 1], np.asarray(grey))
    assert np.array_equal(open_picture(grey, 1), grey)
    for colour in ("red", "white", "black"):
        printed = open_picture(coded(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=100), 3)
        assert np.abs(np.asarray(printed).astype(int) - Image.new("RGB", (16, 16), colour)).max() < 8
    half = Image.new("RGBA", (8, 8), (200, 100, 50, 255))
    half.paste((255, 255, 255, 0), (0, 0, 4, 8))
    palette = half.convert("RGB").quantize(4)
    index = palette.getpixel((0, 0))
    for content in (coded(half), coded(half, "WEBP", lossless=True), coded(palette, transparency=index),
                    coded(palette, "GIF", transparency=index), coded(half.convert("LA"))):  # fmt: skip
        shown = np.asarray(open_picture(content, 3)).astype(int)
        assert shown[:, :4].max() == 0
        assert shown[:, 4:].min() > 40
    keyed = open_picture(coded(half.convert("RGB"), transparency=(255, 255, 255)), 3)
    assert [keyed.getpixel((0, 0)), keyed.getpixel((7, 0))] == [(0, 0, 0), (200, 100, 50)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_whatever_its_exif_says(orientation: int) -> None:
    upright = Image.fromarray(PHOTOS[2][:64, :96])
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that brings upright into this orientation
    turned = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = coded(turned, exif=exif)
    assert np.array_equal(open_picture(content, 3), upright)
    assert size_of(content) == (64, 96)
    assert np.array_equal(open_picture(Image.open(io.BytesIO(content)), 3), upright)
    deep = Image.fromarray(np.asarray(turned.convert("L")).astype(np.uint16) * 257)
    assert np.array_equal(open_picture(coded(deep, exif=exif), 1), upright.convert("L"))


def test_too_large_pictures_are_never_decoded_but_long_strips_are() -> None:
    bomb = png(30_000, 30_000, 8, 2, b"")  # without a pixel: decoding it would be another error
    assert outcome(bomb) == "too large"
    assert outcome(png(2**14, LARGEST // 2**14 + 1, 8, 0, b"")) == "too large"
    strip = png(30_000, 100, 8, 0, b"".join(b"\0" + bytes(30_000) for _ in range(100)))
    assert open_picture(strip, 1).size == (30_000, 100)
    shape = cover(open_picture(strip, 1), 64, 64)
    assert (shape[0].size, shape[1:]) == ((64, 64), (0, (19_200 - 64) // 2))


def test_reading_a_picture_leaves_the_state_of_all_threads_alone(tmp_path: Path) -> None:
    class Watched(type(tmp_path)):
        def open(self, *args: Any, **more: Any) -> Any:
            seen.append(warnings.filters)
            return super().open(*args, **more)

    seen: list[Any] = []
    (tmp_path / "x.ppm").write_bytes(b"P5 16384 8191 255\n")  # enough pixels for Pillow to warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = runpy.run_path(str(Path(__file__).parents[1] / "data/raw/pictures.py"))
        assert fresh["size_of"](Watched(tmp_path / "x.ppm")) == (2**13 - 1, 2**14)
        assert [filters is warnings.filters for filters in seen] == [True]


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_reduced_but_stays_large_enough(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.fromarray(PHOTOS[0]).resize((1600, 1000), Image.Resampling.LANCZOS)
    content = coded(photo, "JPEG", quality=95, exif=exif)
    wanted = (200, 320) if orientation == 1 else (320, 200)
    full, reduced = open_picture(content, 3), open_picture(content, 3, needed=wanted)
    assert reduced.size == (full.width // 2, full.height // 2)  # 1/4 would be less than twice as large as wanted
    a, b = (np.asarray(cover(image, *wanted)[0]).astype(int) for image in (full, reduced))
    assert np.abs(a - b).mean() < 1
    assert open_picture(content, 3, needed=(full.height, full.width)).size == full.size
    assert size_of(content) == (full.height, full.width)


def test_covering_at_its_own_scale_is_a_crop_and_in_general_a_resize_of_a_box() -> None:
    photo = Image.fromarray(PHOTOS[0])
    assert np.array_equal(cover(photo, photo.height, photo.width)[0], photo)
    same, top, left = cover(photo, photo.height, 200)
    assert (top, left) == (0, 220)
    assert np.array_equal(same, photo.crop((220, 0, 420, photo.height)))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((427, 640), (192, 320)), ((3001, 997), (128, 96)), ((33, 47), (64, 64)), ((300, 3000), (96, 64))],
)
def test_both_axes_are_scaled_by_one_factor(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """A filter that is symmetric and sums to 1 takes a ramp to a ramp, so that levels tell places."""
    for axis in (0, 1):
        ramp = np.indices(size)[axis].astype(np.float32) + 0.5
        picture, *corner = cover(Image.fromarray(ramp), *wanted)
        scale = max(wanted[0] / size[0], wanted[1] / size[1])
        assert (picture.height, picture.width) == wanted
        for margin, side, target in zip(corner, size, wanted, strict=True):
            assert abs(margin - (side * scale - target) / 2) < 1  # in the centre, up to a pixel
        places = (np.indices(wanted)[axis] + 0.5 + corner[axis]) / scale
        inside = (slice(6, -6), slice(6, -6))  # what the filter meets at the picture's border is no ramp
        assert np.abs(np.asarray(picture) - places)[inside].max() < 0.05 / scale


def plugin(name: str) -> str:
    """A plugin of Pillow's for a format that is PNG behind the first four bytes."""
    return f"""
from PIL import Image, PngImagePlugin

class Format(PngImagePlugin.PngImageFile):
    format = "{name}"

    def _open(self):
        self.fp.seek(4)
        super()._open()

def register_heif_opener():
    Image.register_open("{name}", Format, lambda prefix: prefix.startswith(b"{name}"))
"""


def test_formats_of_plugins_that_are_installed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = coded(Image.new("RGB", (4, 6), "red"))
    assert {outcome(mark + content) for mark in (b"HEIF", b"JXL ")} == {"unreadable"}
    (tmp_path / "pillow_heif.py").write_text(plugin("HEIF"))
    (tmp_path / "pillow_jxl.py").write_text(plugin("JXL") + "register_heif_opener()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    fresh = runpy.run_path(str(Path(__file__).parents[1] / "data/raw/pictures.py"))
    for mark in (b"HEIF", b"JXL "):
        assert fresh["open_picture"](mark + content, 3).getpixel((0, 0)) == (255, 0, 0)


def test_text_in_a_png_never_fills_the_memory() -> None:
    packed = zlib.compress(bytes(2**24))
    bomb = png(1, 1, 8, 0, b"\0\0", *[chunk(b"zTXt", b"a\0\0" + packed)] * 3)
    tracemalloc.start()
    assert outcome(bomb) == "unreadable"
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**23
