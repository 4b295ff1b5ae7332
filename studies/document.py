"""Writes docs/compare.md from the results of a study of recipes: claims, tables and a plot."""

import math
import shutil
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import safe_open

from metrics.ranking import pareto_ranks
from metrics.significance import LEVEL, Ratio, Sample
from metrics.table import MISSING, column
from storage.files import commit_bytes
from studies.claims import METHOD, Claim, claims_table, corrected, together
from studies.presentation import curves, real_row, spread, table
from studies.recipes import Recipes
from studies.results import KEY, Result, read, select, unique

LIMITS = (4, 8, 25, 50)  # numbers of evaluations in the table of the best samplers


def first_order(results: Sequence[Result]) -> list[Result]:
    """The results of Euler's method, which is DDIM on a chain, on the first spacing of each recipe."""
    own = {r["recipe"]: r["spacing"] for r in reversed(select(results, sampler="euler"))}
    return [r for r in select(results, sampler="euler") if r["spacing"] == own[r["recipe"]]]


def average_ranks(results: Sequence[Result], steps: Sequence[int]) -> dict[str, list[float]]:
    """Recipe → its Pareto rank by distance and accuracy, averaged over these step counts, for each seed."""
    means: dict[str, list[float]] = {}
    for seed in unique(results, "seed"):
        ranks: dict[str, list[int]] = {}
        for count in steps:
            group = select(results, steps=count, seed=seed)
            points = [(math.inf if r["distance"] is None else r["distance"], -(r["accuracy"] or 0.0)) for r in group]
            for r, rank in zip(group, pareto_ranks(points), strict=True):
                ranks.setdefault(r["recipe"], []).append(rank)
        for recipe, found in ranks.items():
            means.setdefault(recipe, []).append(statistics.fmean(found))
    return means


def order_claims(ranks: dict[str, list[float]]) -> list[Claim]:
    """That each recipe has a smaller mean rank than the one that follows it in the paper's table."""
    there = [recipe for recipe in PAPER if recipe in ranks]
    return [
        Claim(
            f"{a} before {b} (there {PAPER[a]} and {PAPER[b]})",
            Ratio(Sample.of(ranks[a]), Sample.of(ranks[b])),
            high=1.0,
        )
        for a, b in pairwise(there)
    ]


def marked(results: Sequence[Result], recipes: Sequence[str], steps: Sequence[int]) -> list[list[str]]:
    """The cells of the table of distance ratios: bold if below the first recipe's, italic if above, significantly."""

    def sample(recipe: str, count: int) -> Sample | None:
        found = [r[KEY] for r in select(results, recipe=recipe, steps=count)]
        return None if None in found or not found else Sample.of(found)

    samples = {(recipe, count): sample(recipe, count) for recipe in recipes for count in steps}
    against = {
        place: Ratio(found, base)
        for place, found in samples.items()
        if found and place[0] != recipes[0] and (base := samples[recipes[0], place[1]])
    }
    p_values = dict(zip(against, corrected([ratio.p(1.0) for ratio in against.values()]), strict=True))

    def cell(place: tuple[str, int]) -> str:
        found = samples[place]
        text = found.text() if found else MISSING
        if not p_values.get(place, 1.0) < LEVEL:
            return text
        return f"**{text}**" if against[place].value < 1 else f"*{text}*"

    return [[recipe, *(cell((recipe, count)) for count in steps)] for recipe in recipes]


def best_within(results: Sequence[Result], recipe: str, evaluations: float) -> tuple[float, list[float], str] | None:
    """The best sampler, spacing and steps with at most so many evaluations: (mean, value for each seed, its name).

    The best has the least mean distance ratio. None if there is no such result.
    """
    ways: dict[tuple, list[Result]] = {}
    for r in select(results, recipe=recipe):
        if r["evaluations"] <= evaluations and r[KEY] is not None:
            ways.setdefault((r["sampler"], r["spacing"], r["steps"]), []).append(r)
    found = [
        (
            statistics.fmean(r[KEY] for r in group),
            [r[KEY] for r in group],
            f"{way[0]}, {way[1].partition(':')[0]}, {way[2]} steps",
        )
        for way, group in ways.items()
    ]
    return min(found, default=None)


