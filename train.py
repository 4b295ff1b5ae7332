"""Trains a model from a YAML file: `python train.py fit --config configs/digits.yaml`. The same command resumes."""

import hashlib
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cli import MACHINE_FAULT, fail, one_line_errors, plain_warnings
from data.latents import Codec
from data.module import Data, Stored
from data.sizes import SIZE_FEATURES
from data.store.reader import StoreError
from data.text.clip import CLIPText
from data.text.encoder import TextEncoder
from engine.checkpoint import CheckpointError, Checkpoints
from engine.log import JSONLinesLogger
from engine.meter import Meter
from engine.posthoc import reconstruct
from engine.progress import StepProgress
from engine.resume import Resume
from engine.strategy import Strategy
from flow.objective import Objective
from mmdit import lora
from pipeline import Pipeline, Reading
from pipeline.folder import describe, read_network
from storage.files import commit_bytes
from storage.models import find_model, fingerprint
from storage.weights import read_json, write_json
from training.experiment import Run, parser, plain
from training.generator import Generator

FREE = (  # may differ on going on
    "run.folder", "run.accelerator", "run.devices", "run.num_nodes", "run.wandb", "run.checkpoint_every",
    "run.validate_every", "data.init_args.workers", "strategy.", "grid.", "encode",
)  # fmt: skip

CHECKPOINTS = "checkpoints"


def claim(folder: Path, resolved: str, identity: dict[str, str]) -> None:
    """Leaves the resolved config in a new run folder; refuses one that holds work done with another config or data.

    Only the first process writes.
    """
    file, known = folder / "config.yaml", folder / "data.json"
    if file.exists() and any((folder / work).exists() for work in (CHECKPOINTS, "log.jsonl")):
        try:
            here, there = flat(yaml.safe_load(resolved)), flat(yaml.safe_load(file.read_text(encoding="utf-8")))
        except yaml.YAMLError:
            raise ValueError(f"{file} is no YAML; what run is in {folder}?") from None
        changed = [key for key in here | there if here.get(key) != there.get(key)]
        told = {key: f"{key} is {there.get(key)} there and {here.get(key)} now" for key in changed}
        if different := "; ".join(line for key, line in told.items() if not key.startswith(FREE)):
            raise ValueError(f"{folder} holds a run with another config ({different}); choose another run.folder")
        if identity and (other := identity.items() - (read_json(known) if known.exists() else {}).items()):
            places = ", ".join(sorted(name for name, _ in other))
            raise ValueError(f"{folder} holds a run on other data than now lie in {places}; choose another run.folder")
        for line in told.values() if is_first() else ():
            print(f"going on although {line}", file=sys.stderr)
        return
    if not is_first():
        return
    if not file.exists() and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run; choose another run.folder")
    folder.mkdir(parents=True, exist_ok=True)
    if identity:
        write_json(identity, known)
    commit_bytes(file, resolved.encode())


def is_first() -> bool:
    """Whether this is the first process of the training, by what torchrun, SLURM or Lightning says before it begins."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    ranks = (rank,) if rank is not None else (os.environ.get("NODE_RANK", "0"), os.environ.get("LOCAL_RANK", "0"))
    return all(one == "0" for one in ranks)


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
    if config.network.init_args.two_times or config.network.init_args.guidance_embeds:
        raise ValueError("lora updates the network as it is: it cannot learn network.two_times or guidance_embeds")
    base = Path(config.network.init_args.path).resolve()
    base = base.parent if base.name == "transformer" and not (base / "model_index.json").exists() else base
    if base.is_dir() and not (base / "model_index.json").is_file():
        raise ValueError(f"lora needs the whole model, to sample with: {base} has no model_index.json")
    return str(base)


def teaching(path: Path, objective: Objective, codec: Codec, text: TextEncoder, sized: bool) -> Pipeline:
    """The teacher at `path`, with the training's codec and text encoders.

    Raises:
        ValueError: its output is not what the student is to learn.
    """
    folder = find_model(path)
    network, process, own = read_network(folder, Reading(dtype="stored"))
    codecs = [{name: value for name, value in c.fingerprint().items() if name != "dtype"} for c in (own, codec)]
    if codecs[0] != codecs[1]:
        raise ValueError(f"teacher.model {path} has another codec")
    if isinstance(text, CLIPText) and CLIPText(folder).fingerprint() != text.fingerprint():
        raise ValueError(f"teacher.model {path} has other text encoders")
    for name in ("path", "target"):
        theirs, ours = (describe(getattr(o, name)) for o in (process, objective))
        if theirs != ours:
            raise ValueError(f"teacher.model {path} learned another {name}: {theirs['class']}, not {ours['class']}")
    if process.variance or getattr(network, "guidance_embeds", False):
        raise ValueError(f"teacher.model {path} has learned a variance or its guidance: it cannot be guided to teach")
    pipe = Pipeline(network, process, codec, text)
    if pipe.sized != sized:
        raise ValueError(f"teacher.model {path} must be told of sizes like its student: set data.size_conditioning")
    return pipe


def build(config: Namespace, base: str | None) -> tuple[L.Trainer, Generator, Data]:
    """The trainer, the module and the data of a config; `base` is where a network to be updated comes from."""
    run: Run = config.run
    network, text, codec = config.network.train(), config.text, config.codec
    if config.lora:
        lora.add(network, config.lora)
    if any(p.requires_grad and p.dtype != torch.float32 for p in network.parameters()):
        raise ValueError("weights that learn must be float32, or small steps vanish: leave out network.init_args.dtype")
    data: Data = config.data(text, codec, run.seed)
    strategy: Strategy = config.strategy
    strategy.check(run.world, data.batch_size)
    if isinstance(data, Stored) and len(data.apart) < run.world:
        raise ValueError(f"data.held_out must be at least the {run.world} processes, got {len(data.apart)}")
    teacher = None
    if config.teacher:
        teacher = config.teacher, teaching(config.teacher.model, config.objective, codec, text, data.sized)
    generator = Generator(
        network, config.objective, text, codec, config.optimization, config.ema, strategy, config.sampling, config.grid,
        data.side, run.folder, run.steps, data.batch_size, run.seed, run.log_every, base,
        teacher,
    )  # fmt: skip
    if data.sized != generator.pipeline.sized:
        needed = text.pooled_dim + (SIZE_FEATURES if data.sized else 0)
        told = "with" if data.sized else "without"
        raise ValueError(f"network.pooled_dim must be {needed} {told} data.size_conditioning, got {network.pooled_dim}")
    for height, width in {(data.side, data.side), *data.sizes}:  # a patch that does not fit should fail now
        generator.pipeline.plan(config.sampling, None, height, width)
    loggers: list[Logger] = [JSONLinesLogger(run.folder / "log.jsonl")]
    if run.wandb != "off":
        offline = run.wandb == "offline"
        name = run.folder.resolve()
        identity = hashlib.sha256(str(name).encode()).hexdigest()[:12]  # a resumed run goes on in the same place
        wandb = WandbLogger(project="mmdit", name=name.name, id=identity, save_dir=run.folder, offline=offline)
        loggers.append(wandb)
    checkpoints = Checkpoints(run.folder / CHECKPOINTS, strategy.sharded_checkpoint)
    meter = Meter(run.log_every, generator.cost, run.precision)
    trainer = L.Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        num_nodes=run.num_nodes,
        strategy=strategy.lightning(run.world),
        precision=run.precision,
        accumulate_grad_batches=strategy.accumulate_grad_batches,
        max_steps=run.steps,
        val_check_interval=run.validate_every * strategy.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=run.log_every,
        logger=loggers,
        callbacks=[StepProgress(), meter, Resume(checkpoints, run.checkpoint_every, run.validate_every, meter)],
        inference_mode=False,  # or the weights that validation gathers could not be trained on
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=run.folder,
    )
    return trainer, generator, data


def quiet() -> None:
    """Leaves only what a user can act on: no tips, no device table, no warnings about loops that we mean."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # nothing is changed in place on what a block returns
    warnings.filterwarnings("ignore", module="lightning.*")
    plain_warnings()


