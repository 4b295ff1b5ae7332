"""What a measurement found, as files: numbers for machines, a plot, a picture sheet and one page to read.

A *row* is what was measured of one model with one sampler and number of steps: the keys of `COLUMNS`, others at will.
None, NaN or a missing key means not available. A *record* is `{"settings": {…}, "floor": float | None, "rows": […]}`:
the settings are anything that JSON holds, the floor is the distance ratio of real pictures, as many as were sampled.
"""

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from storage.files import commit_bytes, commit_json

MISSING = "–"
Row = dict[str, Any]
Record = dict[str, Any]


class Column(NamedTuple):
    """How to show one key of the rows.

    Attributes:
        title: a few words, with the unit if there is one.
        meaning: one line for the glossary.
        better: "low", "high", or None where neither is.
        format: a format specification for numbers; with "g" whole ones and those from 1000 are plain.
    """

    title: str
    meaning: str
    better: str | None
    format: str


COLUMNS = {
    "model": Column("model", "The model that drew the pictures.", None, ""),
    "sampler": Column("sampler", "The method that walks from noise to a picture.", None, ""),
    "spacing": Column("spacing", "How the times of the steps are spread.", None, ""),
    "steps": Column("steps", "Steps from noise to picture.", None, ".3g"),
    "evaluations": Column("evaluations", "Calls of the denoiser for one picture.", None, ".4g"),
    "guidance": Column("guidance", "Scale of classifier-free guidance; 1 is none.", None, ".3g"),
    "samples": Column("samples", "Pictures measured.", None, ".3g"),
    "seconds_per_picture": Column("s / picture", "Seconds of sampling for one picture.", "low", "#.3g"),
    "accuracy": Column("accuracy", "Share of the pictures that show what was asked for.", "high", ".1%"),
    "distance": Column("FD", "Fréchet distance of the features to those of the reference pictures.", "low", "#.3g"),
    "distance_ratio": Column(
        "FD ratio", "FD over that of the other real pictures; 1 means as close as real ones are.", "low", ".2f"
    ),
    "kernel_distance": Column(
        "KD", "Squared kernel distance (KID) to reference pictures; noise near 0.", "low", "#.3g"
    ),
    "inception_score": Column("IS", "Inception score, from 1 to the number of classes.", "high", "#.3g"),
    "spatial_distance": Column("sFD", "Fréchet distance of features that keep their places (sFID).", "low", "#.3g"),
    "precision": Column("precision", "Share of the samples that look like reference pictures.", "high", ".1%"),
    "recall": Column("recall", "Share of the reference pictures that the samples reach.", "high", ".1%"),
    "neighbour_ratio": Column(
        "neighbours",
        "Distance to the nearest other real picture, over that of reference pictures; far below 1 means copies.",
        None,
        ".2f",
    ),
    "pairwise_distance": Column(
        "variety",
        "Mean distance of the features of two digits, or of any two scenes, that were drawn; 0 is one picture.",
        None,
        "#.3g",
    ),
    "duplicates": Column("repeats", "Samples that equal another one, already counted, in every pixel.", "low", ".3g"),
    "path_length": Column("path length", "Length of the walk from noise to picture.", None, "#.3g"),
    "straightness": Column(
        "straightness",
        "Squared departure of the walk from a straight line at constant speed; 0 is none.",
        "low",
        "#.3g",
    ),
    "clip_score": Column(
        "CLIP score", "100 times the cosine of picture and caption, as CLIP sees them.", "high", "#.3g"
    ),
}

CAPTIONS = {
    "quality.png": "Quality against evaluations of the denoiser for one picture. Left: Fréchet distance over that of "
    "real training pictures, lower is better; the dotted line is what as many real pictures reach. Right, where "
    "measured: accuracy, or else straightness of the walk. One line for each model and sampler.",
    "sheet.png": "The same seeds drawn by every model (rows) in every number of steps (columns).",
}


def column(key: str) -> Column:
    """The column of a key; one that `COLUMNS` lacks has itself as the title."""
    return COLUMNS.get(key, Column(key, "", None, "#.3g"))


def available(value: object) -> bool:
    """Whether there is a value: neither None nor a NaN or infinity."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number, and an available one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and available(value)


def shown(key: str, value: object) -> str:
    """A value as its column formats it; "–" if it is not available."""
    if not is_number(value):
        return str(value) if available(value) else MISSING
    form = column(key).format
    plain = form.endswith("g") and (isinstance(value, int) or abs(value) >= 999.5)
    return f"{value:.0f}" if plain else format(value, form).rstrip(".")


def strict(value: Any) -> Any:
    """A copy of nested dicts and lists in which None stands for every NaN and infinity."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    return value if available(value) else None


