"""Which samples make up global batch k, and every random number that belongs to them: pure functions of (seed, k).

Philox is counter-based: key and counter determine a stream, without history (Salmon et al. 2011). So a run that stopped
after k batches resumes with batch k, on any number of ranks and loader workers.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from fractions import Fraction
from itertools import accumulate, count
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler


class Use(IntEnum):
    """The purpose of a random stream. Streams of different purposes are independent."""

    ORDER = 0
    CAPTION = 1
    TIME = 2
    NOISE = 3
    VALIDATION = 4
    SCENE = 5
    REQUESTS = 6
    POSTERIOR = 7
    BUCKET = 8
    PAIR = 9
    LEVEL = 10
    DEGRADE = 11
    JUDGED = 12
    MATCHED = 13
    DEQUANTIZE = 14
    TAGS = 15
    CROP = 16
    EMBEDDING = 17


def stream(seed: int, use: Use, step: int = 0, sample: int = 0) -> np.random.Generator:
    """The random generator of (seed, use, step, sample), each from 0 to 2⁶⁴ − 1."""
    key = np.array([seed, use], dtype=np.uint64)
    counter = np.array([0, 0, step, sample], dtype=np.uint64)  # the low words count the numbers drawn
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, use: Use, step: int, samples: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise (len(samples), *shape). Each sample has its own stream, independent of the batch."""
    out = np.empty((len(samples), *shape), dtype=np.float32)
    generator = stream(seed, use, step)
    start = generator.bit_generator.state
    for row, sample in zip(out, samples, strict=True):
        start["state"]["counter"][3] = sample  # as `stream`, without a new generator for each sample
        generator.bit_generator.state = start
        generator.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def order(seed: int, size: int, epoch: int, bucket: int = 0) -> np.ndarray:
    """A bucket's permutation of range(size) in an epoch: argsort of raw Philox output, which numpy keeps stable."""
    return np.argsort(stream(seed, Use.ORDER, epoch, bucket).bit_generator.random_raw(size), kind="stable")


NOT_COUNTED = -1  # the step of a repeated share, which a rank computes only because all ranks must take part


class Share(NamedTuple):
    """One rank's share of a global batch, or one micro-batch of it."""

    step: int  # k, the number of global batches before this one
    positions: np.ndarray  # of the samples in the global batch, (b,)
    samples: np.ndarray  # their numbers in the data set, (b,)
    bucket: int = 0  # of all of them
    stage: int = 0  # of the curriculum


class Shares(Sampler[Share], ABC):
    """This rank's shares of the global batches start, start + 1, …, without end, each split into equal parts.

    Args:
        start: number of the first batch.
        parts: micro-batches of a share, one after another.
    """

    def __init__(self, start: int, parts: int = 1) -> None:
        self.start, self.parts = start, parts

    @abstractmethod
    def share(self, step: int) -> Share:
        """This rank's share of global batch `step`, independent of earlier calls."""

    def __iter__(self) -> Iterator[Share]:
        for share in map(self.share, count(self.start)):
            cut = (np.split(places, self.parts) for places in (share.positions, share.samples))
            for positions, samples in zip(*cut, strict=True):
                yield share._replace(positions=positions, samples=samples)


