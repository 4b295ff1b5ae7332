"""Verdicts on claims: yes, no or undecided, from planted numbers whose answer is known."""

import pytest

from metrics.significance import Ratio, Sample
from studies.claims import Claim, claims_table, rows, together

LOW, HIGH, WIDE = Sample(1.0, 0.05, 8), Sample(2.0, 0.05, 8), Sample(1.1, 0.9, 8)


@pytest.mark.parametrize(
    ("claim", "answer"),
    [
        (Claim("", Ratio(LOW, HIGH), high=1.0), "yes"),
        (Claim("", Ratio(HIGH, LOW), high=1.0), "no"),
        (Claim("", Ratio(LOW, LOW), high=1.0), "undecided"),
        (Claim("", Ratio(LOW, WIDE), high=1.0), "undecided"),
        (Claim("", Ratio(WIDE, LOW), high=1.0), "undecided"),
        (Claim("", Ratio(LOW, Sample.of([2.0])), high=1.0), "undecided (one seed)"),
        (Claim("", LOW, high=1.2), "yes"),
        (Claim("", LOW, low=1.2), "no"),
        (Claim("", LOW, low=0.9, high=1.1), "yes"),
        (Claim("", LOW, low=0.99, high=1.5), "undecided"),  # it holds, but the lower limit is near
        (Claim("", LOW, low=1.2, high=1.3), "no"),
        (Claim("", LOW, low=0.5, high=0.8), "no"),
    ],
)
def test_the_verdict_is_that_of_the_planted_numbers(claim: Claim, answer: str) -> None:
    assert rows([claim])[0][-1] == answer
    assert together([claim]) == answer


def test_a_claim_alone_may_be_decided_and_among_others_not() -> None:
    close = Claim("close", Ratio(Sample(1.0, 0.1, 8), Sample(1.12, 0.1, 8)), high=1.0)  # p = 0.03
    others = [Claim(f"{i}", Ratio(LOW, LOW), high=1.0) for i in range(4)]
    assert rows([close])[0][-1] == "yes"
    assert rows([close, *others])[0][-1] == "undecided"
    single = Claim("one seed", Ratio(Sample.of([1.0]), LOW), high=1.0)
    assert rows([close, single])[0] == rows([close])[0]  # which is no test, so that it does not count


@pytest.mark.parametrize(
    ("ratios", "answer"), [((LOW, LOW), "yes"), ((LOW, HIGH), "no"), ((LOW, WIDE), "undecided"), ((WIDE, HIGH), "no")]
)
def test_all_of_several_claims_hold_only_if_each_does(ratios: tuple[Sample, Sample], answer: str) -> None:
    assert together([Claim("", found, high=1.2) for found in ratios]) == answer


def test_a_row_holds_limits_estimate_interval_and_p() -> None:
    text = claims_table([Claim("accuracy", Sample(0.982, 0.004, 3), low=0.98, form=".1%")])
    assert "| accuracy | ≥ 98.0% | 98.2% ± 0.4% | [97.2%, 99.2%] | 0.478 | undecided |" in text
    assert "| [0.48, 0.52] | < 0.001 | yes |" in claims_table([Claim("", Ratio(LOW, HIGH), high=1.0)])
    assert "| – | – | undecided (one seed) |" in claims_table([Claim("", Sample.of([1.0]), high=2.0)])
