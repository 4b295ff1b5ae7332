"""Time to quality: this project against plain loops, with the same pictures, captions and judge.

    python -m benchmarks.leaderboard --data digits
    python -m benchmarks.leaderboard --data shapes

On the digits, quality is an FD ratio of at most 1.1 and an accuracy of at least 98 %, with 50 Euler steps from held-out
captions. On the shapes 80 % of the pictures are right, with 20 Euler steps from short captions of six categories. Each
model draws with the guidance scale that serves it best: for other noise and by the distance to the *training* digits,
or for other, long captions. The entries:

- ours: `train.py fit` for each of some lengths, at which the learning rate ends. On the digits with convolutions in the
  image MLPs and a rate of 8e-3, on the shapes as in `configs/shapes.yaml`. The model is the average of the weights.
- sd3-loop: diffusers' `SD3Transformer2DModel` of the same width and depth in a bare loop with the loss of diffusers'
  SD3 training script: 1,000 discrete times drawn logit-normally, AdamW, a constant rate after a warm-up, no averages.
- dit-loop, only for the digits: diffusers' class-conditional `DiTTransformer2DModel` of the same width and depth in a
  bare loop of plain rectified flow, as in minRF: logit-normal times, AdamW, a constant rate, no averages. Labels take
  the captions' place.

A loop is judged at each of the lengths as it passes them. Seconds are those of training steps alone. Loops have the
batches, the precision and the shift of our config, and the rate of --rates that has the lowest distance to the training
pictures on another seed, after the steps of a trial.
"""

import json
import math
import platform
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from tqdm import trange

from cli import Parser, fail, one_line_errors, output, positive
from data import digits
from data.batch import Batch
from data.examined import Digits, Examined, Shapes
from flow.density import shift
from metrics.distance import Measure
from metrics.features import load_features
from pipeline import Pipeline
from pipeline.sampling import Sampling
from storage.files import commit_json
from studies.measure import Setting
from studies.measure import draw as draw_pictures
from training.experiment import parser

ROOT = Path(__file__).parents[1]
TRAIN_STEPS = 1000  # times of the script's scheduler
CHOOSING = 1000  # the seed of the trials, and of the noise with which scales are chosen
BATCH = 100  # pictures at a time


class Task(NamedTuple):
    """What the entries are to learn, and when they have learned it."""

    config: list[str]  # the flags of our training
    loops: "tuple[type[Loop], ...]"
    asked: Callable[[int], Examined]  # so many captions of each category → what quality is measured on
    choosing: Callable[[int], Examined]  # what scales and rates are chosen on
    steps: int  # of Euler's method
    guidance: tuple[float, ...]  # scales to choose from; the first one is for the trials
    fd: float  # the largest FD ratio; infinite: it does not count, and is not measured
    right: float  # the least share of right pictures
    lengths: list[int]
    trial: int  # steps
    rates: list[float]
    each: int  # captions of each category


Draw = Callable[[Examined, float, int], Tensor]  # (what is asked for, guidance scale, seed of the noise) → pictures


class Quality(NamedTuple):
    """Of pictures: Fréchet distance over that of real ones, if it counts, and the share that is right."""

    fd: float | None
    right: float


class Judged(NamedTuple):
    """A model after some steps."""

    steps: int
    seconds: float
    guidance: float
    quality: Quality