class Lane:
    """The endless sequence of a bucket's samples: one permutation for each epoch, one after another.

    Args:
        samples: of the bucket, (n,).
        seed: of the order.
        bucket: the bucket's number.
    """

    def __init__(self, samples: np.ndarray, seed: int, bucket: int) -> None:
        self.samples, self.seed, self.bucket = samples, seed, bucket
        self.latest: tuple[int, np.ndarray] | None = None  # an epoch and its order, which is slow to make

    def before(self, epoch: int) -> int:
        """The number of places before an epoch."""
        return len(self.samples) * epoch

    def members(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, before they are shuffled, (n,)."""
        return self.samples

    def at(self, places: np.ndarray) -> np.ndarray:
        """The samples at ascending places of the sequence, (b,)."""
        found = [self.samples[:0]]
        while len(places):
            epoch = last_epoch(self.before, int(places[0]))
            here = places[places < self.before(epoch + 1)]
            found.append(self._shuffled(epoch)[here - self.before(epoch)])
            places = places[len(here) :]
        return np.concatenate(found)

    def _shuffled(self, epoch: int) -> np.ndarray:
        if self.latest is None or self.latest[0] != epoch:
            members = self.members(epoch)
            self.latest = epoch, members[order(self.seed, len(members), epoch, self.bucket)]
        return self.latest[1]


class Mixed(Lane):
    """The endless sequence of a bucket some of whose samples come more often than others.

    Each part has a sequence of its own, one permutation after another. Before epoch e it has given ⌊rate·e⌋ samples;
    those of an epoch are shuffled with those of the other parts. So shares are exact at the end of each epoch, but for
    a sample, and all samples of a part are seen equally often, but for one time.

    Args:
        parts: samples, (n,) each, and the rate of all of them together: how many come in an epoch.
        seed: of the order.
        bucket: the bucket's number.
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray, Fraction]], seed: int, bucket: int) -> None:
        super().__init__(np.concatenate([samples for samples, _ in parts]), seed, bucket)
        self.parts = [
            (Lane(samples, seed, (number << 32) + bucket), rate)
            for number, (samples, rate) in enumerate(parts, start=1)
            if rate and len(samples)
        ]

    def before(self, epoch: int) -> int:
        return sum(rate.numerator * epoch // rate.denominator for _, rate in self.parts)

    def members(self, epoch: int) -> np.ndarray:
        ends = [[rate.numerator * e // rate.denominator for e in (epoch, epoch + 1)] for _, rate in self.parts]
        return np.concatenate([lane.at(np.arange(*end)) for (lane, _), end in zip(self.parts, ends, strict=True)])


def last_epoch(before: Callable[[int], int], place: int) -> int:
    """The last epoch before which there are at most `place` places, given how many there are before each."""
    enough = 1
    while before(enough) <= place:
        enough *= 2
    return bisect_right(range(enough), place, key=before) - 1


class Plan(NamedTuple):
    """The global batches of an epoch, in their order."""

    first: int  # number of the first batch
    buckets: np.ndarray  # the bucket of each, (batches,)
    places: np.ndarray  # number of earlier batches of its bucket, in all epochs, (batches,)


class GlobalBatches(Shares):
    """This rank's shares of endless global batches. All samples of a batch are from one bucket, so of one size.

    The permutations of a bucket, one for each epoch, form one sequence that is cut into batches. No sample is dropped:
    the rest of a bucket at the end of an epoch starts its next batch, in a later epoch. Before epoch e a bucket of n
    samples has given ⌊n·e / batch_size⌋ batches; the batches of an epoch are shuffled across buckets. So every sample
    is seen equally often, also in a bucket smaller than a batch, unless a bucket is `Mixed`.

    Args:
        buckets: the numbers of the samples of each bucket, (n,) each, or a sequence of them; may be empty. A plain data
            set is one bucket.
        batch_size: of the global batch, over all ranks; a multiple of `world` × `parts`.
        seed: of the order.
        start: number of the first batch.
        rank: of this process.
        world: number of processes.
        parts: micro-batches of each rank's share.

    Raises:
        ValueError: there are no samples, or batch_size is not a multiple of `world` × `parts`.
    """

    def __init__(
        self,
        buckets: Sequence[np.ndarray | Lane],
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
    ) -> None:
        super().__init__(start, parts)
        if batch_size % (world * parts):
            raise ValueError(
                f"batch_size must be a multiple of {world} processes × {parts} parts of a share, got {batch_size}"
            )
        self.lanes = [own if isinstance(own, Lane) else Lane(own, seed, bucket) for bucket, own in enumerate(buckets)]
        if not any(len(lane.samples) for lane in self.lanes):
            raise ValueError(f"there are no samples in {len(buckets)} buckets: batches need at least one")
        self.batch_size, self.seed = batch_size, seed
        self.positions = np.arange(batch_size)[rank * (batch_size // world) : (rank + 1) * (batch_size // world)]
        self.latest = Plan(0, self.positions[:0], self.positions[:0])

    def share(self, step: int) -> Share:
        if not 0 <= step - self.latest.first < len(self.latest.buckets):
            self.latest = self._plan(last_epoch(lambda epoch: int(self._given(epoch).sum()), step))
        bucket, place = (int(column[step - self.latest.first]) for column in self.latest[1:])
        return Share(step, self.positions, self.lanes[bucket].at(place * self.batch_size + self.positions), bucket)

    def _given(self, epoch: int) -> np.ndarray:
        """Number of batches that each bucket has given before an epoch, (buckets,)."""
        return np.array([lane.before(epoch) // self.batch_size for lane in self.lanes])

    def _plan(self, epoch: int) -> Plan:
        given = self._given(epoch)
        counts = self._given(epoch + 1) - given
        shuffle = stream(self.seed, Use.BUCKET, epoch).bit_generator.random_raw(int(counts.sum()))
        shuffled = np.repeat(np.arange(len(counts)), counts)[np.argsort(shuffle, kind="stable")]
        places = np.empty_like(shuffled)
        places[np.argsort(shuffled, kind="stable")] = np.concatenate(
            [np.arange(first, first + n) for first, n in zip(given, counts, strict=True)]
        )
        return Plan(int(given.sum()), shuffled, places)


class Stages(Shares):
    """A curriculum: some steps with the global batches of one kind, then of the next, each kind from its batch 0.

    Args:
        kinds: (steps, batches) of each stage; steps is None for the last stage, which has no end. Stages over buckets
            of the same sizes have the same order unless their seeds differ.
        start: number of the first batch; `start` of the kinds is ignored.
        parts: micro-batches of each rank's share; `parts` of the kinds is ignored.

    Raises:
        ValueError: a stage has less than one step, or the last stage has an end.
    """

    def __init__(self, kinds: Sequence[tuple[int | None, GlobalBatches]], start: int = 0, parts: int = 1) -> None:
        super().__init__(start, parts)
        lengths = [length for length, _ in kinds]
        lasting = [length for length in lengths[:-1] if length is not None and length > 0]
        if not lengths or lengths[-1] is not None or len(lasting) != len(lengths) - 1:
            raise ValueError(f"stages need at least 1 step each, and None for the last, got {lengths}")
        self.begins = [0, *accumulate(lasting)]
        self.kinds = [batches for _, batches in kinds]

    def share(self, step: int) -> Share:
        stage = bisect_right(self.begins, step) - 1
        return self.kinds[stage].share(step - self.begins[stage])._replace(step=step, stage=stage)


class Stripes(Sampler[Share]):
    """Every sample once, in order, for validation: batches of one bucket each, distributed over the ranks in turn.

    No batch is padded; the last batch of a bucket may be smaller. All ranks have the same number of batches, since they
    gather sharded weights together: a rank with one batch less repeats its last, with the step NOT_COUNTED.

    Args:
        buckets: the numbers of the samples of each bucket, (n,) each.
        batch_size: largest batch on one rank.
        rank: of this process.
        world: number of processes.

    Raises:
        ValueError: there are fewer samples than processes.
    """

    def __init__(self, buckets: Sequence[np.ndarray], batch_size: int, rank: int = 0, world: int = 1) -> None:
        samples = sum(map(len, buckets))
        size = min(batch_size, samples // world)
        if size < 1:
            raise ValueError(
                f"validation needs a sample for each of the {world} processes, got {samples}: hold out more"
            )
        shares = [
            Share(0, ids, ids, bucket)
            for bucket, members in enumerate(buckets)
            for ids in (members[i : i + size] for i in range(0, len(members), size))
        ]
        self.shares = shares[rank::world]
        if len(self.shares) < -(-len(shares) // world):
            self.shares.append(self.shares[-1]._replace(step=NOT_COUNTED))

    def __iter__(self) -> Iterator[Share]:
        return iter(self.shares)

    def __len__(self) -> int:
        return len(self.shares)
