"""What a few seeds say about a mean or a ratio of means: tests, intervals, and Holm's correction for many tests."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats
from scipy.optimize import brentq

LEVEL = 0.05  # of the tests; the intervals have 95 %
FAR = 1e6  # a ratio's interval that goes so many times beyond the ratio has no end


class Sample(NamedTuple):
    """Mean, sample standard deviation and number of some values: an estimate of the true mean."""

    mean: float
    deviation: float  # NaN for one value
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        """The sample of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), deviation, len(values))

    @property
    def value(self) -> float:
        """The mean."""
        return self.mean

    def text(self, form: str = ".2f") -> str:
        """Mean ± deviation; for one value only the mean."""
        return format(self.mean, form) + (f" ± {format(self.deviation, form)}" if self.number > 1 else "")

    def p(self, goal: float) -> float:
        """Two-sided p-value of "the true mean is `goal`", by Student's t; NaN for one value.

        Equal values have no t: theirs is the p-value of the sign test.
        """
        if self.deviation == 0:
            return 1.0 if math.isclose(self.mean, goal) else 0.5 ** (self.number - 1)
        t = abs(self.mean - goal) / (self.deviation / math.sqrt(self.number))
        return float(2 * stats.t.sf(t, self.number - 1))

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the true mean; NaN for one value."""
        half = float(stats.t.isf(LEVEL / 2, self.number - 1)) * self.deviation / math.sqrt(self.number)
        return self.mean - half, self.mean + half


class Ratio(NamedTuple):
    """The ratio of the true means of two independent samples. Both means are positive.

    The test of a ratio ρ is Welch's t of `above` against ρ times `below` (Welch 1947; for ratios Tamhane & Logan 2004,
    J. Biopharm. Stat. 14, 843). The interval holds the ratios that this test does not reject, so that the two agree:
    it is Fieller's (1954), with Welch's degrees of freedom for unequal deviations.

    >>> ratio = Ratio(Sample(1.04, 0.08, 3), Sample(1.25, 0.18, 3))
    >>> low, high = ratio.interval()
    >>> print(f"{ratio.value:.2f} [{low:.2f}, {high:.2f}]")
    0.83 [0.64, 1.21]
    """

    above: Sample
    below: Sample

    @property
    def value(self) -> float:
        """The ratio of the means."""
        return self.above.mean / self.below.mean

    def text(self, form: str = ".2f") -> str:
        """The ratio, with both samples."""
        return f"{format(self.value, form)} ({self.above.text(form)} against {self.below.text(form)})"

    def p(self, goal: float) -> float:
        """Two-sided p-value of "the true ratio is `goal`"; NaN if a sample has one value.

        If the values of each sample are equal, there is no t, and it is the p-value of the permutation test.
        """
        scaled = Sample(goal * self.below.mean, goal * self.below.deviation, self.below.number)
        if self.above.deviation == scaled.deviation == 0:
            n, m = self.above.number, scaled.number
            return 1.0 if math.isclose(self.above.mean, scaled.mean) else 2 / math.comb(n + m, n)
        if math.isnan(self.above.deviation + scaled.deviation):
            return math.nan
        return float(stats.ttest_ind_from_stats(*self.above, *scaled, equal_var=False).pvalue)

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the true ratio, from 0 or to ∞ where the samples set no limit."""

        def excess(goal: float) -> float:
            return self.p(goal) - LEVEL

        least, most = self.value / FAR, self.value * FAR
        low = brentq(excess, least, self.value) if excess(least) < 0 else 0.0
        return low, brentq(excess, self.value, most) if excess(most) < 0 else math.inf


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number (Holm 1979, Scand. J. Stat. 6, 65).

    The k-th smallest of n, counted from 0, is multiplied by n − k, and is at least as large as the one before it. If
    all that are below a level are taken for real, the probability of any mistake is at most that level.

    >>> holm([0.01, 0.04, 0.03, 0.005])
    [0.03, 0.06, 0.06, 0.02]
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for k, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - k) * p_values[i]))
        corrected[i] = least
    return corrected
