"""A run and its folder: its settings, and whether a folder may be used for it."""

import hashlib
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from cli import Ranks, own_ranks, srun_used
from engine.checkpoint import Checkpoint, Checkpoints
from storage.files import commit_bytes, commit_json, hold, is_ours, sweep
from storage.text import read_json, read_text, read_yaml

FREE = (  # keys that may change when a run is resumed
    "run.folder", "run.accelerator", "run.devices", "run.num_nodes", "run.wandb", "run.checkpoint_every",
    "run.validate_every", "data.init_args.workers", "strategy.", "grid.", "encode",
)  # fmt: skip

CHECKPOINTS = "checkpoints"
MODELS = ("model", "lora")  # names of the model that a run writes
CONFIG, IDENTITY, WANDB_ID = "config.yaml", "data.json", "wandb-id"  # the files that `claim` writes
ORIGIN = "from.json"  # the place of another run where this one began


@dataclass(frozen=True)
class Run:
    """The run as a whole.

    Args:
        folder: the folder of everything that the run writes.
        seed: seed of initial weights, order, captions, noise and times.
        steps: number of optimizer steps.
        validate_every: steps between validations. Each draws samples, and writes the model if its loss is the best.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of the log.
        accelerator: Lightning's argument of this name.
        devices: processes on each machine.
        num_nodes: number of machines.
        precision: Lightning's argument of this name.
        wandb: also log to Weights & Biases; offline needs no account and no internet.
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
        """Number of all processes of the training."""
        return self.devices * self.num_nodes

    def ranks(self) -> Ranks:
        """This process's place in the training. ValueError if not as many processes were started as it has."""
        place, env = own_ranks(self.devices, self.num_nodes), os.environ
        if place.world != self.world or place.local >= self.devices:
            raise ValueError(
                f"{place.world} processes were started, this one as number {place.local} of its machine, but "
                f"run.devices × run.num_nodes is {self.devices} × {self.num_nodes}: make them equal"
            )
        tasks, nodes = env.get("SLURM_NTASKS_PER_NODE", "not set"), env.get("SLURM_NNODES", str(self.num_nodes))
        if srun_used() and (tasks, nodes) != (str(self.devices), str(self.num_nodes)):
            raise ValueError(
                f"SLURM's --ntasks-per-node and --nodes must be run.devices and run.num_nodes, {self.devices} and "
                f"{self.num_nodes}, got {tasks} and {nodes}"
            )
        return place


@contextmanager
def claim(
    folder: Path,
    resolved: str,
    identity: dict[str, str],
    resolve: Callable[[Any], str],
    first: bool,
    may_last: Callable[[int, int], bool] = lambda then, now: False,
) -> Iterator[None]:
    """Holds a run folder. Writes the resolved config into a new one, or checks that an old one holds the same run.

    Args:
        folder: folder of the run.
        resolved: the config with all its defaults, YAML.
        identity: path → hash of the data and models that the run uses.
        resolve: adds today's names and defaults to a config that an earlier version wrote.
        first: whether this is the first process; the others only check.
        may_last: whether a run of so many steps, the first number, may be one of as many as the second.

    Raises:
        ValueError: the folder holds a run with another config or other data, or is no run's folder.
        BusyError: another process holds it.
    """
    file, known = folder / CONFIG, folder / IDENTITY
    there = folder.iterdir() if folder.is_dir() else ()
    if first and not file.exists() and not all(is_ours(path) or path.name in (IDENTITY, WANDB_ID) for path in there):
        raise ValueError(f"{folder} is not empty and holds no run; choose another run.folder")
    with hold(folder) if first else nullcontext():
        for left in [*folder.rglob(".*.part")] if first else ():
            sweep(left.parent)
        if file.exists() and any((folder / work).exists() for work in (CHECKPOINTS, "log.jsonl")):
            now, then = (flat(yaml.safe_load(config)) for config in (resolved, resolve(read_yaml(file))))
            changed = [key for key in now | then if now.get(key) != then.get(key)]
            longer = "run.steps" in changed and may_last(then["run.steps"], now["run.steps"])
            free = (*FREE, "run.steps") if longer else FREE
            lines = {key: f"{key} is {then.get(key)} there and {now.get(key)} now" for key in changed}
            if different := "; ".join(line for key, line in lines.items() if not key.startswith(free)):
                raise ValueError(f"{folder} holds a run with another config ({different}); choose another run.folder")
            if identity and (other := identity.items() - (read_json(known) if known.exists() else {}).items()):
                places = ", ".join(sorted(name for name, _ in other))
                raise ValueError(
                    f"{folder} holds a run on other data than {places} holds now; choose another run.folder"
                )
            for line in lines.values() if first else ():
                print(f"warning: the run resumes, but {line}", file=sys.stderr)
            if longer and first:
                commit_bytes(file, resolved.encode())
        elif first:
            commit_bytes(folder / WANDB_ID, secrets.token_hex(6).encode())
            if identity:
                commit_json(known, identity)
            commit_bytes(file, resolved.encode())
        yield


def branch_point(start: str) -> Checkpoint:
    """The checkpoint that RUN or RUN@STEP names: that of the step, or the newest.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    run, _, step = start.rpartition("@") if re.search(r"@\d+$", start) else (start, "", "")
    checkpoints = Checkpoints(Path(run) / CHECKPOINTS)
    found = checkpoints.at(int(step)) if step else checkpoints.newest()
    if found is None:
        there = ", ".join(map(str, checkpoints.steps())) or "none"
        raise FileNotFoundError(f"--from {start}: there is no such checkpoint; {run} has those of the steps {there}")
    if not all(map(found.intact, found.parts)):
        raise ValueError(f"--from {start}: {found.folder} is damaged: choose another step")
    return found


def check_branch(folder: Path, start: str) -> None:
    """ValueError if a run that is there already did not begin at this place of another."""
    known = folder / ORIGIN
    if not known.exists() or read_json(known) != {"from": start}:
        raise ValueError(f"{folder} holds a run that did not begin from {start}: choose another run.folder")


def begin_branch(folder: Path, start: str, found: Checkpoint) -> None:
    """Begins a claimed run at a checkpoint of another."""
    commit_json(folder / ORIGIN, {"from": start})
    Checkpoints(folder / CHECKPOINTS).adopt(found)
    print(f"the run begins from {start}, at step {found.step}", file=sys.stderr)


def wandb_id(folder: Path) -> str:
    """The name of a claimed run in Weights & Biases. One that an earlier version began is named after its folder."""
    if (file := folder / WANDB_ID).exists():
        return read_text(file)
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


def check_target(out: Path, run: Path, overwrite: bool) -> None:
    """Checks that a model may be written to a folder that the user named.

    Args:
        out: the folder.
        run: folder of the run whose model it is.
        overwrite: it may replace another model.

    Raises:
        ValueError: it would replace or change the run or anything that is no model.
    """
    place, kept = out.resolve(), [(run / name).resolve() for name in (CHECKPOINTS, "snapshots", "samples", *MODELS)]
    if any(used.is_relative_to(place) for used in (run.resolve(), Path.cwd())) or any(map(place.is_relative_to, kept)):
        raise ValueError(f"--out {out} would replace the run, a part of it or the current folder: choose another")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        model = any((out / file).is_file() for file in ("model_index.json", "adapter_config.json"))
        cure = (
            " and holds a model: choose another, or give --overwrite" if model else " and is no model: choose another"
        )
        if not (model and overwrite):
            raise ValueError(f"--out {out} exists{cure}")


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as a flat one with dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, branch in tree.items() for k, v in flat(branch, f"{prefix}.{name}".lstrip(".")).items()}
