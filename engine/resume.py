"""Going on where a run stopped: at one number, the optimizer steps that are done, from which all else follows."""

import signal
from typing import Any, Protocol

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from torch import Tensor, nn

from engine.checkpoint import Checkpoints
from engine.meter import Meter

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ASKED_EVERY = 10  # steps, on a device that would have to wait for the answer


class Resumable(Protocol):
    """What a module must offer to be saved and to go on."""

    def state(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """Its tensors, those of the optimizer with them if there is one; all processes ask for them together."""

    def numbers(self) -> dict[str, Any]:
        """What else it keeps."""

    def go_on(self, step: int, numbers: dict[str, Any]) -> None:
        """Takes its tensors, which have been copied into, and these numbers, as those of after so many steps."""


class Resume(CheckpointCallback):
    """Saves the run every few steps and after each validation; begins where the newest undamaged checkpoint is.

    At SIGTERM, SIGUSR1 or SIGINT to any of the processes, all finish their step, save, and exit with 128 + the number.
    A second SIGINT ends its process at once. A validation that was due then is made up for on going on.

    Lightning calls callbacks of this kind after all others.

    Args:
        checkpoints: where to.
        every: steps between two saves.
        validate_every: steps between two validations; one that is due is followed by a save, so that a run that is
            killed meanwhile does that step again, with its validation.
        meter: paused while saving.
    """

    def __init__(self, checkpoints: Checkpoints, every: int, validate_every: int, meter: Meter) -> None:
        self.checkpoints, self.every, self.validate_every, self.meter = checkpoints, every, validate_every, meter
        self.signal = self.agreed = 0  # that came to this process; that came to any
        self.impatient = False
        self.saved = self.validated = 0  # the last step at which
        self.usual: dict[int, Any] = {}  # what handled the signals before

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        for number in SIGNALS:
            self.usual[number] = signal.signal(number, self._notice)
        found = self.checkpoints.find()
        self.checkpoints.forget(found.step if found else 0)
        if found:
            tensors = module.state(trainer.optimizers[0])
            found.compare({name: tensor.shape for name, tensor in tensors.items()})
            found.restore(tensors)
            self.saved, self.validated = found.step, found.numbers["validated"]
            place(trainer, found.step)
            module.go_on(found.step, found.numbers)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        step = trainer.global_step
        if step and step % self.validate_every == 0 and self.validated < step:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        # Not at the end of the step before: its line of the log is only written after that.
        step = trainer.global_step
        if step == self.saved or trainer.fit_loop.epoch_loop.total_batch_idx % trainer.accumulate_grad_batches:
            return
        if self._asked(trainer, step % ASKED_EVERY == 0):
            self._stop(trainer, module)
        if step % self.every == 0:
            self._save(trainer, module)
            self.meter.resume()

    def on_validation_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.state.fn == "fit" and trainer.global_step < trainer.max_steps and self._asked(trainer, True):
            self._stop(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.state.fn == "fit":
            self.validated = trainer.global_step
            self._save(trainer, module)

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.state.fn == "validate" and (found := self.checkpoints.find()):
            found.restore(module.state(None))
            module.go_on(found.step, found.numbers)

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        self.checkpoints.wait()
        self._end()

    def _end(self) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)
        self.usual.clear()

    def _notice(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.impatient:
            raise SystemExit(128 + number)
        self.impatient = number == signal.SIGINT
        self.signal = number

    def _asked(self, trainer: L.Trainer, now: bool) -> bool:
        """Whether any process was asked to stop. On a GPU the answer has to be waited for: only from time to time."""
        self.agreed = self.signal
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            if device.type != "cpu" and not now:
                return False
            number = torch.tensor(self.signal, device=device)
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
            self.agreed = int(number)
        return bool(self.agreed)

    def _stop(self, trainer: L.Trainer, module: Any) -> None:
        self._save(trainer, module)
        self.checkpoints.wait()
        trainer.strategy.barrier()  # whoever started the others may end them all once one has ended
        raise SystemExit(128 + self.agreed if trainer.local_rank == 0 else 0)

    def _save(self, trainer: L.Trainer, module: Resumable) -> None:
        """Saves, unless this step is saved: a validation that was made up for would be again."""
        if trainer.global_step == self.saved:
            return
        self.meter.pause()
        self.saved = trainer.global_step
        numbers = module.numbers() | {"validated": self.validated}
        self.checkpoints.save(self.saved, module.state(trainer.optimizers[0]), numbers)


def place(trainer: L.Trainer, step: int) -> None:
    """Makes Lightning's loops stand after so many optimizer steps."""
    loop = trainer.fit_loop.epoch_loop
    done = loop.automatic_optimization.optim_progress.optimizer.step.total
    done.ready = done.completed = step
    batches = step * trainer.accumulate_grad_batches
    for name in ("ready", "started", "processed", "completed"):
        setattr(loop.batch_progress.total, name, batches)
    loop._batches_that_stepped = step


def adam(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """AdamW's numbers for each learning parameter by its name, as "blocks.0.….exp_avg"; zeros before the first step."""
    found: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            found |= {f"{name}.{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return found
