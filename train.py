"""Trains a model from a YAML file: `python train.py fit --config configs/digits.yaml`. The same command resumes."""

import logging
import re
import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cli import MACHINE_FAULT, fail, one_line_errors, plain_warnings
from data.store.reader import StoreError
from engine.checkpoint import CheckpointError, Checkpoints
from engine.posthoc import reconstruct
from storage.models import find_model, fingerprint
from training.build import base_of, build
from training.experiment import parser, plain, resolve
from training.run_folder import CHECKPOINTS, claim, is_first


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
        model = generator.writer.folder
        taught = {str(t.model): fingerprint(find_model(t.model)) for t in [config.teacher] if t}
        newest = Checkpoints(config.run.folder / CHECKPOINTS).newest()
        if command != "fit" and newest is None:
            raise FileNotFoundError(f"{config.run.folder} holds no checkpoint: train this config first")
        claim(config.run.folder, resolved, data.identity() | taught, resolve)
        if newest:
            newest.compare({name: tensor.shape for name, tensor in generator.learned().items()}, "network.")
        if command == "average":
            out = out or model.with_name(f"{model.name}-{width}")
            weights = reconstruct(config.run.folder / "snapshots", width, step)
            generator.writer.write(generator.network.state_dict() | weights, out)
            print(f"the average of width {width} is {out}")
            return
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
