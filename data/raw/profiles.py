"""Colour profiles of pictures: from the colours of a camera, screen or press to sRGB."""

from functools import lru_cache
from io import BytesIO
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

BROKEN = "broken profile"  # the key in a picture's `info` of why its profile was ignored
LARGEST = 2**24  # bytes of a profile
MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # a profile's colour space → the mode of its pictures
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
LEVELS = range(0, 256, 15)


class Profile(NamedTuple):
    """A colour profile."""

    mode: str  # of its pictures
    transform: ImageCms.ImageCmsTransform | None  # to sRGB; None if it changes no level by more than 1


def to_srgb(image: Image.Image, profile: bytes, mode: str) -> Image.Image:
    """A picture in sRGB, converted perceptually by LittleCMS; an alpha channel stays.

    A grey picture may have a profile of colours. A profile that does not fit or cannot be read is ignored, and why is
    in `info[BROKEN]`. A picture whose profile is sRGB is not changed.

    Args:
        image: of mode "L", "RGB", "RGBA" or "CMYK".
        profile: its embedded ICC profile.
        mode: of the picture in its file.
    """
    try:
        known = read_profile(profile)
        fitting = ("L", "RGB") if mode in GREY else ("CMYK",) if mode == "CMYK" else ("RGB",)
        if known.mode not in fitting:
            raise ValueError(f"it is for pictures of mode {known.mode}, not {mode}")
        if known.transform is None:
            return image
        made = known.transform.apply(image.convert(known.mode))
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        image.info[BROKEN] = " ".join(str(error).split()) or type(error).__name__
        return image
    if image.mode == "RGBA":
        made.putalpha(image.getchannel("A"))
    return made


@lru_cache(maxsize=16)
def read_profile(content: bytes) -> Profile:
    """A profile from its bytes. ValueError, OSError or PyCMSError if it is none."""
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    opened = ImageCms.getOpenProfile(BytesIO(content))
    space = opened.profile.xcolor_space.strip()
    if space not in MODES:
        raise ValueError(f"it is for the colour space {space}")
    mode = MODES[space]
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return Profile(mode, transform)
    levels = list(product(LEVELS, repeat=3)) if mode == "RGB" else [(level,) for level in LEVELS]
    samples = Image.fromarray(np.array(levels, np.uint8)[None].squeeze(-1 if mode == "L" else ()))
    change = np.asarray(transform.apply(samples)).astype(int) - np.asarray(samples.convert("RGB"))
    return Profile(mode, transform if np.abs(change).max() > 1 else None)
