"""Reading, cropping and writing pictures, and sheets of pictures."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from torchvision.utils import make_grid

from data.raw.base import LARGEST_FILE
from data.raw.profiles import BROKEN, to_srgb

# Formats with a signature in their first bytes that Pillow decodes without another program.
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
    FORMATS.append("HEIF")
with suppress(ImportError):
    import pillow_jxl  # noqa: F401  # registers itself

    FORMATS.append("JXL")
LARGEST = 2**27  # pixels, 0.5 GB in Pillow's four bytes a pixel
GAP = 2  # a JPEG that is decoded at reduced size stays this much larger than needed

# The limit here is `largest`. Set globally, since a filter set in a thread would hold for all threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

PictureSource: TypeAlias = Path | bytes | Image.Image
Reason: TypeAlias = Literal[
    "unreadable", "animated", "too large", "empty file", "no hint", "no mask", "mask size", "same crop"
]


class PictureError(ValueError):
    """A picture that cannot be used, with a one-line message.

    Attributes:
        reason: why, for counting.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self) -> tuple[type["PictureError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))  # the default loses the reason when pickled


def to_image(picture: Tensor) -> Image.Image:
    """A picture (C, H, W) in [0, 1], C = 1 or 3, as 8-bit grey or RGB, rounded half to even."""
    levels = (picture.detach().cpu() * 255).round().to(torch.uint8)
    return Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.movedim(0, -1).numpy())


def sheet(pictures: Tensor, columns: int, side: int = 64) -> Image.Image:
    """Pictures (N, C, H, W) in [0, 1] in rows of `columns`, each enlarged by whole pixels to about `side`."""
    zoom = max(1, math.ceil(side / max(pictures.shape[-2:])))
    large = pictures.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)
    return to_image(make_grid(large, nrow=columns, padding=4, pad_value=0.5)[: pictures.shape[1]])


def save_png(image: Image.Image, file: Path, texts: Mapping[str, str] | None = None) -> None:
    """Writes a PNG with some texts by keyword, and makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    chunks = PngInfo()
    for keyword, text in (texts or {}).items():
        chunks.add_text(keyword, text)
    image.save(file, format="PNG", pnginfo=chunks)


def png_texts(file: Path) -> dict[str, str]:
    """The texts of a PNG by keyword; none for a picture of another format. PictureError if it can't be read."""
    with _opened(file, LARGEST) as image:
        return dict(getattr(image, "text", {}))  # also those after the pixels