def claims(results: Sequence[Result], chains: Sequence[str], others: Sequence[str]) -> list[Claim]:
    """The claims of the literature that these results can test: each that a ratio of two distances is not above some.

    Args:
        results: results of all samplers.
        chains: the recipes that are DDPM on the same network.
        others: the recipes on another network.
    """
    plain = first_order(results)
    recipes = unique(results, "recipe")
    straight = [r for r in recipes if r.startswith("rf")]
    found: list[Claim] = []

    def values(rows: Iterable[Result], **wanted: object) -> list[float]:
        return [r[KEY] for r in select(rows, **wanted) if r[KEY] is not None]

    def best_straight(steps: int) -> tuple[str, list[float]]:
        each = {r: values(plain, recipe=r, steps=steps) for r in straight}
        there = [(name, found) for name, found in each.items() if found]
        return min(there, key=lambda item: statistics.fmean(item[1]), default=("none", []))

    def claim(text: str, goal: float, above: Sequence[float], below: Sequence[float]) -> None:
        if above and below:
            found.append(Claim(text, Ratio(Sample.of(above), Sample.of(below)), high=goal))

    steps = unique(plain, "steps")
    for chain in chains:
        if 4 in steps and (chained := best_within(select(results, sampler="euler", steps=4), chain, 4)):
            name, ours = best_straight(4)
            text = f"4 evaluations: the best RF ({name}) against DDIM on the same network ({chain}: {chained[2]})"
            claim(text, 1 / 3, ours, chained[1])
    if 50 in steps:
        name, ours = best_straight(50)
        rivals = {r: way for r in recipes if r not in straight and (way := best_within(results, r, 50))}
        groups = [("the best opponent on the same network", rivals.keys() - set(others))]
        groups += [("another network", {other} & rivals.keys()) for other in others]
        for words, group in groups:
            if group:
                rival = min(group, key=lambda r: rivals[r][0])
                text = f"50 evaluations: the best RF by Euler ({name}) against {words}"
                claim(f"{text} ({rival}: {rivals[rival][2]})", 1.05, ours, rivals[rival][1])
    for chain in chains:
        text = f"DDPM's own sampler, 1000 steps ({chain}), against rf-lognorm by 50 Euler steps, equal training"
        ancestral = values(results, recipe=chain, sampler="ddpm", steps=1000)
        claim(text, 1.3, ancestral, values(plain, recipe="rf-lognorm", steps=50))
    if 5 in steps:
        text = "5 steps: rf-lognorm against rf-uniform, ahead in the paper"
        claim(text, 1.0, *(values(plain, recipe=r, steps=5) for r in ("rf-lognorm", "rf-uniform")))
    return found


PAPER = {  # the mean ranks of Esser et al. 2024, Table 1, "all"
    "rf-lognorm": 1.54, "rf-mode": 2.75, "eps-linear": 2.88, "rf-cosmap": 4.13, "rf-uniform": 5.67, "v-linear": 6.83,
    "v-cosine": 9.17, "edm": 15.58,
}  # fmt: skip

REST = {  # the other measures: key → number format
    "accuracy": ".1%", "kernel_distance": ".4f", "inception_score": ".2f", "spatial_distance": ".2f",
    "precision": ".1%", "recall": ".1%", "neighbour_ratio": ".2f", "path_length": ".2f", "straightness": ".2f",
}  # fmt: skip

INTRODUCTION = """\
# Rectified flow against DDPM, EDM and the rest

Written by `{command}` from its results alone.

{note}Every recipe is trained with {seeds}. For one seed, all recipes see the same batches in the same order with the
same noise. Numbers are mean ± standard deviation over the models of the seeds: {samples:,} samples each, {per_digit} of
each digit, from held-out captions, at guidance {guidance:g}. The *FD ratio* is the Fréchet distance to the held-out
digits on a classifier's features, divided by that of the training digits ({real_distance:.2f}). The same number of real
digits has {floor:.2f}.

![Fréchet distance against function evaluations](compare.png)

![The same seeds, recipes as rows, step counts as columns](compare-sheet.png)
"""

