"""Tests and intervals against scipy's own, Holm's correction by hand, and both against what is planted."""

import math

import numpy as np
import pytest
from scipy import stats

from metrics.significance import LEVEL, Ratio, Sample, holm

ABOVE, BELOW = [1.31, 1.02, 1.20, 1.11], [1.52, 1.91, 1.40, 1.66, 1.73]


def ratio(above: list[float], below: list[float]) -> Ratio:
    return Ratio(Sample.of(above), Sample.of(below))


def test_a_mean_is_tested_as_scipy_tests_it() -> None:
    expected = stats.ttest_1samp(ABOVE, 1.0)
    assert Sample.of(ABOVE).p(1.0) == pytest.approx(expected.pvalue)
    assert Sample.of(ABOVE).interval() == pytest.approx(tuple(expected.confidence_interval()))


@pytest.mark.parametrize("asked", [0.5, 0.8, 1.0])
def test_a_ratio_is_tested_by_welch(asked: float) -> None:
    expected = stats.ttest_ind(ABOVE, [asked * value for value in BELOW], equal_var=False).pvalue
    assert ratio(ABOVE, BELOW).p(asked) == pytest.approx(expected)


def test_the_ends_of_a_ratio_s_interval_are_just_not_rejected() -> None:
    found = ratio(ABOVE, BELOW)
    low, high = found.interval()
    assert low < found.value < high
    assert (found.p(low), found.p(high)) == pytest.approx((LEVEL, LEVEL))


def test_a_ratio_s_interval_is_fieller_s_if_only_one_mean_is_uncertain() -> None:
    low, high = ratio(ABOVE, [2.0, 2.0, 2.0]).interval()
    assert (low, high) == pytest.approx(tuple(end / 2 for end in Sample.of(ABOVE).interval()))
    inverse = ratio([2.0, 2.0, 2.0], ABOVE).interval()
    assert inverse == pytest.approx(tuple(2 / end for end in reversed(Sample.of(ABOVE).interval())))


def test_an_interval_has_no_end_where_a_mean_may_be_zero() -> None:
    assert ratio(ABOVE, [0.1, 4.0]).interval()[1] == math.inf
    assert ratio([0.1, 4.0], ABOVE).interval()[0] == 0


@pytest.mark.parametrize("other", [[1.0], [1.0, 1.2]])
def test_one_seed_tests_nothing(other: list[float]) -> None:
    assert math.isnan(Sample.of([1.0]).p(2.0))
    assert math.isnan(ratio([1.0], other).p(2.0))
    assert math.isnan(ratio(other, [1.0]).p(2.0))


@pytest.mark.parametrize(
    ("seeds", "sign", "permutation"), [(2, 1 / 2, 2 / 6), (3, 1 / 4, 2 / 20), (8, 1 / 128, 2 / 12870)]
)
def test_equal_values_have_an_exact_test(seeds: int, sign: float, permutation: float) -> None:
    exact = ratio([0.9] * seeds, [0.3] * seeds)
    assert (exact.p(3.0), exact.p(1.0)) == (1.0, pytest.approx(permutation))
    assert (exact.above.p(0.9), exact.above.p(1.0)) == (1.0, sign)


def test_equal_and_separated_distributions_are_told_apart_as_often_as_the_level_says() -> None:
    drawn = np.random.default_rng(0).normal(1.0, 0.1, (400, 2, 8))
    equal = [ratio(a.tolist(), b.tolist()) for a, b in drawn]
    assert 0.02 < np.mean([found.p(1.0) < LEVEL for found in equal]) < 0.09
    assert 0.91 < np.mean([low < 1 < high for low, high in (found.interval() for found in equal[:200])]) < 0.99
    assert np.mean([ratio(a.tolist(), (1.5 * b).tolist()).p(1.0) < LEVEL for a, b in drawn]) > 0.99


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 × .005, 3 × .01, 2 × .03, and no less than that
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.04], [0.04]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values: list[float], corrected: list[float]) -> None:
    assert holm(p_values) == pytest.approx(corrected)
