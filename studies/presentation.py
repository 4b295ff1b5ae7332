"""How the documents show results: numbers over seeds, Markdown tables and a plot."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from metrics.figures import MARKERS, PALETTE
from metrics.significance import Sample
from studies.results import KEY, Result, select, unique


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± sample standard deviation; for one value only the mean; a dash if a value is missing."""
    if not values or any(value is None for value in values):
        return "–"
    return Sample.of(values).text(form)


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |\n"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(row(cells) for cells in (head, rule, *body))


def filled(template: Path, parts: Mapping[str, str]) -> bytes:
    """A template with each {NAME} replaced by its part."""
    text = template.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace("{" + name + "}", part.rstrip("\n"))
    return text.encode()


def real_row(floor: float, columns: int) -> str:
    """The last row of a table of FD ratios: that of as many real digits, which is no function of steps."""
    return row(["real digits", *[f"{floor:.2f}"] * columns])


def curves(results: Sequence[Result], floor: float | None, file: Path) -> None:
    """Plots distance ratio against evaluations: a line for each recipe, with bars from lowest to highest seed."""
    figure = Figure(figsize=(9, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for i, recipe in enumerate(unique(results, "recipe")):
        rows = select(results, recipe=recipe)
        rows = [r for r in rows if r[KEY] is not None]
        x = sorted(unique(rows, "evaluations"))
        y = [[r[KEY] for r in select(rows, evaluations=count)] for count in x]
        mean = [statistics.fmean(values) for values in y]
        bars = [[m - min(v) for m, v in zip(mean, y, strict=True)], [max(v) - m for m, v in zip(mean, y, strict=True)]]
        axes.errorbar(
            x, mean, bars, color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)], markersize=5,
            linewidth=1.5, capsize=2, label=recipe, linestyle="-" if recipe.startswith("rf") else "--",
        )  # fmt: skip
    if floor:
        axes.axhline(floor, color="grey", linewidth=1, linestyle=":", label="real digits, as many of each")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="function evaluations a picture",
        ylabel="Fréchet distance / that of real digits",
    )
    ticks = sorted(unique(results, "evaluations"))
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.grid(alpha=0.25, linewidth=0.5, which="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(file, format="png", metadata={"Software": None})
