"""Writes docs/fewstep.md from the results of configs/studies/fewstep.yaml: claims, tables and pictures.

The template fewstep.md in this folder holds the text, with a name in braces for each table.
"""

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from data import digits
from data.shapes import CATEGORIES
from metrics.significance import Sample
from pipeline import Pipeline
from pipeline.sampling import Sampling
from storage.files import commit_bytes
from storage.text import read_json
from studies.claims import METHOD, Claim, claims_table
from studies.presentation import curves, filled, real_row, spread, table
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


def claims(rows: list[Result], straight: list[Result], guided: list[Result]) -> list[Claim]:
    """The claims about the digits."""
    one, best = {"recipe": "2-rectified", "steps": 1}, {"recipe": "teacher", "steps": 8}
    learned, teacher = {"recipe": "guided"}, {"recipe": "teacher"}
    right = values(rows, "accuracy", **one)
    bends = ratios(straight, "straightness", {"recipe": "2-rectified", "steps": FINE}, teacher | {"steps": FINE})
    meanflow = [Sample.of(values(rows, "distance_ratio", recipe="meanflow", steps=n)) for n in (1, 2)]
    cost = statistics.fmean(ratios(guided, "evaluations", learned, teacher))
    return [
        Claim("straightness S of the 2-rectified model over the teacher's", Sample.of(bends), high=0.05, form=".4f"),
        Claim("one Euler step, 2-rectified: FD ratio", Sample.of(values(rows, "distance_ratio", **one)), high=1.03),
        Claim("one Euler step, 2-rectified: accuracy", Sample.of(right), low=0.98, form=".1%"),
        Claim("MeanFlow from scratch, one step: FD ratio", meanflow[0], high=1.3),
        Claim("MeanFlow from scratch, two steps: FD ratio", meanflow[1], high=1.15),
        Claim(f"guidance distillation over the guided teacher, 8 steps, at {cost:g} of its evaluations: FD",
              Sample.of(ratios(guided, "distance_ratio", learned, teacher)), low=0.95, high=1.05),
        *(Claim(f"{words} of one step, 2-rectified, over the teacher's in 8", Sample.of(ratios(rows, key, one, best)),
                low=0.9) for words, key in (("recall", "recall"), ("pairwise distance", "pairwise_distance"))),
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


def shapes(measured: list[Result], judged: list[Result], teacher: str, floor: float) -> tuple[str, str]:
    """Two tables of the shapes: distances, and the share of right pictures by category.

    `teacher` is the teacher's recipe, `floor` the FD ratio of real scenes.
    """

    def name(row: Result) -> str:
        recipe = "teacher" if row["recipe"] == teacher else row["recipe"]
        return f"{recipe}, {row['steps']} step{'s' * (row['steps'] > 1)}"

    full = select(measured, recipe=teacher, steps=20)[0]
    shown = [full, *(row for row in measured if row is not full and row["steps"] < 20)]
    keys = (("evaluations", "g"), ("distance_ratio", ".2f"), ("accuracy", ".1%"), ("recall", ".2f"),
            ("pairwise_distance", ".1f"))  # fmt: skip
    body = [[name(row), *(format(row[key], form) for key, form in keys),
             f"{row['distance_ratio'] / full['distance_ratio']:.2f}"] for row in shown]  # fmt: skip
    body.append(["real scenes", "–", f"{floor:.2f}", "–", "–", "–", f"{floor / full['distance_ratio']:.2f}"])
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
    judged, measured = (
        [row for name in (f"{kind}-20", kind) for row in rows_of(place(f"shapes/{name}"))]
        for kind in ("judged", "measured")
    )
    floor, real_scenes = (
        read(place(name))["floor"] for name in (f"digits/{study.seeds[0]}/measured", "shapes/measured")
    )
    distances, categories = shapes(measured, judged, place("shapes/teacher").name, real_scenes)
    lengths = [[name, *(spread(values(straight, key, recipe=name), form) for key, form in
                        (("straightness", ".3f"), ("path_length", ".2f"), ("distance_ratio", ".2f")))]
               for name in ("teacher", "2-rectified")]  # fmt: skip
    lengths.append(["real digits", "–", "–", f"{floor:.2f}"])
    recipes, first = unique(rows, "recipe"), f"digits/{study.seeds[0]}"
    parts = {
        "COMMAND": command,
        "SEEDS": str(len(study.seeds)),
        "METHOD": METHOD.format(test="Student's t"),
        "CLAIMS": claims_table(claims(rows, straight, guided)),
        "DISTANCE": by_steps(rows, recipes, "distance_ratio", ".2f") + real_row(floor, len(STEPS)),
        "ACCURACY": by_steps(rows, recipes, "accuracy", ".1%"),
        "RECALL": by_steps(rows, recipes, "recall", ".2f"),
        "PAIRWISE": by_steps(rows, recipes, "pairwise_distance", ".2f"),
        "STRAIGHT": table(["50 Euler steps", "S", "path length", "FD ratio"], lengths),
        "GRID": grids(place(f"{first}/grid")),
        "SHAPES": distances,
        "CATEGORIES": categories,
    }
    commit_bytes(docs / "fewstep.md", filled(TEMPLATE, parts))  # first, since it says whose pictures these are
    curves(rows, floor, docs / "fewstep.png")
    trajectories(place(f"{first}/teacher"), place(f"{first}/2-rectified"), docs / "fewstep-trajectories.png")
    shutil.copyfile(place(f"{first}/measured") / "sheet.png", docs / "fewstep-digits.png")
    shutil.copyfile(place("shapes/measured") / "sheet.png", docs / "fewstep-shapes.png")
    return docs / "fewstep.md"
