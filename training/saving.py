"""The models that a training writes: model folders, LoRA folders, and snapshots of averaged weights."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch import Tensor

from data.text.inversion import FOLDER
from data.text.sd3 import SD3Text
from engine.ema import EMA
from engine.meter import Meter
from engine.posthoc import write_snapshot
from engine.strategy import skeleton, whole
from mmdit import lora
from mmdit.model import MMDiT
from mmdit.network import Network
from pipeline import Pipeline
from pipeline.folder import process_note
from storage.files import replace_folder
from training.reader import Reader, of_network
from training.run_folder import MODELS


class ModelWriter:
    """Writes weights as a model folder, or in a training of a LoRA or new words as a folder of these.

    Args:
        pipeline: the model; its other parts are written with the weights.
        run_folder: folder of the training.
        base: the base model of a LoRA training.
    """

    def __init__(self, pipeline: Pipeline, run_folder: Path, base: str | None) -> None:
        self.network, self.parts, self.base = skeleton(pipeline.network), pipeline.parts, base
        self.folder = run_folder / MODELS[base is not None]
        self.notes = process_note(pipeline.objective, pipeline.sampling, Path(base)) if base else {}
        self.words = pipeline.text.words if isinstance(pipeline.text, SD3Text) else ()

    def write(self, weights: Mapping[str, Tensor], folder: Path | None = None) -> None:
        """Writes these weights. The folder None means the run's model. OSError if it cannot be written."""
        network, folder = self.network_with(weights), folder or self.folder
        if self.base is None:
            Pipeline(network, *self.parts[1:]).save(folder)
        else:
            replace_folder(folder, partial(self._fill, network))

    def _fill(self, network: Network, folder: Path) -> None:
        """Writes low-rank updates and new words into an empty folder."""
        assert self.base
        updates = lora.export(cast(MMDiT, of_network(network)))
        if isinstance(network, Reader):
            updates |= network.updates()
            for word in network.new_words(self.words):
                word.write(folder / FOLDER)
        lora.save(updates, folder, self.base, self.notes)

    def network_with(self, weights: Mapping[str, Tensor]) -> Network:
        """A copy of the trained network with these weights. In a LoRA training the others have no values."""
        network = skeleton(self.network)
        network.load_state_dict(dict(weights), strict=self.base is None, assign=True)
        return network


class Snapshots(L.Callback):
    """Writes the power-function averages every few steps (`engine.posthoc`).

    Args:
        folder: folder of the snapshots.
        every: steps between two snapshots.
        widths: relative widths of the averages.
        meter: paused while writing.
    """

    def __init__(self, folder: Path, every: int, widths: tuple[float, ...], meter: Meter) -> None:
        self.folder, self.every, self.widths, self.meter = folder, every, widths, meter
        self.saved = 0  # step of the last snapshot

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every or step == self.saved:
            return
        self.saved = step
        self.meter.pause()
        averages = {width: gather(trainer, average(module.ema, width)) for width in self.widths}
        if trainer.is_global_zero:
            write_snapshot(self.folder, step, cast(dict[float, dict[str, Tensor]], averages))


def average(ema: EMA, width: float) -> dict[str, Tensor]:
    """The averaged weights of one width, by their names in the network."""
    prefix = f"width-{width}."
    return {name.removeprefix(prefix): tensor for name, tensor in ema.named().items() if name.startswith(prefix)}


def gather(trainer: L.Trainer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Gathers sharded tensors in the first process, on the CPU; None in the others. All processes must call it."""
    first = trainer.is_global_zero
    held = {name: whole(tensor).cpu() if first else whole(tensor).numel() for name, tensor in tensors.items()}
    return cast(dict[str, Tensor], held) if first else None
