"""Bits per dimension of real pictures under models: `evaluate.py --likelihood`."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data.examined import Examined, Half
from metrics.table import Row, table
from pipeline import Pipeline
from pipeline.likelihood import TOLERANCE, Autoencoder, bits
from storage.files import commit_json

BATCH = 100  # pictures at a time


def code_lengths(pictures: Tensor, others: Tensor, levels: int) -> dict[str, Tensor]:
    """Bits per dimension of pictures (N, …) for codes that need no network, each (N,).

    One is uniform over the levels. The other has a histogram for each number of a picture, counted on other pictures,
    each level once more than it occurs.
    """
    seen, counted = ((some.flatten(1) * (levels - 1)).round().long().T for some in (pictures, others))  # (D, N)
    count = torch.zeros(len(seen), levels).scatter_add_(1, counted, torch.ones(counted.shape))
    share = (count + 1) / (len(others) + levels)
    histogram = -share.log2().gather(1, seen).mean(0)
    return {"uniform code": torch.full((len(pictures),), math.log2(levels)), "histogram of each pixel": histogram}


class Likelihood:
    """Measures the bits per dimension of real pictures, given their captions: one row for each model.

    The first two rows are codes without a model; the histograms are of the other half of the pictures.

    Args:
        examined: the real pictures with captions and levels.
        half: of the pictures.
        samples: how many of them; none is all.
        seed: draws the noise of the first picture; each next picture has the next seed.
        out: folder of the results.

    Raises:
        ValueError: there are not so many pictures.
    """

    def __init__(self, examined: Examined, half: Half, samples: int | None, seed: int, out: Path) -> None:
        self.examined, self.half, self.seed, self.out = examined, half, seed, out
        pictures = examined.real[half]
        if samples and samples > len(pictures):
            raise ValueError(f"there are {len(pictures)} {half} pictures: give --samples up to that")
        self.pictures = pictures[:samples]
        self.captions = examined.captions(half)[:samples]
        others = examined.real["train" if half == "held_out" else "held_out"]
        codes = code_lengths(self.pictures, others, examined.levels)
        self.rows: list[Row] = [self.row(name, each) for name, each in codes.items()]

    def add(self, name: str, folder: str, model: Pipeline | Autoencoder, progress: Callable[[int], object]) -> None:
        """Measures a model: a row for each way. ValueError in one line if it has no likelihood of these pictures."""
        found = []
        for start in range(0, len(self.pictures), BATCH):
            rows = slice(start, min(start + BATCH, len(self.pictures)))
            seeds = range(self.seed + rows.start, self.seed + rows.stop)
            pictures, captions = self.pictures[rows], self.captions[rows]
            if isinstance(model, Autoencoder):
                found.append(model.bits(pictures, seeds))
            else:
                found.append(bits(model, pictures, captions, self.examined.levels, seeds))
            progress(rows.stop - rows.start)
        for kind in found[0]:
            each = torch.cat([part[kind] for part in found])
            self.rows.append(self.row(name, each, folder=folder, likelihood=kind))

    @staticmethod
    def row(name: str, bits: Tensor, **more: str) -> Row:
        """A row of the results for the bits of each picture."""
        error = (bits.std() / math.sqrt(len(bits))).item() if len(bits) > 1 else None
        return {
            "model": name, **more, "samples": len(bits), "bits_per_dim": bits.mean().item(), "bits_per_dim_error": error
        }  # fmt: skip

    def finish(self) -> str:
        """Writes the results; returns the text for the user."""
        settings = {"data": self.examined.name, "half": self.half, "levels": self.examined.levels,
                    "seed": self.seed, "tolerance": TOLERANCE}  # fmt: skip
        commit_json(self.out / "results.json", settings | {"rows": self.rows})
        return table(self.rows, [key for key in self.rows[-1] if key != "folder"])