class Jury:
    """Judges the pictures of a model.

    Args:
        task: what to ask for.
        each: captions of each category.
    """

    def __init__(self, task: Task, each: int) -> None:
        self.task = task
        self.asked, self.choosing = task.asked(each), task.choosing(each)
        self.network, real = load_features(self.asked.features), self.asked.real
        self.held_out = Measure(self.network, real["train"], real["held_out"])
        self.train = Measure(self.network, real["held_out"], real["train"])  # only to choose rates and scales

    def __call__(self, draw: Draw) -> tuple[float, Quality]:
        """The guidance scale that serves a model best, and the quality of its pictures with it."""
        best = max(self.task.guidance, key=lambda scale: self.worth(self.choice(draw, scale)))
        measure = self.held_out if math.isfinite(self.task.fd) else None
        return best, self.quality(self.asked, measure, draw(self.asked, best, 0))

    def choice(self, draw: Draw, scale: float) -> Quality:
        """The quality with the captions and the noise for choices, by the distance to the training pictures."""
        return self.quality(self.choosing, self.train, draw(self.choosing, scale, CHOOSING))

    def quality(self, asked: Examined, measure: Measure | None, pictures: Tensor) -> Quality:
        pictures = pictures.mul(255).round() / 255
        seen = self.network(pictures).logits if not asked.by_rule else None
        verdicts = asked.verdicts(pictures, [] if seen is None else seen.argmax(dim=1).tolist())
        fd = measure.quality(pictures, asked.labels).distance_ratio if measure else None
        return Quality(fd, sum(verdict.right for verdict in verdicts) / len(verdicts))

    def worth(self, quality: Quality) -> tuple[float, float]:
        """The larger, the better: right pictures up to the wanted share, then a small distance."""
        assert quality.fd is not None
        return min(quality.right, self.task.right), -quality.fd

    def good(self, quality: Quality) -> bool:
        """Whether that is the quality that is wanted."""
        return quality.right >= self.task.right and (quality.fd is None or quality.fd <= self.task.fd)