@contextmanager
def _opened(source: PictureSource, largest: int) -> Iterator[Image.Image]:
    """The picture with its header read and checked. Errors in the with block become PictureErrors."""
    try:
        with ExitStack() as stack:
            if isinstance(source, Image.Image):
                image = source
            else:
                if isinstance(source, Path) and not source.is_file():
                    raise PictureError("unreadable", f"there is no picture {source}")
                size = source.stat().st_size if isinstance(source, Path) else len(source)
                if size == 0:
                    raise PictureError("empty file", "it is empty")
                if size > LARGEST_FILE:
                    raise PictureError("too large", f"it has {size:,} bytes, more than {LARGEST_FILE:,}")
                stream = BytesIO(source) if isinstance(source, bytes) else stack.enter_context(source.open("rb"))
                image = stack.enter_context(Image.open(stream, formats=FORMATS))
            if image.width * image.height > largest:
                raise PictureError("too large", f"it has {image.width}×{image.height} pixels, more than {largest}")
            # The second picture of an MPO is added by the camera: a preview or a depth map.
            if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
                raise PictureError("animated", f"it has {frames} frames")
            yield image
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise PictureError("too large", " ".join(str(error).split())) from None
    except UnidentifiedImageError:
        raise PictureError("unreadable", f"it is of none of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders may raise anything for damaged data
        raise PictureError("unreadable", " ".join(str(error).split()) or type(error).__name__) from None


def _sideways(image: Image.Image) -> bool:
    """Whether the EXIF orientation exchanges width and height."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)


def size_of(source: PictureSource, largest: int = LARGEST) -> tuple[int, int]:
    """Height and width of the upright picture in pixels, from its header; PictureError as `open_picture`."""
    with _opened(source, largest) as image:
        return image.size if _sideways(image) else (image.height, image.width)


def open_picture(
    source: PictureSource, channels: int, largest: int = LARGEST, needed: tuple[int, int] | None = None
) -> Image.Image:
    """A picture, upright as its EXIF says, in 8-bit grey ("L") or colour ("RGB").

    Colours are converted to sRGB by the embedded profile (`data.raw.profiles`), CMYK without a profile by Pillow's
    formula. 16 bits are scaled to 8, transparent pixels become black.

    Args:
        source: a file, its content, or a picture of Pillow's; AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF, WebP,
            and HEIF and JPEG XL if Pillow's plugins pillow-heif and pillow-jxl-plugin are installed.
        channels: 1 for grey, 3 for colour.
        largest: largest width × height that is decoded. Pillow's own limit of 179 million pixels also holds.
        needed: height and width that the upright picture is needed in. A JPEG of more than twice these is decoded at
            1/2, 1/4 or 1/8 of its size, and stays at least twice as large.

    Raises:
        PictureError: it is unreadable, animated (or has several pages), too large, or an empty file.
    """
    with _opened(source, largest) as image:
        if needed and image.format == "JPEG":
            sides = needed if _sideways(image) else needed[::-1]
            image.draft(None, (GAP * sides[0], GAP * sides[1]))
        mode, profile = image.mode, image.info.get("icc_profile")
        image = _eight_bit(ImageOps.exif_transpose(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
        if profile:
            image = to_srgb(image, profile, mode)
        if image.mode == "RGBA":
            visible = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            visible.info, image = image.info, visible
        return image.convert("L" if channels == 1 else "RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow would clip; other pictures unchanged."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose white is not known")
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    if image.mode == "I" and (levels.min() < 0 or levels.max() > 65535):
        raise ValueError("its pixels are integers of more than 16 bits, whose white is not known")
    grey = ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:  # the level of transparent pixels
        grey[levels == image.info["transparency"]] = 0
    return Image.fromarray(grey)


def room(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """By how many pixels a picture of this height and width is higher and wider than height × width, once scaled."""
    scale = max(height / size[0], width / size[1])
    return round(size[0] * scale) - height, round(size[1] * scale) - width


def cover(image: Image.Image, height: int, width: int, crop: float | None = None) -> tuple[Image.Image, int, int]:
    """A part of a picture, scaled by one factor so that it just covers height × width.

    The factor is the same in both directions to floating-point precision: the box that is taken from the original may
    end between pixels.

    Args:
        image: "L" or "RGB", of any size; enlarged if it is smaller.
        height: of the result, in pixels.
        width: likewise.
        crop: place of the part, from left or top at 0 to right or bottom at 1; none is the centre.

    Returns:
        The picture, and top and left of the crop in the scaled picture, in whole pixels.
    """
    scale = max(height / image.height, width / image.width)
    rooms = room((image.height, image.width), height, width)
    top, left = (free // 2 if crop is None else round(crop * free) for free in rooms)
    right, bottom = min((left + width) / scale, image.width), min((top + height) / scale, image.height)
    box = (left / scale, top / scale, right, bottom)
    # From three times the size on, Pillow first averages blocks of pixels.
    return image.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0), top, left


def load_picture(file: Path, channels: int, height: int | None, width: int | None, unit: int) -> Tensor:
    """A picture from disk, (1, C, height, width) in [0, 1], fitted as by `fitted`.

    Args:
        file: as for `open_picture`.
        channels: 1 for grey, 3 for colour.
        height: as for `fitted`.
        width: as for `fitted`.
        unit: as for `fitted`.

    Raises:
        FileNotFoundError, ValueError: in one line, if the file is missing, unreadable or too small.
    """
    return fitted(_read(file, channels), file, height, width, unit)


def load_masked(
    file: Path, mask_file: Path, channels: int, height: int | None, width: int | None, unit: int
) -> tuple[Tensor, Tensor]:
    """A picture from disk as by `load_picture`, and its mask (1, 1, height, width) of 0 and 1, fitted likewise.

    A mask of another size is first scaled to that of the picture. What is white becomes 1. If the file of the mask has
    an alpha channel that is not constant, what is transparent becomes 1.

    Raises:
        FileNotFoundError, ValueError: as `load_picture`; or picture and mask differ in shape; or a mask of black and
            white is also transparent in part.
    """
    image, mask = _read(file, channels), _alpha(mask_file) or _read(mask_file, 1)
    (w, h), (mask_w, mask_h) = image.size, mask.size
    if 2 * abs(w * mask_h - h * mask_w) > max(w + h, mask_w + mask_h):  # more than rounding to whole pixels explains
        sizes = f"{mask_file} has {mask_w}×{mask_h} pixels and {file} {w}×{h}"
        raise ValueError(f"mask and image must have the same shape, but {sizes}: crop one of them")
    if mask.size != image.size:
        mask = mask.resize(image.size, Image.Resampling.LANCZOS)
    redrawn = (fitted(mask, mask_file, height, width, unit) >= 0.5).float()
    return fitted(image, file, height, width, unit), redrawn


def _read(file: Path, channels: int) -> Image.Image:
    """`open_picture`. FileNotFoundError or ValueError in one line that names the file."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no picture {file}")
    try:
        return open_picture(file, channels)
    except PictureError as error:
        raise ValueError(f"{file} is no picture that can be read: {error}") from None


def _alpha(file: Path) -> Image.Image | None:
    """The alpha channel of a mask, inverted; None if there is none, it is constant, or the file cannot be read.

    ValueError if what is visible is black and white, so that the colours are a mask, too.
    """
    try:
        with _opened(file, LARGEST) as image:
            if not image.has_transparency_data:
                return None
            whole = ImageOps.exif_transpose(image).convert("RGBA")
    except PictureError:  # `open_picture` says it
        return None
    alpha, grey = np.asarray(whole.getchannel("A")), np.asarray(whole.convert("L"))
    if alpha.min() == alpha.max():
        return None
    visible = grey[alpha >= 128]
    if (visible > 247).any() and ((visible < 8) | (visible > 247)).mean() > 0.9:
        raise ValueError(f"the mask {file} is black and white, and transparent in part: save it without transparency")
    return Image.fromarray(255 - alpha)


def fitted(image: Image.Image, file: Path, height: int | None, width: int | None, unit: int) -> Tensor:
    """A picture (1, C, height, width) in [0, 1].

    Args:
        image: "L" or "RGB".
        file: its name, for the message.
        height: in pixels; the picture is scaled to cover height × width and cropped about its centre. None is the
            picture's own, cropped to a multiple of `unit`.
        width: likewise.
        unit: height and width are multiples of it.

    Raises:
        ValueError: it is smaller than a unit.
    """
    own = (image.width // unit * unit, image.height // unit * unit)
    if min(own) == 0:
        raise ValueError(f"{file} is smaller than {unit} pixels: {image.width}×{image.height}")
    if BROKEN in image.info:
        warnings.warn(f"the colour profile of {file} is ignored: {image.info[BROKEN]}", stacklevel=2)
    size = (width or own[0], height or own[1])
    if height or width:
        image = cover(image, size[1], size[0])[0]
    else:
        left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
        image = image.crop((left, top, left + size[0], top + size[1]))
    return to_tensor(image)[None]
