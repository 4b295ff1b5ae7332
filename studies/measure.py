"""Draws pictures with one setting of a model and compares them with real pictures."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from data.examined import Examined, Half
from metrics import report
from metrics.clip_score import clip_score
from metrics.distance import Measure
from metrics.distribution import check_count
from metrics.features import CLIPFeatures, load_features
from metrics.figures import sheet_image
from metrics.straightness import path_length, straightness
from metrics.table import Row, table
from pipeline import Pipeline
from pipeline.sampling import Sampling

PRINTED = ["model", "sampler", "steps", "evaluations", "accuracy", "distance_ratio", "neighbour_ratio", "duplicates"]


class Setting(NamedTuple):
    """A model and how it is sampled: one row of the results."""

    name: str  # name of the model
    folder: str
    pipe: Pipeline
    sampling: Sampling


class Drawn(NamedTuple):
    """Pictures, with the cost and the shape of their walks."""

    pictures: Tensor  # (N, C, H, W) in [0, 1], in 256 levels as in a PNG
    evaluations: float  # network evaluations for each picture
    seconds: float  # seconds for each picture
    path_length: float  # mean over the pictures, as in `metrics.straightness`
    straightness: float  # mean over the pictures, as in `metrics.straightness`


def short_names(paths: Sequence[Path]) -> list[str]:
    """The paths without their common first and last folders: a/rf/1 and a/edm/1 become rf and edm."""
    parts = [path.parts for path in paths]
    while len(paths) > 1 and min(map(len, parts)) > 1:
        for end in (0, -1):
            if len({part[end] for part in parts}) == 1:
                parts = [part[1:] if end == 0 else part[:-1] for part in parts]
                break
        else:
            break
    return [str(Path(*part)) for part in parts]


def draw(
    setting: Setting,
    examined: Examined,
    first_seed: int,
    batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
) -> Drawn:
    """Draws a picture for each prompt and measures the walks.

    Args:
        setting: model and sampling.
        examined: the prompts, and the form in which pictures are compared.
        first_seed: seed of the first picture; each next picture has the next seed.
        batch_size: pictures at a time.
        progress: called after each batch with its number of pictures.

    Raises:
        ValueError: in one line, if the sampling does not fit the model.
    """
    _, _, pipe, sampling = setting
    prompts = examined.prompts
    seeds = range(first_seed, first_seed + len(prompts))
    _, _, times = pipe.plan(sampling)
    a, b = pipe.objective.path(times)
    scale, tau = a + b, b / (a + b)
    pictures, lengths, deviations, calls, seconds = [], [], [], 0, 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += len(inputs[0])

    weak = pipe.guides.weak
    asked = {pipe.network, *([weak.model] if weak else [])}
    hooks = [cast(nn.Module, network).register_forward_pre_hook(count) for network in asked]
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        walk: list[Tensor] = []
        began = time.perf_counter()
        images = pipe(
            prompts[part],
            seeds[part],
            sampling=sampling,
            callback=lambda done, z, x0, walk=walk: walk.append((z / scale[done]).cpu()),  # type: ignore[misc]
        )
        seconds += time.perf_counter() - began
        pictures.append(examined.compared(images).mul(255).round() / 255)
        lengths.append(path_length(walk))
        deviations.append(straightness(walk, tau))
        progress(len(images))
    for hook in hooks:
        hook.remove()
    n = len(prompts)
    length, deviation = (torch.cat(parts).mean().item() for parts in (lengths, deviations))
    return Drawn(torch.cat(pictures), calls / n, seconds / n, length, deviation)


class AgainstReal:
    """Compares the pictures of each setting with real pictures: one row of distances for each.

    Args:
        examined: prompts and real pictures.
        out: folder of results, plot, sheet and report.
        reference: the half of the real pictures that the samples are compared with.
        features: the feature network, as for `metrics.features.load_features`; None means the data set's own.
        clip: folder of a CLIP model for the CLIP score; None leaves the score out.
        seed: seed of the first picture, for the record.
        device: device of the models, for the record.

    Raises:
        ValueError: in one line, if these do not fit together, or there are too few samples.
        FileNotFoundError: in one line, if a network is missing.
    """

    def __init__(
        self,
        examined: Examined,
        out: Path,
        reference: Half = "held_out",
        features: str | None = None,
        clip: Path | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.examined, self.out = examined, out
        network = load_features(features or examined.features)
        self.clip = CLIPFeatures(clip) if clip else None
        if self.clip:
            self.clip.text(["a picture"])  # fails now if the folder has no tokenizer
        check_count(len(examined.prompts), network.num_features)
        self.other: Half = "train" if reference == "held_out" else "held_out"
        self.measure = Measure(network, examined.real[self.other], examined.real[reference])
        real = examined.alike(self.other)
        self.floor = self.measure.floor(real) if len(real) > network.num_features else None
        self.settings: dict[str, Any] = {
            "data": examined.name,
            "features": network.name,
            "preprocessing": network.preprocessing,
            "reference": reference,
            "real_distance": self.measure.real_distance,
            **examined.settings,
            "first_seed": seed,
            "device": device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        self.rows: list[Row] = []
        self.shown: list[tuple[Setting, Tensor]] = []

    def batch_size(self, pipe: Pipeline) -> int:
        """The default batch size."""
        return pipe.batch_size()

    def files(self, settings: int) -> Sequence[str]:
        """The names of the files that it writes for so many settings."""
        return report.FILES

    def add(self, setting: Setting, drawn: Drawn) -> None:
        """Measures the pictures of a setting."""
        quality = self.measure.quality(drawn.pictures, self.examined.labels)
        if self.examined.by_rule:
            verdicts = self.examined.verdicts(drawn.pictures)
            quality = quality._replace(accuracy=sum(verdict.right for verdict in verdicts) / len(verdicts))
        row = {
            "model": setting.name,
            "folder": setting.folder,
            **asdict(setting.sampling),
            "shift": setting.pipe.shift(),
            "evaluations": drawn.evaluations,
            "samples": len(drawn.pictures),
            "seconds_per_picture": drawn.seconds,
            **quality._asdict(),
            "path_length": drawn.path_length,
            "straightness": drawn.straightness,
            "clip_score": self.clip and clip_score(self.clip, drawn.pictures, self.examined.prompts),
        }
        self.rows.append(row)
        self.shown.append((setting, drawn.pictures[self.examined.shown]))

    def finish(self) -> str:
        """Writes results, plot, sheet and report; returns the text for the user."""
        several = len({setting.sampling.sampler for setting, _ in self.shown}) > 1
        sheet = {
            (f"{s.name}, {s.sampling.sampler}" if several else s.name, s.sampling.steps): some for s, some in self.shown
        }
        series, steps = list(dict.fromkeys(key[0] for key in sheet)), list(dict.fromkeys(key[1] for key in sheet))
        record = {"settings": self.settings, "floor": self.floor, "rows": self.rows}
        report.write(record, sheet_image(sheet, series, steps, self.examined.side), self.out)
        text = table(self.rows, PRINTED)
        if self.floor is not None:
            half = "training" if self.other == "train" else "held-out"
            text += f"FD ratio of real {half} {self.examined.amount}: {self.floor:.2f}\n"
        return text + f"Look at {self.out / 'report.html'}"
