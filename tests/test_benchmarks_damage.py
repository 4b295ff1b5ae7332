"""A flipped bit in a file is detected, or changes nothing that is read, and never ends a process."""

import pytest

from benchmarks.damage import FAULTS, flips


@pytest.mark.parametrize(
    ("name", "count"), [("store", 45), ("pairs", 15), ("checkpoint", 20), ("snapshot", 20), ("model folder", 20)]
)
def test_no_flipped_bit_is_silent_or_crashes_the_reader(name: str, count: int) -> None:
    found = list(flips(name, count, seed=1))
    assert len(found) == count
    assert [flip for flip in found if flip[0] in FAULTS] == []
    assert sum(outcome == "detected" for outcome, _, _ in found) > count / 2
