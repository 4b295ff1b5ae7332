"""Tables of results: how each number is formatted, Markdown tables, and the best rows.

A *row* holds the results of one model with one sampler and number of steps: the keys of `COLUMNS`, and perhaps others.
None, NaN or a missing key means not available. A *record* is `{"settings": {…}, "floor": float | None, "rows": […]}`:
the settings are any JSON; the floor is the distance ratio of as many real pictures as there are samples.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeGuard

MISSING = "–"
Row = dict[str, Any]
Record = dict[str, Any]


class Column(NamedTuple):
    """How one key of the rows is shown.

    Attributes:
        title: a few words, with the unit if there is one.
        meaning: one line for the glossary.
        better: "low", "high", or None if neither is better.
        format: a format specification for numbers. With "g", integers and numbers from 1000 on are plain.
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
    "likelihood": Column("likelihood", "That of the model's ODE, or the variational bound of its chain.", None, ""),
    "bits_per_dim": Column("bits / dim", "Bits for one number of a real picture, given its caption.", "low", ".3f"),
    "bits_per_dim_error": Column("error", "Standard error of the bits over the pictures.", None, ".3f"),
    "seconds_per_picture": Column("s / picture", "Seconds of sampling for one picture.", "low", "#.3g"),
    "accuracy": Column("accuracy", "Share of the pictures that show what the prompt says.", "high", ".1%"),
    "distance": Column("FD", "Fréchet distance of the features to those of the reference pictures.", "low", "#.3g"),
    "distance_ratio": Column(
        "FD ratio", "FD over that of the other real pictures; 1 means as close as real ones are.", "low", ".2f"
    ),
    "kernel_distance": Column(
        "KD", "Squared kernel distance (KID) to reference pictures; noise near 0.", "low", "#.3g"
    ),
    "inception_score": Column("IS", "Inception score, from 1 to the number of classes.", "high", "#.3g"),
    "spatial_distance": Column("sFD", "Fréchet distance of spatial features, without pooling (sFID).", "low", "#.3g"),
    "precision": Column("precision", "Share of the samples that look like reference pictures.", "high", ".1%"),
    "recall": Column("recall", "Share of the reference pictures that the samples cover.", "high", ".1%"),
    "neighbour_ratio": Column(
        "neighbours",
        "Distance to the nearest other real picture, over that of reference pictures; far below 1 means copies.",
        None,
        ".2f",
    ),
    "pairwise_distance": Column(
        "variety",
        "Mean feature distance of two samples of the same digit, or of any two scenes; 0 if all are the same picture.",
        None,
        "#.3g",
    ),
    "duplicates": Column("repeats", "Samples that equal an earlier sample in every pixel.", "low", ".3g"),
    "path_length": Column("path length", "Length of the walk from noise to picture.", None, "#.3g"),
    "straightness": Column(
        "straightness",
        "Squared departure of the walk from a straight line at constant speed; 0 is none.",
        "low",
        "#.3g",
    ),
    "clip_score": Column(
        "CLIP score", "100 times the cosine of the CLIP embeddings of picture and caption.", "high", "#.3g"
    ),
}


def column(key: str) -> Column:
    """The column of a key. The title of an unknown key is the key itself."""
    return COLUMNS.get(key, Column(key, "", None, "#.3g"))


def available(value: object) -> bool:
    """Whether there is a value: not None, NaN or infinity."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an available number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and available(value)


def shown(key: str, value: object) -> str:
    """A value in the format of its column, or "–" if it is not available."""
    if not is_number(value):
        return str(value) if available(value) else MISSING
    form = column(key).format
    plain = form.endswith("g") and (isinstance(value, int) or abs(value) >= 999.5)
    return f"{value:.0f}" if plain else format(value, form).rstrip(".")


def keys(rows: Iterable[Row]) -> list[str]:
    """All keys of the rows, in order of first occurrence."""
    return list(dict.fromkeys(key for row in rows for key in row))


def table(rows: list[Row], columns: list[str]) -> str:
    """A Markdown table with these keys as columns. It ends with a newline."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |\n"

    text = [any(isinstance(row.get(key), str) for row in rows) for key in columns]
    rule = "|" + "|".join("---" if left else "---:" for left in text) + "|\n"
    head = line(column(key).title for key in columns)
    return head + rule + "".join(line(shown(key, row.get(key)) for key in columns) for row in rows)


def best(rows: list[Row]) -> set[tuple[int, str]]:
    """(index of the row, key) of the best values among the rows of equal steps.

    Values that are formatted alike are equally good. If all are, none is best.
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