def main(argv: list[str] | None = None) -> None:
    quiet()
    p = parser(__doc__ or "")
    commands = "train, report the validation loss of a run, or make a model of its snapshots (see ema.widths)"
    p.add_argument("command", choices=["fit", "validate", "average"], help=commands)
    p.add_argument("--width", type=float, help="of the average to make, σ_rel")
    p.add_argument("--step", type=int, help="up to which snapshot; default: the last")
    p.add_argument(
        "--out", type=Path, help="where to write the averaged model; default: model-WIDTH in the run's folder"
    )
    config = p.parse_args(argv)
    command, width, step, out = (config.pop(key) for key in ("command", "width", "step", "out"))
    if (command == "average") != (width is not None) or (command != "average" and (step or out)):
        fail("average needs --width, and only it takes --width, --step and --out")
    resolved = p.dump(config, skip_validation=True)
    config.encode = None  # which a store has no more need of
    with one_line_errors(ValueError, FileNotFoundError, MisconfigurationException):
        L.seed_everything(config.run.seed, verbose=False)
        base = base_of(config)
        try:
            config = p.instantiate(config)
        except ValueError as error:
            raise ValueError(plain(str(error))) from None
        trainer, generator, data = build(config, base)
        taught = {str(t.model): fingerprint(find_model(t.model)) for t in [config.teacher] if t}
        newest = Checkpoints(config.run.folder / CHECKPOINTS).newest()
        if command != "fit" and newest is None:
            raise FileNotFoundError(f"{config.run.folder} holds no checkpoint: train this config first")
        claim(config.run.folder, resolved, data.identity() | taught)
        if newest:
            newest.compare({name: tensor.shape for name, tensor in generator.learned().items()}, "network.")
        if command == "average":
            out = out or config.run.folder / f"{'lora' if base else 'model'}-{width}"
            weights = reconstruct(config.run.folder / "snapshots", width, step)
            generator.write(generator.network.state_dict() | weights, out)
            print(f"the average of width {width} is {out}")
            return
    model = config.run.folder / ("lora" if base else "model")
    if command == "fit" and newest and newest.step >= config.run.steps:
        if is_first():
            print(f"{config.run.folder} is trained already; the model is {model}")
        return
    cure = "try strategy.accumulate_grad_batches, strategy.activation_checkpointing selective or strategy.kind fsdp2"
    with one_line_errors(FloatingPointError, CheckpointError, cure=cure):
        try:
            if command == "validate":
                trainer.validate(generator, data)
                return
            trainer.fit(generator, data)
        except StoreError as error:  # from a loader process it comes with that one's traceback, the cause last
            cause = str(error).splitlines()[-1].rpartition("StoreError: ")[2]
            fail(f"{cause}; `python -m data verify` finds all faults, and the same command goes on", MACHINE_FAULT)
        except RuntimeError as error:
            if config.run.world == 1 or not re.search("gloo|nccl|TCPStore|peer|timed out", str(error), re.IGNORECASE):
                raise
            fault = "lost contact with another process, which has ended or hangs; the same command goes on"
            fail(f"{fault} ({str(error).splitlines()[0]})", MACHINE_FAULT)
        if trainer.is_global_zero:
            print(f"trained {config.run.steps} steps; the model is {model}")


if __name__ == "__main__":
    main()
