"""What the page says, as HTML in which nothing of the text is HTML."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from metrics.report import embedded, png
from web.job import Picture, Progress
from web.walk import figure, shown

SHOWN = 448  # pixels of the longer side of a picture to choose
SMALL = 128  # pixels: smaller pictures are shown pixel by pixel


def said(text: str, wrong: bool = False, notes: list[str] | None = None) -> str:
    """A line for the user, as HTML in which nothing of the text is HTML."""
    more = "".join(f"<div>Note: {escape(note)}</div>" for note in notes or ())
    role = "alert" if wrong else "status"
    return f'<div class="said{" wrong" * wrong}" role="{role}" aria-live="polite">{escape(text)}{more}</div>'


def step(progress: Progress) -> str:
    """A line with a bar."""
    bar = f'<progress value="{progress.done}" max="{progress.total}" aria-label="steps done"></progress>'
    return f'<div class="said" role="status">{escape(progress.text)}{bar}</div>'


def walked(done: list[Picture]) -> str:
    """The walks: films, figure and numbers."""
    walks = [picture.walk for picture in done]
    films = (
        f"<figure><figcaption>{escape(walk.name)}: the picture that it expects, from the first step to the last"
        f"</figcaption>{embedded(png(picture.film), 'the picture step by step')}</figure>"
        for walk, picture in zip(walks, done, strict=True)
    )
    plot = embedded(png(figure(walks)), "the walk on its plane, and its times")
    rows = [picture.walk.numbers() | {"seconds": f"{picture.seconds:.2f}"} for picture in done]
    heads = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    numbers = f'<table class="numbers"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="walk">{"".join(films)}{plot}{numbers}</div>'


def large(file: Path) -> str:
    """A picture as HTML, of at most SHOWN pixels."""
    with Image.open(file) as image:
        return f'<div class="one">{embedded(png(shown(image, SHOWN)), file.name)}</div>'


def gallery(pictures: list[Any]) -> Any:
    """The pictures, shown pixel by pixel if they are small."""
    first = pictures[0]
    size = Image.open(first).size if isinstance(first, str) else first.size
    return gr.Gallery(pictures, elem_classes=["small"] if max(size) < SMALL else [])