def keys(rows: Iterable[Row]) -> list[str]:
    """All keys of the rows, in the order in which they first occur."""
    return list(dict.fromkeys(key for row in rows for key in row))


def table(rows: list[Row], columns: list[str]) -> str:
    """A Markdown table with these keys as columns, ending in a newline."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |\n"

    text = [any(isinstance(row.get(key), str) for row in rows) for key in columns]
    rule = "|" + "|".join("---" if left else "---:" for left in text) + "|\n"
    head = line(column(key).title for key in columns)
    return head + rule + "".join(line(shown(key, row.get(key)) for key in columns) for row in rows)


def best(rows: list[Row]) -> set[tuple[int, str]]:
    """(index of the row, key) of the best values among the rows of equal steps.

    Values that read the same are equally good; where all do, none is best.
    """
    found = set()
    for key in keys(rows):
        pick: Callable[[Iterable[float]], float] | None = {"low": min, "high": max}.get(column(key).better or "")
        if pick is None:
            continue
        for steps in {row.get("steps") for row in rows}:
            group = {i: row[key] for i, row in enumerate(rows) if row.get("steps") == steps and available(row.get(key))}
            if len({shown(key, value) for value in group.values()}) > 1:
                winner = shown(key, pick(group.values()))
                found |= {(i, key) for i, value in group.items() if shown(key, value) == winner}
    return found


# --- The plot -------------------------------------------------------------------------------------------------------

PALETTE = [matplotlib.colormaps["tab20"](i) for i in (0, 2, 4, 6, 8, 10, 12, 16, 18, 1, 3, 5, 7, 9, 11, 13, 17, 19)]
STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = "os^Dv*PX"


class Line(NamedTuple):
    """The rows that one line of the plot joins, and how it looks."""

    rows: list[Row]
    look: dict[str, Any]


def lines(rows: list[Row]) -> list[Line]:
    """One line for each model and sampler; more where several spacings or guidance scales were measured of one."""
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
    """(evaluations, values) where both are available, in order; on a log axis only `positive` values can be shown."""
    pairs = [(row.get("evaluations"), row.get(key)) for row in rows]
    there = sorted((x, y) for x, y in pairs if is_number(x) and is_number(y) and x > 0 and (y > 0 or not positive))
    return [x for x, _ in there], [y for _, y in there]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, both > 0: at most nine of them."""
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
    """Ticks at the numbers of evaluations that occur, the most frequent first, as far as their labels fit."""
    values = points(rows, "evaluations", True)[0]
    per_character = 7 * axes.figure.dpi / 72  # pixels, of 7 points
    kept: dict[float, tuple[float, float]] = {}  # value → the room of its label, in pixels
    for value in sorted(set(values), key=lambda value: (-values.count(value), value)):
        middle, half = axes.transData.transform((value, 1))[0], len(f"{value:.4g}") * per_character / 2
        if all(middle + half < left - 4 or middle - half > right + 4 for left, right in kept.values()):
            kept[value] = (middle - half, middle + half)
    axes.xaxis.set_major_locator(FixedLocator(sorted(kept)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def plot(record: Record, file: Path | BinaryIO) -> None:
    """Draws a PNG of the distance ratio, and of accuracy or else straightness, against function evaluations."""
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
    figure.draw_without_rendering()  # settles the width of the axes
    for axes in figure.axes:
        tick_evaluations(axes, rows)
    figure.savefig(file, format="png", metadata={"Software": None})


# --- The picture sheet ----------------------------------------------------------------------------------------------


def to_image(picture: Tensor, side: int) -> Image.Image:
    """A picture (C, H, W) in [0, 1], C = 1 or 3, as 8-bit RGB whose longer side has `side` pixels.

    Enlarged by nearest neighbour, shrunk by area. ValueError for another shape or value.
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
    """Pictures side by side: models as rows, numbers of steps as columns, in each cell the same seeds.

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
                text((x + width / 2, y + height / 2), "-", anchor="mm")  # the font has no longer dash
            for i, image in enumerate(cells.get((model, count), [])):
                corner = x + (width - grid) // 2 + i % across * (wide + gap), y + i // across * (high + gap)
                canvas.paste(image, corner)
    return canvas


# --- The page -------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #ccc; --head: #f2f2f2; --page: #fff; --text: #1a1a1a; --quiet: #595959; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --head: #262626; --page: #161616; --text: #e6e6e6; --quiet: #a6a6a6; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 75rem;
  background: var(--page); color: var(--text); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--head); padding: 0; }
