"""A complete training step against a bare loop over the same network and batch, in one run.

    python -m benchmarks.overhead --config configs/digits.yaml
    python -m benchmarks.overhead --config configs/digits.yaml --turn 1 --turns 6 --network.width 1536 \
        --network.heads 24 --network.depth 2 --data.side 16 --data.batch_size 16

Ours is the trainer of `train.py fit`: Lightning, data, times, guard, averages, log, progress bar. The bare loop draws
t, computes the loss of one batch in memory, clips and steps. The two take turns of a few steps, so that a noisy machine
slows both equally. For one process. Printed are the medians, and the median over turns of the ratio.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from timm.optim import param_groups_weight_decay

from flow.density import stratified
from mmdit.model import Condition
from pipeline.sampling import sent
from train import build, quiet
from training.experiment import parser
from training.generator import Generator


class Turns(Callback):
    """After every few steps of the training runs as many of the bare loop, and times both.

    Args:
        steps: of a turn.
        turns: of each; the first does not count.
    """

    def __init__(self, steps: int, turns: int) -> None:
        self.steps, self.turns = steps, turns
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.began = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.steps:
            return
        wait(module.device)
        now = time.perf_counter()
        if trainer.global_step == self.steps:
            self.loop = loop(module, batch)
        else:
            self.ours.append((now - self.began) / self.steps)
            start = time.perf_counter()
            for _ in range(self.steps):
                next(self.loop)
            wait(module.device)
            self.bare.append((time.perf_counter() - start) / self.steps)
        self.began = time.perf_counter()


def wait(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loop(module: Generator, batch: Any) -> Any:
    """A generator that takes a step at each `next`."""
    network, objective = copy.deepcopy(module.network), module.objective
    groups = param_groups_weight_decay(network, module.optimization.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=True)
    condition, area = Condition(batch.text, batch.pooled), batch.x0[0, 0].numel()
    mixed = module.trainer.precision == "bf16-mixed"
    while True:
        optimizer.zero_grad()
        t = sent(objective.training_time(stratified(len(batch.x0), torch.Generator()), area), module.device)
        with torch.autocast(module.device.type, torch.bfloat16, enabled=mixed):
            loss = objective.loss(network, batch.x0, batch.noise, t, condition).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), module.optimization.clip)
        optimizer.step()
        yield


def log_of(folder: str) -> list[str]:
    """The log's lines; empty before the first."""
    log = Path(folder) / "log.jsonl"
    return log.read_text().splitlines() if log.exists() else []


class Overhead(NamedTuple):
    """Medians: seconds of a step of each, their ratio, and the share of a step that waits for data, if it is known."""

    ours: float
    bare: float
    ratio: float
    waits: float | None


def measure(flags: Sequence[str], turn: int, turns: int) -> Overhead:
    """Trains by these flags of `train.py` for `turns` turns of `turn` steps, and as many of the bare loop."""
    quiet()
    steps = turn * (turns + 1)
    with tempfile.TemporaryDirectory() as folder:
        run = {"folder": folder, "steps": steps, "validate_every": steps, "checkpoint_every": steps}
        own = [f"--run.{name}={value}" for name, value in run.items()] + ["--optimization.warmup=1"]
        p = parser("")
        trainer, generator, data = build(p.instantiate(p.parse_args([*flags, *own])), None)
        taken = Turns(turn, turns)
        trainer.callbacks.insert(0, taken)  # type: ignore[attr-defined]
        trainer.limit_val_batches = 0
        trainer.fit(generator, data)
        waits = [line["perf/data_wait"] for line in map(json.loads, log_of(folder)) if "perf/data_wait" in line]
    pairs = list(zip(taken.ours[1:], taken.bare[1:], strict=True))
    ours, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Overhead(ours, bare, statistics.median(a / b for a, b in pairs), statistics.median(waits) if waits else None)


def main() -> None:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--turns", type=int, default=40, help="turns of each")
    own.add_argument("--turn", type=int, default=10, help="steps of a turn")
    args, flags = own.parse_known_args()
    found = measure(flags, args.turn, args.turns)
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, took in (("train.py", found.ours), ("bare loop", found.bare)):
        print(f"{name:10}{1e3 * took:10.2f} ms a step")
    print(f"overhead  {100 * (found.ratio - 1):+10.1f} %")
    if found.waits is not None:
        print(f"waiting for data {100 * found.waits:.1f} % of a step")


if __name__ == "__main__":
    main()
