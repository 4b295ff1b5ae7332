"""Captioned pictures in folders, tars and tables, as users bring them."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from skimage.data import astronaut
from sklearn.datasets import load_sample_images

from data.raw.base import Fault, Raw

PHOTOS = [*load_sample_images().images, astronaut()]


def coded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def dot(level: int) -> bytes:
    return coded(Image.new("RGB", (8, 8), (level % 256, level // 256, 0)))


def everything(source: Any) -> list[Raw | Fault]:
    return [entry for shard in range(source.shards) for entry in source.read(shard)]


def reasons(source: Any) -> dict[str, str]:
    return {entry.id: entry.reason if isinstance(entry, Fault) else "" for entry in everything(source)}


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def write_rows(file: Path, start: int, count: int, **more: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = range(start, start + count)
    table = pa.table(
        {"image": [{"bytes": dot(i), "path": None} for i in rows], "text": [f"row {i}" for i in rows], **more}
    )
    pq.write_table(table, file, row_group_size=7)
    return file


def folder_of_pictures(root: Path) -> Path:
    for i, name in enumerate(("a.jpg", "b/c.png", "b/d/e.webp", "f.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name)
    return root


def with_texts(root: Path) -> Path:
    for name in ("a", "b/c", "b/d/e", "f"):
        folder_of_pictures(root).joinpath(f"{name}.txt").write_text(f" {name} \n")
    return root


def with_jsonl(root: Path) -> Path:
    folder_of_pictures(root)
    rows = [{"file_name": n, "text": n.split(".")[0], "n": 1} for n in ("a.jpg", "b/c.png", "f.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (root / "b/d/metadata.jsonl").write_text(json.dumps({"file_name": "e.webp", "text": "b/d/e"}))
    return root


def with_csv(root: Path) -> Path:
    folder_of_pictures(root)
    with (root / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        names = ["a.jpg", "b/c.png", "b/d/e.webp", "f.png"]
        csv.writer(stream).writerows([["file_name", "text"], *([name, name.split(".")[0]] for name in names)])
    return root
