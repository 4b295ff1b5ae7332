"""Samples a second of the latent store through a DataLoader, against the same samples as a Hugging Face dataset.

    python benchmarks/store.py --samples 2000 --workers 2

Writes random latents of 512 × 512 pictures (16 × 64 × 64), pooled vectors (2048) and tokens (333 × 4096), all bfloat16,
into both formats in a temporary folder: 2 × 2.9 MB a sample. Then all readers take turns at random batches of 32: with
the files dropped from the page cache before each turn (cold) and with them in it (warm). Printed are the medians over
the turns, and the speed of the disk for one large cold file, which bounds the cold readers. Linux only.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.store.reader import Sample, Store, Writer
from data.text.encoder import Text

SHAPES = {"latents": (16, 64, 64), "pooled": (2048,), "tokens": (333, 4096)}
BYTES = {name: 2 * int(np.prod(shape)) for name, shape in SHAPES.items()}
PLAN = {"version": 1, "buckets": {"sizes": [[512, 512]]}, "factor": 8, "channels": 16}
BATCH, PART = 32, 100
NEEDED = 5 * 75  # samples a second: five times the training speed of one fast GPU
NULL = Text(torch.zeros(SHAPES["tokens"]), torch.zeros(SHAPES["pooled"]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--samples", type=int, default=2000, help="fewer are written if the disk is too small")
    p.add_argument("--workers", type=int, default=2, help="of the loader, at least 1")
    p.add_argument("--turns", type=int, default=3, help="of each reader, cold and warm")
    p.add_argument("--folder", type=Path, help="keeps both formats for the next run; default: a temporary folder")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = args.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "store/report.json").exists():
            room = int(0.8 * shutil.disk_usage(folder).free / (2 * sum(BYTES.values())))
            build(folder, min(args.samples, room))
        compare(folder, args.workers, args.turns)


def build(folder: Path, samples: int) -> None:
    """Writes the same samples in both formats."""
    from datasets import Dataset, Features, Value, disable_progress_bars

    disable_progress_bars()
    features = Features({name: Value("large_binary") for name in SHAPES})
    for number, drawn in enumerate(write(folder / "store", samples)):
        columns = {name: [row.view(torch.uint8).numpy().tobytes() for row in drawn[name]] for name in SHAPES}
        Dataset.from_dict(columns, features).save_to_disk(folder / f"dataset/{number:04d}")
    os.sync()


def write(folder: Path, samples: int) -> Iterator[dict[str, Tensor]]:
    """Writes a store of random samples; yields its parts, by name."""
    writer, draw = Writer(folder, PLAN, NULL), torch.Generator().manual_seed(0)
    starts = range(0, samples, PART)
    for start in tqdm(starts, desc="writing"):
        n = min(PART, samples - start)
        drawn = {name: torch.randn(n, *shape, generator=draw).bfloat16() for name, shape in SHAPES.items()}
        part = [
            Sample(str(start + i), ("",), (1.0,), 0, (512, 512), (0, 0), start + i, drawn["latents"][i],
                   drawn["pooled"][i : i + 1], drawn["tokens"][i : i + 1])
            for i in range(n)
        ]  # fmt: skip
        writer.write(0, part, [], n, last=start == starts[-1])
        yield drawn
    writer.finish(1, None)


class FromStore(torch.utils.data.Dataset):
    """Batches of the store: latents, pooled and, optionally, tokens."""

    def __init__(self, store: Store, tokens: bool) -> None:
        self.store, self.tokens = store, tokens

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        choice = np.zeros_like(rows)
        text = self.store.text(rows, choice) if self.tokens else (self.store.pooled(rows, choice),)
        return (self.store.latents(rows), *text)


class FromDataset(torch.utils.data.Dataset):
    """Batches of the dataset, with few copies: Arrow selects the rows, torch views the result."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset.with_format("arrow")

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        table = self.dataset[rows.tolist()]
        return tuple(self._stacked(table[name].combine_chunks(), shape) for name, shape in SHAPES.items())

    @staticmethod
    def _stacked(column: Any, shape: tuple[int, ...]) -> Tensor:
        _, offsets, values = column.buffers()
        start = np.frombuffer(offsets, dtype=np.int64)[column.offset]
        numbers = np.frombuffer(values, dtype=np.uint16, count=len(column) * int(np.prod(shape)), offset=start)
        return torch.from_numpy(numbers.view(np.int16)).view(torch.bfloat16).reshape(len(column), *shape)


def compare(folder: Path, workers: int, turns: int) -> None:
    from datasets import concatenate_datasets, load_from_disk

    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
    store = Store(folder / "store")
    dataset = concatenate_datasets([load_from_disk(part) for part in sorted((folder / "dataset").iterdir())])
    readers: dict[str, tuple[Callable[[], torch.utils.data.Dataset], int]] = {
        "store, with tokens": (lambda: FromStore(store, True), sum(BYTES.values())),
        "store, without tokens": (lambda: FromStore(store, False), BYTES["latents"] + BYTES["pooled"]),
        "datasets, with tokens": (lambda: FromDataset(dataset), sum(BYTES.values())),
    }
    one, other = (make()[np.array([3, 1])] for make in (readers[name][0] for name in list(readers)[::2]))
    same = {tensor.shape: tensor for tensor in other}
    if not all(torch.equal(tensor, same[tensor.shape]) for tensor in one):
        raise SystemExit("the two formats do not hold the same samples")
    files = [file for file in folder.rglob("*") if file.is_file()]
    rates: dict[tuple[str, str], list[float]] = {}
    disk = []
    for turn in range(turns):
        drop(files)
        disk.append(sequential(max(files, key=lambda file: file.stat().st_size)))
        for name, (make, _) in readers.items():
            for state in ("cold", "warm"):
                if state == "cold":
                    drop(files)
                rates.setdefault((name, state), []).append(rate(make(), len(store), workers, turn))
    print(f"{len(store)} samples, batches of {BATCH}, {workers} workers, medians of {turns} turns")
    for (name, state), found in rates.items():
        speed = statistics.median(found)
        each = ", ".join(f"{value:.0f}" for value in sorted(found))
        print(f"{name}, {state}: {speed:.0f} samples/s, {speed * readers[name][1] / 1e6:.0f} MB/s (turns: {each})")
    print(f"the disk, one cold file from end to end: {statistics.median(disk):.0f} MB/s")
    print(f"needed: {NEEDED} samples/s, {NEEDED * sum(BYTES.values()) / 1e6:.0f} MB/s with tokens")


def batches(samples: int, seed: int) -> Iterator[np.ndarray]:
    order = np.random.default_rng(seed).permutation(samples)
    return (order[start : start + BATCH] for start in range(0, samples - BATCH + 1, BATCH))


def rate(data: torch.utils.data.Dataset, samples: int, workers: int, seed: int) -> float:
    """Samples a second over one pass; the clock starts with the first batch, when all workers are up."""
    loader = iter(DataLoader(data, sampler=list(batches(samples, seed)), batch_size=None, num_workers=workers))
    next(loader)
    start = time.perf_counter()
    seen = sum(len(batch[0]) for batch in loader)
    return seen / (time.perf_counter() - start)


def drop(files: list[Path]) -> None:
    """Drops files from the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential(file: Path) -> float:
    """MB a second of reading a file from end to end."""
    block = bytearray(2**23)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(block):
            pass
    return file.stat().st_size / 1e6 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
