"""Progress of a run: a bar on a terminal, elsewhere a line every 15 seconds."""

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm


class StepProgress(Callback):
    """Shows steps done, speed, time left, loss and validation loss; a resumed run starts at its step."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.bar is not None:
            if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                logged = trainer.logged_metrics
                shown = {key.removeprefix("train/"): f"{float(logged[key]):.4f}"
                         for key in ("train/loss", "val/loss") if key in logged}  # fmt: skip
                self.bar.set_postfix(shown, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.close()

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar, so that later output starts on a new line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
