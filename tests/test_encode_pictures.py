"""Pictures as they come: bad ones are counted by reason, and the good ones are all there."""

import io
import json
import struct
import tarfile
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import CODEC, assert_nothing_lost, coded, config_in, painted, run
from PIL import Image

from data.raw.pictures import cover
from data.raw.sources import Pictures


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return config_in(tmp_path)


def huge() -> bytes:
    """The header of 20,000 × 20,000 pixels, and none of them."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


GOOD = {"square.png": (40, 40), "wide.png": (30, 80), "tall.png": (90, 40), "small.png": (9, 9), "odd.png": (33, 47)}
FRAMES = [painted(20, 20, seed) for seed in (50, 51)]
BAD = {  # file → content, caption, reason
    "empty.png": (b"", "a caption", "empty file"),
    "words.png": (b"these are words", "a caption", "unreadable"),
    "cut.jpg": (coded(painted(60, 60, 60), "JPEG")[:600], "a caption", "unreadable"),
    "cut.png": (coded(painted(60, 60, 61))[:900], "a caption", "unreadable"),
    "film.gif": (coded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "a caption", "animated"),
    "film.webp": (coded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "a caption", "animated"),
    "float.tiff": (coded(Image.new("F", (20, 20)), "TIFF"), "a caption", "unreadable"),
    "huge.png": (huge(), "a caption", "too large"),
    "tiny.png": (coded(painted(4, 4, 62)), "a caption", "too small"),
    "strip.png": (coded(painted(20, 90, 63)), "a caption", "aspect ratio"),
    "brief.png": (coded(painted(20, 20, 64)), "ab", "caption length"),
    "silent.png": (coded(painted(20, 20, 65)), None, "no caption"),
    "garbled.png": (coded(painted(20, 20, 66)), b"\xff\xfe\xfa", "unreadable caption"),
}
THREE_BUCKETS = ("--encode.side", "32", "--encode.step", "16", "--encode.max_aspect", "4")
FILTERS = ("--encode.filters.min_side", "8", "--encode.filters.min_caption", "3")


def test_bad_pictures_are_counted_by_reason_and_the_good_ones_are_all_there(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = config.parent / "pictures"
    (folder / "more").mkdir(parents=True)
    for seed, (name, size) in enumerate(GOOD.items()):
        (folder / name).write_bytes(coded(painted(*size, seed)))
        (folder / name).with_suffix(".txt").write_text(f"a picture called {name}")
    for name, (content, caption, _) in BAD.items():
        (folder / "more" / name).write_bytes(content)
        if caption is not None:
            beside = (folder / "more" / name).with_suffix(".txt")
            beside.write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    (folder / "more/film.txt").write_text("a caption")
    (folder / "again.webp").write_bytes(coded(painted(40, 40, 0), "WEBP", lossless=True))
    (folder / "again.txt").write_text("the square again")
    rows = [
        {"file_name": "wide.png", "text": "a wide picture"},
        {"file_name": "wide.png", "text": "a wide picture, again"},
        {"file_name": "gone.png", "text": "a picture that is not there"},
        {"text": "a row of no picture"},
        {"file_name": "../outside.png", "text": "a picture of others"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nno JSON\n")

    flags = ("--encode.source", "Pictures", "--encode.source.path", str(folder), "--encode.duplicates", "4",
             "--encode.source.captions", '{"text": 1.0, "txt": 2.0}')  # fmt: skip
    run(config, *flags, *FILTERS, *THREE_BUCKETS)
    told = capsys.readouterr().out
    store = assert_nothing_lost(config.parent / "store", Pictures(str(folder), {"text": 1.0, "txt": 2.0}))
    reasons = Counter(reason for _, _, reason in BAD.values())
    reasons += Counter({"no picture": 1, "unreadable row": 3, "duplicate id": 1, "near-duplicate": 1})
    assert Counter(store.report["dropped"]) == reasons
    assert all(f"{count:8} left out: {reason}" in told for reason, count in reasons.items())

    # Of two that look alike, the first in the order of the names is kept.
    kept = {store.ids()[i].as_py(): i for i in range(len(store))}
    first = {"square.png": "again.webp"}
    assert set(kept) == {first.get(name, name) for name in GOOD}
    assert store.report["buckets"] == {"16x64": 1, "32x32": 3, "64x16": 1}
    for name, number in kept.items():
        image = Image.open(folder / name).convert("RGB")
        rows_here = np.array([number])
        (bucket,) = (b for b in range(len(store.buckets)) if number in store.members(b))
        made, top, left = cover(image, *store.buckets[bucket])
        pixels = torch.from_numpy(np.array(made)).permute(2, 0, 1) / 255
        assert torch.equal(store.latents(rows_here)[0], CODEC.encode(pixels).bfloat16()), name
        assert store.sizes(rows_here).tolist() == [[image.height, image.width, top, left]]
    for name in ("tall.png", "small.png", "odd.png"):
        assert store.captions(kept[name]) == [f"a picture called {name}"]
    wide = kept["wide.png"]
    assert store.captions(wide) == ["a wide picture", "a picture called wide.png"]
    assert store.weights(wide) == [1.0, 2.0]


def test_bad_inputs_of_tars_are_counted_too(config: Path, capsys: pytest.CaptureFixture) -> None:
    def write(file: Path, members: list[tuple[str, bytes]]) -> None:
        with tarfile.open(file, "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    folder = config.parent / "tars"
    folder.mkdir()
    pictures = [coded(painted(32, 32, seed)) for seed in range(8)]
    write(folder / "0.tar", [
        ("a.png", pictures[0]), ("a.txt", b"the first"), ("b.png", b"damaged"), ("b.txt", b"the second"),
        ("c.png", pictures[2]), ("c.jpg", pictures[2]), ("c.txt", b"two pictures"), ("d.txt", b"no picture"),
        ("e.png", pictures[4]),
    ])  # fmt: skip
    write(folder / "1.tar", [("f.png", pictures[5]), ("f.txt", b"the last whole one"), ("g.png", pictures[6])])
    cut = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(cut[: 512 * 5 + len(pictures[5]) // 2])
    write(folder / "2.tar", [("h.png", pictures[7]), ("h.txt", b"before the damage"), ("i.txt", b"lost")])
    damaged = bytearray((folder / "2.tar").read_bytes())
    third = damaged.index(b"i.txt")
    damaged[third : third + 512] = b"\xa5" * 512
    (folder / "2.tar").write_bytes(bytes(damaged))
    run(config, "--encode.source", "Pictures", "--encode.source.path", str(folder), "--encode.side", "32",
        "--encode.step", "16")  # fmt: skip
    store = assert_nothing_lost(config.parent / "store", Pictures(str(folder)))
    dropped = store.report["dropped"]
    assert {name: dropped.get(name) for name in ("unreadable", "several pictures", "no picture", "no caption")} == {
        "unreadable": 1, "several pictures": 1, "no picture": 1, "no caption": 1,
    }  # fmt: skip
    assert (dropped["truncated shard"], dropped["damaged shard"]) == (1, 1)
    assert set(store.ids().to_pylist()) == {"0/a", "1/f", "2/h"}
    assert "left out: truncated shard" in capsys.readouterr().out


def test_ignored_profiles_and_cut_captions_are_counted_once_each(config: Path) -> None:
    folder = config.parent / "pictures"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(coded(painted(64, 64, i), icc_profile=b"no profile" if i < 2 else None))
        (folder / f"{i}.txt").write_text(f"{i} " * (40 if i < 3 else 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flags = ("--encode.source", "Pictures", "--encode.source.path", str(folder), "--encode.batch_size", "2")
        run(config, *flags)
    told = [str(warning.message) for warning in caught]
    assert [line for line in told if "captions" in line or "profile" in line] == [
        "3 captions were too long for a text encoder: their tails were cut",
        "the colour profiles of 2 pictures are broken or of another colour space: they were ignored",
    ]
