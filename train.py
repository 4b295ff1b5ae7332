"""Trains a model from a YAML file: `python train.py fit --config configs/digits.yaml`. The same command resumes."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cli import MACHINE_FAULT, fail, one_line_errors, plain_warnings
from data.store.reader import StoreError
from engine.checkpoint import CheckpointError, Checkpoints
from engine.posthoc import reconstruct
from storage.models import find_model, fingerprint
from training.build import build, lora_base, wandb_logger
from training.experiment import parser, resolve, short_cause
from training.fellows import LOST, watch_children, watch_parent
from training.generator import LEARNERS
from training.rewards import RewardError
from training.run_folder import CHECKPOINTS, Run, begin_branch, branch_point, check_branch, check_target, claim


def quiet() -> None:
    """Hides the messages that a user cannot act on: Lightning's tips, device table and warnings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # no code changes the output of a block in place
    warnings.filterwarnings("ignore", module="lightning.*")
    plain_warnings()


def main(argv: list[str] | None = None) -> None:
    quiet()
    watch_parent()
    p = parser(__doc__ or "")
    commands = "train; report a run's validation loss; or write a model averaged from its snapshots (see ema.widths)"
    p.add_argument("command", choices=["fit", "validate", "average"], help=commands)
    p.add_argument(
        "--from",
        type=str | None,
        help="fit: begin a new run at a checkpoint of another, RUN or RUN@STEP, with all that it holds",
    )
    p.add_argument("--width", type=float, help="average: its relative width σ_rel")
    p.add_argument("--step", type=int, help="average: the last step that it includes; default: the last snapshot")
    p.add_argument(
        "--out", type=Path, help="average: where to write the model; default: model-WIDTH in the run's folder"
    )
    p.add_argument("--overwrite", action="store_true", help="average: --out may replace another model")
    config = p.parse_args(argv)
    start = config.pop("from")
    command, width, step, out, overwrite = (config.pop(k) for k in ("command", "width", "step", "out", "overwrite"))
    if (command == "average") != (width is not None) or (command != "average" and (step or out or overwrite)):
        fail("the command average needs --width, and --width, --step, --out and --overwrite are only for average")
    if start and command != "fit":
        fail("--from is only for fit")
    resolved = p.dump(config, skip_validation=True)
    config.encode = None  # only encode.py needs this section
    with ExitStack() as held:
        with one_line_errors(ValueError, FileNotFoundError, MisconfigurationException):
            L.seed_everything(config.run.seed, verbose=False)
            base = lora_base(config)
            try:
                config = p.instantiate(config)
            except ValueError as error:
                raise ValueError(short_cause(str(error))) from None
            run: Run = config.run
            first = run.ranks().rank == 0
            trainer, generator, data = build(config, base)
            model = generator.writer.folder
            shapes = {name: tensor.shape for name, tensor in generator.network_state().items()}
            unchanged = generator.unchanged()
            others = [
                config.teacher and config.teacher.model,
                config.judgement and config.judgement.reference,
                config.residual and config.residual.regressor,
            ]
            teachers = {str(model): fingerprint(find_model(model)) for model in others if model}
            newest = Checkpoints(run.folder / CHECKPOINTS).newest()
            if command != "fit" and newest is None:
                raise FileNotFoundError(f"{run.folder} holds no checkpoint: train this config first")
            if out:
                check_target(out, run.folder, overwrite)
            origin = None
            if start and newest:
                check_branch(run.folder, start)
            elif start:
                origin = branch_point(start)
                origin.compare(shapes, LEARNERS, unchanged)
                if origin.step >= run.steps:
                    raise ValueError(f"--from {start} begins at step {origin.step}: run.steps must be larger")
            may_last = partial(generator.optimization.same_rates, newest.step if newest else 0)
            held.enter_context(claim(run.folder, resolved, data.identity() | teachers, resolve, first, may_last))
            if origin and first:
                begin_branch(run.folder, start, origin)
            if newest:
                newest.compare(shapes, LEARNERS, unchanged)
                generator.keep_scale(newest.numbers)
            if command == "average":
                out = out or model.with_name(f"{model.name}-{width}")
                weights = reconstruct(run.folder / "snapshots", width, step)
                generator.writer.write(generator.kept(generator.network) | weights, out)
                print(f"the model averaged with width {width} is {out}")
                return
        if command == "fit" and newest and newest.step >= run.steps:
            if first:
                print(f"{run.folder} is trained already; the model is {model}")
            return
        if run.wandb != "off":
            trainer.loggers.append(wandb_logger(run))
        with one_line_faults(run.world):
            if run.devices > 1:
                watch_children()
            (trainer.fit if command == "fit" else trainer.validate)(generator, data)
    if command == "fit" and first:
        print(f"trained {run.steps} steps; the model is {model}")


@contextmanager
def one_line_faults(world: int) -> Iterator[None]:
    """Ends a training of so many processes with one line of error if the machine, the data or another process fails."""
    cure = "try strategy.accumulate_grad_batches, strategy.activation_checkpointing selective or strategy.kind fsdp2"
    with one_line_errors(FloatingPointError, CheckpointError, RewardError, cure=cure):
        try:
            yield
        except StoreError as error:  # a loader process sends its whole traceback; the cause is the last line
            cause = str(error).splitlines()[-1].rpartition("StoreError: ")[2]
            fail(f"{cause}; `python -m data verify` finds all faults; then the same command resumes", MACHINE_FAULT)
        except Exception as error:
            if dead := next((str(e) for e in causes(error) if str(e).startswith("DataLoader worker")), None):
                hint = "if the memory was full, lower data.workers; the same command resumes"
                fail(f"a loader process died ({dead.splitlines()[0].strip()}): {hint}", MACHINE_FAULT)
            cause = str(error).partition("\n")[0]
            lost = isinstance(error, RuntimeError) and re.search("gloo|nccl|TCPStore|peer|timed out", str(error), re.I)
            if world == 1 or not lost:
                raise
            fail(f"{LOST} ({cause})", MACHINE_FAULT)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it. torch reports a dead loader wherever the process is, also where others catch it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


if __name__ == "__main__":
    main()
