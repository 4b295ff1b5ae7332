"""The models of scenes that are in the repository: they load, and draw what a caption says."""

from dataclasses import replace
from pathlib import Path

import torch

from data import shapes
from pipeline import Pipeline

MODEL = Path(__file__).parents[1] / "assets/shapes/model"
STUDENT = MODEL.parent / "student"


def right(pipe: Pipeline, steps: int | None = None) -> list[bool]:
    """Which of eight pictures for each of three captions show what the caption says."""
    captions = 8 * [
        "a large red circle",
        "a large blue square below a small red circle",
        "a small green cross to the right of a large black circle",
    ]
    seeds = [i // 3 for i in range(24)]
    with torch.inference_mode():
        pictures = pipe(captions, seeds, sampling=replace(pipe.sampling, steps=steps or pipe.sampling.steps))
    return [
        shapes.fulfils(shapes.read(picture.movedim(0, -1).double().numpy()), shapes.asked_for(caption))
        for picture, caption in zip(pictures, captions, strict=True)
    ]


def test_it_draws_what_captions_say() -> None:
    """Also above, below, left and right, which the CLIP towers alone do not tell apart."""
    assert sum(right(Pipeline.load(MODEL))) >= 22  # of 24; all where it was written


def test_the_student_draws_them_in_four_evaluations_and_mostly_in_one() -> None:
    pipe = Pipeline.load(STUDENT)
    assert (pipe.sampling.steps, pipe.sampling.guidance) == (4, 1.0)
    assert sum(right(pipe)) >= 21  # of 24
    assert sum(right(pipe, 1)) >= 14
