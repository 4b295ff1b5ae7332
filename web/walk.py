"""The walk of one picture from noise: its numbers, and what it looks like on its own plane."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from data.raw.pictures import to_image
from flow.path import Path
from metrics.figures import PALETTE
from metrics.straightness import norms, path_length, straightness
from pipeline import Pipeline

FRAMES = 8  # pictures of a film
SIDE = 96  # pixels of the longer side of each


@dataclass
class Walk:
    """The states of the first picture of a batch, step by step, on the host."""

    name: str
    pipe: Pipeline
    times: Tensor  # (n + 1,)
    z: list[Tensor] = field(default_factory=list)  # each (1, C, h, w); the first is the noise
    x0: list[Tensor] = field(default_factory=list)  # estimates of the picture, of all steps but the first

    def add(self, done: int, z: Tensor, x0: Tensor) -> None:
        """Records the state after `done` steps; a new walk begins with 0."""
        if done == 0:
            self.z, self.x0 = [], []
        self.z.append(z[:1].float().cpu())
        if done:
            self.x0.append(x0[:1].float().cpu())

    @property
    def path(self) -> Path:
        return self.pipe.objective.path

    def line(self) -> tuple[list[Tensor], Tensor]:
        """w = z/(a + b) and τ = b/(a + b), in which a straight path is a straight line: see `metrics.straightness`."""
        a, b = self.path(self.times)
        return [z / (at + bt) for z, at, bt in zip(self.z, a, b, strict=True)], b / (a + b)

    def numbers(self) -> dict[str, str]:
        """What is said of the walk."""
        w, tau = self.line()
        chord = norms(w[-1] - w[0]).item()
        return {
            "model": self.name,
            "steps": str(len(w) - 1),
            "length / distance": f"{path_length(w).item() / chord:.3f}",
            "straightness S": f"{straightness(w, tau).item():.3g}",
        }

    def plane(self) -> tuple[Tensor, Tensor]:
        """The walk on the plane of its chord and of the direction in which it leaves the chord most, each (n + 1,).

        In units of the distance between its ends: it begins at 0 and ends at 1 of the first.
        """
        w, _ = self.line()
        points = torch.cat(w).flatten(1).double()
        points = points - points[0]
        chord = points[-1] / points[-1].norm()
        along = points @ chord
        rest = points - along[:, None] * chord
        across = rest @ torch.linalg.svd(rest, full_matrices=False)[2][0]
        across = across * (1 if across.sum() >= 0 else -1)
        return along / along[-1], across / along[-1]

    def film(self) -> Image.Image:
        """The estimates of the picture at steps that are equally far from each other, side by side."""
        chosen = sorted({round(i) for i in torch.linspace(0, len(self.x0) - 1, FRAMES).tolist()})
        with torch.inference_mode():
            frames = [self.pipe.codec.decode(self.x0[i].to(self.pipe.device)).cpu()[0] for i in chosen]
        images = [shown(to_image(frame), SIDE) for frame in frames]
        film = Image.new("RGB", (sum(image.width + 4 for image in images) - 4, images[0].height), "white")
        for i, image in enumerate(images):
            film.paste(image, (i * (image.width + 4), 0))
        return film


def shown(image: Image.Image, side: int) -> Image.Image:
    """A picture with a longer side of so many pixels; enlarged pixel by pixel if it is smaller than that."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)


def figure(walks: Sequence[Walk]) -> Image.Image:
    """The walks on their planes, and their times."""
    plot = Figure(figsize=(8, 3.2), layout="constrained", dpi=110)
    left, right = plot.subplots(1, 2)
    for i, walk in enumerate(walks):
        look = {"color": PALETTE[i], "label": walk.name, "marker": "o", "markersize": 3.5, "linewidth": 1.4}
        left.plot(*walk.plane(), **look)
        _, tau = walk.line()
        right.plot(range(len(tau)), tau, **look)
    left.plot([0, 1], [0, 0], color="0.6", linewidth=0.8, linestyle="--")
    labelled(left, "along the line from noise to picture", "beside it", "The walk on its plane")
    labelled(right, "step", "share of noise τ", "Times")
    if len(walks) > 1:
        right.legend(fontsize="small", frameon=False)
    out = io.BytesIO()
    plot.savefig(out, format="png")
    return Image.open(out)


def labelled(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25, linewidth=0.5)
