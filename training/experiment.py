"""An experiment's YAML file: its sections, and how they are read. `encode.py` and `train.py` work on the same file."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from jsonargparse import ArgumentParser
from torch import nn

from cli import fail
from data.latents import Codec
from data.module import Data
from data.store.encoding import Encoding
from data.text.encoder import TextEncoder
from engine.ema import Averages
from engine.strategy import Strategy
from flow.objective import Objective
from mmdit.lora import LoRA
from pipeline.sampling import Sampling
from training.generator import Grid, Optimization, Teacher


@dataclass(frozen=True)
class Run:
    """The run as a whole.

    Args:
        folder: everything that the run writes.
        seed: of initial weights, order, captions, noise and times.
        steps: optimizer steps.
        validate_every: steps between validations, samples and, where the loss is the best so far, model folders.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of the log.
        accelerator: as Lightning's.
        devices: processes on each machine.
        num_nodes: machines.
        precision: as Lightning's.
        wandb: also log to Weights & Biases; offline needs no account and no network.
    """

    folder: Path
    seed: int = 0
    steps: int = 100_000
    validate_every: int = 1000
    checkpoint_every: int = 1000
    log_every: int = 50
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    wandb: Literal["off", "offline", "online"] = "off"

    def __post_init__(self) -> None:
        counts = (self.steps, self.validate_every, self.checkpoint_every, self.log_every, self.devices, self.num_nodes)
        if min(counts) < 1 or self.steps % self.validate_every:
            raise ValueError(
                "run.steps, validate_every, checkpoint_every, log_every, devices and num_nodes must be at least 1, and "
                f"steps a multiple of validate_every; got {', '.join(map(str, counts))}"
            )

    @property
    def world(self) -> int:
        """Processes of the whole training."""
        return self.devices * self.num_nodes


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        fail(plain(message))


def plain(message: str) -> str:
    """The cause, where jsonargparse tells all that a value could have been."""
    where = re.match(r"(.*?)Does not validate against any of the Union subtypes", message, re.DOTALL)
    cause = re.search(r"Errors:\s+- (.*?)\s*(?:\n\s*- |Given value|$)", message, re.DOTALL)
    return f"{where[1]}{cause[1]}" if where and cause else message


def parser(description: str) -> Parser:
    """Every key of the YAML file is a constructor's argument, documented there."""
    p = Parser(description=description)
    p.add_argument("--config", action="config", required=True, help="a YAML file; later ones and flags override it")
    p.add_class_arguments(Run, "run")
    p.add_subclass_arguments(TextEncoder, "text", required=True)
    p.add_subclass_arguments(Codec, "codec", required=True)
    p.add_argument("--encode", type=Encoding | None, help="what encode.py makes a store of")
    p.add_argument("--data", type=Callable[[TextEncoder, Codec, int], Data], required=True)
    p.add_subclass_arguments(nn.Module, "network", required=True)
    p.add_argument("--lora", type=LoRA | None, help="train low-rank updates of a network that is read from disk")
    p.add_argument("--teacher", type=Teacher | None, help="learn from a model's output")
    p.add_class_arguments(Objective, "objective")
    p.add_class_arguments(Optimization, "optimization")
    p.add_class_arguments(Averages, "ema")
    p.add_class_arguments(Strategy, "strategy")
    p.add_class_arguments(Sampling, "sampling")
    p.add_class_arguments(Grid, "grid")
    return p
