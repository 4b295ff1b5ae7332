"""A store of 14 made-up samples, what writes it, and what it must hold."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.store.reader import Drop, Sample, Store, Writer
from storage.files import commit_json, file_checksum, is_ours, json_checksum

SIZES, SHAPES = [[64, 64], [48, 80], [80, 48]], [(8, 8), (6, 10), (10, 6)]  # of pictures and of latents
PLAN: dict[str, Any] = {
    "version": 1, "codec": {"name": "vae", "scale": 1.5, "files": {"weights": "abc"}}, "latents": "mean",
    "text": {"encoders": ["clip_l", "t5"], "length": 5}, "tokens": True, "source": {"folder": "pictures"},
    "buckets": {"side": 64, "step": 16, "max_aspect": 2.0, "sizes": SIZES}, "factor": 8, "channels": 4,
}  # fmt: skip
UNITS = {(0, 0): range(7), (0, 1): range(0), (1, 0): range(7, 14)}  # shard and part → samples
INPUTS, KEPT = 8, 14  # inputs of each unit, and what all keep of them
UNIT, TOKENS, SIDECAR = (f"units/000000-0000{end}" for end in (".safetensors", ".tokens.safetensors", ".parquet"))
HERE, FIRST = np.array([1]), np.array([0])  # a sample of that unit; the first caption


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


NULL: Any = SimpleNamespace(tokens=drawn(1, 5, 6), pooled=drawn(2, 8))  # data.text.Text would be slow to import


def sample(number: int, **changes: Any) -> Sample:
    """Sample `number`, always the same; with one to three captions."""
    bucket, n = number % 3, 1 + number % 3
    made = Sample(
        f"picture {number}", tuple(f"caption {i} of {number}: ein schöner Tag" for i in range(n)),
        tuple(0.5 + i for i in range(n)), bucket, size=(100 + number, 200 + number), crop=(number, 2 * number),
        phash=int(np.random.Philox(key=number).random_raw()), latents=drawn(3 * number, 4, *SHAPES[bucket]),
        pooled=drawn(3 * number + 1, n, 8), tokens=drawn(3 * number + 2, n, 5, 6).bfloat16(),
    )  # fmt: skip
    return made._replace(**changes)


def encode(folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any] | None:
    """What an encoder does: goes on wherever the store stands."""
    writer = Writer(folder, PLAN, NULL)
    for shard in range(rank, 2, world):
        start, consumed, done = writer.position(shard)
        parts = sum(unit[0] == shard for unit in UNITS)
        assert (consumed, done) == (start * INPUTS, start == parts)
        for part in range(start, parts):
            samples = [sample(i) for i in UNITS[shard, part]]
            reason = "unreadable" if shard else "too small"
            drops = [Drop(f"{shard}-{part}-{i}", reason, "it is 3 × 4") for i in range(INPUTS - len(samples))]
            writer.write(shard, samples, drops, INPUTS, last=part == parts - 1)
    return writer.finish(2, hamming=2)


def replan(folder: Path, **changes: Any) -> None:
    """Makes a finished store one of another plan, with the hashes of such a one."""
    plan, report = (json.loads((folder / name).read_text()) for name in ("store.json", "report.json"))
    commit_json(folder / "store.json", plan | changes)
    report["files"]["store.json"] = file_checksum(folder / "store.json")
    del report["hash"]
    commit_json(folder / "report.json", report | {"hash": json_checksum(report)})


def contents(folder: Path) -> dict[str, bytes]:
    """The store's files; what a killed process was writing is none of them."""
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    return {str(file): (folder / file).read_bytes() for file in files if not any(map(is_ours, [file, *file.parents]))}


def refused(told: str, call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises((ValueError, IndexError, FileNotFoundError), match=told) as error:
        call(*args)
    assert "\n" not in str(error.value)


def assert_holds(store: Store, row: int, wanted: Sample) -> None:
    """A sample in the store, against the one that was written."""
    rows = np.array([row])
    told = (store.ids()[row].as_py(), store.captions(row), store.weights(row))
    assert told == (wanted.id, [*wanted.captions], [*wanted.weights])
    assert store.sizes(rows).tolist() == [[*wanted.size, *wanted.crop]]
    assert torch.equal(store.latents(rows)[0], wanted.latents.bfloat16())
    for choice in range(len(wanted.captions)):
        text = store.text(rows, np.array([choice]))
        assert torch.equal(text.tokens[0], wanted.tokens[choice])
        assert torch.equal(text.pooled[0], wanted.pooled[choice].bfloat16())


def written(folder: Path) -> Path:
    """A store that was written without a break."""
    assert encode(folder / "store") is not None
    return folder / "store"