QUICK = """\
**The quick version: it has too little training and too few pictures for a result.**

"""

CLAIMS = f"""\
## Claims and results

{METHOD.format(test="Welch's t")}
The interval is of the ratio of two means, by inversion of the test: Fieller's, for unequal deviations. "The best" of
several is chosen by these same numbers, which no correction accounts for.
"""

FIRST_ORDER = """\
## FD ratio by first-order steps

Euler's method, which on a chain is DDIM with η = 0. A step is one evaluation. Each recipe has its own time spacing
({spacings}).

Against {first} in the same number of steps, a number in bold is significantly lower and one in italics significantly
higher (Welch's t, Holm's correction for the whole table, p < 0.05). All others are undecided.
"""

BEST = """\
## FD ratio of the best sampler

The columns limit the number of evaluations. The best of the measured samplers and spacings is chosen on the same
pictures, so recipes with more choices look somewhat better than they are.
"""

RANKS = """\
## Ranks

Pareto rank by Fréchet distance and accuracy (Esser et al. 2024, §5.1), Euler, averaged over step counts; then mean ±
deviation over seeds.
"""

ORDER = """\
## The order of the SD3 paper

Esser et al. 2024, Table 1, ranks these {count} recipes by FID and CLIP score, on larger models and data. The claims:
each comes before the next here, too, by its rank over all step counts. They are tested like those above. All of them
hold: {whole}.
"""

STRAIGHT = """\
## The other measures, {steps} Euler steps

Path length and straightness are measured in the coordinates w = z/(a + b), τ = b/(a + b). In these every path is a
straight line, so recipes can be compared. KD and sFD are kernel distance and spatial Fréchet distance.
"""

TUNED = """\
The learning rates are chosen by the Fréchet distance to the *training* digits, by Euler's method, after a training with
a separate seed. Network, batch and steps come from the demo, where they were chosen for rf-lognorm on the held-out
digits.
"""


def document(
    results: Sequence[Result],
    longer: Sequence[Result],
    tuned: dict[str, dict[float, float]],
    facts: dict[str, tuple[str, str]],
    command: str,
    settings: dict[str, Any],
    chains: Sequence[str] = ("eps-linear", "ddpm"),
    others: Sequence[str] = (),
) -> str:
    """The whole document in Markdown, without its pictures `compare.png` and `compare-sheet.png`.

    Args:
        results: results of all models, samplers and step counts.
        longer: results of longer trainings.
        tuned: recipe → learning rate → distance to the training pictures.
        facts: recipe → (parameters, learning rate).
        command: the command that repeats the study.
        settings: settings of the measurements, with the floor.
        chains: as for `claims`.
        others: as for `claims`.
    """
    plain = first_order(results)
    recipes, steps, seeds = unique(plain, "recipe"), sorted(unique(plain, "steps")), unique(plain, "seed")
    most, floor = max(steps), settings["floor"]

    def cells(recipe: str, key: str, form: str, count: int) -> str:
        return spread([r[key] for r in select(plain, recipe=recipe, steps=count)], form)

    def best(recipe: str, evaluations: int) -> str:
        found = best_within(results, recipe, evaluations)
        return f"{spread(found[1])} ({found[2]})" if found else "–"

    own = {r["recipe"]: r["spacing"].partition(":")[0] for r in plain}
    spacings = "; ".join(f"{s}: {', '.join(r for r in recipes if own[r] == s)}" for s in dict.fromkeys(own.values()))
    sets = {"all": steps} | {f"{n} steps": [n] for n in (5, 50) if n in steps}
    ranks = {name: average_ranks(plain, counts) for name, counts in sets.items()}
    order = order_claims(ranks["all"])
    parts = [
        INTRODUCTION.format(
            command=command,
            note=QUICK if "--quick" in command else "",
            seeds="one seed" if len(seeds) == 1 else f"{len(seeds)} seeds",
            samples=results[0]["samples"],
            guidance=results[0]["guidance"],
            **{key: settings[key] for key in ("per_digit", "real_distance", "floor")},
        ),
        CLAIMS,
        claims_table(claims(results, chains, others)),
        FIRST_ORDER.format(spacings=spacings, first=recipes[0]),
        table(["recipe", *map(str, steps)], marked(plain, recipes, steps)) + real_row(floor, len(steps)),
        BEST,
        table(["recipe", *map(str, LIMITS)], ([r, *(best(r, n) for n in LIMITS)] for r in recipes))
        + real_row(floor, len(LIMITS)),
        RANKS,
        table(
            ["recipe", *ranks],
            (
                [r, *(spread(rank[r]) for rank in ranks.values())]
                for r in sorted(recipes, key=lambda recipe: statistics.fmean(ranks["all"][recipe]))
            ),
        ),
        *([ORDER.format(count=len(order) + 1, whole=together(order)), claims_table(order)] if order else []),
        STRAIGHT.format(steps=most),
        table(
            ["recipe", *(column(key).title for key in REST)],
            ([r, *(cells(r, key, form, most) for key, form in REST.items())] for r in recipes),
        ),
    ]
    if longer:
        ways = [select(longer, recipe=r)[0] for r in unique(longer, "recipe")]
        parts += [
            "## FD ratio after more training, one seed\n",
            table(
                ["training steps", *(f"{w['recipe']}, {w['sampler']}, {w['steps']} steps" for w in ways)],
                (
                    [
                        f"{budget:,}",
                        *(spread([r[KEY] for r in select(longer, budget=budget, recipe=w["recipe"])]) for w in ways),
                    ]
                    for budget in sorted(unique(longer, "budget"))
                ),
            )
            + real_row(floor, len(ways)),
        ]
    parts += ["## Settings\n", table(["recipe", "parameters", "learning rate"], ([r, *facts[r]] for r in recipes))]
    rates = sorted({rate for found in tuned.values() for rate in found})
    if max(map(len, tuned.values())) > 1:
        body = (
            [r, *("–" if rate not in found else bold_if_least(found[rate], found) for rate in rates)]
            for r, found in tuned.items()
        )
        parts += [TUNED, table(["recipe", *(f"{rate:g}" for rate in rates)], body)]
    parts.append("; ".join(f"{key} {settings[key]}" for key in ("features", "torch", "machine", "threads")) + "\n")
    return "\n".join(parts)


