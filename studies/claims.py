"""Claims, and what the seeds say about them: yes, no or undecided."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from metrics.significance import LEVEL, Ratio, Sample, holm
from studies.presentation import table

METHOD = """\
A claim holds ("yes") or does not ("no") if p < 0.05; otherwise it is undecided. p is two-sided, of the hypothesis that
the true number equals the goal, by {test}, with Holm's correction for the number of claims. The intervals are not
corrected. All of this is about other seeds of the training: the samples' noise, the captions and the held-out digits
are the same for all.
"""
YES, NO, UNDECIDED, ONE_SEED = "yes", "no", "undecided", "undecided (one seed)"


class Claim(NamedTuple):
    """A claim: the number that the seeds estimate lies from `low` to `high`. At least one of them is finite."""

    text: str
    found: Sample | Ratio
    low: float = -math.inf
    high: float = math.inf
    form: str = ".2f"

    @property
    def holds(self) -> bool:
        """Whether the estimate lies there, whatever its uncertainty."""
        return self.low <= self.found.value <= self.high

    @property
    def p(self) -> float:
        """The p-value of the limit that is passed; if none is, the largest of both limits. NaN with one seed."""
        passed = self.low if self.found.value < self.low else self.high
        limits = [limit for limit in (self.low, self.high) if math.isfinite(limit)] if self.holds else [passed]
        return max(map(self.found.p, limits))

    def row(self, p: float) -> list[str]:
        """Text, limits, estimate, interval, p-value and verdict. `p` is corrected."""
        low, high, *ends = (format(x, self.form) for x in (self.low, self.high, *self.found.interval()))
        goal = f"≤ {high}" if math.isinf(self.low) else f"≥ {low}" if math.isinf(self.high) else f"{low} to {high}"
        known = "–" if math.isnan(p) else f"[{', '.join(ends)}]".replace("inf", "∞")
        return [self.text, goal, self.found.text(self.form), known, p_text(p), verdict(self.holds, p)]


def p_text(p: float) -> str:
    """A p-value for a table."""
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict(holds: bool, p: float) -> str:
    """What is known of a claim whose estimate holds or not."""
    return ONE_SEED if math.isnan(p) else UNDECIDED if p >= LEVEL else YES if holds else NO


def corrected(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number. NaN, which is no test, stays NaN and does not count."""
    tested = iter(holm([p for p in p_values if not math.isnan(p)]))
    return [p if math.isnan(p) else next(tested) for p in p_values]


def rows(claims: Sequence[Claim]) -> list[list[str]]:
    """The row of each of some claims that are tested together."""
    p_values = corrected([claim.p for claim in claims])
    return [claim.row(p) for claim, p in zip(claims, p_values, strict=True)]


def claims_table(claims: Sequence[Claim]) -> str:
    """A Markdown table of claims that are tested together."""
    return table(["claim", "goal", "found", "95 % interval", "p", "holds"], rows(claims))


def together(claims: Sequence[Claim]) -> str:
    """The verdict on "all of these hold": no if one does not, yes if each does."""
    found = {row[-1] for row in rows(claims)}
    return next(answer for answer in (NO, ONE_SEED, UNDECIDED, YES) if answer in found)
