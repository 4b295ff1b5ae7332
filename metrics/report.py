"""Writes the results to files: JSON and CSV, the figures, and one HTML page."""

import base64
import csv
import io
import json
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from metrics.figures import plot
from metrics.table import COLUMNS, MISSING, Record, available, best, column, is_number, keys, shown
from storage.files import commit_bytes, commit_json

FILES = ("results.json", "results.csv", "quality.png", "sheet.png", "report.html")
CAPTIONS = {
    "quality.png": "Quality against evaluations of the denoiser for one picture. Left: Fréchet distance over that of "
    "real training pictures, lower is better; the dotted line is the value of as many real pictures. Right, where "
    "measured: accuracy, or else straightness of the walk. One line for each model and sampler.",
    "sheet.png": "The same seeds drawn by every model (rows) in every number of steps (columns).",
}

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
th:not(:has(button)) { padding: .3rem .6rem; } .film img { image-rendering: pixelated; width: 100%; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } .figures figure { margin: 0; }
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
    """A table cell, with the attribute that the script sorts by."""
    text = escape(shown(key, value))
    kind = f'data-number="{value}"' if is_number(value) else "class=text" if available(value) else "data-missing"
    return f"<td {kind}>{f'<b>{text}</b>' if bold else text}</td>"


def page(record: Record, images: dict[str, bytes]) -> str:
    """The report as one HTML page that loads no other file.

    Columns without any value are left out. Bold numbers are the best of those with the same number of steps.

    Args:
        record: the results.
        images: file name → PNG; the page shows them in this order, with their captions from `CAPTIONS`.
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
        f"<figure>{embedded(content, name)}<figcaption>{escape(CAPTIONS.get(name, name))}</figcaption></figure>"
        for name, content in images.items()
    )
    direction = {"low": " Lower is better.", "high": " Higher is better.", None: ""}
    glossary = "\n".join(
        f"<dt>{escape(column(key).title)}</dt><dd>{escape(column(key).meaning + direction[column(key).better])}</dd>"
        for key in columns
        if column(key).meaning
    )
    settings = escape(json.dumps(finite_only(record["settings"]), indent=2, ensure_ascii=False))
    real = f" As many real pictures have an FD ratio of {floor:.2f}." if available(floor) else ""
    body = f"""<div class="wide"><table>
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
<details><summary>Settings</summary><pre>{settings}</pre></details>"""
    return document("Quality of sampled pictures", body, SCRIPT)


def document(title: str, body: str, script: str, head: str = "") -> str:
    """An HTML page that loads no other file.

    Args:
        title: plain text.
        body: HTML, beside the heading.
        script: runs at the end.
        head: further tags of the head.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
{head}<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
<script>{script}</script>
</body>
</html>
"""


def embedded(content: bytes, description: str) -> str:
    """The tag of a PNG that is part of the page."""
    return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" alt="{escape(description)}">'


def finite_only(value: Any) -> Any:
    """A copy of nested dicts and lists in which None replaces every NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite_only(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(inner) for inner in value]
    return value if available(value) else None


def png(image: Image.Image) -> bytes:
    """The image as a PNG."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()


def write(record: Record, sheet: Image.Image | None, folder: Path) -> None:
    """Writes results.json, results.csv, quality.png, sheet.png (if there is a sheet) and report.html.

    The numbers are written first, so that they are safe even if a figure fails. Each file is replaced as a whole.

    Args:
        record: the results; NaN and infinities become null in JSON and empty in CSV.
        sheet: the image of `sheet_image`.
        folder: the folder; it is created if it does not exist.

    Raises:
        OSError: a file cannot be written.
        TypeError: the record holds a value that JSON cannot hold.
    """
    record = finite_only(record)
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
