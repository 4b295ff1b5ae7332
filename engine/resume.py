"""Resuming a run at the optimizer step where it stopped; everything else follows from the step's number."""

import signal
from typing import Any, Protocol

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from torch import Tensor

from engine.checkpoint import Checkpoints
from engine.meter import Meter

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CHECK_EVERY = 10  # steps between two checks for a signal, on a device that has to wait for the answer


class Resumable(Protocol):
    """The methods that a module needs to be saved and resumed."""

    def state(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """Its tensors, and those of the optimizer if there is one. All processes must call it together."""

    def unchanged(self) -> set[str]:
        """Names of further tensors that a checkpoint may hold: older ones hold what training does not change, too."""

    def numbers(self) -> dict[str, Any]:
        """Everything else that is saved, as JSON."""

    def on_resume(self, step: int, numbers: dict[str, Any]) -> None:
        """Called when its tensors have been restored as they were after `step` steps, with the saved numbers."""


class Resume(CheckpointCallback):
    """Saves the run every few steps and after each validation; resumes from the newest undamaged checkpoint.

    At SIGTERM, SIGUSR1 or SIGINT to any process, all finish their step, save, and exit with 128 + the signal's number.
    A second SIGINT ends its process at once. A resumed run first does the validation that was due when it stopped.

    Lightning calls callbacks of this kind after all others.

    Args:
        checkpoints: of the run.
        every: steps between two saves.
        validate_every: steps between two validations. The save of such a step comes after its validation, so that a
            run that is killed during the validation repeats the step and the validation.
        meter: paused while saving.
    """

    def __init__(self, checkpoints: Checkpoints, every: int, validate_every: int, meter: Meter) -> None:
        self.checkpoints, self.every, self.validate_every, self.meter = checkpoints, every, validate_every, meter
        self.signal = self.any_signal = 0  # received by this process; by any process
        self.interrupted = False  # a SIGINT came; the next one ends the process
        self.saved = self.validated = 0  # the last step that was saved; validated
        self.old_handlers: dict[int, Any] = {}  # of the signals

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        for number in SIGNALS:
            self.old_handlers[number] = signal.signal(number, self._on_signal)
        found = self.checkpoints.find()
        self.checkpoints.remove_after(found.step if found else 0)
        if found:
            tensors = module.state(trainer.optimizers[0] if found.step else None)
            found.compare({name: tensor.shape for name, tensor in tensors.items()}, ignored=module.unchanged())
            found.restore(tensors)
            self.saved, self.validated = found.step, found.numbers["validated"]
            set_step(trainer, found.step)
            module.on_resume(found.step, found.numbers)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        step = trainer.global_step
        if step and step % self.validate_every == 0 and self.validated < step:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        # Not at the end of the previous step, whose line of the log is written later.
        step = trainer.global_step
        if step == self.saved or trainer.fit_loop.epoch_loop.total_batch_idx % trainer.accumulate_grad_batches:
            return
        if self._stop_requested(trainer, step % CHECK_EVERY == 0):
            self._stop(trainer, module)
        if step % self.every == 0:
            self._save(trainer, module)
            self.meter.resume()

    def on_validation_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if (
            trainer.state.fn == "fit"
            and trainer.global_step < trainer.max_steps
            and self._stop_requested(trainer, True)
        ):
            self._stop(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.state.fn == "fit":
            self.validated = trainer.global_step
            self._save(trainer, module)

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.state.fn == "validate" and (found := self.checkpoints.find()):
            found.restore(module.state(None))
            module.on_resume(found.step, found.numbers)

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        self._restore_handlers()

    def teardown(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        self.checkpoints.wait()
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        self.old_handlers.clear()

    def _on_signal(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.interrupted:
            raise SystemExit(128 + number)
        self.interrupted = number == signal.SIGINT
        self.signal = number

    def _stop_requested(self, trainer: L.Trainer, now: bool) -> bool:
        """Whether any process received a signal. On a GPU this waits for the device, so several processes check it only
        if `now`.
        """
        self.any_signal = self.signal
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            if device.type != "cpu" and not now:
                return False
            number = torch.tensor(self.signal, device=device)
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
            self.any_signal = int(number)
        return bool(self.any_signal)

    def _stop(self, trainer: L.Trainer, module: Any) -> None:
        self._save(trainer, module)
        self.checkpoints.wait()
        trainer.strategy.barrier()  # a launcher may end all processes once one has ended
        raise SystemExit(128 + self.any_signal if trainer.local_rank == 0 else 0)

    def _save(self, trainer: L.Trainer, module: Resumable) -> None:
        """Saves, unless this step is saved already, as after the validation that a resumed run starts with."""
        if trainer.global_step == self.saved:
            return
        self.meter.pause()
        self.saved = trainer.global_step
        numbers = module.numbers() | {"validated": self.validated}
        optimizer = trainer.optimizers[0] if self.saved else None  # before its first step it has no tensors
        self.checkpoints.save(self.saved, module.state(optimizer), numbers)


def set_step(trainer: L.Trainer, step: int) -> None:
    """Sets the counters of Lightning's loops as they are after `step` optimizer steps."""
    loop = trainer.fit_loop.epoch_loop
    done = loop.automatic_optimization.optim_progress.optimizer.step.total
    done.ready = done.completed = step
    batches = step * trainer.accumulate_grad_batches
    for name in ("ready", "started", "processed", "completed"):
        setattr(loop.batch_progress.total, name, batches)
    loop._batches_that_stepped = step
