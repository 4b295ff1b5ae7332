"""Speed of a training, use of the device, and time spent waiting for data."""

import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler

from engine.hardware import find

FETCH = "[_TrainingEpochLoop].train_dataloader_next"  # Lightning's name for waiting on the training data


class Cost(NamedTuple):
    """Size of one rank's micro-batch, or the sum of several."""

    images: int
    tokens: int
    flops: int  # of forward and backward pass, without recomputation to save memory


class Meter(Callback):
    """Logs speed, use of the device, waiting and memory, in the line of the log that holds the loss.

    A line covers the steps since the line before; the first of a run includes the start of the data loader's processes.
    Time includes everything that Lightning and callbacks do between steps, except validations (with their samples and
    models) and checkpoints: these count from the end of the device's work to the next fetch of data. The meter
    synchronises with the device there and at lines of the log, and at no other step.

    - `perf/images_per_s`, `perf/tokens_per_s`, `perf/tflops_per_s`: sums over ranks.
    - `perf/mfu`: these FLOP/s over the peak of all devices. Only if `engine.hardware` knows the device, and in float32
      only without TF32.
    - `perf/data_wait`: share of the time that the loop waits for data, mean over ranks. The device may still work on
      queued steps meanwhile, so this is an upper bound of its idle time.
    - `perf/step_s`: seconds an optimizer step, mean over ranks.
    - `perf/memory_gb`: peak since the process began, of the rank with the most, in 10⁹ bytes: allocated by torch on
      CUDA, the resident set elsewhere.

    Args:
        log_every: optimizer steps between two lines; the trainer's `log_every_n_steps` must be the same.
        cost: of a batch as the training step gets it. It must not synchronise with the device. Its time is not counted.
        precision: the trainer's, for `perf/mfu`.
    """

    def __init__(self, log_every: int, cost: Callable[[Any], Cost], precision: str) -> None:
        if log_every < 1:
            raise ValueError(f"log_every must be at least 1, got {log_every}")
        self.log_every, self.cost, self.precision = log_every, cost, precision
        self.device = torch.device("cpu")
        self.peak: float | None = None
        self.profiler: Profiler | None = None  # the trainer's own, during fit
        self.since: float | None = None  # start of the time that is counted; None while paused
        self._open(step=0)

    def _open(self, step: int) -> None:
        """Starts a window after this optimizer step."""
        self.step, self.sums, self.seconds, self.waited = step, Cost(0, 0, 0), 0.0, 0.0

    def pause(self) -> None:
        """Stops counting time, once the device has finished, until the next fetch of data.

        Whatever writes files between steps calls this. Validations are detected without it.
        """
        if self.since is not None:
            self.seconds += self._now() - self.since
            self.since = None

    def resume(self) -> None:
        """Starts to count time again, if it was paused."""
        if self.since is None:
            self.since = perf_counter()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.device = module.device
        self.peak = peak(self.device, self.precision)
        self._watch(trainer)
        self._open(trainer.global_step)
        self.since = perf_counter()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.pause()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.resume()  # if another callback has just saved a checkpoint
        began = perf_counter()
        cost = self.cost(batch)
        self.sums = Cost(*(a + b for a, b in zip(self.sums, cost, strict=True)))
        assert self.since is not None
        self.since += perf_counter() - began
        if trainer.global_step > self.step and trainer.global_step % self.log_every == 0:
            module.log_dict(self._close(trainer))

    def _close(self, trainer: L.Trainer) -> dict[str, float]:
        """The values of this window, the same on all ranks; starts the next window."""
        self.pause()
        numbers: list[float] = [*self.sums, self.seconds, self.waited]
        steps = trainer.global_step - self.step
        self._open(trainer.global_step)
        self.resume()  # here, so that waiting for other ranks counts in the next window

        def over_ranks(mine: list[float], operation: str) -> list[float]:
            tensor = torch.tensor(mine, dtype=torch.float64, device=self.device)
            return trainer.strategy.reduce(tensor, reduce_op=operation).tolist()

        images, tokens, flops, *times = over_ranks(numbers, "sum")
        seconds, waited = (time / trainer.world_size for time in times)
        values = {
            "perf/images_per_s": images / seconds,
            "perf/tokens_per_s": tokens / seconds,
            "perf/tflops_per_s": flops / seconds / 1e12,
            "perf/data_wait": waited / seconds,
            "perf/step_s": seconds / steps,
            "perf/memory_gb": over_ranks([peak_memory(self.device)], "max")[0] / 1e9,
        }
        if self.peak is not None:
            values["perf/mfu"] = flops / seconds / (trainer.world_size * self.peak)
        return values

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._leave(trainer)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def _watch(self, trainer: Any) -> None:
        self.profiler = trainer.profiler
        trainer.profiler = Watch(self, trainer.profiler)

    def _leave(self, trainer: Any) -> None:
        self.since = None
        if self.profiler is not None:
            trainer.profiler, self.profiler = self.profiler, None


class Watch(Profiler):
    """Informs a meter of events that callbacks do not see: a fetch of data and the start of a validation.

    Args:
        meter: is informed of these.
        profiler: the trainer's own; every event is passed on to it.
    """

    def __init__(self, meter: Meter, profiler: Profiler) -> None:
        super().__init__()
        self.meter, self.profiler = meter, profiler
        self.fetching = 0.0

    def start(self, action_name: str) -> None:
        if action_name == FETCH:
            self.meter.resume()
            self.fetching = perf_counter()
        elif action_name.endswith(".on_validation_model_zero_grad"):
            self.meter.pause()  # the loop does this first; on_validation_start comes after the loaders
        self.profiler.start(action_name)

    def stop(self, action_name: str) -> None:
        if action_name == FETCH:
            self.meter.waited += perf_counter() - self.fetching
        self.profiler.stop(action_name)


def peak(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device at one of Lightning's precisions; None if it is not known."""
    known = find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None or (precision == "32-true" and torch.get_float32_matmul_precision() != "highest"):
        return None
    return known.peak(precision)


def peak_memory(device: torch.device) -> int:
    """Peak bytes since the process began: allocated by torch on CUDA, the resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux, where getrusage includes the parent process's peak
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
