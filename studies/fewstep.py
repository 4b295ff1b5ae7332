"""Writes docs/fewstep.md from the results of configs/studies/fewstep.yaml: claims, tables and pictures.

The template fewstep.md in this folder holds the text, with a name in braces for each table.
"""

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from data import digits
from data.shapes import CATEGORIES
from pipeline import Pipeline
from pipeline.sampling import Sampling
from storage.files import commit_bytes
from storage.text import read_json
from studies.presentation import curves, spread, table
from studies.results import Result, read, select, unique
from studies.steps import Steps

TEMPLATE = Path(__file__).with_suffix(".md")
STEPS = (1, 2, 4, 8)
WALKS, FINE = 24, 50  # number of plotted trajectories, and their steps


def rows_of(folder: Path, seed: int | None = None) -> list[Result]:
    """The rows of an evaluation. The recipe of a row is the name of the model's folder."""
    return [row | {"recipe": Path(row["folder"]).name, "seed": seed} for row in read(folder)["rows"]]


def values(rows: Sequence[Result], key: str, **wanted: object) -> list[float]:
    """The values of a key, from the rows whose other keys have the wanted values."""
    return [row[key] for row in select(rows, **wanted)]


def ratios(rows: Sequence[Result], key: str, above: dict[str, Any], below: dict[str, Any]) -> list[float]:
    """One measurement divided by another, for each seed."""
    pairs = zip(values(rows, key, **above), values(rows, key, **below), strict=True)
    return [a / b for a, b in pairs]


class Claim(NamedTuple):
    """A claim: the asked number, and the numbers found, one for each seed."""

    what: str
    asked: str
    found: list[float]
    holds: bool
    form: str = ".2f"


def claims(rows: list[Result], straight: list[Result], guided: list[Result]) -> list[Claim]:
    """The claims about the digits."""
    teacher, two = {"recipe": "teacher", "steps": FINE}, {"recipe": "2-rectified", "steps": FINE}
    one = {"recipe": "2-rectified", "steps": 1}
    s = ratios(straight, "straightness", two, teacher)
    fd, right = values(rows, "distance_ratio", **one), values(rows, "accuracy", **one)
    mean1, mean2 = (values(rows, "distance_ratio", recipe="meanflow", steps=n) for n in (1, 2))
    by_scale = ratios(guided, "distance_ratio", {"recipe": "guided"}, {"recipe": "teacher"})
    cost = ratios(guided, "evaluations", {"recipe": "guided"}, {"recipe": "teacher"})
    best = {"recipe": "teacher", "steps": 8}
    kept = [
        (f"{key} of one step, 2-rectified, over the teacher's in 8", ratios(rows, name, one, best))
        for key, name in (("recall", "recall"), ("pairwise distance", "pairwise_distance"))
    ]

    def mean(found: list[float]) -> float:
        return statistics.fmean(found)

    return [
        Claim("straightness S of the 2-rectified model over the teacher's", "≤ 0.05", s, mean(s) <= 0.05, ".4f"),
        Claim("one Euler step, 2-rectified: FD ratio", "≤ 1.03", fd, mean(fd) <= 1.03),
        Claim("one Euler step, 2-rectified: accuracy", "≥ 98 %", right, mean(right) >= 0.98, ".1%"),
        Claim("MeanFlow from scratch, one step: FD ratio", "≤ 1.3", mean1, mean(mean1) <= 1.3),
        Claim("MeanFlow from scratch, two steps: FD ratio", "≤ 1.15", mean2, mean(mean2) <= 1.15),
        Claim("learned guidance over the guided teacher, 8 steps: FD", "within 5 %", by_scale,
              abs(mean(by_scale) - 1) <= 0.05),
        Claim("its evaluations over the teacher's", "0.5", cost, mean(cost) == 0.5),
        *(Claim(what, "≥ 0.9", found, mean(found) >= 0.9) for what, found in kept),
    ]  # fmt: skip


def by_steps(rows: list[Result], recipes: Sequence[str], key: str, form: str) -> str:
    """The table of one key by recipe and number of steps."""
    body = [[name, *(spread(values(rows, key, recipe=name, steps=n), form) for n in STEPS)] for name in recipes]
    return table(["", *(f"{n} step{'s' * (n > 1)}" for n in STEPS)], body)


def walk(pipe: Pipeline, prompts: list[str]) -> Tensor:
    """The states of Euler walks in FINE steps, (FINE + 1, WALKS, numbers)."""
    found: list[Tensor] = []
    sampling = Sampling(FINE, 1.0)
    pipe(prompts, range(len(prompts)), sampling=sampling, callback=lambda done, z, x0: found.append(z.flatten(1)))
    return torch.stack(found)