def bold_if_least(distance: float, found: dict[float, float]) -> str:
    """The distance, in bold if it is the least."""
    return f"**{distance:.2f}**" if distance == min(found.values()) else f"{distance:.2f}"


def parameters(model: Path) -> int:
    """The number of parameters of the network in a model folder."""
    with safe_open(next(model.glob("*/diffusion_pytorch_model.safetensors")), "pt") as file:
        names = set(file.keys()) - {"pos_embed.pos_embed"}  # a fixed table is no parameter
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def write(study: Recipes, out: Path, docs: Path, command: str) -> Path:
    """Writes compare.md, compare.png and compare-sheet.png from the results alone. Returns the document.

    Args:
        study: the study; it must have been run.
        out: the folder of its results.
        docs: the folder of the document.
        command: the command that repeats the study.

    Raises:
        FileNotFoundError: a result is missing.
    """
    plan, rates = study.plan(out), study.chosen_rates(out)
    found = plan.results()
    longer = [
        row | {"recipe": name, "budget": steps}
        for (name, steps), step in plan.longer.items()
        for row in read(step.folder)["rows"]
    ]
    first = read(next(iter(plan.measured.values())).folder)
    facts = {
        name: (
            f"{parameters(plan.trained[name, study.seeds[0]].folder / 'model'):,}",
            f"{rates[name]:g}" + (f", as {recipe.tuned_as}" if recipe.tuned_as else ""),
        )
        for name, recipe in study.recipes.items()
    }
    others = [name for name, r in study.recipes.items() if any("configs/network/" in f for f in r.overlays)]
    settings = first["settings"] | {"floor": first["floor"]}
    text = document(found, longer, study.distances(out), facts, command, settings, others=others)
    commit_bytes(docs / "compare.md", text.encode())  # first, since it says whose pictures these are
    curves(first_order(found), first["floor"], docs / "compare.png")
    shutil.copyfile(plan.sheet.folder / "sheet.png", docs / "compare-sheet.png")
    return docs / "compare.md"
