"""A run and its folder: its settings, and whether a folder may be used for it."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from storage.files import commit_bytes, commit_json, is_ours
from storage.text import read_json, read_yaml

FREE = (  # keys that may change when a run is resumed
    "run.folder", "run.accelerator", "run.devices", "run.num_nodes", "run.wandb", "run.checkpoint_every",
    "run.validate_every", "data.init_args.workers", "strategy.", "grid.", "encode",
)  # fmt: skip

CHECKPOINTS = "checkpoints"


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


def claim(folder: Path, resolved: str, identity: dict[str, str], resolve: Callable[[Any], str]) -> None:
    """Writes the resolved config into a new run folder, or checks that the folder holds the same run.

    Only the first process writes.

    Args:
        folder: folder of the run.
        resolved: the config with all its defaults, YAML.
        identity: path → hash of the data and models that the run uses.
        resolve: adds today's names and defaults to a config that an earlier version wrote.

    Raises:
        ValueError: the folder holds a run with another config or other data, or is no run's folder.
    """
    file, known = folder / "config.yaml", folder / "data.json"
    if file.exists() and any((folder / work).exists() for work in (CHECKPOINTS, "log.jsonl")):
        here, there = (flat(yaml.safe_load(config)) for config in (resolved, resolve(read_yaml(file))))
        changed = [key for key in here | there if here.get(key) != there.get(key)]
        lines = {key: f"{key} is {there.get(key)} there and {here.get(key)} now" for key in changed}
        if different := "; ".join(line for key, line in lines.items() if not key.startswith(FREE)):
            raise ValueError(f"{folder} holds a run with another config ({different}); choose another run.folder")
        if identity and (other := identity.items() - (read_json(known) if known.exists() else {}).items()):
            places = ", ".join(sorted(name for name, _ in other))
            raise ValueError(f"{folder} holds a run on other data than {places} holds now; choose another run.folder")
        for line in lines.values() if is_first() else ():
            print(f"warning: the run resumes, but {line}", file=sys.stderr)
        return
    if not is_first():
        return
    if not file.exists() and folder.is_dir() and not all(map(is_ours, folder.iterdir())):
        raise ValueError(f"{folder} is not empty and holds no run; choose another run.folder")
    folder.mkdir(parents=True, exist_ok=True)
    if identity:
        commit_json(known, identity)
    commit_bytes(file, resolved.encode())


def is_first() -> bool:
    """Whether this is the first process, from the environment variables of torchrun, SLURM or Lightning."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    ranks = (rank,) if rank is not None else (os.environ.get("NODE_RANK", "0"), os.environ.get("LOCAL_RANK", "0"))
    return all(one == "0" for one in ranks)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as a flat one with dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, branch in tree.items() for k, v in flat(branch, f"{prefix}.{name}".lstrip(".")).items()}
