"""What the document of recipes makes of results: ranks, claims, tables and the plot."""

from pathlib import Path

import pytest
from PIL import Image

from metrics.ranking import pareto_ranks
from metrics.significance import Ratio, Sample
from studies import document
from studies.claims import rows
from studies.presentation import curves
from studies.results import select


def test_pareto_fronts_by_hand() -> None:
    points = [(1, 4), (2, 2), (4, 1), (2, 5), (3, 3), (5, 5)]
    assert pareto_ranks(points) == [1, 1, 1, 2, 2, 3]
    assert pareto_ranks([(1, 1), (1, 1), (1, 2)]) == [1, 1, 2]  # equals do not dominate each other
    assert pareto_ranks([]) == []


def result(recipe: str, seed: int, steps: int, ratio: float, sampler: str = "euler", spacing: str = "trailing") -> dict:
    rest = dict.fromkeys(document.REST, 0.5)
    return rest | {
        "recipe": recipe, "seed": seed, "steps": steps, "evaluations": float(steps), "sampler": sampler,
        "spacing": spacing, "distance": 3 * ratio, "distance_ratio": ratio, "accuracy": 1 - ratio / 100,
        "samples": 1000, "guidance": 1.0,
    }  # fmt: skip


@pytest.fixture
def results() -> list[dict]:
    found = []
    for seed, more in ((1, 0.0), (2, 0.2)):
        for steps, fine in ((4, 2.0), (5, 1.5), (50, 1.0)):
            for recipe, factor in (("rf-lognorm", 1.0), ("rf-uniform", 1.5), ("eps-linear", 8.0), ("edm", 1.2)):
                found.append(result(recipe, seed, steps, factor * fine + more))
            found.append(result("eps-linear", seed, steps, 3 * fine + more, spacing="leading"))
        found.append(result("edm", seed, 5, 0.5 + more, "dpmpp_2m"))
        found.append(result("eps-linear", seed, 1000, 1.1, "ddpm"))
    return found


def test_the_shared_sampler_is_euler_on_each_recipe_s_own_spacing(results: list[dict]) -> None:
    plain = document.first_order(results)
    assert {r["spacing"] for r in plain} == {"trailing"}
    assert len(plain) == 2 * 3 * 4


def test_best_within_takes_the_best_mean_that_is_cheap_enough(results: list[dict]) -> None:
    assert document.best_within(results, "edm", 4) == (pytest.approx(2.5), [2.4, 2.6], "euler, trailing, 4 steps")
    found = document.best_within(results, "edm", 50)
    assert found is not None
    assert found[1:] == ([0.5, 0.7], "dpmpp_2m, trailing, 5 steps")
    assert document.best_within(results, "edm", 3) is None


def test_claims_are_ratios_of_means_over_seeds(results: list[dict]) -> None:
    found = {claim.text.partition(":")[0]: claim for claim in document.claims(results, ["eps-linear"], [])}
    four = found["4 evaluations"]
    assert four.found == Ratio(Sample.of([2.0, 2.2]), Sample.of([6.0, 6.2]))  # the better spacing of DDIM
    assert (four.high, four.holds) == (1 / 3, False)
    fifty = found["50 evaluations"]
    assert "edm: dpmpp_2m, trailing, 5 steps" in fifty.text
    assert not fifty.holds
    both = document.claims(results, [], ["edm", "eps-linear"])[:2]  # each other network is compared, not only the best
    assert [claim.text.partition("against ")[2].partition(":")[0] for claim in both] == [
        "another network (edm",
        "another network (eps-linear",
    ]
    (ancestral,) = (claim for text, claim in found.items() if text.startswith("DDPM's own sampler"))
    assert ancestral.found.text() == "1.00 (1.10 ± 0.00 against 1.10 ± 0.14)"
    assert found["5 steps"].holds


