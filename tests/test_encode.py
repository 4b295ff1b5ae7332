"""encode.py as a user calls it: counts that add up, any number of ranks, kills, refusals, and what it leaves out."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import encode
from data.latents import VAE, Pixels
from data.raw.base import Source
from data.raw.pictures import cover
from data.raw.sources import Pictures
from data.shapes import Shapes
from data.store import encoding
from data.store.reader import Store
from data.store.units import read_notes, read_sidecar
from data.text.clip import CLIPText

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
CODEC = Pixels(3)
COUNT = 40


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config of the shapes, made small."""
    content = yaml.safe_load((ROOT / "configs/shapes.yaml").read_text())
    content["text"]["init_args"]["folder"] = str(ROOT / "assets/shapes/text")
    content["codec"] = {"class_path": "Pixels", "init_args": {"channels": 3}}
    content["encode"]["source"]["init_args"]["count"] = COUNT
    content["encode"] |= {"store": str(tmp_path / "store"), "batch_size": 8, "threads": 2, "device": "cpu"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def units_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, each of several units, of few pictures."""
    monkeypatch.setattr(encoding, "UNIT", 4)
    monkeypatch.setattr(Shapes, "UNIT", 10)


def run(config: Path, *flags: str) -> None:
    encode.main(["--config", str(config), *flags])


def files(store: Path) -> dict[str, bytes]:
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in store.rglob("*") if file.is_file()}


def refused(capsys: pytest.CaptureFixture, config: Path, *flags: str) -> str:
    """The one line with which a call ends; it must end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(config, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def assert_nothing_lost(folder: Path, source: Source) -> Store:
    """Every input of the source is a sample, once, or was left out for a reason that the report counts."""
    store = Store(folder)
    report = store.report
    given = Counter(entry.id for shard in range(source.shards) for entry in source.read(shard))
    kept = Counter(store.ids().to_pylist())
    assert max(kept.values(), default=1) == 1
    dropped: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    written: Counter[str] = Counter()
    for file in sorted((folder / "units").glob("*.parquet")):
        written.update(read_sidecar(file)["id"].to_pylist())
        for name, reason, detail in read_notes(file)["drops"]:
            assert detail
            assert "\n" not in detail
            dropped[name] += 1
            reasons[reason] += 1
    assert given == dropped + written  # whatever was read …
    unseen = written - kept
    listed = [json.loads(line) for line in (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert Counter(line["id"] for line in listed) == dropped + unseen
    assert Counter(line["reason"] for line in listed) == Counter(report["dropped"])
    reasons += Counter({"duplicates": unseen.total()})
    counted = Counter(report["dropped"])
    counted["duplicates"] = counted.pop("duplicate id", 0) + counted.pop("near-duplicate", 0)
    assert +counted == +reasons  # … is in the index or counted
    assert report["inputs"] == given.total() == report["kept"] + sum(report["dropped"].values())
    assert report["kept"] == len(store) == sum(report["buckets"].values())
    assert store.verify(progress=False) == []
    return store


# A small run


def test_a_run_fills_a_store_and_the_next_one_finds_nothing_to_do(config: Path, capsys: pytest.CaptureFixture) -> None:
    run(config)
    folder = config.parent / "store"
    told = capsys.readouterr().out
    assert f"{COUNT} of {COUNT} pictures are in {folder}" in told
    assert f"{COUNT} of 64x64 pixels" in told
    store = assert_nothing_lost(folder, Shapes(COUNT))
    text = CLIPText(ROOT / "assets/shapes/text")
    null = text.encode([""])
    assert store.null is not None
    assert torch.equal(store.null.tokens, null.tokens[0].bfloat16())
    assert torch.equal(store.null.pooled, null.pooled[0].bfloat16())
    for number, raw in enumerate(Shapes(COUNT).read(0)):
        rows = np.array([number])
        assert isinstance(raw.picture, Image.Image)
        pixels = torch.from_numpy(np.array(raw.picture)).permute(2, 0, 1) / 255
        assert torch.equal(store.latents(rows)[0], CODEC.encode(pixels).bfloat16())
        assert (store.ids()[number].as_py(), tuple(store.captions(number))) == (raw.id, raw.captions)
        for choice, caption in enumerate(raw.captions):
            here = store.text(rows, np.array([choice]))
            for made, kept in zip(text.encode([caption]), here, strict=True):
                torch.testing.assert_close(kept.float(), made, rtol=2**-8, atol=1e-5)
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder) if name.startswith("units/")}
    content = files(folder)
    run(config, "--encode.threads", "1")
    assert files(folder) == content
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.usefixtures("units_of_four")
def test_ranks_together_write_what_one_writes(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run(config)
    whole = files(config.parent / "store")
    assert len([name for name in whole if name.endswith(".parquet")]) == 4 * 3
    shared = config.parent / "shared"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (shared / "report.json").exists()
        monkeypatch.setenv("RANK", rank)
        run(config, "--encode.store", str(shared))
    told = capsys.readouterr().out
    assert "rank 1 is done; the last one to finish completes" in told
    assert files(shared) == whole
    assert_nothing_lost(shared, Shapes(COUNT))


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from data import shapes
from data.store import encoding
import encode

encoding.UNIT, shapes.Shapes.UNIT = 4, 10
kills, store, *argv = sys.argv[1:]
draw = random.Random(0)
units = lambda: len(list(Path(store).glob("units/*.parquet")))
for kill in [True] * int(kills) + [False]:
    there = units()
    child = os.fork()
    if not child:
        encode.main(argv)
        sys.stdout.flush()
        os._exit(0)
    if kill:
        while units() == there:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(units(), os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""


@pytest.mark.usefixtures("units_of_four")
def test_killed_and_resumed_is_the_straight_run_to_the_byte(config: Path) -> None:
    kills, killed, count = 10, config.parent / "killed", ("--encode.source.count", "100")
    run(config, *count)
    straight = files(config.parent / "store")
    argv = ["--config", str(config), *count, "--encode.store", str(killed)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(kills), str(killed), *argv],
        cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    told = [line for line in done.stdout.splitlines() if line[0].isdigit() and "pictures" not in line]
    ends = [tuple(map(int, line.split())) for line in told]
    assert [status for _, status in ends] == [9] * kills + [0], done.stderr[-2000:]
    assert [units for units, _ in ends] == sorted({units for units, _ in ends})  # each went on
    assert ends[-2][0] < ends[-1][0] == 10 * 3
    assert files(killed) == straight


def test_the_shipped_vae_makes_a_store(config: Path) -> None:
    if not (ROOT / "assets/shapes/vae/config.json").is_file():
        pytest.skip("the VAE is not trained yet")
    vae = ["--codec", "VAE", "--codec.path", str(ROOT / "assets/shapes/vae")]
    stores = {kind: config.parent / kind for kind in ("mean", "draw", "posterior")}
    for kind, folder in stores.items():
        run(config, *vae, "--encode.latents", kind, "--encode.store", str(folder), "--encode.source.count", "24")
    codec = VAE(ROOT / "assets/shapes/vae")
    rows = np.arange(24)
    mean, draw, posterior = (Store(folder).latents(rows).float() for folder in stores.values())
    assert torch.equal(posterior[:, : codec.channels], mean)
    std = (posterior[:, codec.channels :] / 2).exp()
    assert 0.8 < ((draw - mean) / std).std() < 1.2
    pixels = torch.stack([torch.from_numpy(np.array(raw.picture)) for raw in Shapes(24).read(0)]).permute(0, 3, 1, 2)
    torch.testing.assert_close(codec.encode(pixels / 255), mean, rtol=2**-7, atol=1e-4)


# Refusals


def test_a_store_of_another_config_is_refused_and_left_alone(config: Path, capsys: pytest.CaptureFixture) -> None:
    run(config)
    before = files(config.parent / "store")
    for flags, told in (
        (["--encode.side", "128"], "buckets.side: there 64, now 128"),
        (["--codec.shift", "0.25"], "codec.shift_factor: there 0.5, now 0.25"),
        (["--encode.source.count", "41"], "source.count: there 40, now 41"),
        (["--encode.source.seed", "1"], "source.seed: there 0, now 1"),
        (["--encode.text", "captions"], "tokens: there true, now false"),
        (["--encode.filters.min_side", "70"], "filters.min_side: there 0, now 70"),
        (["--text.folder", str(ROOT / "assets/digits/text")], "text.length: there 20, now 10"),
    ):
        assert told in refused(capsys, config, *flags), flags
    assert files(config.parent / "store") == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--encode.step", "48"], "side must be a multiple of step"),
        (["--encode.batch_size", "0"], "batch_size and threads must be at least 1"),
        (["--encode.duplicates", "9"], "duplicates must be from 0 to 8 bits"),
        (["--encode.latents", "posterior"], "Pixels has no posterior to draw latents from"),
        (["--encode.max_aspect", "0.5"], "max_aspect must be at least 1"),
        (["--encode.source.count", "0"], "the number of scenes must be at least 1"),
        (["--encode.sorce", "x"], "Option 'sorce' is not accepted"),
        (["--text.folder", "nowhere"], "nowhere"),
        (["--encode.source", "Pictures", "--encode.source.path", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    config: Path, capsys: pytest.CaptureFixture, flags: list[str], told: str
) -> None:
    assert told in refused(capsys, config, *flags)
    assert not (config.parent / "store").exists()


def test_a_config_without_the_section_is_refused(config: Path, capsys: pytest.CaptureFixture) -> None:
    content = yaml.safe_load(config.read_text())
    del content["encode"]
    config.write_text(yaml.safe_dump(content))
    assert "the config has no section encode" in refused(capsys, config)


# Pictures as they come


def coded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def painted(height: int, width: int, seed: int) -> Image.Image:
    """Large blotches, unlike those of another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


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
