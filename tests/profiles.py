"""ICC profiles, written by hand, and what they mean."""

import struct
from itertools import product

import numpy as np

# Primaries as columns of XYZ relative to D50.
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
WHITE = (0.9642, 1.0, 0.8249)


def fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2 with these tags."""
    table, content = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + struct.pack(">II", start + len(content), len(tag))
        content += tag
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI", start + len(content), bytes(4), 0x02400000) + kind + space + connection + bytes(12)
    return (head + b"acsp" + bytes(28) + fixed(*WHITE)).ljust(128, b"\0") + table + content


def gamma(power: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(power * 256))


def xyz(*numbers: float) -> bytes:
    return b"XYZ " + bytes(4) + fixed(*numbers)


def of_colours(primaries: np.ndarray, power: float) -> bytes:
    tags = {b"wtpt": xyz(*WHITE)}
    for i, colour in enumerate("rgb"):
        tags |= {f"{colour}XYZ".encode(): xyz(*primaries[:, i]), f"{colour}TRC".encode(): gamma(power)}
    return profile(b"RGB ", b"XYZ ", tags)


def of_grey(power: float) -> bytes:
    return profile(b"GRAY", b"XYZ ", {b"wtpt": xyz(*WHITE), b"kTRC": gamma(power)})


def of_inks() -> bytes:
    """Each ink takes its share of the light: L* is 100 (1 - K) (1 - (C + M + Y) / 3), without a hue."""
    line = bytes(range(256))
    corners = b"".join(
        bytes([round(255 * (1 - k) * (1 - (c + m + y) / 3)), 128, 128]) for c, m, y, k in product((0, 1), repeat=4)
    )
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * line + corners + 3 * line
    return profile(b"CMYK", b"Lab ", {b"wtpt": xyz(*WHITE), b"A2B0": table})


def encoded(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] → levels of sRGB."""
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


ADOBE_RGB, GREY, INKS = of_colours(ADOBE, 2.2), of_grey(1.8), of_inks()
