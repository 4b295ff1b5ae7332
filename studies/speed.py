"""Writes docs/speed.md from the results of configs/studies/speed.yaml: what each change of a training is worth.

The template speed.md in this folder holds the text, with a name in braces for each table.
"""

import json
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from metrics.figures import MARKERS, PALETTE
from metrics.significance import Ratio, Sample
from storage.files import commit_bytes
from storage.text import read_text
from studies.claims import METHOD, Claim, claims_table
from studies.document import bold_if_least
from studies.presentation import filled, spread, table
from studies.recipes import Recipes
from studies.results import KEY, Result, read, select, unique
from studies.runner import Step

TEMPLATE = Path(__file__).with_suffix(".md")


def worth(curve: dict[int, float], distance: float) -> float:
    """The number of steps after which the baseline has this distance; beyond its lengths 0 or infinity.

    Args:
        curve: training steps → distance of the baseline. Between two lengths log distance is linear in log steps.
        distance: the distance of another training.
    """
    points = sorted(curve.items())
    if distance > points[0][1]:
        return 0.0
    for (fewer, before), (more, after) in pairwise(points):
        if before >= distance >= after and before > after:
            share = math.log(before / distance) / math.log(before / after)
            return fewer * (more / fewer) ** share
    return points[0][0] if distance == points[0][1] else math.inf


def times(steps: float, curve: dict[int, float], factor: float) -> str:
    """So many steps of the baseline times a factor; beyond the baseline's lengths the limit that is known."""
    ends = f"< {min(curve) * factor:.2f} ×" if steps == 0 else f"> {max(curve) * factor:.2f} ×"
    return f"{steps * factor:.2f} ×" if 0 < steps < math.inf else ends


def step_seconds(trained: Step) -> float:
    """The least time of a training step in a run's log, whose numbers are means over some steps."""
    lines = map(json.loads, read_text(trained.folder / "log.jsonl").splitlines())
    return min(line["perf/step_s"] for line in lines if "perf/step_s" in line)


def claims(results: Sequence[Result], first: str, tricks: Sequence[str], walk: int) -> list[Claim]:
    """That each trick has a lower Fréchet distance than the baseline after the same number of pictures."""

    def sample(recipe: str) -> Sample:
        return Sample.of([r[KEY] for r in select(results, recipe=recipe, steps=walk)])

    return [Claim(f"{name}: FD over the {first}'s", Ratio(sample(name), sample(first)), high=1.0) for name in tricks]


def plot(points: dict[str, tuple[int, float, list[float]]], lengths: Sequence[str], first: str, file: Path) -> None:
    """Plots Fréchet distance against steps and against seconds: the baseline as a line, the tricks as points.

    Args:
        points: recipe → training steps, seconds, FD ratio of each seed.
        lengths: the recipes that are the baseline, of different lengths.
        first: the name of the baseline.
        file: where the plot goes.
    """
    figure = Figure(figsize=(9, 4), layout="constrained", dpi=150)
    tricks = [name for name in points if name not in lengths]
    for which, (axes, unit) in enumerate(
        zip(figure.subplots(1, 2, sharey=True), ("training steps", "seconds of training"), strict=True)
    ):
        line = sorted((points[name][which], statistics.fmean(points[name][2])) for name in lengths)
        axes.plot(*zip(*line, strict=True), color="black", marker=".", label=first)
        for i, name in enumerate(tricks):
            values = points[name][2]
            mean = statistics.fmean(values)
            axes.errorbar(
                points[name][which], mean, [[mean - min(values)], [max(values) - mean]], label=name, capsize=2,
                marker=MARKERS[i % len(MARKERS)], color=PALETTE[i % len(PALETTE)], markersize=5, linestyle="",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=unit)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
        axes.set_xticks([x for x, _ in line], [f"{x:,.0f}" for x, _ in line])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25, linewidth=0.5, which="both")
    figure.axes[0].set_ylabel("FD ratio")
    named = figure.axes[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(file, format="png", metadata={"Software": None})


def write(study: Recipes, out: Path, docs: Path, command: str) -> Path:
    """Writes speed.md and speed.png from the results alone. Returns the document.

    Recipes without overlays are the baseline, of different lengths; the first is the one that others are compared with.

    Args:
        study: the study; it must have been run.
        out: the folder of its results.
        docs: the folder of the document.
        command: the command that repeats the study.

    Raises:
        FileNotFoundError: a result is missing.
    """
    plan, rates = study.plan(out), study.chosen_rates(out)
    results = plan.results()
    record = read(next(iter(plan.measured.values())).folder)
    usual = study.flags["run.steps"]
    length = {name: recipe.steps or usual for name, recipe in study.recipes.items()}
    same = [name for name, recipe in study.recipes.items() if not recipe.overlays]
    first, walks = next(iter(study.recipes)), sorted(unique(results, "steps"))
    seconds = {name: min(step_seconds(plan.trained[name, seed]) for seed in study.seeds) for name in study.recipes}

    def values(name: str, key: str, steps: int) -> list[float]:
        return [row[key] for row in select(results, recipe=name, steps=steps)]

    curve = {length[name]: statistics.fmean(values(name, KEY, walks[-1])) for name in same}
    body = []
    for name in study.recipes:
        steps, cost = worth(curve, statistics.fmean(values(name, KEY, walks[-1]))), seconds[name] / seconds[first]
        factors = () if name in same else (1 / length[name], 1 / length[name] / cost)
        body.append([
            name, f"{length[name]:,}", f"{rates[name]:g}", *(spread(values(name, KEY, n)) for n in walks),
            spread(values(name, "accuracy", walks[-1]), ".1%"), f"{cost:.2f}",
            *([times(steps, curve, factor) for factor in factors] or ["–", "–"]),
        ])  # fmt: skip
    head = ["", "steps", "lr", *(f"FD ratio, {n} Euler steps" for n in walks), "accuracy", "time of a step",
            "worth in pictures", "worth in seconds"]  # fmt: skip
    tuned = study.distances(out)
    candidates = sorted({rate for found in tuned.values() for rate in found})
    settings = record["settings"]
    parts = {
        "COMMAND": command,
        "SEEDS": str(len(study.seeds)),
        "STEPS": f"{usual:,}",
        "SAMPLES": str(results[0]["samples"]),
        "FLOOR": f"{record['floor']:.2f}",
        "TABLE": table(head, body),
        "METHOD": METHOD.format(test="Welch's t"),
        "CLAIMS": claims_table(claims(results, first, [name for name in study.recipes if name not in same], walks[-1])),
        "TUNED": table(
            ["", *(f"{rate:g}" for rate in candidates)],
            ([name, *(bold_if_least(found[rate], found) if rate in found else "–" for rate in candidates)]
             for name, found in tuned.items()),
        ),
        "MACHINE": "; ".join(f"{key} {settings[key]}" for key in ("features", "torch", "machine", "threads")),
    }  # fmt: skip
    commit_bytes(docs / "speed.md", filled(TEMPLATE, parts))  # first, since it says whose picture this is
    points = {
        name: (length[name], seconds[name] * length[name], values(name, KEY, walks[-1])) for name in study.recipes
    }
    plot(points, same, first, docs / "speed.png")
    return docs / "speed.md"