class Loop(ABC):
    """A bare training loop of one of diffusers' networks, of the sizes, with the data and the precision of our config.

    Args:
        task: has the config.
        rate: the learning rate.
        seed: of weights, batches and noise.
    """

    name: ClassVar[str]
    flags: ClassVar[tuple[str, ...]] = ()  # what is different in the config

    def __init__(self, task: Task, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        reader = parser("")
        config = reader.parse_args([*task.config, *self.flags, "--run.seed", str(seed)])
        self.sizes, self.warmup = config.network.init_args, config.optimization.warmup
        built = reader.instantiate(config)
        self.bf16 = built.run.precision == "bf16-mixed"
        self.text, self.codec, self.shift = built.text, built.codec, built.objective.shift
        self.data = built.data(self.text, self.codec, seed)
        self.batches = iter(self.data.train_dataloader())
        self.task, self.rate = task, rate
        self.network = self.build(
            in_channels=self.sizes.in_channels, out_channels=self.sizes.in_channels, num_layers=self.sizes.depth,
            sample_size=self.sizes.sample_size, patch_size=self.sizes.patch_size,
            num_attention_heads=self.sizes.heads, attention_head_dim=self.sizes.width // self.sizes.heads,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=rate)
        self.done, self.seconds = 0, 0.0

    @abstractmethod
    def build(self, **shared: Any) -> nn.Module:
        """A new network, with arguments that both networks have."""

    @abstractmethod
    def training_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The network's inputs beside z and t, for a batch of training."""

    @abstractmethod
    def sampling_inputs(self, prompts: list[str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The same for samples, one for each of the prompts; and without a condition."""

    @abstractmethod
    def velocity(self, z: Tensor, t: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """The network's output at z (B, C, H, W) and t (B,), shaped like z."""

    def times(self, count: int) -> Tensor:
        """Times (count,) of a batch, logit-normal, shifted."""
        return shift(torch.sigmoid(torch.randn(count)), self.shift)

    def step(self) -> None:
        """One step of the optimizer."""
        batch = self.data.on_after_batch_transfer(next(self.batches), 0)
        x0, noise, t = batch.x0.float(), torch.randn(batch.x0.shape), self.times(len(batch.x0))
        z = torch.lerp(x0, noise, t[:, None, None, None])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.done + 1) / self.warmup)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            v = self.velocity(z, t, self.training_inputs(batch))
        loss = (v - (noise - x0)).square().mean()
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
    def draw(self, asked: Examined, guidance: float = 1.0, seed: int = 0) -> Tensor:
        """Pictures (N, C, H, W) of what is asked for, by Euler steps."""
        self.network.eval()
        side, prompts = self.sizes.sample_size, asked.prompts
        noise = torch.randn(
            len(prompts), self.sizes.in_channels, side, side, generator=torch.Generator().manual_seed(seed)
        )
        times = shift(torch.linspace(1, 0, self.task.steps + 1), self.shift)
        pictures = []
        for start in trange(0, len(prompts), BATCH, desc=f"{self.name} draws", leave=False):
            z = noise[start : start + BATCH]
            inputs, null = self.sampling_inputs(prompts[start : start + BATCH])
            for t, after in pairwise(times):
                v = self.velocity(z, t.expand(len(z)), inputs)
                if guidance != 1:
                    v = torch.lerp(self.velocity(z, t.expand(len(z)), null), v, guidance)
                z = z + (after - t) * v
            pictures.append(asked.compared(self.codec.decode(z)))
        return torch.cat(pictures)


class SD3Loop(Loop):
    """Text to image with the loss of diffusers' SD3 training script."""

    name = "sd3-loop"

    def build(self, **shared: Any) -> nn.Module:
        network = SD3Transformer2DModel(
            **shared, caption_projection_dim=self.sizes.width, joint_attention_dim=self.sizes.text_dim,
            pooled_projection_dim=self.sizes.pooled_dim, pos_embed_max_size=self.sizes.pos_embed_max_size,
            qk_norm="rms_norm",
        )  # fmt: skip
        return cast(nn.Module, network)

    def training_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch.text.float(), batch.pooled.float()

    def sampling_inputs(self, prompts: list[str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        text, null = (self.text.encode(captions) for captions in (prompts, [""] * len(prompts)))
        return (text.tokens, text.pooled), (null.tokens, null.pooled)

    def times(self, count: int) -> Tensor:
        return torch.ceil(super().times(count) * TRAIN_STEPS) / TRAIN_STEPS

    def velocity(self, z: Tensor, t: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.network(z, *inputs, t * TRAIN_STEPS, return_dict=False)[0]


class DiTLoop(Loop):
    """Labels of digits to image by plain rectified flow."""

    name = "dit-loop"
    flags = ("--data.caption_dropout", "0")  # the network drops a tenth of the labels in training by itself
    classes = 10

    def build(self, **shared: Any) -> nn.Module:
        network = DiTTransformer2DModel(**shared, num_embeds_ada_norm=self.classes)
        return cast(nn.Module, network)

    def training_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        assert batch.prompts is not None
        return (torch.tensor(list(map(digits.asked_for, batch.prompts))),)

    def sampling_inputs(self, prompts: list[str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        labels = torch.tensor(list(map(digits.asked_for, prompts)))
        return (labels,), (torch.full_like(labels, self.classes),)

    def velocity(self, z: Tensor, t: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.network(z, timestep=t * TRAIN_STEPS, class_labels=inputs[0], return_dict=False)[0]


CONV = ["--config", "configs/network/conv.yaml", "--optimization.lr", "8e-3"]  # as configs/studies/speed.yaml found
TASKS = {
    "digits": Task(
        config=["--config", "configs/digits.yaml", *CONV],
        loops=(SD3Loop, DiTLoop),
        asked=Digits,
        choosing=Digits,
        steps=50,
        guidance=(1.0, 1.15, 1.3, 1.5),
        fd=1.1,
        right=0.98,
        lengths=[500, 1000, 2000, 4000, 8000],
        trial=1000,
        rates=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        each=50,
    ),
    "shapes": Task(
        config=["--config", "configs/shapes.yaml"],
        loops=(SD3Loop,),
        asked=partial(Shapes.by_category, seed=1),
        choosing=lambda each: Shapes.held_out(3 * each),
        steps=20,
        guidance=(3.0, 2.0, 5.0),
        fd=math.inf,
        right=0.8,
        lengths=[8000, 16000, 32000],
        trial=1000,
        rates=[5e-4, 1e-3, 2e-3],
        each=100,
    ),
}


def chosen(kind: type[Loop], rates: list[float], task: Task, jury: Jury) -> float:
    """The rate with which a loop is nearest to the training pictures after a trial, on a seed of its own."""

    def distance(rate: float) -> float:
        trial = kind(task, rate, CHOOSING)
        trial.train(task.trial)
        found = jury.choice(trial.draw, task.guidance[0]).fd
        assert found is not None
        print(f"{kind.name:9} rate {rate:g} {task.trial:6} steps  FD {found:6.2f}", flush=True)
        return found

    return min(rates, key=distance) if len(rates) > 1 else rates[0]


def passing(loop: Loop, lengths: list[int], jury: Jury) -> Iterator[Judged]:
    """A loop, judged at each length."""
    for steps in lengths:
        loop.train(steps)
        yield Judged(steps, loop.seconds, *jury(loop.draw))


def ours(task: Task, lengths: list[int], seed: int, jury: Jury, out: Path) -> Iterator[Judged]:
    """Trainings of this project, one for each length."""
    for steps in lengths:
        folder = out / f"ours-{seed}-{steps}"
        flags = ["--run.folder", folder, "--run.steps", steps, "--run.seed", seed, "--run.validate_every", steps]
        done = subprocess.run([sys.executable, "train.py", "fit", *task.config, *map(str, flags)], cwd=ROOT)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        times = [line["perf/step_s"] for line in lines if "perf/step_s" in line]
        yield Judged(steps, steps * sum(times) / len(times), *jury(partial(drawn, task, Pipeline.load(folder))))


def drawn(task: Task, pipe: Pipeline, asked: Examined, guidance: float, seed: int) -> Tensor:
    """What a model of this project draws."""
    setting = Setting("ours", "", pipe, Sampling(steps=task.steps, guidance=guidance))
    return draw_pictures(setting, asked, seed, BATCH).pictures


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--data", choices=TASKS, default="digits", help="what to learn; default: digits")
    p.add_argument("--entries", nargs="+", choices=ENTRIES, default=ENTRIES, help="default: all that the data have")
    p.add_argument("--out", type=output, help="folder of trainings and results; default: runs/leaderboard-DATA")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="trainings of each entry")
    p.add_argument("--lengths", type=positive, nargs="+", help="in steps; default: " + defaults("lengths"))
    p.add_argument("--rates", type=learning_rate, nargs="+", help="of the loops; default: " + defaults("rates"))
    p.add_argument("--per-category", type=positive, help="captions of each category; default: " + defaults("each"))
    args = p.parse_args(argv)

    task = TASKS[args.data]
    entries = [(name, kind) for name, kind in [(OURS, None), *((loop.name, loop) for loop in task.loops)]
               if name in args.entries]  # fmt: skip
    if not entries:
        fail(f"{', '.join(args.entries)} learns labels, which the {args.data} do not have: take another of --entries")
    with one_line_errors(ValueError, FileNotFoundError):
        compared(task, entries, args, args.out or ROOT / f"runs/leaderboard-{args.data}")


def compared(task: Task, entries: list[tuple[str, type[Loop] | None]], args: Namespace, out: Path) -> None:
    """Trains and judges the entries, prints a line for each length, and writes all of them."""
    jury, lengths, rows = Jury(task, args.per_category or task.each), sorted(args.lengths or task.lengths), []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}", flush=True)
    for name, kind in entries:
        rate = chosen(kind, args.rates or task.rates, task, jury) if kind else None
        for seed in args.seeds:
            loop = kind(task, rate, seed) if kind and rate else None
            for row in passing(loop, lengths, jury) if loop else ours(task, lengths, seed, jury, out):
                reached, (fd, right) = jury.good(row.quality), row.quality
                found = {**row._asdict(), "quality": row.quality._asdict(), "reached": reached}
                rows.append({"entry": name, "seed": seed, "rate": rate, **found})
                print(
                    f"{name:9} seed {seed}  {row.steps:6} steps {row.seconds:7.1f} s  guidance {row.guidance:.2f}"
                    f"{'' if fd is None else f'  FD {fd:6.2f}'}  right {100 * right:5.1f} %"
                    f"{'  reached' if reached else ''}",
                    flush=True,
                )
                if reached:
                    break
        commit_json(out / "leaderboard.json", {"data": args.data, "rows": rows})


OURS = "ours"
ENTRIES = [OURS, *(loop.name for loop in (SD3Loop, DiTLoop))]


def learning_rate(text: str) -> float:
    """A learning rate. ArgumentTypeError unless it is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a learning rate, such as 1e-3")
    return number


def defaults(name: str) -> str:
    """The defaults of an argument for each kind of data, in words."""
    values = {data: getattr(task, name) for data, task in TASKS.items()}
    texts = {data: " ".join(map(str, v)) if isinstance(v, list) else str(v) for data, v in values.items()}
    return ", ".join(f"{data}: {text}" for data, text in texts.items())


if __name__ == "__main__":
    main()
