"""Checkpoints for going on with a run: written whole or not at all, read without running pickled code."""

import os
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then renames: a kill or a full disk leaves the previous file as it was."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Raises OSError if the disk is full; the previous checkpoint stays."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".new")
        try:
            with temporary.open("wb") as out:
                torch.save(checkpoint, out)
                out.flush()
                os.fsync(out.fileno())
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a short write
            temporary.unlink(missing_ok=True)
            raise OSError(f"could not write {file}: {error}") from error
        temporary.replace(file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises ValueError for a file that is truncated, or that holds anything but tensors and plain containers."""
        try:
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(f"{path} holds pickled code, which is not run; a checkpoint holds tensors only") from None
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, RuntimeError, EOFError) as error:  # which of them depends on where the file ends
            raise ValueError(f"{path} is truncated or no checkpoint: {str(error).splitlines()[0]}") from None
        if not isinstance(checkpoint, dict) or not {"global_step", "state_dict", "callbacks"} <= checkpoint.keys():
            raise ValueError(f"{path} is no checkpoint of a run")
        return checkpoint


class LastCheckpoint(Checkpoint):
    """Keeps the run's newest state in one file, saved every few steps and at the end.

    At a step with a validation the save comes after it, so that a run killed meanwhile does that step again, with its
    validation. Lightning runs `Checkpoint` callbacks after all others, so the file holds this step's average.

    Args:
        file: where to.
        every: steps between two saves.
        validate_every: steps between two validations.
    """

    def __init__(self, file: Path, every: int, validate_every: int) -> None:
        self.file, self.every, self.validate_every = file, every, validate_every

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step % self.validate_every:
            trainer.save_checkpoint(self.file, weights_only=False)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            trainer.save_checkpoint(self.file, weights_only=False)