def trajectories(before: Path, after: Path, file: Path) -> None:
    """Plots walks of teacher and student from the same noise, on the first two principal axes of the teacher's."""
    prompts = [digits.captions(i % 10, digits.HELD_OUT_TEMPLATES)[0] for i in range(WALKS)]
    walks = {name: walk(Pipeline.load(path / "model"), prompts) for name, path in
             (("teacher", before), ("2-rectified", after))}  # fmt: skip
    points = walks["teacher"].flatten(0, 1)
    mean = points.mean(0)
    _, _, axes = torch.linalg.svd(points - mean, full_matrices=False)
    figure = Figure(figsize=(9, 4.5), layout="constrained", dpi=150)
    for place, (name, states) in zip(figure.subplots(1, 2, sharex=True, sharey=True), walks.items(), strict=True):
        flat = (states - mean) @ axes[:2].T  # (FINE + 1, WALKS, 2)
        for line in flat.unbind(1):
            place.plot(*line.T.tolist(), color="tab:blue", linewidth=1)
        for at, colour, label in ((0, "lightgrey", "noise"), (-1, "tab:red", "picture")):
            place.scatter(
                *flat[at].T.tolist(), s=12, color=colour, edgecolor="black", linewidth=0.4, zorder=3, label=label
            )
        place.set(title=name, xticks=[], yticks=[])
    figure.axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(file, format="png", metadata={"Software": None})


def shapes(measured: list[Result], judged: list[Result], teacher: str) -> tuple[str, str]:
    """Two tables of the shapes: distances, and the share of right pictures by category. `teacher` is its recipe."""

    def name(row: Result) -> str:
        recipe = "teacher" if row["recipe"] == teacher else row["recipe"]
        return f"{recipe}, {row['steps']} step{'s' * (row['steps'] > 1)}"

    full = select(measured, recipe=teacher, steps=20)[0]
    shown = [full, *(row for row in measured if row is not full and row["steps"] < 20)]
    keys = (("evaluations", "g"), ("distance_ratio", ".2f"), ("accuracy", ".1%"), ("recall", ".2f"),
            ("pairwise_distance", ".1f"))  # fmt: skip
    body = [[name(row), *(format(row[key], form) for key, form in keys),
             f"{row['distance_ratio'] / full['distance_ratio']:.2f}"] for row in shown]  # fmt: skip
    head = ["", "evaluations", "FD ratio", "right", "recall", "pairwise distance", "FD over the teacher's in 20"]
    categories = [[name(row), *(f"{row[category]:.0%}" for category in CATEGORIES)] for row in judged]
    return table(head, body), table(["", *CATEGORIES], categories)


def grids(folder: Path) -> str:
    """The table of searched times."""
    found = read_json(folder / "grid.json")["found"]
    body = [[str(row["steps"]), *(f"{row['distance'][name]:.4f}" for name in ("uniform", "searched")),
             row["spacing"].partition("=")[2]] for row in found]  # fmt: skip
    return table(["steps", "equal steps", "searched", "times"], body)


def write(study: Steps, out: Path, docs: Path, command: str) -> Path:
    """Writes fewstep.md and its pictures from the results alone. Returns the document.

    Args:
        study: the study; it must have been run.
        out: the folder of its results.
        docs: the folder of the document.
        command: the command that repeats the study.

    Raises:
        FileNotFoundError: a result is missing.
    """

    def place(name: str) -> Path:
        return study.folder(name, out)

    rows, straight, guided = (
        [row for seed in study.seeds for row in rows_of(place(f"digits/{seed}/{name}"), seed)]
        for name in ("measured", "straightness", "guidance")
    )
    judged = [row for steps in (20, 1, 2) for row in rows_of(place(f"shapes/judged-{steps}"))]
    distances, categories = shapes(rows_of(place("shapes/measured")), judged, place("shapes/teacher").name)
    found = [[c.what, c.asked, spread(c.found, c.form), "yes" if c.holds else "no"]
             for c in claims(rows, straight, guided)]  # fmt: skip
    lengths = [[name, *(spread(values(straight, key, recipe=name), form) for key, form in
                        (("straightness", ".3f"), ("path_length", ".2f"), ("distance_ratio", ".2f")))]
               for name in ("teacher", "2-rectified")]  # fmt: skip
    recipes, first = unique(rows, "recipe"), f"digits/{study.seeds[0]}"
    parts = {
        "COMMAND": command,
        "SEEDS": str(len(study.seeds)),
        "CLAIMS": table(["digits", "asked", "found", "holds"], found),
        "DISTANCE": by_steps(rows, recipes, "distance_ratio", ".2f"),
        "ACCURACY": by_steps(rows, recipes, "accuracy", ".1%"),
        "RECALL": by_steps(rows, recipes, "recall", ".2f"),
        "PAIRWISE": by_steps(rows, recipes, "pairwise_distance", ".2f"),
        "STRAIGHT": table(["50 Euler steps", "S", "path length", "FD ratio"], lengths),
        "GRID": grids(place(f"{first}/grid")),
        "SHAPES": distances,
        "CATEGORIES": categories,
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace("{" + name + "}", part.rstrip("\n"))
    commit_bytes(docs / "fewstep.md", text.encode())  # first, since it says whose pictures these are
    curves(rows, None, docs / "fewstep.png")
    trajectories(place(f"{first}/teacher"), place(f"{first}/2-rectified"), docs / "fewstep-trajectories.png")
    shutil.copyfile(place(f"{first}/measured") / "sheet.png", docs / "fewstep-digits.png")
    shutil.copyfile(place("shapes/measured") / "sheet.png", docs / "fewstep-shapes.png")
    return docs / "fewstep.md"
