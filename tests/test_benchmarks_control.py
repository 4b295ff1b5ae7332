"""Edges that lie on a hint, and scenes that fulfil what is asked for."""

import numpy as np
import pytest
import torch

from benchmarks.control import edges, overlap, scene_of
from benchmarks.inpainting import seam
from data.shapes import CATEGORIES, fulfils, read, requests


def square(top: int, left: int) -> torch.Tensor:
    lines = torch.zeros(40, 40, dtype=torch.bool)
    lines[top, left : left + 10] = lines[top + 9, left : left + 10] = True
    lines[top : top + 10, left] = lines[top : top + 10, left + 9] = True
    return lines


def test_overlap_counts_edges_within_a_pixel() -> None:
    assert overlap(square(5, 5), square(5, 5)) == overlap(square(6, 6), square(5, 5)) == 1
    assert overlap(square(5, 5), square(25, 25)) == 0
    both = square(5, 5) | square(25, 25)
    assert overlap(both, square(5, 5)) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert overlap(square(5, 5), both) == pytest.approx(2 / 3)
    nothing = torch.zeros(40, 40, dtype=torch.bool)
    assert (overlap(nothing, nothing), overlap(nothing, both)) == (1, 0)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_scene_fulfils_its_request_and_has_edges(category: str) -> None:
    for number, asked in enumerate(requests(category, 5, seed=3)):
        pixels = scene_of(asked, 3, number)
        assert fulfils(read(pixels.movedim(0, -1).double().numpy()), asked)
        lines = edges(pixels[None])
        assert lines.shape == (1, 3, 64, 64)
        assert 20 < int((lines[0, 0] > 0.5).sum()) < 600
        assert np.isin(lines, (0, 1)).all()


def test_the_seam_is_the_step_at_the_border_of_the_mask() -> None:
    mask = torch.zeros(8, 8)
    mask[2:6, 3:7] = 1
    assert seam(torch.stack([0.25 * mask] * 3), mask) == pytest.approx(0.25)
    slope = torch.arange(8.0).expand(3, 8, 8) / 100  # changes along a row only
    assert seam(slope, mask) == pytest.approx(0.005)  # half of the border is crossed along a row
    assert seam(torch.full((3, 8, 8), 0.7), mask) == 0
