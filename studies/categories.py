"""Scores by category, like GenEval (Ghosh et al. 2023): the share of pictures that show what the prompt says."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from data.examined import Examined
from data.raw.pictures import save_png, sheet
from metrics.features import load_features
from metrics.table import Row, keys, table
from pipeline import Pipeline
from storage.files import commit_json
from studies.measure import Drawn, Setting

SHOWN = 8  # pictures of each category on the sheet
BATCH = 64  # pictures at a time
FRAME = 2  # width of a frame, in pixels
RED, GREEN = (0.85, 0.1, 0.1), (0.1, 0.65, 0.2)


class ByCategory:
    """Measures the share of right pictures for each setting and category.

    Args:
        examined: the same number of prompts for each category, category after category.
        out: folder of results and sheets.
        seed: seed of the prompts and of the first picture, for the record.

    Raises:
        ValueError: in one line, if the network that classifies the pictures is damaged.
        FileNotFoundError: in one line, if it is missing.
    """

    def __init__(self, examined: Examined, out: Path, seed: int = 0) -> None:
        self.examined, self.out, self.seed = examined, out, seed
        self.network = None if examined.by_rule else load_features(examined.features)
        self.rows: list[Row] = []

    def batch_size(self, pipe: Pipeline) -> int:
        """The default batch size."""
        return BATCH

    def files(self, settings: int) -> list[str]:
        """The names of the files that it writes for so many settings."""
        each = [name for number in range(settings) for name in (f"sheet-{number}.png", f"pictures-{number}.json")]
        return ["results.json", *each]

    def classes(self, pictures: Tensor) -> list[int]:
        """The class that the network gives to each picture; empty if the pictures are read by rule."""
        logits = None if self.network is None else self.network(pictures).logits
        return [] if logits is None else logits.argmax(dim=1).tolist()

    def add(self, setting: Setting, drawn: Drawn) -> None:
        """Scores the pictures of a setting, and writes the sheet and the contents of each picture."""
        number, categories = len(self.rows), self.examined.categories
        verdicts = self.examined.verdicts(drawn.pictures, self.classes(drawn.pictures))
        right = np.array([verdict.right for verdict in verdicts]).reshape(len(categories), -1)
        scores = dict(zip(categories, right.mean(1).tolist(), strict=True))
        sampled = {key: getattr(setting.sampling, key) for key in ("sampler", "steps", "guidance")}
        row = {"model": setting.name, "folder": setting.folder, **sampled, **scores}
        self.rows.append(row | {"overall": float(np.mean(list(scores.values())))})
        shown = drawn.pictures.unflatten(0, right.shape)[:, :SHOWN].flatten(0, 1)
        framed_ones = framed(shown, torch.from_numpy(right[:, :SHOWN].reshape(-1)), self.examined.side)
        save_png(sheet(framed_ones, SHOWN), self.out / f"sheet-{number}.png")
        pictures = [
            {"caption": prompt, **verdict._asdict()}
            for prompt, verdict in zip(self.examined.prompts, verdicts, strict=True)
        ]
        content = {"model": setting.name, **sampled, "seed": self.seed, "pictures": pictures}
        commit_json(self.out / f"pictures-{number}.json", content)

    def finish(self) -> str:
        """Writes the results; returns the text for the user."""
        each = len(self.examined.prompts) // len(self.examined.categories)
        common = {"data": self.examined.name, "per_category": each, "seed": self.seed}
        commit_json(self.out / "results.json", common | {"rows": self.rows})
        printed = [key for key in keys(self.rows) if key != "folder"]
        look = f"Look at {self.out / 'sheet-0.png'}: a row for each category; right pictures have a green frame"
        return table(self.rows, printed) + look


def framed(pictures: Tensor, right: Tensor, side: int) -> Tensor:
    """Adds a frame to each picture: green if it is right, red if it is wrong.

    Args:
        pictures: `(N, 1 or 3, H, W)` in [0, 1].
        right: `(N,)` bool.
        side: smaller pictures are enlarged to about this side in pixels, by an integer factor.

    Returns:
        `(N, 3, H', W')`
    """
    zoom = max(1, side // max(pictures.shape[-2:]))
    large = pictures.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1).expand(-1, 3, -1, -1)
    inside = pad(torch.ones(large.shape[-2:], dtype=torch.bool), (FRAME,) * 4)
    colours = torch.where(right[:, None], torch.tensor(GREEN), torch.tensor(RED))
    return torch.where(inside, pad(large, (FRAME,) * 4), colours[:, :, None, None])
