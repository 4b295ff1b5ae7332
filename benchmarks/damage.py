"""Flips single bits in every file of a store, a store of pairs, a checkpoint, a snapshot and a model folder.

    python -m benchmarks.damage --flips 1200

Each flip hits a random bit of a fresh copy, each file as often as the others. A forked process opens and reads all of
it, so that a crash is counted and not suffered. The outcome is one of

    detected        an error of one line, a fault that `verify` lists, or a warning and the checkpoint before
    no effect       everything that was read is as before
    silent          something else was read, without a word
    crash           a signal, a traceback, or no end within a minute

The last two are faults: exit status 1, and a line for each.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.latents import Pixels
from data.store.reader import Drop, Sample, Store, Writer
from data.text.clip import CLIPText
from data.text.encoder import Text
from engine.checkpoint import Checkpoints
from engine.posthoc import reconstruct, write_snapshot
from flow.objective import Objective
from mmdit.model import MMDiT
from pipeline import Pipeline
from pipeline.pairs import Captions, Coupling, PairMaker
from pipeline.sampling import Sampling

ROOT = Path(__file__).parents[1]
OUTCOMES = ("detected", "no effect", "silent", "crash")
FAULTS = OUTCOMES[2:]
PATIENCE = 60  # seconds for one reading
PLAN = {"buckets": {"sizes": [[8, 8], [8, 16]]}, "factor": 1, "channels": 2, "latents": "mean"}


class Kind(NamedTuple):
    """Something on disk."""

    write: Callable[[Path], object]  # into a new folder
    read: Callable[[Path], Iterator[object]]  # everything; damage is an error, before anything wrong was yielded
    damaged: str = "**/*"  # pattern of the files


def pipeline() -> Pipeline:
    """A small model with random weights, the same each time."""
    torch.manual_seed(0)
    network = MMDiT(
        in_channels=1, depth=1, width=16, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=4
    )
    text = CLIPText(ROOT / "assets/digits/text")
    return Pipeline(network.eval(), Objective(shift=1.5), Pixels(1, 0.3, 2.66), text, Sampling(steps=2, guidance=2.0))


def write_store(folder: Path) -> None:
    """Twelve samples in three units of two buckets."""
    draw = torch.Generator().manual_seed(0)
    writer = Writer(folder, PLAN, Text(torch.ones(3, 4), torch.ones(5)))
    for shard, part in ((0, 0), (0, 1), (1, 0)):
        samples = []
        for i in range(4):
            captions = tuple(f"caption {n} of {shard}-{part}-{i}" for n in range(1 + i % 2))
            latents = torch.randn(2, 8, 8 + 8 * (i % 2), generator=draw)
            pooled, tokens = (torch.randn(len(captions), *s, generator=draw) for s in ((5,), (3, 4)))
            samples.append(
                Sample(f"{shard}-{part}-{i}", captions, (1.0, 2.0)[: len(captions)], i % 2, (30 + i, 40), (i, 0),
                       (shard << 32) + (part << 16) + i, latents, pooled, tokens)
            )  # fmt: skip
        writer.write(
            shard, samples, [Drop(f"{shard}-{part}-4", "too small", "it is 3 × 4")], 5, (shard, part) != (0, 0)
        )
    writer.finish(2, None)


def read_store(folder: Path) -> Iterator[object]:
    """All samples as training reads them; then every checksum; then all units as `encode.py` reads them once more."""
    store = Store(folder)
    yield content(store)
    if faults := store.verify(progress=False):
        raise ValueError(faults[0])
    shards = 1 + max(int(file.name[:6]) for file in folder.glob("units/*.parquet"))
    yield Writer(folder, store.plan, store.null).finish(shards, None)
    yield content(Store(folder))


def content(store: Store) -> object:
    """All that a store holds."""
    rows = np.arange(len(store))
    counts = [len(store.weights(row)) for row in range(len(store))]
    every, choice = np.repeat(rows, counts), np.concatenate([np.arange(count) for count in counts])
    parts = [store.latents(store.members(bucket)) for bucket in range(len(store.buckets))]
    told = [(store.captions(row), store.weights(row)) for row in range(len(store))]
    return (
        store.plan, store.report, store.buckets, store.null, store.ids().to_pylist(), told, store.sizes(rows).tolist(),
        parts, store.text(every, choice),
    )  # fmt: skip


def write_pairs(folder: Path) -> None:
    how = Coupling(num=6, inverted=0, seed=0, batch_size=6, sampling=Sampling(steps=1, guidance=1.0))
    PairMaker(pipeline(), "the model", Captions(["a seven", "zero"]), how, folder).run()


def state() -> dict[str, Tensor]:
    return {"w": torch.arange(60.0).view(6, 10), "step": torch.tensor(3.0)}


def write_checkpoints(folder: Path) -> None:
    for step in (5, 10):
        checkpoints = Checkpoints(folder)
        checkpoints.save(step, {name: tensor + step for name, tensor in state().items()}, {"validated": step})
        checkpoints.wait()


def read_checkpoint(folder: Path) -> Iterator[object]:
    """The newest checkpoint; if the one before is used, that is right as well, but there must be a warning."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = Checkpoints(folder).find()
    assert found, "a run must not begin anew"
    tensors = state()
    found.restore(tensors)
    yield {name: tensor - found.step for name, tensor in tensors.items()}, found.numbers["validated"] - found.step
    if found.step != 10 and said:
        raise ValueError(str(said[0].message))
    yield found.step


