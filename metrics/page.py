"""A training as one HTML page: what the runs' logs hold as figures, and the sheets of samples as a film."""

import io
import json
import re
import sys
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from metrics.figures import PALETTE
from metrics.report import document, embedded, png
from storage.files import commit_bytes
from storage.text import read_text, split_lines

MARK = '<meta name="generator" content="mmdit page">'
MOST_SHEETS, SIDE = 24, 1024  # of a film; pixels of a sheet's longer side
BLOCKS = 60  # points of a smoothed line
Series = tuple[np.ndarray, np.ndarray]  # steps and values
FILM = """
for (const film of document.querySelectorAll(".film")) {
  const slider = film.querySelector("input"), step = film.querySelector("output");
  const frames = film.querySelectorAll("img");
  const show = () => { frames.forEach((frame, i) => frame.hidden = i != slider.value);
    step.textContent = frames[slider.value].alt; };
  slider.oninput = show; show();
}
"""


class Run(NamedTuple):
    """What a run has logged so far."""

    name: str
    values: dict[str, Series]  # by key, in ascending steps
    sheets: list[Path]  # in ascending steps
    config: str


def read_run(folder: Path) -> Run:
    """Reads a run's folder, also of a training that goes on meanwhile.

    A step that was logged again, after a resume, counts once. A last line that is not whole yet is left out.

    Raises:
        FileNotFoundError: the folder has no log.
        ValueError: nothing has been logged yet, or a line is no JSON object.
    """
    log = folder / "log.jsonl"
    if not log.is_file():
        raise FileNotFoundError(f"{folder} is no run: it has no log.jsonl")
    found: dict[str, dict[float, float]] = {}
    lines = [line for line in split_lines(read_text(log)) if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = float(entry["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                continue
            raise ValueError(f"{log}: line {number} is no entry of a log") from None
        for key, value in entry.items():
            if key != "step" and isinstance(value, int | float) and abs(value) <= sys.float_info.max:
                found.setdefault(key, {})[step] = value
    if not found:
        raise ValueError(f"{log} is empty: the run has logged nothing yet")
    values = {key: (np.array(sorted(own)), np.array([own[step] for step in sorted(own)])) for key, own in found.items()}
    config = folder / "config.yaml"
    sheets = sorted((folder / "samples").glob("step-*.png"))
    return Run(folder.resolve().name, values, sheets, read_text(config) if config.is_file() else "")


def smoothed(series: Series) -> Series:
    """Means over blocks of equally many steps, at most BLOCKS; the series itself if it is shorter."""
    steps, values = series
    if len(steps) <= BLOCKS:
        return series
    parts = [np.array_split(column, BLOCKS) for column in (steps, values)]
    return np.array([part.mean() for part in parts[0]]), np.array([part.mean() for part in parts[1]])


def keys_of(runs: list[Run]) -> dict[str, list[str]]:
    """The keys of each figure, in the order of the page. What never changes has none."""
    every = list(dict.fromkeys(key for run in runs for key in run.values if np.ptp(run.values[key][1])))
    figures: dict[str, list[str]] = {
        "Loss": [key for key in ("train/loss", "val/loss") if key in every],
        "Training loss by t": [key for key in every if re.fullmatch(r"train/loss_bin\d+", key)],
        "Validation loss by t": [key for key in every if re.fullmatch(r"val/loss_t[\d.]+", key)],
    }
    known = {key for keys in figures.values() for key in keys}
    figures |= {key.partition("/")[2].replace("_", " "): [key] for key in every if key not in known and "/" in key}
    return {title: keys for title, keys in figures.items() if keys}


def draw(runs: list[Run], title: str, keys: list[str]) -> bytes:
    """A figure as PNG: a line for each run, or for each key where there are several."""
    by_t = title.endswith("by t")
    panels = runs if by_t else runs[:1]
    figure = Figure(figsize=(5.6 * len(panels), 3.4), layout="constrained", dpi=110)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(keys)))
    for axes, own in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        for i, run in enumerate([own] if by_t else runs):
            for j, key in enumerate(keys):
                if key in run.values:
                    colour = shades[j] if by_t else PALETTE[(i * len(keys) + j) % len(PALETTE)]
                    label = t_of(key, len(keys)) if by_t else f"{run.name}, {key}" if len(runs) > 1 else key
                    line(axes, run.values[key], colour, label)
        values = np.concatenate([run.values[key][1] for run in runs for key in keys if key in run.values])
        if "loss" in title.lower() and values.min() > 0:
            axes.set_yscale("log")
            for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                axis("{x:g}")
        axes.set(xlabel="step", title=own.name if by_t and len(runs) > 1 else title)
        axes.grid(alpha=0.25, linewidth=0.5)
        if by_t or len(runs) > 1 or len(keys) > 1:
            axes.legend(fontsize="x-small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def line(axes: Axes, series: Series, colour: object, label: str) -> None:
    """A series: its points faintly where there are many, and their means."""
    if len(series[0]) > BLOCKS:
        axes.plot(*series, color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(*smoothed(series), color=colour, linewidth=1.6, marker="o" if len(series[0]) < 3 else "", label=label)


def t_of(key: str, count: int) -> str:
    """The t of a key of a loss by t: that of its name, or the ends of its bin."""
    if key.startswith("val/loss_t"):
        return f"t = {key.removeprefix('val/loss_t')}"
    number = int(key.removeprefix("train/loss_bin"))
    return f"t from {number / count:g}"


def film(run: Run) -> str:
    """The sheets of samples under a slider, at most MOST_SHEETS of them; empty if there are none."""
    chosen = run.sheets
    if len(chosen) > MOST_SHEETS:
        chosen = [chosen[round(i)] for i in np.linspace(0, len(chosen) - 1, MOST_SHEETS)]
    frames = []
    for sheet in chosen:
        with suppress(OSError), Image.open(sheet) as image:  # a sheet may be half written
            image.thumbnail((SIDE, SIDE))
            number = int(sheet.stem.removeprefix("step-"))
            frames.append(embedded(png(image.convert("RGB")), f"step {number:,}"))
    if not frames:
        return ""
    last = len(frames) - 1
    return (
        f'<figure class="film"><figcaption>{escape(run.name)}: <output></output> '
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step of the samples"></figcaption>'
        f"{''.join(frames)}</figure>"
    )


def summary(run: Run) -> str:
    """A row of the table: how far a run is, its best validation, its speed."""

    def last(key: str) -> float | None:
        return float(run.values[key][1][-1]) if key in run.values else None

    steps, losses = run.values.get("val/loss", (np.zeros(0), np.zeros(0)))
    best = f"{losses.min():.4g} at step {steps[losses.argmin()]:,.0f}" if len(steps) else "–"
    rate = run.values.get("perf/images_per_s")
    wait = last("perf/data_wait")
    cells = [
        f"{max(steps[-1] for steps, _ in run.values.values()):,.0f}",
        "–" if last("train/loss") is None else f"{last('train/loss'):.4g}",
        best,
        "–" if rate is None else f"{np.median(rate[1]):,.4g}",
        "–" if wait is None else f"{wait:.1%}",
        f"{last('train/skipped') or 0:.0f}",
    ]
    return f"<tr><td class=text>{escape(run.name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def page(runs: list[Run]) -> str:
    """The page of one or several runs. It loads no other file."""
    heads = ("run", "step", "loss", "best validation loss", "pictures/s", "waiting for data", "skipped steps")
    figures = "\n".join(
        f"<figure>{embedded(draw(runs, title, keys), title)}</figure>" for title, keys in keys_of(runs).items()
    )
    configs = "\n".join(
        f"<details><summary>{escape(run.name)}: config</summary><pre>{escape(run.config)}</pre></details>"
        for run in runs
        if run.config
    )
    body = f"""<div class="wide"><table>
<thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>
<tbody>{"".join(map(summary, runs))}</tbody>
</table></div>
{"".join(map(film, runs))}
<div class="figures">{figures}</div>
{configs}"""
    return document(", ".join(run.name for run in runs), body, FILM, MARK)


def write(folders: list[Path], out: Path) -> None:
    """Writes the page of runs; replaces an earlier one.

    Raises:
        FileExistsError: the file is no such page.
        FileNotFoundError, ValueError: as `read_run`.
    """
    runs = [read_run(folder) for folder in folders]
    if out.exists() and MARK not in out.read_text(errors="replace")[:1000]:
        raise FileExistsError(f"{out} is no page of a training: choose another --out")
    commit_bytes(out, page(runs).encode())
