"""What a training writes for others: model folders, or low-rank updates alone, and snapshots of averages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch import Tensor

from engine.ema import EMA
from engine.meter import Meter
from engine.posthoc import write_snapshot
from engine.strategy import skeleton, whole
from mmdit import lora
from mmdit.model import MMDiT
from mmdit.network import Network
from pipeline import Pipeline
from pipeline.folder import replace_folder


class ModelWriter:
    """Writes weights as a model folder, or where only low-rank updates are trained, as a folder of these.

    Args:
        pipeline: the model, whose other parts are written with the weights.
        run_folder: of the training.
        base: where the network came from, if what is trained are low-rank updates of it.
    """

    def __init__(self, pipeline: Pipeline, run_folder: Path, base: str | None) -> None:
        self.network, self.parts, self.base = skeleton(pipeline.network), pipeline.parts, base
        self.folder = run_folder / ("model" if base is None else "lora")

    def write(self, weights: Mapping[str, Tensor], folder: Path | None = None) -> None:
        """Writes these weights; none is the run's own model. OSError if it cannot."""
        network, folder = self.filled(weights), folder or self.folder
        if self.base is None:
            Pipeline(network, *self.parts[1:]).save(folder)
        else:
            updated, base = cast(MMDiT, network), self.base
            replace_folder(folder, lambda new: lora.save(updated, new, base))

    def filled(self, weights: Mapping[str, Tensor]) -> Network:
        """A network like the one that learns, with these weights."""
        network = skeleton(self.network)
        network.load_state_dict(dict(weights), assign=True)
        return network


class Snapshots(L.Callback):
    """Keeps power-function averages every few steps (`engine.posthoc`).

    Args:
        folder: where.
        every: steps.
        widths: of the averages.
        meter: paused while writing.
    """

    def __init__(self, folder: Path, every: int, widths: tuple[float, ...], meter: Meter) -> None:
        self.folder, self.every, self.widths, self.meter = folder, every, widths, meter
        self.saved = 0  # the last step at which

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every or step == self.saved:
            return
        self.saved = step
        self.meter.pause()
        averages = {width: gathered(trainer, average(module.ema, width)) for width in self.widths}
        if trainer.is_global_zero:
            write_snapshot(self.folder, step, cast(dict[float, dict[str, Tensor]], averages))


def average(ema: EMA, width: float) -> dict[str, Tensor]:
    """The average of a width by the names of the network."""
    prefix = f"width-{width}."
    return {name.removeprefix(prefix): tensor for name, tensor in ema.named().items() if name.startswith(prefix)}


def gathered(trainer: L.Trainer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors whole, in the memory of the first process; none in the others. All processes must ask."""
    first = trainer.is_global_zero
    held = {name: whole(tensor).cpu() if first else whole(tensor).numel() for name, tensor in tensors.items()}
    return cast(dict[str, Tensor], held) if first else None
