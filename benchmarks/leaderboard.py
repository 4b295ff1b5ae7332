"""Time to quality on the digits: this project against two plain loops, with the same pictures, captions and judge.

    python -m benchmarks.leaderboard --out runs/leaderboard

Quality is an FD ratio of at most 1.1 and an accuracy of at least 98 %, with 50 Euler steps from held-out captions. Each
model draws with the scale of GUIDANCE that serves it best with other noise, by the distance to the *training* digits.
The entries:

- ours: `train.py fit --config configs/digits.yaml` with convolutions in the image MLPs and a rate of 8e-3, for each of
  some lengths: the cosine ends at the length. The model is the average of the weights.
- sd3-loop: diffusers' `SD3Transformer2DModel` of the same width and depth in a bare loop with the loss of diffusers'
  SD3 training script: 1,000 discrete times drawn logit-normally, AdamW, a constant rate after a warm-up, no averages.
- dit-loop: diffusers' class-conditional `DiTTransformer2DModel` of the same width and depth in a bare loop of plain
  rectified flow, as in minRF: logit-normal times, AdamW, a constant rate, no averages. Labels take the captions' place.

A loop is judged at each of the lengths as it passes them. Seconds are those of training steps alone. Loops take the
rate of --rates that has the lowest distance to the training digits on another seed, at the second length.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple, cast

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from tqdm import trange

from cli import output, positive
from data import digits
from data.examined import Digits
from data.latents import Pixels
from data.text.clip import CLIPText
from metrics.distance import Measure
from metrics.features import load_features
from pipeline import Pipeline
from pipeline.sampling import Sampling
from storage.files import commit_json
from storage.text import read_yaml

ROOT = Path(__file__).parents[1]
FD, ACCURACY, STEPS = 1.1, 0.98, 50
GUIDANCE = (1.0, 1.15, 1.3, 1.5)
TRAIN_STEPS = 1000  # times of the script's scheduler
CONFIG = read_yaml(ROOT / "configs/digits.yaml")
SIZES, DATA = CONFIG["network"]["init_args"], CONFIG["data"]["init_args"]
BATCH, WARMUP = DATA["batch_size"], CONFIG["optimization"]["warmup"]
SHARED = {  # arguments of both networks of diffusers
    "in_channels": 1, "out_channels": 1, "sample_size": SIZES["sample_size"], "patch_size": 2,
    "num_layers": SIZES["depth"], "num_attention_heads": SIZES["heads"],
    "attention_head_dim": SIZES["width"] // SIZES["heads"],
}  # fmt: skip
RATE, CHOOSING = 8e-3, 1000  # ours, chosen by configs/studies/speed.yaml; the seed on which loops choose theirs
OURS = ["--config", "configs/digits.yaml", "--config", "configs/network/conv.yaml", "--optimization.lr", str(RATE)]


Draw = Callable[[float, int], Tensor]  # (guidance scale, seed of the noise) → pictures of what is asked for, in order


class Quality(NamedTuple):
    """Of pictures (N, 1, 8, 8): Fréchet distance over that of real digits, and the share that shows the right digit."""

    fd: float
    accuracy: float

    def good(self) -> bool:
        return self.fd <= FD and self.accuracy >= ACCURACY


class Judged(NamedTuple):
    """A model after some steps."""

    steps: int
    seconds: float
    guidance: float
    quality: Quality


class Jury:
    """Judges pictures (N, 1, 8, 8) in [0, 1] of the held-out captions, in order.

    Args:
        each: pictures of each digit.
    """

    def __init__(self, each: int) -> None:
        self.asked = Digits(each)
        network, real = load_features(self.asked.features), self.asked.real
        self.held_out = Measure(network, real["train"], real["held_out"])
        self.train = Measure(network, real["held_out"], real["train"])  # only to choose rates and scales

    def __call__(self, draw: Draw) -> tuple[float, Quality]:
        """The guidance scale that serves a model best, and the quality of its pictures with it."""
        best = max(GUIDANCE, key=lambda scale: worth(self.choosing(draw, scale)))
        return best, self.quality(self.held_out, draw(best, 0))

    def choosing(self, draw: Draw, scale: float) -> Quality:
        """The quality with other noise, by the distance to the training digits."""
        return self.quality(self.train, draw(scale, CHOOSING))

    def quality(self, measure: Measure, pictures: Tensor) -> Quality:
        found = measure.quality(pictures.mul(255).round() / 255, self.asked.labels)
        assert found.distance_ratio is not None
        assert found.accuracy is not None
        return Quality(found.distance_ratio, found.accuracy)


def worth(quality: Quality) -> tuple[float, float]:
    """The larger, the better: accuracy up to the wanted one, then a small distance."""
    return min(quality.accuracy, ACCURACY), -quality.fd


class Loop(ABC):
    """A bare training loop of one of diffusers' networks, of the sizes in configs/digits.yaml.

    Args:
        rate: the learning rate.
        seed: of weights, batches and noise.
    """

    name: ClassVar[str]

    def __init__(self, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.rate, self.random = rate, np.random.default_rng(seed)
        self.codec = Pixels(**CONFIG["codec"]["init_args"])
        pixels, self.labels = digits.load("train")
        self.x0 = self.codec.encode(pixels)
        self.network = self.build()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=rate)
        self.done, self.seconds = 0, 0.0

    @abstractmethod
    def build(self) -> nn.Module:
        """A new network."""

    @abstractmethod
    def training_inputs(self, labels: Tensor) -> tuple[Tensor, ...]:
        """The network's inputs beside z and t, for training pictures with these labels (B,)."""

    @abstractmethod
    def sampling_inputs(self, asked: Digits) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The same for samples, one for each of the prompts; and without a condition."""

    @abstractmethod
    def velocity(self, z: Tensor, t: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """The network's output at z (B, 1, 8, 8) and t (B,), shaped like z."""

    def times(self) -> Tensor:
        """Times of a batch, logit-normal."""
        return torch.sigmoid(torch.randn(BATCH))

    def step(self) -> None:
        """One step of the optimizer."""
        chosen = self.random.integers(len(self.x0), size=BATCH)
        x0, noise, t = self.x0[chosen], torch.randn(BATCH, *self.x0.shape[1:]), self.times()
        z = torch.lerp(x0, noise, t[:, None, None, None])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.done + 1) / WARMUP)
        loss = (self.velocity(z, t, self.training_inputs(self.labels[chosen])) - (noise - x0)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1

    def train(self, steps: int) -> None:
        """Trains until so many steps are done."""
        self.network.train()
        began = time.perf_counter()
        for _ in trange(steps - self.done, desc=f"{self.name}, rate {self.rate:g}", unit="step", leave=False):
            self.step()
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def draw(self, asked: Digits, guidance: float = 1.0, seed: int = 0) -> Tensor:
        """Pictures (N, 1, 8, 8) of what is asked for, by Euler steps."""
        self.network.eval()
        n, (inputs, null) = len(asked.labels), self.sampling_inputs(asked)
        z = torch.randn(n, *self.x0.shape[1:], generator=torch.Generator().manual_seed(seed))
        for k in range(STEPS, 0, -1):
            t = torch.full((n,), k / STEPS)
            v = self.velocity(z, t, inputs)
            if guidance != 1:
                v = torch.lerp(self.velocity(z, t, null), v, guidance)
            z = z - v / STEPS
        return self.codec.decode(z)


class SD3Loop(Loop):
    """Text to image with the loss of diffusers' SD3 training script."""

    name = "sd3-loop"

    def build(self) -> nn.Module:
        self.encoder, self.templates = CLIPText(ROOT / "assets/digits/text"), len(digits.TRAIN_TEMPLATES)
        captions = [caption for label in range(10) for caption in digits.captions(label, digits.TRAIN_TEMPLATES)]
        self.text = self.encoder.encode(["", *captions])
        network = SD3Transformer2DModel(
            **SHARED, caption_projection_dim=SIZES["width"], joint_attention_dim=SIZES["text_dim"],
            pooled_projection_dim=SIZES["pooled_dim"], pos_embed_max_size=SIZES["pos_embed_max_size"],
            qk_norm="rms_norm",
        )  # fmt: skip
        return cast(nn.Module, network)

    def training_inputs(self, labels: Tensor) -> tuple[Tensor, ...]:
        which = torch.from_numpy(self.random.integers(self.templates, size=BATCH))
        rows = torch.where(torch.rand(BATCH) < DATA["caption_dropout"], 0, 1 + labels * self.templates + which)
        return self.text.tokens[rows], self.text.pooled[rows]

    def sampling_inputs(self, asked: Digits) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        text, null = (self.encoder.encode(prompts) for prompts in (asked.prompts, [""] * len(asked.prompts)))
        return (text.tokens, text.pooled), (null.tokens, null.pooled)

    def times(self) -> Tensor:
        return torch.ceil(super().times() * TRAIN_STEPS) / TRAIN_STEPS

    def velocity(self, z: Tensor, t: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.network(z, *inputs, t * TRAIN_STEPS, return_dict=False)[0]


class DiTLoop(Loop):
    """Labels to image by plain rectified flow."""

    name = "dit-loop"
    classes = 10

    def build(self) -> nn.Module:
        network = DiTTransformer2DModel(**SHARED, num_embeds_ada_norm=self.classes)
        return cast(nn.Module, network)

    def training_inputs(self, labels: Tensor) -> tuple[Tensor, ...]:
        return (labels,)  # the network drops a tenth of them in training by itself

    def sampling_inputs(self, asked: Digits) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (asked.labels,), (torch.full_like(asked.labels, self.classes),)

    def velocity(self, z: Tensor, t: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.network(z, timestep=t * TRAIN_STEPS, class_labels=inputs[0], return_dict=False)[0]


def chosen(kind: type[Loop], rates: list[float], steps: int, jury: Jury) -> float:
    """The rate with which a loop is nearest to the training digits after some steps, on a seed of its own."""

    def distance(rate: float) -> float:
        trial = kind(rate, CHOOSING)
        trial.train(steps)
        return jury.choosing(partial(trial.draw, jury.asked), 1.0).fd

    return min(rates, key=distance) if len(rates) > 1 else rates[0]


def passing(loop: Loop, lengths: list[int], jury: Jury) -> Iterator[Judged]:
    """A loop, judged at each length."""
    for steps in lengths:
        loop.train(steps)
        yield Judged(steps, loop.seconds, *jury(partial(loop.draw, jury.asked)))


def ours(lengths: list[int], seed: int, jury: Jury, out: Path) -> Iterator[Judged]:
    """Trainings of this project, one for each length."""
    for steps in lengths:
        folder = out / f"ours-{seed}-{steps}"
        flags = ["--run.folder", folder, "--run.steps", steps, "--run.seed", seed, "--run.validate_every", steps]
        done = subprocess.run([sys.executable, "train.py", "fit", *OURS, *map(str, flags)], cwd=ROOT)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        times = [line["perf/step_s"] for line in lines if "perf/step_s" in line]
        yield Judged(steps, steps * sum(times) / len(times), *jury(partial(drawn, Pipeline.load(folder), jury.asked)))


def drawn(pipe: Pipeline, asked: Digits, guidance: float, seed: int) -> Tensor:
    """What a model of this project draws."""
    seeds = range(seed, seed + len(asked.prompts))
    return asked.compared(pipe(asked.prompts, seeds, sampling=Sampling(steps=STEPS, guidance=guidance)))


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=output, default=ROOT / "runs/leaderboard", help="folder of trainings and results")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="trainings of each entry")
    p.add_argument("--lengths", type=positive, nargs="+", default=[500, 1000, 2000, 4000, 8000], help="in steps")
    p.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3], help="of the loops")
    p.add_argument("--per-digit", type=positive, default=50, help="pictures of each digit")
    args = p.parse_args(argv)

    jury, lengths, rows = Jury(args.per_digit), sorted(args.lengths), []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}", flush=True)
    for kind in (None, SD3Loop, DiTLoop):
        name = kind.name if kind else "ours"
        rate = chosen(kind, args.rates, lengths[min(1, len(lengths) - 1)], jury) if kind else RATE
        for seed in args.seeds:
            judged = passing(kind(rate, seed), lengths, jury) if kind else ours(lengths, seed, jury, args.out)
            for row in judged:
                reached, (fd, accuracy) = row.quality.good(), row.quality
                found = {**row._asdict(), "quality": row.quality._asdict(), "reached": reached}
                rows.append({"entry": name, "seed": seed, "rate": rate, **found})
                print(
                    f"{name:9} seed {seed}  rate {rate:g} {row.steps:6} steps {row.seconds:7.1f} s  "
                    f"guidance {row.guidance:.2f}  FD {fd:6.2f}  accuracy {100 * accuracy:5.1f} %"
                    f"{'  reached' if reached else ''}",
                    flush=True,
                )
                if reached:
                    break
    commit_json(args.out / "leaderboard.json", {"rows": rows})


if __name__ == "__main__":
    main()
