"""Figures of the results: a plot of quality against evaluations, and a sheet of the drawn pictures."""

import math
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metrics.table import Record, Row, available, column, is_number, shown

PALETTE = [matplotlib.colormaps["tab20"](i) for i in (0, 2, 4, 6, 8, 10, 12, 16, 18, 1, 3, 5, 7, 9, 11, 13, 17, 19)]
STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = "os^Dv*PX"


class Line(NamedTuple):
    """One line of the plot: its rows and its style."""

    rows: list[Row]
    look: dict[str, Any]


def lines(rows: list[Row]) -> list[Line]:
    """One line for each combination of model, sampler, spacing and guidance scale."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(k) for k in ("model", "sampler", "spacing", "guidance")), []).append(row)
    models, samplers = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    ways = list(dict.fromkeys(key[1:] for key in groups))
    found = []
    for key, group in groups.items():
        model, sampler, spacing, guidance = key
        others = [other for other in groups if other[:2] == key[:2]]
        label = [str(model) if len(str(model)) <= 32 else "…" + str(model)[-31:], str(sampler)]
        label += [str(spacing)] * (len({other[2] for other in others}) > 1)
        label += [f"guidance {shown('guidance', guidance)}"] * (len({other[3] for other in others}) > 1)
        look = {
            "color": PALETTE[models.index(model) % len(PALETTE)],
            "linestyle": STYLES[samplers.index(sampler) % len(STYLES)],
            "marker": MARKERS[ways.index(key[1:]) % len(MARKERS)],
            "label": ", ".join(label),
        }
        found.append(Line(group, look))
    return found


def points(rows: list[Row], key: str, positive: bool) -> tuple[list[float], list[float]]:
    """(evaluations, values) where both are available, in order. `positive` leaves out values that a log axis lacks."""
    pairs = [(row.get("evaluations"), row.get(key)) for row in rows]
    there = sorted((x, y) for x, y in pairs if is_number(x) and is_number(y) and x > 0 and (y > 0 or not positive))
    return [x for x, _ in there], [y for _, y in there]


def log_ticks(low: float, high: float) -> list[float]:
    """At most nine round numbers from low to high; both are > 0."""
    if high < 3 * low:
        return [t for t in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= t <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for subs in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [t for t in (sub * 10.0**decade for decade in decades for sub in subs) if low <= t <= high]
        if len(ticks) <= 9:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 9)]


def tick_evaluations(axes: Axes, rows: list[Row]) -> None:
    """Sets ticks at the numbers of evaluations that occur. The most frequent come first, as long as labels fit."""
    values = points(rows, "evaluations", True)[0]
    per_character = 7 * axes.figure.dpi / 72  # pixels, of 7 points
    kept: dict[float, tuple[float, float]] = {}  # value → left and right end of its label, in pixels
    for value in sorted(set(values), key=lambda value: (-values.count(value), value)):
        middle, half = axes.transData.transform((value, 1))[0], len(f"{value:.4g}") * per_character / 2
        if all(middle + half < left - 4 or middle - half > right + 4 for left, right in kept.values()):
            kept[value] = (middle - half, middle + half)
    axes.xaxis.set_major_locator(FixedLocator(sorted(kept)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def plot(record: Record, file: Path | BinaryIO) -> None:
    """Draws the distance ratio, and accuracy or else straightness, against function evaluations, as a PNG."""
    rows, floor = record["rows"], record["floor"]
    second = [key for key in ("accuracy", "straightness") if points(rows, key, False)[0]][:1]
    drawn = lines(rows)
    panels = ["distance_ratio", *second]
    seen = points(rows, "evaluations", True)[0] or [1]
    aside = len(drawn) > 6
    figure = Figure(figsize=(5 * len(panels) + 3 * aside, 4.2 + 0.3 * (not aside)), layout="constrained", dpi=150)
    for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        ratio = key == "distance_ratio"
        for line in drawn:
            axes.plot(*points(line.rows, key, ratio), markersize=5, linewidth=1.5, **line.look)
        if ratio:
            axes.axhline(1, color="grey", linewidth=1, linestyle="--", label="real pictures, as they come")
            if available(floor) and floor > 0:
                axes.axhline(floor, color="grey", linewidth=1, linestyle=":", label="real pictures, as many of each")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_ylim())))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        elif key == "accuracy":
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
        axes.set(xscale="log", xlim=(0.8 * min(seen), 1.25 * max(seen)), xlabel="function evaluations a picture")
        axes.set_ylabel("Fréchet distance / that of real pictures" if ratio else column(key).title)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25, linewidth=0.5)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    place = {"loc": "outside right upper"} if aside else {"loc": "outside lower center", "ncols": len(panels)}
    figure.legend(handles, labels, fontsize="small", handlelength=3.5, frameon=False, **place)
    figure.draw_without_rendering()  # fixes the width of the axes
    for axes in figure.axes:
        tick_evaluations(axes, rows)
    figure.savefig(file, format="png", metadata={"Software": None})


def to_image(picture: Tensor, side: int) -> Image.Image:
    """A picture (C, H, W) in [0, 1], C = 1 or 3, as 8-bit RGB whose longer side has `side` pixels.

    It is enlarged by nearest neighbour and shrunk by area. ValueError for another shape or value.
    """
    if picture.ndim != 3 or len(picture) not in (1, 3):
        raise ValueError(f"pictures must be (n, 1 or 3, H, W), got {tuple(picture.shape)} for one")
    if not ((picture >= 0) & (picture <= 1)).all():
        raise ValueError("pictures must be in [0, 1]")
    levels = (picture.detach().cpu().float() * 255).round().byte().expand(3, -1, -1)
    image = Image.fromarray(levels.movedim(0, -1).contiguous().numpy())
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)


def sheet_image(pictures: dict[tuple[str, int], Tensor], models: list[str], steps: list[int], side: int) -> Image.Image:
    """Pictures side by side: models are rows, numbers of steps are columns, and each cell has the same seeds.

    Args:
        pictures: (model, steps) → (n, C, H, W) in [0, 1], C = 1 or 3. A missing cell shows a dash.
        models: the rows.
        steps: the columns.
        side: pixels of a picture's longer side on the sheet, at least 1.

    Raises:
        ValueError: no pictures in any of these cells, or pictures of another shape or range.
    """
    cells = {
        (model, count): [to_image(picture, side) for picture in pictures[model, count]]
        for model in models
        for count in steps
        if (model, count) in pictures
    }
    images = [image for cell in cells.values() for image in cell]
    if not images:
        raise ValueError("no pictures of these models and steps")
    size = min(max(12, side // 3), 28)
    font = ImageFont.load_default(size=size)
    gap, between = max(1, side // 32), max(8, side // 4)
    across = min(5, max(map(len, cells.values())))
    down = math.ceil(max(map(len, cells.values())) / across)
    wide, high = (max(image.size[i] for image in images) for i in (0, 1))
    heads = [f"{count} step{'s' * (count != 1)}" for count in steps]
    grid = across * (wide + gap) - gap
    width = max(grid, *(math.ceil(font.getlength(head)) for head in heads))
    height = max(down * (high + gap) - gap, size)
    left = between + max(math.ceil(font.getlength(model)) for model in models) + between
    top = size + between
    total = (left + len(steps) * (width + between), top + len(models) * (height + between))
    canvas = Image.new("RGB", total, "white")
    draw = ImageDraw.Draw(canvas)
    text = partial(draw.text, fill="black", font=font)
    for column_index, head in enumerate(heads):
        text((left + column_index * (width + between) + width / 2, top - between / 2), head, anchor="mb")
    for row_index, model in enumerate(models):
        y = top + row_index * (height + between)
        text((between, y + height / 2), model, anchor="lm")
        for column_index, count in enumerate(steps):
            x = left + column_index * (width + between)
            if (model, count) not in cells:
                text((x + width / 2, y + height / 2), "-", anchor="mm")  # the font has no en dash
            for i, image in enumerate(cells.get((model, count), [])):
                corner = x + (width - grid) // 2 + i % across * (wide + gap), y + i // across * (high + gap)
                canvas.paste(image, corner)
    return canvas