td.text, th.text { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; min-width: 6rem; max-width: 12rem; white-space: normal;
  overflow-wrap: anywhere; background: var(--page); } th:first-child { background: var(--head); }
th button { all: unset; cursor: pointer; padding: .3rem .6rem; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, .note { color: var(--quiet); font-size: .875rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .875rem; }
dt { font-weight: 600; } dd { margin: 0; } pre { overflow-x: auto; font-size: .8rem; }
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const up = head.ariaSort !== "ascending", value = row => row.cells[head.cellIndex].dataset;
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)], [none, nor] = ["missing" in x, "missing" in y];
    if (none || nor) return none - nor;
    const order = "number" in x && "number" in y ? x.number - y.number
      : a.cells[head.cellIndex].textContent.localeCompare(b.cells[head.cellIndex].textContent);
    return up ? order : -order;
  });
  body.append(...rows);
};
"""


def cell(key: str, value: object, bold: bool) -> str:
    """A table cell, with what the script sorts by."""
    text = escape(shown(key, value))
    kind = f'data-number="{value}"' if is_number(value) else "class=text" if available(value) else "data-missing"
    return f"<td {kind}>{f'<b>{text}</b>' if bold else text}</td>"


def page(record: Record, images: dict[str, bytes]) -> str:
    """The report as one HTML page that asks for nothing from outside.

    Columns without a single value are left out. Numbers in bold are the best of those with as many steps.

    Args:
        record: what was measured.
        images: file name → PNG, shown in this order with its caption from `CAPTIONS`.
    """
    rows, floor = record["rows"], record["floor"]
    used = {key for row in rows for key, value in row.items() if available(value)}
    columns = [key for key in dict.fromkeys([*COLUMNS, *keys(rows)]) if key in used]
    winners = best(rows)
    worded = [any(isinstance(row.get(key), str) for row in rows) for key in columns]
    head = "".join(
        f'<th scope=col{" class=text" * words} title="{escape(column(key).meaning)}">'
        f"<button>{escape(column(key).title)}</button></th>"
        for key, words in zip(columns, worded, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(cell(key, row.get(key), (i, key) in winners) for key in columns) + "</tr>"
        for i, row in enumerate(rows)
    )
    figures = "\n".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(content).decode()}" alt="{escape(name)}">'
        f"<figcaption>{escape(CAPTIONS.get(name, name))}</figcaption></figure>"
        for name, content in images.items()
    )
    direction = {"low": " Lower is better.", "high": " Higher is better.", None: ""}
    glossary = "\n".join(
        f"<dt>{escape(column(key).title)}</dt><dd>{escape(column(key).meaning + direction[column(key).better])}</dd>"
        for key in columns
        if column(key).meaning
    )
    settings = escape(json.dumps(strict(record["settings"]), indent=2, ensure_ascii=False))
    real = f" As many real pictures have an FD ratio of {floor:.2f}." if available(floor) else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Quality of sampled pictures</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<h1>Quality of sampled pictures</h1>
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<p class="note">Bold: the best at that number of steps. {MISSING}: not available. A click on a heading sorts.{real}</p>
{figures}
<h2>Columns</h2>
<dl>
{glossary}
</dl>
<details><summary>Settings</summary><pre>{settings}</pre></details>
<script>{SCRIPT}</script>
</body>
</html>
"""


# --- The files ------------------------------------------------------------------------------------------------------


def png(image: Image.Image) -> bytes:
    """The image as a PNG."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()


def write(record: Record, sheet: Image.Image | None, folder: Path) -> None:
    """Writes results.json, results.csv, quality.png, sheet.png (if there is a sheet) and report.html.

    The numbers come first, so that they are safe whatever becomes of the pictures. Each file is whole or the old one.

    Args:
        record: what was measured; in the files NaN and infinities are null in JSON and empty in CSV.
        sheet: see `sheet_image`.
        folder: made if it is not there.

    Raises:
        OSError: a file cannot be written.
        TypeError: the record holds what JSON does not.
    """
    record = strict(record)
    rows = record["rows"]
    folder.mkdir(parents=True, exist_ok=True)
    commit_json(folder / "results.json", record)
    text = io.StringIO()
    writer = csv.DictWriter(text, keys(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    commit_bytes(folder / "results.csv", text.getvalue().encode())
    drawing = io.BytesIO()
    plot(record, drawing)
    images = {"quality.png": drawing.getvalue()} | ({} if sheet is None else {"sheet.png": png(sheet)})
    for name, content in (images | {"report.html": page(record, images).encode()}).items():
        commit_bytes(folder / name, content)
