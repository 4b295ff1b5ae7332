"""Which samples make up global batch k, and every random number that belongs to them: pure functions of (seed, k).

Philox is counter-based: a stream is named by its key and counter and needs no history (Salmon et al. 2011), so a run
that stopped after k batches goes on with batch k, on any number of ranks and loader workers.
"""

from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler


class Use(IntEnum):
    """What a random stream is for. Streams of different uses never meet."""

    ORDER = 0
    CAPTION = 1
    TIME = 2
    NOISE = 3
    VALIDATION = 4


def stream(seed: int, use: Use, step: int = 0, sample: int = 0) -> np.random.Generator:
    """A random generator of its own for each (seed, use, step, sample); all at least 0 and below 2⁶⁴."""
    key = np.array([seed, use], dtype=np.uint64)
    counter = np.array([0, 0, step, sample], dtype=np.uint64)  # the low words count the numbers drawn
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, use: Use, step: int, samples: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, sample i's from its own stream whatever else is in the batch: (len(samples), *shape)."""
    out = np.empty((len(samples), *shape), dtype=np.float32)
    for row, sample in zip(out, samples, strict=True):
        stream(seed, use, step, int(sample)).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


@lru_cache(maxsize=2)
def order(seed: int, size: int, epoch: int) -> np.ndarray:
    """The permutation of range(size) for one epoch. By argsort of raw Philox output, which numpy keeps stable."""
    return np.argsort(stream(seed, Use.ORDER, epoch).bit_generator.random_raw(size), kind="stable")


class Share(NamedTuple):
    """One rank's part of a global batch."""

    step: int  # k, the number of global batches before this one
    positions: np.ndarray  # where in the global batch, (b,)
    samples: np.ndarray  # which samples of the data set, (b,)


class GlobalBatches(Sampler[Share]):
    """This rank's share of global batches start, start + 1, … without end.

    Epochs follow each other without a gap, so no sample is dropped: a batch may hold the end of one and the start of
    the next.

    Args:
        size: samples in the data set.
        batch_size: of the global batch, over all ranks; a multiple of `world`.
        seed: names the order.
        start: the first batch.
        rank: this process.
        world: number of processes.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size must be a multiple of the {world} processes, got {batch_size}")
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.positions = np.arange(batch_size)[rank * (batch_size // world) : (rank + 1) * (batch_size // world)]

    def share(self, step: int) -> Share:
        """This rank's share of global batch `step`."""
        epoch, place = np.divmod(step * self.batch_size + self.positions, self.size)
        samples = np.array([order(self.seed, self.size, int(e))[p] for e, p in zip(epoch, place, strict=True)])
        return Share(step, self.positions, samples)

    def __iter__(self) -> Iterator[Share]:
        step = self.start
        while True:
            yield self.share(step)
            step += 1


class Stripes(Sampler[Share]):
    """Every sample once, in order, for validation: batches dealt out to the ranks in turn, none padded.

    Args:
        size: samples in the data set.
        batch_size: of one batch on one rank.
        rank: this process.
        world: number of processes.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        starts = range(rank * batch_size, size, world * batch_size)
        self.shares = [Share(0, ids, ids) for ids in (np.arange(s, min(s + batch_size, size)) for s in starts)]

    def __iter__(self) -> Iterator[Share]:
        return iter(self.shares)

    def __len__(self) -> int:
        return len(self.shares)
