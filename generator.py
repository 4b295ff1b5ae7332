"""Generator: the only place where network, process and data meet for training."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from data.batch import Batch
from data.latents import Codec
from data.pictures import save_png, sheet
from data.sampler import Use, stream
from data.text import TextEncoder
from flow.density import stratified
from flow.objective import Objective, TimeBins
from mmdit import lora
from mmdit.model import Condition, MMDiT
from pipeline import Network, Pipeline
from pipeline.folder import replace_folder
from sampling import Sampling

VALIDATION_TIMES = 8
SAMPLED = 64  # pictures at a time


@dataclass(frozen=True)
class Optimization:
    """AdamW, warmed up linearly and decayed along a cosine to zero.

    Args:
        lr: the peak learning rate.
        warmup: steps up to it.
        weight_decay: on matrices; biases and gains have none.
        clip: largest norm of the whole gradient.
        ema_decay: of the averaged weights, which validation, samples and the model folder use.
    """

    lr: float = 1e-4
    warmup: int = 1000
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        if not (self.lr >= 0 and self.warmup >= 0 and self.weight_decay >= 0 and self.clip > 0):
            raise ValueError(
                "optimization needs lr, warmup and weight_decay of at least 0 and clip > 0, "
                f"got {self.lr}, {self.warmup}, {self.weight_decay} and {self.clip}"
            )


@dataclass(frozen=True)
class Grid:
    """The sheet of samples drawn at each validation: one row per prompt.

    Args:
        prompts: what to draw.
        columns: pictures of each.
    """

    prompts: tuple[str, ...] = ()
    columns: int = 4

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError(f"grid.columns must be at least 1, got {self.columns}")


class Generator(L.LightningModule):
    """Trains a network on an objective; draws samples and writes model folders as it goes.

    Args:
        network: the network to train.
        objective: what it learns.
        text: encodes the prompts of the samples; saved with the model.
        codec: decodes the samples; saved with the model.
        optimization: how it is trained.
        sampling: how samples are drawn; saved with the model.
        grid: which samples are drawn.
        side: height and width of the samples, in pixels.
        folder: the run's folder.
        steps: optimizer steps of the whole training.
        batch_size: of the global batch.
        seed: of the drawn times; the noise comes with the data.
        log_every: steps between two lines of the log.
        base: where the network came from, if what is trained are low-rank updates of it.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        text: TextEncoder,
        codec: Codec,
        optimization: Optimization,
        sampling: Sampling,
        grid: Grid,
        side: int,
        folder: Path,
        steps: int,
        batch_size: int,
        seed: int,
        log_every: int = 50,
        base: str | None = None,
    ) -> None:
        super().__init__()
        self.network, self.objective = network, objective
        self.optimization, self.grid, self.side, self.folder, self.base = optimization, grid, side, folder, base
        self.steps, self.batch_size, self.seed, self.log_every = steps, batch_size, seed, log_every
        if optimization.warmup >= steps:
            raise ValueError(f"optimization.warmup must be below run.steps {steps}, got {optimization.warmup}")
        self.pipeline = Pipeline(network, objective, codec, text, sampling)
        self.strict_loading = base is None
        self.bins = TimeBins()
        self.best = math.inf
        self.loaded_step = 0

    def training_step(self, batch: Batch) -> Tensor:
        """The mean loss of this rank's share of global batch `batch.step`."""
        draw = torch.Generator().manual_seed(int(stream(self.seed, Use.TIME, batch.step).bit_generator.random_raw()))
        u = stratified(self.batch_size, draw)[batch.positions]
        t = self.objective.time(u, batch.x0[0, 0].numel()).to(batch.x0.device)
        loss = self.objective.loss(self.network, batch.x0, batch.noise, t, Condition(batch.text, batch.pooled))
        self.bins.add(t, loss)
        mean = loss.mean()
        if (self.global_step + 1) % self.log_every == 0:
            self.log("step", self.global_step + 1.0)
            self.log("train/loss", mean.detach(), sync_dist=True)
            bins = self.bins.means(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
            self.log_dict({f"train/loss_bin{i}": value for i, value in enumerate(bins)})
        return mean

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norm of the whole gradient, and logs what it was."""
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.optimization.clip)
        if (self.global_step + 1) % self.log_every == 0:
            self.log_dict({"train/grad_norm": norm, "train/lr": optimizer.param_groups[0]["lr"]})

    def configure_optimizers(self) -> Any:
        o = self.optimization
        groups = param_groups_weight_decay(self.network, o.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=o.lr, fused=True)
        schedule = CosineLRScheduler(
            optimizer, self.steps - o.warmup, warmup_t=o.warmup, warmup_prefix=True, t_in_epochs=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: object) -> None:
        """timm's schedules count updates."""
        scheduler.step_update(self.global_step)

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(VALIDATION_TIMES + 1, dtype=torch.float64, device=self.device)  # loss per t; pictures

    def validation_step(self, batch: Batch) -> None:
        """Adds up the loss at eight equally spaced t, each picture with its own fixed noise."""
        condition = Condition(batch.text, batch.pooled)
        for i in range(VALIDATION_TIMES):
            t = torch.full((len(batch.x0),), (i + 0.5) / VALIDATION_TIMES, device=self.device)
            t = self.objective.path.cell(t)
            self.sums[i] += self.objective.loss(self.network, batch.x0, batch.noise, t, condition).double().sum()
        self.sums[-1] += len(batch.x0)

    def on_validation_epoch_end(self) -> None:
        """Reports the loss, draws the samples and keeps the best model."""
        sums = self.trainer.strategy.reduce(self.sums, reduce_op="sum")
        losses = (sums[:-1] / sums[-1]).tolist()
        mean = sum(losses) / len(losses)
        times = [(i + 0.5) / VALIDATION_TIMES for i in range(VALIDATION_TIMES)]
        values = {"val/loss": mean} | {f"val/loss_t{t:.4f}": loss for t, loss in zip(times, losses, strict=True)}
        self.log_dict(values | {"step": float(self.global_step or self.loaded_step)}, rank_zero_only=True)
        if self.trainer.state.fn != "fit":
            return
        if not math.isfinite(mean):
            raise FloatingPointError(f"the validation loss is {mean} at step {self.global_step}: try a lower lr")
        self.draw_samples()
        if mean < self.best:
            self.best = mean
            self.save_model()

    def draw_samples(self) -> None:
        """Draws the sheet of samples into the run's folder and the loggers. Every rank draws; rank 0 writes."""
        prompts = [prompt for prompt in self.grid.prompts for _ in range(self.grid.columns)]
        if not prompts:
            return
        pictures = [
            self.pipeline(
                prompts[i : i + SAMPLED], range(len(prompts))[i : i + SAMPLED], height=self.side, width=self.side
            )
            for i in range(0, len(prompts), SAMPLED)
        ]
        image = sheet(torch.cat(pictures), self.grid.columns)
        if self.trainer.is_global_zero:
            save_png(image, self.folder / "samples" / f"step-{self.global_step:07d}.png")
        for logger in self.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [image], step=self.global_step)

    @rank_zero_only
    def save_model(self) -> None:
        """Writes the weights now in the network, which are the averaged ones while validating.

        They make a model folder, or where only low-rank updates are trained, a folder of these.
        """
        if self.base is None:
            self.pipeline.save(self.folder / "model")
        else:
            base = self.base
            network = cast(MMDiT, self.network)
            replace_folder(self.folder / "lora", lambda new: lora.save(network, new, base))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Leaves out what does not learn if it is on disk already: a low-rank update's checkpoint is small, too."""
        checkpoint["best"] = self.best
        if self.base is not None:
            frozen = {name for name, p in self.named_parameters() if not p.requires_grad} | {"network.positions"}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.best = checkpoint["best"]
        self.loaded_step = checkpoint["global_step"]  # Lightning restores its own only to go on training
