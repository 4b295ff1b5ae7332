"""Writes the report of `gpu.json`: `gpu.md` with a table for each group, and a picture of where the time goes."""

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import Row
from benchmarks.gpu.parts import GROUPS, PARTS
from engine.hardware import find
from storage.files import commit_bytes

TITLES = {
    "card": "The card",
    "correctness": "Correct: the same as on a CPU",
    "training": "Training steps",
    "sampling": "Sampling: 28 steps with guidance, bfloat16, without text encoders and VAE",
    "profile": "Where a training step's time goes",
    "trainer": "The whole trainer",
}


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes `gpu.md`, and `gpu-profile.png` if there is a profile."""
    lines = ["# What a GPU does", "", f"`{report['command']}`", ""]
    lines += table([{"": name, " ": value} for name, value in report["machine"].items()])
    for group in GROUPS:
        parts = {name: found for name, found in report["parts"].items() if PARTS[name].group == group}
        if not parts:
            continue
        lines += ["", f"## {TITLES[group]}", ""]
        rows = [row for found in parts.values() for row in found["rows"]]
        if group == "training":
            rows = [with_shares(row, report) for row in rows]
        for alike in same_columns(rows):
            lines += [*table(alike), ""]
        lines += [f"- {name}: **{found['status']}**" for name, found in parts.items() if found["status"] != "done"]
        if group == "profile" and draw(rows, folder / "gpu-profile.png"):
            lines.append("![The parts of a training step](gpu-profile.png)")
    lines += planner(report)
    if report.get("left out"):
        lines += ["", f"Left out for lack of time: {'; '.join(report['left out'])}."]
    commit_bytes(folder / "gpu.md", ("\n".join(lines).rstrip() + "\n").encode())


def with_shares(row: Row, report: dict[str, Any]) -> Row:
    """A training's row with its MFU: against the card's measured products, and against its data sheet."""
    if "TFLOP/s" not in row:
        return row
    shown = dict(row)
    peaks = [r["TFLOP/s"] for r in report["parts"].get("card", {}).get("rows", ()) if "TFLOP/s" in r]
    if peaks:
        shown["MFU, measured peak"] = f"{row['TFLOP/s'] / max(peaks):.1%}"
    if known := find(str(report["machine"]["card"])):
        shown["MFU, data sheet"] = f"{1e12 * row['TFLOP/s'] / known.bf16:.1%}"
    return shown


def planner(report: dict[str, Any]) -> list[str]:
    """How far `benchmarks.plan` was off, and by how much its times must be multiplied for this card."""
    parts = [found["rows"] for name, found in report["parts"].items() if PARTS[name].group == "training"]
    rows = [row for found in parts for row in found if "planned ms" in row and "ms" in row]
    if not rows:
        return []
    times = [row["ms"] / row["planned ms"] for row in rows]
    factor = statistics.median(times)
    spread = max(abs(x / factor - 1) for x in times)
    lines = ["", "## The planner", "", f"Measured over planned time: {min(times):.2f} to {max(times):.2f}, median "
             f"{factor:.2f}. Calibrated by the median, the planned times are off by at most {spread:.0%}."]  # fmt: skip
    sizes = [row["planned GB"] / row["GB"] for row in rows if row.get("GB")]
    if sizes:
        lines.append(
            f"Planned over measured memory: {min(sizes):.2f} to {max(sizes):.2f}; the plan has 2 GB for CUDA and 5 % "
            "of fragments, which the measured peak of tensors has not."
        )
    return lines


def same_columns(rows: list[Row]) -> list[list[Row]]:
    """The rows in groups with the same columns, except that a fault may stand in the place of numbers."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(next(iter(row)), []).append(row)
    return list(groups.values())


def table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    bodies = ([shown(row.get(column)) for column in columns] for row in rows)
    return lines + [f"| {' | '.join(body)} |" for body in bodies]


def shown(value: object) -> str:
    """A number with three digits, or more before the point; whole numbers and text as they are."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return str(value)


def draw(rows: list[Row], file: Path) -> bool:
    """A bar for each profile, in shares of the step. False if there is nothing to draw."""
    rows = [row for row in rows if "ms" in row]
    if not rows:
        return False
    from matplotlib.figure import Figure

    kinds = [key for key in rows[0] if key.endswith(", ms")]
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{row['network']}, {row['pictures']}, {'compiled' if row['compiled'] else 'eager'}" for row in rows]
    start = torch.zeros(len(rows))
    for kind in kinds:
        parts = torch.tensor([row[kind] for row in rows])
        axes.barh(names, parts.tolist(), left=start.tolist(), label=kind.removesuffix(", ms"))
        start += parts
    axes.set_xlabel("ms a step")
    axes.invert_yaxis()
    axes.legend(ncols=3, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    figure.savefig(file, dpi=120)
    return True
