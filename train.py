"""Trains a model from a YAML file: `python train.py fit --config configs/digits.yaml`. The same command resumes."""

import hashlib
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from cli import fail, one_line_errors, plain_warnings
from data.latents import Codec
from data.module import Digits
from data.text import TextEncoder
from flow.objective import Objective
from generator import Generator, Grid, Optimization
from mmdit import lora
from mmdit.lora import LoRA
from sampling import Sampling
from training.checkpoint import AtomicCheckpointIO, LastCheckpoint
from training.ema import EMA
from training.log import JSONLinesLogger
from training.progress import StepProgress

FREE = {"run.folder", "run.accelerator", "run.devices", "run.wandb", "data.workers"}  # may differ when a run goes on


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
        devices: processes on this machine.
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
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    wandb: Literal["off", "offline", "online"] = "off"

    def __post_init__(self) -> None:
        counts = (self.steps, self.validate_every, self.checkpoint_every, self.log_every, self.devices)
        if min(counts) < 1 or self.steps % self.validate_every:
            raise ValueError(
                "run.steps, validate_every, checkpoint_every, log_every and devices must be at least 1, and steps a "
                f"multiple of validate_every; got {', '.join(map(str, counts))}"
            )


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


def parser() -> Parser:
    """Every key of the YAML file is a constructor's argument, documented there."""
    p = Parser(description=__doc__)
    p.add_argument("command", choices=["fit", "validate"], help="train, or report the validation loss of a run")
    p.add_argument("--config", action="config", required=True, help="a YAML file; later ones and flags override it")
    p.add_class_arguments(Run, "run")
    p.add_subclass_arguments(TextEncoder, "text", required=True)
    p.add_subclass_arguments(Codec, "codec", required=True)
    p.add_class_arguments(Digits, "data", skip={"text", "codec", "seed"}, instantiate=False)
    p.add_subclass_arguments(nn.Module, "network", required=True)
    p.add_argument("--lora", type=LoRA | None, help="train low-rank updates of a network that is read from disk")
    p.add_class_arguments(Objective, "objective")
    for group, name in ((Optimization, "optimization"), (Sampling, "sampling"), (Grid, "grid")):
        p.add_class_arguments(group, name)
    return p


def claim(folder: Path, resolved: str) -> None:
    """Leaves the resolved config in a new run folder; refuses one that holds work done with another config."""
    file = folder / "config.yaml"
    if file.exists() and any((folder / work).exists() for work in ("last.ckpt", "log.jsonl")):
        try:
            here, there = flat(yaml.safe_load(resolved)), flat(yaml.safe_load(file.read_text(encoding="utf-8")))
        except yaml.YAMLError:
            raise ValueError(f"{file} is no YAML; what run is in {folder}?") from None
        different = [key for key in here | there if here.get(key) != there.get(key) and key not in FREE]
        if different:
            told = "; ".join(f"{key} is {there.get(key)} there and {here.get(key)} now" for key in different[:3])
            raise ValueError(f"{folder} holds a run with another config ({told}); choose another run.folder")
        return
    if not file.exists() and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run; choose another run.folder")
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "config.yaml.new"
    new.write_text(resolved, encoding="utf-8")
    new.replace(file)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, branch in tree.items() for k, v in flat(branch, f"{prefix}.{name}".lstrip(".")).items()}


def base_of(config: Namespace) -> str | None:
    """Where the network comes from, if low-rank updates of it are to be trained; ValueError if it is a new one."""
    if config.lora is None:
        return None
    if config.network.class_path != "mmdit.checkpoint.load":
        raise ValueError("lora updates a network from disk: network.class_path must be mmdit.checkpoint.load")
    base = Path(config.network.init_args.path).resolve()
    base = base.parent if base.name == "transformer" and not (base / "model_index.json").exists() else base
    if base.is_dir() and not (base / "model_index.json").is_file():
        raise ValueError(f"lora needs the whole model, to sample with: {base} has no model_index.json")
    return str(base)


def build(config: Namespace, base: str | None) -> tuple[L.Trainer, Generator, Digits]:
    """The trainer, the module and the data of a config; `base` is where a network to be updated comes from."""
    run: Run = config.run
    network, text, codec = config.network.train(), config.text, config.codec
    if config.lora:
        lora.add(network, config.lora)
    if any(p.requires_grad and p.dtype != torch.float32 for p in network.parameters()):
        raise ValueError("weights that learn must be float32, or small steps vanish: leave out network.init_args.dtype")
    data = Digits(text, codec, run.seed, **config.data)
    if data.batch_size % run.devices:
        raise ValueError(f"data.batch_size must be a multiple of the {run.devices} devices, got {data.batch_size}")
    generator = Generator(
        network, config.objective, text, codec, config.optimization, config.sampling, config.grid, data.side,
        run.folder, run.steps, data.batch_size, run.seed, run.log_every, base,
    )  # fmt: skip
    generator.pipeline.latent_size(data.side, data.side)  # a patch that does not fit should fail now
    ema = EMA(network, config.optimization.ema_decay)
    loggers: list[Logger] = [JSONLinesLogger(run.folder / "log.jsonl")]
    if run.wandb != "off":
        offline = run.wandb == "offline"
        name = run.folder.resolve()
        identity = hashlib.sha256(str(name).encode()).hexdigest()[:12]  # a resumed run goes on in the same place
        wandb = WandbLogger(project="mmdit", name=name.name, id=identity, save_dir=run.folder, offline=offline)
        loggers.append(wandb)
    last = LastCheckpoint(run.folder / "last.ckpt", run.checkpoint_every, run.validate_every)
    trainer = L.Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        precision=run.precision,
        max_steps=run.steps,
        val_check_interval=run.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=run.log_every,
        logger=loggers,
        callbacks=[ema, StepProgress(), last],
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=run.folder,
    )
    return trainer, generator, data


def quiet() -> None:
    """Leaves only what a user can act on: no tips, no device table, no warnings about loops that we mean."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    plain_warnings()


def main(argv: list[str] | None = None) -> None:
    quiet()
    p = parser()
    config = p.parse_args(argv)
    command = config.pop("command")
    resolved = p.dump(config, skip_validation=True)
    with one_line_errors(ValueError, FileNotFoundError, MisconfigurationException):
        L.seed_everything(config.run.seed, verbose=False)
        base = base_of(config)
        try:
            config = p.instantiate(config)
        except ValueError as error:
            raise ValueError(plain(str(error))) from None
        last = config.run.folder / "last.ckpt"
        if command == "validate" and not last.is_file():
            raise FileNotFoundError(f"{last} does not exist: train this config first")
        trainer, generator, data = build(config, base)
        claim(config.run.folder, resolved)
        state = AtomicCheckpointIO().load_checkpoint(last) if last.is_file() else None
    model = config.run.folder / ("lora" if base else "model")
    if command == "fit" and state and state["global_step"] >= config.run.steps:
        print(f"{config.run.folder} is trained already; the model is {model}")
        return
    with one_line_errors(FloatingPointError):
        if command == "validate":
            trainer.validate(generator, data, ckpt_path=last, weights_only=True)
        else:
            trainer.fit(generator, data, ckpt_path=last if state else None, weights_only=True)
            if trainer.is_global_zero:
                print(f"trained {config.run.steps} steps; the model is {model}")


if __name__ == "__main__":
    main()
