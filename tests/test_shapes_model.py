"""The model of scenes that is in the repository: it loads, and draws what a caption says."""

from pathlib import Path

import torch

from data import shapes
from pipeline import Pipeline

MODEL = Path(__file__).parents[1] / "assets/shapes/model"


def test_it_draws_what_captions_say() -> None:
    pipe = Pipeline.load(MODEL)
    red, green = (
        shapes.Request((shapes.Group(count, shape, colour, size),))
        for count, shape, colour, size in ((1, "circle", "red", "large"), (3, "square", "green", "small"))
    )
    asked = [red] * 8 + [green] * 8
    with torch.inference_mode():
        pictures = pipe([request.caption() for request in asked], range(16))
    right = [
        shapes.fulfils(shapes.read(picture.movedim(0, -1).double().numpy()), request)
        for picture, request in zip(pictures, asked, strict=True)
    ]
    assert sum(right) >= 13  # of 16; all of them where it was written
