"""Pictures that look alike are found, and stay out of the index."""

import time
from pathlib import Path

import numpy as np
import pytest
from store_files import NULL, PLAN, assert_holds, refused, sample

from data.store.reader import Store, Writer
from data.store.units import near_duplicates


@pytest.mark.parametrize("distance", range(9))
def test_near_duplicates_are_those_of_the_plain_definition(distance: int) -> None:
    draw, n = np.random.default_rng(distance), 3000
    values = draw.integers(0, 2**64, 20, dtype=np.uint64)[draw.integers(0, 20, n)]
    for _ in range(6):  # near some, and in chains: near to what is near
        flipped = np.uint64(1) << draw.integers(0, 64, n).astype(np.uint64)
        values ^= np.where(draw.random(n) < 0.5, flipped, np.uint64(0))
    kept, wanted = np.zeros(0, dtype=np.uint64), []
    for value in values:
        wanted.append(bool((np.bitwise_count(kept ^ value) <= distance).any()))
        kept = kept if wanted[-1] else np.append(kept, value)
    assert near_duplicates(values, distance).tolist() == wanted
    assert 0 < sum(wanted) < n


def test_near_duplicates_of_many_in_seconds() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    values[50_000:60_000] = values[:10_000] ^ np.uint64(0b10010001 << 30)
    values[60_000:80_000] = values[7]
    start = time.perf_counter()
    assert np.flatnonzero(near_duplicates(values, 3)).tolist() == list(range(50_000, 80_000))
    assert time.perf_counter() - start < 10


def test_duplicates_stay_out_of_the_index(tmp_path: Path) -> None:
    """An id that came before, even that of a near-duplicate, goes first; then what is near to one that is kept."""
    hashes = [0, 0b111, 0b11111, 0, 0b1111111, 1 << 60]
    ids = ["a", "b", "c", "b", "e", "f"]  # b is near a; c is near b only, which is dropped; e is near c
    samples = [sample(i, id=name, phash=h) for i, (name, h) in enumerate(zip(ids, hashes, strict=True))]
    for hamming, kept, near in ((None, "abcef", {}), (0, "abcef", {}), (3, "ac", {"near-duplicate": 3})):
        folder = tmp_path / str(hamming)
        writer = Writer(folder, PLAN, NULL)
        writer.write(1, samples[3:], [], 3, True)
        assert writer.finish(2, hamming) is None
        writer.write(0, samples[:3], [], 3, True)
        report, store = writer.finish(2, hamming), Store(folder)
        assert "".join(store.ids().to_pylist()) == kept
        assert (report["kept"], report["dropped"]) == (len(kept), {"duplicate id": 1} | near)
        assert store.verify(progress=False) == []
        for row, name in enumerate(kept):
            assert_holds(store, row, samples[ids.index(name)])
    refused("hamming from 0 to 8", writer.finish, 2, 9)
