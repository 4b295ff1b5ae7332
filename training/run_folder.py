"""A run and its folder: what it is called, who may write there, whether it is the same run."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from storage.files import commit_bytes
from storage.weights import read_json, write_json

FREE = (  # may differ on going on
    "run.folder", "run.accelerator", "run.devices", "run.num_nodes", "run.wandb", "run.checkpoint_every",
    "run.validate_every", "data.init_args.workers", "strategy.", "grid.", "encode",
)  # fmt: skip

CHECKPOINTS = "checkpoints"


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


def claim(folder: Path, resolved: str, identity: dict[str, str], resolve: Callable[[Any], str]) -> None:
    """Leaves the resolved config in a new run folder; refuses one that holds work done with another config or data.

    Only the first process writes.

    Args:
        folder: of the run.
        resolved: the config with all its defaults, YAML.
        identity: what tells the data and models from others in the same place.
        resolve: gives a config that an earlier version wrote the names and defaults of today.

    Raises:
        ValueError: the folder holds another run, or something else.
    """
    file, known = folder / "config.yaml", folder / "data.json"
    if file.exists() and any((folder / work).exists() for work in (CHECKPOINTS, "log.jsonl")):
        try:
            there = yaml.safe_load(file.read_text(encoding="utf-8"))
            here, there = (flat(yaml.safe_load(config)) for config in (resolved, resolve(there)))
        except yaml.YAMLError:
            raise ValueError(f"{file} is no YAML: choose another run.folder") from None
        changed = [key for key in here | there if here.get(key) != there.get(key)]
        lines = {key: f"{key} is {there.get(key)} there and {here.get(key)} now" for key in changed}
        if different := "; ".join(line for key, line in lines.items() if not key.startswith(FREE)):
            raise ValueError(f"{folder} holds a run with another config ({different}); choose another run.folder")
        if identity and (other := identity.items() - (read_json(known) if known.exists() else {}).items()):
            places = ", ".join(sorted(name for name, _ in other))
            raise ValueError(f"{folder} holds a run on other data than now lie in {places}; choose another run.folder")
        for line in lines.values() if is_first() else ():
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
