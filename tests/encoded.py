"""Small runs of encode.py, and what they must leave."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import encode
from data.latents import Pixels
from data.raw.base import Source
from data.store.reader import Store
from data.store.units import read_notes, read_sidecar

ROOT = Path(__file__).parents[1]
CODEC = Pixels(3)
COUNT = 40


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


def coded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def painted(height: int, width: int, seed: int) -> Image.Image:
    """Large blotches, unlike those of another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def config_in(folder: Path) -> Path:
    """The config of the shapes, made small."""
    content = yaml.safe_load((ROOT / "configs/shapes.yaml").read_text())
    content["text"] = {"class_path": "CLIPText", "init_args": {"folder": str(ROOT / "assets/shapes/text")}}
    content["codec"] = {"class_path": "Pixels", "init_args": {"channels": 3}}
    content["encode"]["source"]["init_args"]["count"] = COUNT
    content["encode"] |= {"store": str(folder / "store"), "batch_size": 8, "threads": 2, "device": "cpu"}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file