def write_snapshots(folder: Path) -> None:
    for step in (100, 200):
        average = {"blocks.0.w": torch.randn(4, 6, generator=torch.Generator().manual_seed(step)), "b": torch.ones(3)}
        write_snapshot(folder, step, {0.05: average, 0.1: {name: tensor + 1 for name, tensor in average.items()}})


def read_snapshots(folder: Path) -> Iterator[object]:
    for width in (0.05, 0.1, 0.07):
        yield reconstruct(folder, width)


def read_model(folder: Path) -> Iterator[object]:
    """Its settings and weights, its text encoder's answer, and a picture."""
    pipe = Pipeline.load(folder)
    yield pipe.objective.describe(), asdict(pipe.sampling), pipe.codec.fingerprint(), pipe.text.fingerprint()
    yield pipe.network.state_dict(), pipe.text.encode(["a seven", ""]), pipe(["a seven"], [0])


KINDS = {
    "store": Kind(write_store, read_store),
    "pairs": Kind(write_pairs, read_store),
    "checkpoint": Kind(write_checkpoints, read_checkpoint, "step-0000010/*"),
    "snapshot": Kind(write_snapshots, read_snapshots),
    "model folder": Kind(lambda folder: pipeline().save(folder), read_model),
}


def plain(value: object) -> object:
    """A value whose `repr` says all of it."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.flatten().tolist()
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value)}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


class Reading(NamedTuple):
    """What a process read: the hash of each value, and the error that ended it."""

    values: list[str]
    error: str


def read_apart(kind: Kind, folder: Path) -> Reading | None:
    """What a forked process reads; None if it crashed."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def read() -> None:
        signal.alarm(PATIENCE)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        values: list[str] = []
        fault = ""
        try:
            for value in kind.read(folder):
                values += [sha256(repr(plain(value)).encode()).hexdigest()]
        except (ValueError, OSError) as error:
            fault = str(error)
        sender.send(Reading(values, fault))

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def outcome(before: Reading, now: Reading | None) -> str:
    """What a flip did, one of OUTCOMES."""
    if now is None or "\n" in now.error:
        return "crash"
    if now.values != before.values[: len(now.values)]:
        return "silent"
    return "detected" if now.error else "no effect"


def flips(name: str, count: int, seed: int) -> Iterator[tuple[str, str, int]]:
    """Flips bits of one kind: the outcome, the file and the bit of each.

    Args:
        name: a key of KINDS.
        count: number of flips.
        seed: of the choice of bits.
    """
    kind, draw = KINDS[name], random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory() as place:
        whole, copy = Path(place) / "whole", Path(place) / "copy"
        kind.write(whole)
        found = [file for file in sorted(whole.glob(kind.damaged)) if file.is_file() and file.stat().st_size]
        files = [str(file.relative_to(whole)) for file in found]
        shutil.copytree(whole, copy)
        before = read_apart(kind, copy)
        assert before
        assert not before.error, before.error
        for number in range(count):
            shutil.rmtree(copy)
            shutil.copytree(whole, copy)
            file = copy / files[number % len(files)]
            content = bytearray(file.read_bytes())
            bit = draw.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
            yield outcome(before, read_apart(kind, copy)), files[number % len(files)], bit


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--flips", type=int, default=1200, help="in all, an equal number for each kind")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is damaged")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)
    each, faults = args.flips // len(args.kinds), []
    counts = {name: Counter[str]() for name in args.kinds}
    with tqdm(total=each * len(args.kinds), unit="flip", disable=not sys.stderr.isatty()) as bar:
        for name in args.kinds:
            for found, file, bit in flips(name, each, args.seed):
                counts[name][found] += 1
                if found in FAULTS:
                    faults.append(f"{found}: {name}, {file}, bit {bit % 8} of byte {bit // 8}")
                bar.update()
    print(f"{'':14}{''.join(f'{found:>12}' for found in OUTCOMES)}")
    for name, count in (*counts.items(), ("all", sum(counts.values(), Counter()))):
        print(f"{name:14}{''.join(f'{count[found]:12}' for found in OUTCOMES)}")
    print(*faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
