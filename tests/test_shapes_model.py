"""The model of scenes that is in the repository: it loads, and draws what a caption says."""

from pathlib import Path

import torch

from data import shapes
from pipeline import Pipeline

MODEL = Path(__file__).parents[1] / "assets/shapes/model"


def test_it_draws_what_captions_say() -> None:
    """Also above, below, left and right, which the CLIP towers alone do not tell apart."""
    pipe = Pipeline.load(MODEL)
    captions = 8 * [
        "a large red circle",
        "a large blue square below a small red circle",
        "a small green cross to the right of a large black circle",
    ]
    seeds = [i // 3 for i in range(24)]
    with torch.inference_mode():
        pictures = pipe(captions, seeds)
    right = [
        shapes.fulfils(shapes.read(picture.movedim(0, -1).double().numpy()), shapes.asked_for(caption))
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    assert sum(right) >= 22  # of 24; all where it was written
