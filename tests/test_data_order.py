"""Which samples make up a batch: pure in its number, from one bucket, each sample as often as any other."""

import copy
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

from data.order import NOT_COUNTED, GlobalBatches, Mixed, Share, Shares, Stages, Stripes, Use, normal, order, stream

BATCH = 4
UNEVEN = [10, 7, 0, 3, 1, 26]  # samples of the buckets: an empty one, and two that are smaller than a batch


def split(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    """That many samples in each bucket, numbered without any order."""
    numbers = np.random.default_rng(seed).permutation(sum(sizes))
    return np.split(numbers, np.cumsum(sizes)[:-1])


def pool(size: int) -> list[np.ndarray]:
    """All samples in one bucket."""
    return [np.arange(size)]


def given(sizes: list[int], epoch: int, batch: int = BATCH) -> list[int]:
    """How many batches of each bucket are complete after so many epochs of its samples."""
    return [size * epoch // batch for size in sizes]


def assert_equal(ours: Share, theirs: Share) -> None:
    assert (ours.step, ours.bucket, ours.stage) == (theirs.step, theirs.bucket, theirs.stage)
    assert np.array_equal(ours.positions, theirs.positions)
    assert np.array_equal(ours.samples, theirs.samples)


def test_a_stream_is_its_own_for_each_seed_use_step_and_sample() -> None:
    names = [(s, u, k, i) for s in (0, 1) for u in (Use.NOISE, Use.CAPTION) for k in (0, 1) for i in (0, 1)]
    first = [stream(*name).random(100).tolist() for name in names]
    assert len({tuple(draw) for draw in first}) == len(names)
    assert len({number for draw in first for number in draw}) == 100 * len(names)
    assert first == [stream(*name).random(100).tolist() for name in names]


def test_noise_belongs_to_its_sample_whatever_the_batch() -> None:
    all_of_it = normal(3, Use.NOISE, 7, np.arange(64), (2, 4, 4))
    assert np.array_equal(normal(3, Use.NOISE, 7, np.array([9, 4]), (2, 4, 4)), all_of_it[[9, 4]])
    assert not np.array_equal(normal(3, Use.NOISE, 8, np.arange(64), (2, 4, 4)), all_of_it)
    assert abs(all_of_it.mean().item()) < 0.1
    assert abs(all_of_it.std().item() - 1) < 0.05


def test_order_is_a_permutation_of_its_own_for_each_seed_epoch_and_bucket() -> None:
    names = [(seed, epoch, bucket) for seed in (0, 1) for epoch in (0, 1) for bucket in (0, 1)]
    orders = [order(seed, 100, epoch, bucket) for seed, epoch, bucket in names]
    assert all(sorted(found) == list(range(100)) for found in orders)
    assert len({tuple(found) for found in orders}) == len(names)


def before_there_were_buckets(size: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The formula by which runs drew their batches: the k-th B of all permutations of the data set, end to end."""
    samples = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        raw = stream(seed, Use.ORDER, place // size).bit_generator.random_raw(size)
        samples.append(int(np.argsort(raw, kind="stable")[place % size]))
    return samples


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (1297, 32), (64, 64), (3, 8), (1, 2)])
def test_one_bucket_gives_the_batches_of_all_runs_so_far(size: int, batch: int) -> None:
    batches = GlobalBatches(pool(size), batch, seed=5)
    for step in (*range(12), 41, 1000, 10**6):
        share = batches.share(step)
        assert share.samples.tolist() == before_there_were_buckets(size, batch, 5, step)
        assert (share.step, share.bucket, share.stage) == (step, 0, 0)
    among_empty = GlobalBatches([*pool(size), np.arange(0)], batch, seed=5)
    assert np.array_equal(among_empty.share(41).samples, batches.share(41).samples)


def test_global_batches_visit_every_sample_once_an_epoch_without_a_gap() -> None:
    batches = GlobalBatches(pool(10), batch_size=4, seed=5)
    seen = np.concatenate([batches.share(k).samples for k in range(15)])
    for epoch in range(6):
        assert sorted(seen[10 * epoch : 10 * (epoch + 1)]) == list(range(10))


@pytest.mark.parametrize("sizes", [UNEVEN, [10], [3, 2, 1], [40, 40], [1]])
def test_an_epoch_holds_the_batches_that_its_samples_complete(sizes: list[int]) -> None:
    batches = iter(GlobalBatches(split(sizes), BATCH, seed=1))
    for epoch in range(12):
        due = np.subtract(given(sizes, epoch + 1), given(sizes, epoch))
        found = [next(batches).bucket for _ in range(due.sum())]
        assert np.bincount(found, minlength=len(sizes)).tolist() == due.tolist()


@pytest.mark.parametrize("sizes", [UNEVEN, [3, 2, 1], [40, 40]])
def test_a_bucket_s_batches_are_its_permutations_end_to_end(sizes: list[int]) -> None:
    """What is left over of an epoch begins the next batch, and each batch is from one bucket."""
    buckets = split(sizes)
    shares = list(islice(GlobalBatches(buckets, BATCH, seed=1), sum(given(sizes, 20))))
    for number, bucket in enumerate(buckets):
        own = [share.samples for share in shares if share.bucket == number]
        assert len(own) == given(sizes, 20)[number]
        sequence = np.concatenate([*own, bucket[:0]])
        for start in range(0, len(sequence) - len(bucket) + 1, max(len(bucket), 1)):
            assert sorted(sequence[start : start + len(bucket)]) == sorted(bucket)
        rest = sequence[len(sequence) // len(bucket) * len(bucket) :] if len(bucket) else sequence
        assert len(set(rest)) == len(rest)


def test_every_sample_is_seen_as_often_as_any_other() -> None:
    """At every time as often as those of its bucket but for one; and after e epochs e times, but for a batch."""
    sizes = [100, 37, 9, 2]
    buckets = split(sizes)
    batches = iter(GlobalBatches(buckets, BATCH, seed=3))
    seen = np.zeros(sum(sizes), dtype=int)
    for epoch in range(1, 60):
        for _ in range(sum(given(sizes, epoch)) - sum(given(sizes, epoch - 1))):
            np.add.at(seen, next(batches).samples, 1)
            assert all(np.ptp(seen[bucket]) <= 1 for bucket in buckets)
        for bucket in buckets:
            assert epoch * len(bucket) - BATCH < seen[bucket].sum() <= epoch * len(bucket)


def test_buckets_take_turns_at_random_in_another_order_each_epoch() -> None:
    labels = np.array([s.bucket for s in islice(GlobalBatches(split([4000, 4000]), BATCH, seed=0), 4000)])
    first, second = labels[:2000], labels[2000:]
    assert first.sum() == second.sum() == 1000
    assert not np.array_equal(first, second)
    changes = (first[1:] != first[:-1]).mean()
    assert abs(changes - 0.5) < 5 * 0.5 / 2000**0.5  # five deviations of a fair coin
    other = [s.bucket for s in islice(GlobalBatches(split([4000, 4000]), BATCH, seed=1), 2000)]
    assert not np.array_equal(first, other)


def test_buckets_of_equal_size_have_orders_of_their_own() -> None:
    shares = list(islice(GlobalBatches([np.arange(40), np.arange(40, 80)], BATCH, seed=0), 20))
    first, second = (np.concatenate([s.samples for s in shares if s.bucket == b]) for b in (0, 1))
    assert not np.array_equal(first, second - 40)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batch_of_one_process(world: int) -> None:
    buckets = split([50, 30, 20, 5])
    whole = GlobalBatches(buckets, 12, seed=1)
    parts = [GlobalBatches(buckets, 12, 1, 0, rank, world) for rank in range(world)]
    for k in (0, 9, 1000):
        shares = [part.share(k) for part in parts]
        assert np.array_equal(np.concatenate([s.samples for s in shares]), whole.share(k).samples)
        assert np.array_equal(np.concatenate([s.positions for s in shares]), np.arange(12))
        assert {s.bucket for s in shares} == {whole.share(k).bucket}
        assert {len(s.samples) for s in shares} == {12 // world}


def test_batches_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 5 processes × 1 parts of a share, got 12"):
        GlobalBatches(pool(100), 12, 1, 0, 0, 5)
    for buckets in ([], [np.arange(0)] * 2):
        with pytest.raises(ValueError, match=f"there are no samples in {len(buckets)} buckets"):
            GlobalBatches(buckets, 12, 1)


def curriculum(start: int = 0) -> Stages:
    """11 steps of small pictures, then 9, then the rest; the last one's samples are those of the first."""
    small, large = split(UNEVEN, 1), split([5, 30], 2)
    parts = [GlobalBatches(small, 8, 0), GlobalBatches(large, 4, 1), GlobalBatches(small, 4, 2)]
    return Stages(list(zip((11, 9, None), parts, strict=True)), start)


RATES = Fraction(7, 3), Fraction(1, 5), Fraction(0)  # how often a sample of each part comes in an epoch


def mixed(sizes: list[int], seed: int = 7) -> list[Mixed]:
    """Three parts in each bucket, as sequences by their rates."""
    thirds = [np.array_split(bucket, 3) for bucket in split(sizes)]
    return [
        Mixed([(own, rate * len(own)) for own, rate in zip(parts, RATES, strict=True)], seed, bucket)
        for bucket, parts in enumerate(thirds)
    ]


def test_the_samples_of_each_part_come_at_its_rate() -> None:
    """Each part's samples equally often but for one time, and of all a bucket's draws in whole epochs its share."""
    sizes = [60, 31, 0, 2]
    thirds = [np.array_split(bucket, 3) for bucket in split(sizes)]
    for bucket, (lane, parts) in enumerate(zip(mixed(sizes), thirds, strict=True)):
        for epochs in (1, 4, 15):
            drawn = lane.at(np.arange(lane.before(epochs)))
            for own, rate in zip(parts, RATES, strict=True):
                times = [int((drawn == sample).sum()) for sample in own]
                assert sum(times) == int(rate * len(own) * epochs), bucket
                assert max(times, default=0) - min(times, default=0) <= 1


def test_the_parts_of_a_bucket_are_shuffled_among_each_other() -> None:
    """Any stretch of an epoch has samples of both, and epochs have different orders and different samples."""
    first, second = np.arange(300), np.arange(300, 600)
    lane = Mixed([(first, Fraction(100)), (second, Fraction(100))], 3, 0)
    epochs = np.split(lane.at(np.arange(600)), 3)
    for drawn in epochs:
        assert (drawn < 300).sum() == 100
        assert all(0.25 < (part < 300).mean() < 0.75 for part in np.split(drawn, 4))
    assert len(set(np.concatenate(epochs).tolist())) == 600  # one permutation of each part
    again = np.split(lane.at(np.arange(600, 1200)), 3)
    assert len(set(epochs[0].tolist()) & set(again[0].tolist())) < 120  # another permutation, so other company
    assert not np.array_equal(epochs[0] % 300, epochs[1] % 300)
    sides = [drawn[drawn < 300], drawn[drawn >= 300] - 300]  # of the last epoch
    assert set(sides[0].tolist()) != set(sides[1].tolist())  # each part has an order of its own


@pytest.mark.parametrize("kind", ["one stage", "stages", "mixed"])
def test_a_share_depends_on_its_number_alone(kind: str) -> None:
    """Whatever was asked for before, and wherever the run started."""

    def fresh(start: int = 0) -> Shares:
        if kind == "mixed":
            return GlobalBatches(mixed(UNEVEN), BATCH, 7, start)
        return curriculum(start) if kind == "stages" else GlobalBatches(split(UNEVEN), BATCH, 7, start)

    straight = list(islice(fresh(), 200))
    assert [share.step for share in straight] == list(range(200))
    back_and_forth = fresh()
    for k in np.random.default_rng(0).integers(200, size=100):
        assert_equal(back_and_forth.share(int(k)), straight[k])
    for start in (1, 10, 11, 12, 20, 21, 63, 199):
        assert_equal(next(iter(fresh(start))), straight[start])
    copied = copy.deepcopy(back_and_forth)
    assert_equal(copied.share(150), straight[150])


def test_a_step_far_away_is_found_at_once() -> None:
    """Not by counting up to it: it would take hours."""
    sizes = [4, 7, 0, 3, 1]
    step = 10**12
    bucket = GlobalBatches(split(sizes), BATCH, 0).share(step).bucket
    epoch = step * BATCH // sum(sizes)
    while sum(given(sizes, epoch + 1)) <= step:
        epoch += 1
    window = range(sum(given(sizes, epoch)), sum(given(sizes, epoch + 1)))
    assert step in window
    found = [GlobalBatches(split(sizes), BATCH, 0).share(k).bucket for k in window]
    assert found[step - window[0]] == bucket
    due = np.subtract(given(sizes, epoch + 1), given(sizes, epoch))
    assert np.bincount(found, minlength=5).tolist() == due.tolist()


def test_each_stage_starts_with_its_own_first_batch_at_the_run_s_step() -> None:
    stages = curriculum()
    for stage, (begin, end) in enumerate([(0, 11), (11, 20), (20, 90)]):
        for k in range(begin, end):
            share, own = stages.share(k), stages.kinds[stage].share(k - begin)
            assert (share.step, share.stage, share.bucket) == (k, stage, own.bucket)
            assert np.array_equal(share.samples, own.samples)
            assert np.array_equal(share.positions, own.positions)
    alone = GlobalBatches(split(UNEVEN), BATCH, 0)
    assert all(np.array_equal(Stages([(None, alone)]).share(k).samples, alone.share(k).samples) for k in range(30))


@pytest.mark.parametrize("lengths", [(), (5,), (None, None), (5, -3, None), (0, None), (3, 5), (None, 5)])
def test_stages_that_do_not_follow_each_other_are_refused(lengths: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="stages need at least 1 step each, and None for the last"):
        Stages([(length, GlobalBatches(pool(10), 2, 0)) for length in lengths])


@pytest.mark.parametrize("kind", ["one stage", "stages"])
@pytest.mark.parametrize(("world", "parts"), [(1, 2), (1, 4), (2, 2)])
def test_the_parts_of_a_share_are_the_share(kind: str, world: int, parts: int) -> None:
    for rank in range(world):
        place = (rank, world)
        small, large = (GlobalBatches(split(sizes, 1), 8, 0, 0, *place) for sizes in (UNEVEN, [5, 30]))
        cut: Shares = GlobalBatches(split(UNEVEN, 1), 8, 0, 3, *place, parts)
        if kind == "stages":
            cut = Stages([(7, small), (None, large)], 3, parts)
        found = islice(cut, 20 * parts)
        for step in range(3, 23):
            whole = cut.share(step)
            own = [next(found) for _ in range(parts)]
            assert {(part.step, part.bucket, part.stage) for part in own} == {(step, whole.bucket, whole.stage)}
            assert [len(part.samples) for part in own] == [8 // world // parts] * parts
            assert np.array_equal(np.concatenate([part.samples for part in own]), whole.samples)
            assert np.array_equal(np.concatenate([part.positions for part in own]), whole.positions)
    with pytest.raises(ValueError, match="multiple of 2 processes × 3 parts of a share, got 8"):
        GlobalBatches(pool(10), 8, 0, 0, 0, 2, 3)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[500], [200, 0, 64, 1, 235]])
def test_validation_counts_every_sample_once_on_any_number_of_ranks(world: int, sizes: list[int]) -> None:
    """All ranks have equally many batches; those that are repeated for that are marked."""
    buckets = split(sizes)
    ranks = [list(Stripes(buckets, 64, rank, world)) for rank in range(world)]
    assert [len(Stripes(buckets, 64, rank, world)) for rank in range(world)] == [len(ranks[0])] * world
    assert {len(shares) for shares in ranks} == {len(ranks[0])}
    in_turn = [share for shares in zip(*ranks, strict=True) for share in shares]
    counted = [share for share in in_turn if share.step != NOT_COUNTED]
    assert np.array_equal(np.concatenate([share.samples for share in counted]), np.concatenate(buckets))
    assert len(in_turn) - len(counted) == -len(counted) % world
    for share in in_turn:
        assert set(share.samples) <= set(buckets[share.bucket])
        assert 0 < len(share.samples) <= 64
        assert np.array_equal(share.positions, share.samples)


def test_every_rank_validates_however_few_samples_there_are() -> None:
    ranks = [list(Stripes(split([3, 4]), 125, rank, 5)) for rank in range(5)]
    assert len({len(shares) for shares in ranks}) == 1
    counted = [share.samples for shares in ranks for share in shares if share.step != NOT_COUNTED]
    assert sorted(np.concatenate(counted)) == list(range(7))
    with pytest.raises(ValueError, match="a sample for each of the 8 processes, got 7"):
        Stripes(split([3, 4]), 125, 0, 8)