def test_ranks_average_over_steps_for_each_seed(results: list[dict]) -> None:
    plain = document.first_order(results)
    for r in select(plain, recipe="edm", seed=2, steps=5):
        r |= {"distance": 0.0, "accuracy": 1.0}
    ranks = document.average_ranks(plain, [4, 5, 50])
    assert ranks == {
        "rf-lognorm": [1.0, pytest.approx(4 / 3)],
        "edm": [2.0, pytest.approx(5 / 3)],
        "rf-uniform": [3.0, 3.0],
        "eps-linear": [4.0, 4.0],
    }


def test_the_paper_s_order_is_claimed_of_neighbours_in_its_table() -> None:
    ranks = {
        "ddpm": [1.0] * 8,  # not in the paper's table
        "edm": [2.0, 2.2] * 4,
        "eps-linear": [4.0, 4.2] * 4,
        "rf-lognorm": [1.0, 1.2] * 4,
        "rf-uniform": [4.1, 4.2] * 4,
    }
    found = document.order_claims(ranks)
    assert [claim.text.partition(" (")[0] for claim in found] == [
        "rf-lognorm before eps-linear",
        "eps-linear before rf-uniform",
        "rf-uniform before edm",
    ]
    assert [row[-1] for row in rows(found)] == ["yes", "undecided", "no"]
    assert document.order_claims({"rf-lognorm": [1.0]}) == []


def test_recipes_that_differ_significantly_from_the_first_are_marked() -> None:
    planted = {"first": 2.0, "same": 2.0, "lower": 1.0, "higher": 3.0}
    found = [result(r, seed, 4, x + 0.05 * (seed % 3)) for r, x in planted.items() for seed in range(8)]
    found += [result("few", seed, 4, 1.0) for seed in range(2)] + [result("none", 0, 4, 1.0) | {"distance_ratio": None}]
    assert document.marked(found, [*planted, "none"], [4]) == [
        ["first", "2.04 ± 0.04"],
        ["same", "2.04 ± 0.04"],
        ["lower", "**1.04 ± 0.04**"],
        ["higher", "*3.04 ± 0.04*"],
        ["none", "–"],
    ]
    one = [r for r in found if r["seed"] == 0]
    assert document.marked(one, list(planted), [4])[2] == ["lower", "1.00"]  # one seed tells nothing


def test_the_document_holds_every_number_and_the_plot_is_a_picture(results: list[dict], tmp_path: Path) -> None:
    tuned = {"edm": {0.001: 3.0, 0.002: 2.5}}
    facts = dict.fromkeys(["rf-lognorm", "rf-uniform", "eps-linear", "edm"], ("1,234", "0.002"))
    settings = {
        "per_digit": 100,
        "real_distance": 2.9,
        "floor": 0.66,
        "features": "judge",
        "torch": "2",
        "machine": "m",
    }
    text = document.document(results, [], tuned, facts, "python compare.py x", settings | {"threads": 1})
    assert "`python compare.py x`" in text
    assert "| edm | 2.50 ± 0.14 | 1.90 ± 0.14 | 1.30 ± 0.14 |" in text
    assert "| real digits | 0.66 | 0.66 | 0.66 |\n" in text
    assert "| real digits | 0.66 | 0.66 | 0.66 | 0.66 |\n" in text  # of the best samplers
    assert "| eps-linear | 4.00 ± 0.00 | 4.00 ± 0.00 | 4.00 ± 0.00 |" in text  # ranks
    assert "| ≤ 1.00 | 0.68 (1.60 ± 0.14 against 2.35 ± 0.14) | [0.25, 0.93] | 0.135 | undecided |" in text
    assert "All of them\nhold: undecided." in text  # 3 > 2, 3 > 2 and 1 < 4, in two seeds
    assert "| edm | 3.00 | **2.50** |" in text
    assert all(line.count("|") == text.splitlines()[i - 1].count("|") for i, line in enumerate(text.splitlines())
               if line.startswith("|") and text.splitlines()[i - 1].startswith("|"))  # fmt: skip
    curves(document.first_order(results), 0.66, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 600
