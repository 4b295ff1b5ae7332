"""A complete training step against a bare loop over the same network and batch, in one run.

    python -m benchmarks.overhead --config configs/digits.yaml
    python -m benchmarks.overhead --config configs/digits.yaml --turn 1 --turns 6 --network.width 1536 \
        --network.heads 24 --network.depth 2 --data.side 16 --data.batch_size 16

Ours is the trainer of `train.py fit`: Lightning, data, times, guard, averages, log, progress bar. The bare loop draws
t, computes the loss of one batch in memory, clips and steps. The two take turns of a few steps, so that a noisy machine
slows both equally. For a CPU and float32. Printed are the medians, and the median over turns of the ratio.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from timm.optim import param_groups_weight_decay

from flow.density import stratified
from mmdit.model import Condition
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
        now = time.perf_counter()
        if trainer.global_step == self.steps:
            self.loop = loop(module, batch)
        else:
            self.ours.append((now - self.began) / self.steps)
            start = time.perf_counter()
            for _ in range(self.steps):
                next(self.loop)
            self.bare.append((time.perf_counter() - start) / self.steps)
        self.began = time.perf_counter()


def loop(module: Generator, batch: Any) -> Any:
    """A generator that takes a step at each `next`."""
    network, objective = copy.deepcopy(module.network), module.objective
    groups = param_groups_weight_decay(network, module.optimization.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=True)
    condition, area = Condition(batch.text, batch.pooled), batch.x0[0, 0].numel()
    while True:
        optimizer.zero_grad()
        t = objective.training_time(stratified(len(batch.x0), torch.Generator()), area)
        objective.loss(network, batch.x0, batch.noise, t, condition).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), module.optimization.clip)
        optimizer.step()
        yield


def log_of(folder: str) -> list[str]:
    """The log's lines; empty before the first."""
    log = Path(folder) / "log.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def main() -> None:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--turns", type=int, default=40, help="turns of each")
    own.add_argument("--turn", type=int, default=10, help="steps of a turn")
    args, flags = own.parse_known_args()
    quiet()
    steps = args.turn * (args.turns + 1)
    with tempfile.TemporaryDirectory() as folder:
        run = {"folder": folder, "steps": steps, "validate_every": steps, "checkpoint_every": steps}
        flags += [f"--run.{name}={value}" for name, value in run.items()] + ["--optimization.warmup=1"]
        p = parser("")
        trainer, generator, data = build(p.instantiate(p.parse_args(flags)), None)
        turns = Turns(args.turn, args.turns)
        trainer.callbacks.insert(0, turns)  # type: ignore[attr-defined]
        trainer.limit_val_batches = 0
        trainer.fit(generator, data)
        waits = [line["perf/data_wait"] for line in map(json.loads, log_of(folder)) if "perf/data_wait" in line]
    ratio = statistics.median(ours / bare for ours, bare in zip(turns.ours[1:], turns.bare[1:], strict=True))
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, times in (("train.py", turns.ours[1:]), ("bare loop", turns.bare[1:])):
        print(f"{name:10}{1e3 * statistics.median(times):10.2f} ms a step")
    print(f"overhead  {100 * (ratio - 1):+10.1f} %")
    if waits:
        print(f"waiting for data {100 * statistics.median(waits):.1f} % of a step")


if __name__ == "__main__":
    main()
