"""Generator: the only place where network, process and data meet for training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from data.batch import Batch
from data.latents import Codec
from data.order import NOT_COUNTED, Use, stream
from data.raw.pictures import save_png, sheet
from data.sizes import SIZE_FEATURES
from data.text.encoder import TextEncoder
from engine.ema import EMA, Averages
from engine.flops import forward_flops
from engine.guard import Guard, spread_nonfinite
from engine.meter import Cost, Meter
from engine.posthoc import write_snapshot
from engine.resume import adam
from engine.strategy import Strategy, skeleton, whole
from flow.density import stratified
from flow.guidance import ClassifierFree
from flow.objective import Model, Objective, TimeBins
from mmdit import lora
from mmdit.model import Condition, MMDiT
from pipeline import Network, Pipeline
from pipeline.folder import replace_folder
from pipeline.sampling import Sampling

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
        max_skipped: steps in a row whose loss or gradient is not finite, which are not taken; more end the run.
    """

    lr: float = 1e-4
    warmup: int = 1000
    weight_decay: float = 0.01
    clip: float = 1.0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if not (min(self.lr, self.warmup, self.weight_decay, self.max_skipped) >= 0 and self.clip > 0):
            raise ValueError(
                "optimization needs lr, warmup, weight_decay and max_skipped of at least 0 and clip > 0, "
                f"got {self.lr}, {self.warmup}, {self.weight_decay}, {self.max_skipped} and {self.clip}"
            )


@dataclass(frozen=True)
class Teacher:
    """A model whose output is learned, in the place of what picture and noise say.

    Args:
        model: its folder, or a run's.
        guidance: scale of its classifier-free guidance, which the student so learns to do without; two numbers are the
            ends of a range, from which one is drawn for each picture and told to a network with guidance_embeds.
    """

    model: Path
    guidance: float | tuple[float, float] = 1.0

    def __post_init__(self) -> None:
        low, high = self.range
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"teacher.guidance must be a number of at least 0, or two that rise, got {self.guidance}")

    @property
    def range(self) -> tuple[float, float]:
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)


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
        averages: which averages of the weights are kept.
        strategy: how the training is spread and fitted into memory.
        sampling: how samples are drawn; saved with the model.
        grid: which samples are drawn.
        side: height and width of the samples, in pixels.
        folder: the run's folder.
        steps: optimizer steps of the whole training.
        batch_size: of the global batch.
        seed: of the drawn times; the noise comes with the data.
        log_every: steps between two lines of the log.
        base: where the network came from, if what is trained are low-rank updates of it.
        teacher: what it learns from, and the model itself.

    Raises:
        ValueError: the network is not told what it is to learn.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        text: TextEncoder,
        codec: Codec,
        optimization: Optimization,
        averages: Averages,
        strategy: Strategy,
        sampling: Sampling,
        grid: Grid,
        side: int,
        folder: Path,
        steps: int,
        batch_size: int,
        seed: int,
        log_every: int = 50,
        base: str | None = None,
        teacher: tuple[Teacher, Pipeline] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.objective = network, objective
        self.optimization, self.grid, self.side, self.folder, self.base = optimization, grid, side, folder, base
        self.steps, self.batch_size, self.seed, self.log_every = steps, batch_size, seed, log_every
        if optimization.warmup >= steps:
            raise ValueError(f"optimization.warmup must be below run.steps {steps}, got {optimization.warmup}")
        if objective.average and not getattr(network, "two_times", False):
            raise ValueError("objective.average needs a network of two times: set network.two_times")
        low, high = teacher[0].range if teacher else (1.0, 1.0)
        if getattr(network, "guidance_embeds", False) != (low < high):
            raise ValueError("network.guidance_embeds and a range of teacher.guidance, such as [1, 6], need each other")
        self.averages, self.strategy = averages, strategy
        self.teacher = [teacher] if teacher else []  # in a list, so that it is no part of the module
        self.shape = [skeleton(network)]  # in a list, so that it is no part of the module
        self.pipeline = Pipeline(network, objective, codec, text, sampling)
        self.costs: dict[tuple[tuple[int, ...], ...], Cost] = {}  # by the shapes of latents and text
        self.bins = TimeBins()
        self.guard = Guard()
        self.loss = torch.zeros(())  # of the global batch so far, this rank's mean
        self.best = math.inf
        self.loaded_step = 0
        self.null: Condition | None = None  # the teacher's

    def configure_model(self) -> None:
        """Divides the network among the processes, makes its averages, and lets the pipeline draw with the first."""
        if hasattr(self, "ema"):
            return
        strategy, device, world = self.strategy, self.trainer.strategy.root_device, self.trainer.world_size
        for _, pipe in self.teacher:
            pipe.network.to(device).requires_grad_(False)
        strategy.prepare(self.network)
        copies = [skeleton(self.shape[0]) for _ in self.averages.decays()]
        if strategy.kind == "fsdp2" and world > 1:
            mesh = strategy.mesh(device, world)
            dtype = torch.float32 if self.trainer.precision == "32-true" else torch.bfloat16
            for network in (self.network, *copies):
                strategy.shard(network, mesh, dtype)
        for copied in copies:
            copied.to_empty(device=next(self.network.parameters()).device)
        self.ema = EMA(self.averages, copies, self.network)
        self.weights = [p for p in self.network.parameters() if p.requires_grad]
        self.pipeline = Pipeline(copies[0], *self.pipeline.parts[1:])

    def training_step(self, batch: Batch) -> Tensor:
        """The mean loss of a part of this rank's share of global batch `batch.step`."""
        draw = torch.Generator().manual_seed(int(stream(self.seed, Use.TIME, batch.step).bit_generator.random_raw()))
        u = torch.stack([stratified(self.batch_size, draw) for _ in range(4)])[:, batch.positions]
        t, end = self.objective.times(u[:3], batch.x0[0, 0].numel())
        t, end = t.to(batch.x0.device), None if end is None else end.to(batch.x0.device)
        loss = self.loss_of(self.network, batch, t, u[3].float(), end)
        self.bins.add(t, loss)
        mean = loss.mean()
        share = mean.detach() / self.strategy.accumulate_grad_batches
        begins = batch.positions[0] % (self.batch_size // self.trainer.world_size) == 0
        self.loss = share if begins else self.loss + share
        return spread_nonfinite(mean)

    def loss_of(self, network: Network, batch: Batch, t: Tensor, u: Tensor, end: Tensor | None = None) -> Tensor:
        """The loss of each picture, (b,), with the guidance that uniform numbers u (b,) draw, if there is a teacher."""
        condition = Condition(batch.text, batch.pooled)
        if not self.teacher:
            return self.objective.loss(network, batch.x0, batch.noise, t, condition, end)
        teacher, pipe = self.teacher[0]
        low, high = teacher.range
        scale = (low + (high - low) * u).to(t.device)
        model: Model = pipe.network
        if teacher.range != (1, 1):
            if self.null is None:
                self.null = pipe.condition([""])
            null = self.null
            if pipe.sized:  # both halves of the same sizes
                pooled = null.pooled[:, :-SIZE_FEATURES].expand(len(t), -1)
                null = null._replace(pooled=torch.cat([pooled, condition.pooled[:, -SIZE_FEATURES:]], 1))
            model = ClassifierFree(pipe.network, null, scale[:, None, None, None])
        told = condition._replace(guidance=scale) if low < high else condition

        def field(z: Tensor, t: Tensor, told: Condition, y: Tensor) -> Tensor:
            return model(z, t, condition)  # which tells no scale

        return self.objective.loss(network, batch.x0, batch.noise, t, told, end, field)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norm of the whole gradient, and lets the optimizer leave out a step that is not finite."""
        norm = whole(torch.nn.utils.clip_grad_norm_(self.weights, self.optimization.clip))
        self.trainer.optimizers[0].found_inf = self.guard.check(norm)  # type: ignore[attr-defined]
        step, most = self.global_step + 1, self.optimization.max_skipped
        if step % self.log_every and step % (most + 1):
            return
        longest, total = self.guard.skipped_steps()
        if longest > most:
            raise FloatingPointError(
                f"loss or gradient was not finite in {longest} steps in a row, up to step {step}: "
                "try a lower lr, or look at the pictures of these steps"
            )
        if step % self.log_every == 0:
            self.log("step", float(step))
            self.log("train/loss", self.loss, sync_dist=True)
            bins = self.bins.means(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
            self.log_dict({f"train/loss_bin{i}": value for i, value in enumerate(bins)})
            told = {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "skipped": total}
            told["grad_spikes"] = self.guard.spikes()
            self.log_dict({f"train/{name}": float(value) for name, value in told.items()})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, after which the averages take in the new weights."""
        super().optimizer_step(*args, **kwargs)
        step = self.global_step + 1
        self.ema.update(self.network, step)
        every = self.averages.snapshot_every
        if every and step % every == 0:
            self.save_snapshot(step)

    def configure_optimizers(self) -> Any:
        o = self.optimization
        groups = param_groups_weight_decay(self.network, o.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=o.lr, fused=True)
        schedule = CosineLRScheduler(
            optimizer, self.steps - o.warmup, warmup_t=o.warmup, warmup_prefix=True, t_in_epochs=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: object, step: int | None = None) -> None:
        """timm's schedules count updates."""
        scheduler.step_update(self.global_step if step is None else step)

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(VALIDATION_TIMES + 1, dtype=torch.float64, device=self.device)  # loss per t; pictures

    def validation_step(self, batch: Batch) -> None:
        """Adds up the main average's loss at eight equally spaced t, each picture with its own fixed noise."""
        counted = batch.step != NOT_COUNTED
        half = torch.full((len(batch.x0),), 0.5)
        for i in range(VALIDATION_TIMES):
            t = torch.full((len(batch.x0),), (i + 0.5) / VALIDATION_TIMES, device=self.device)
            t = self.objective.cell(t, batch.x0[0, 0].numel())
            losses = self.loss_of(self.ema.main, batch, t, half)
            self.sums[i] += counted * losses.double().sum()
        self.sums[-1] += counted * len(batch.x0)

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

    def save_model(self) -> None:
        """Writes the main average."""
        held = self.gathered(self.ema.main.state_dict())
        if held is not None:
            self.write(held, self.folder / ("model" if self.base is None else "lora"))

    def write(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes a model folder with these weights, or where only low-rank updates are trained, a folder of these."""
        if self.base is None:
            Pipeline(self.filled(weights), *self.pipeline.parts[1:]).save(folder)
        else:
            network, base = cast(MMDiT, self.filled(weights)), self.base
            replace_folder(folder, lambda new: lora.save(network, new, base))

    def save_snapshot(self, step: int) -> None:
        """Keeps the power-function averages of this step."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Meter):
                callback.pause()
        averages = {}
        for width in self.averages.widths:
            prefix = f"width-{width}."
            named = {name: t for name, t in self.ema.named().items() if name.startswith(prefix)}
            averages[width] = self.gathered({name.removeprefix(prefix): t for name, t in named.items()})
        if self.trainer.is_global_zero:
            write_snapshot(self.folder / "snapshots", step, averages)  # type: ignore[arg-type]

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors whole, in the memory of the first process; none in the others."""
        first = self.trainer.is_global_zero
        held = {name: whole(tensor).cpu() if first else whole(tensor).numel() for name, tensor in tensors.items()}
        return cast(dict[str, Tensor], held) if first else None

    def filled(self, weights: Mapping[str, Tensor]) -> Network:
        """A network like the one that learns, with these weights."""
        network = skeleton(self.shape[0])
        network.load_state_dict(dict(weights), assign=True)
        return network

    def state(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """All numbers that training changes, by name."""
        self.bins.sums = self.trainer.strategy.reduce(self.bins.sums.to(self.device), reduce_op="sum")
        if not self.trainer.is_global_zero:
            self.bins.sums.zero_()
        state = self.learned()
        state |= {f"average.{name}": tensor for name, tensor in self.ema.named().items()}
        state |= {f"guard.{name}": tensor for name, tensor in self.guard.named_buffers()}
        if optimizer:
            state |= {f"optimizer.{name}": tensor for name, tensor in adam(optimizer, self.network).items()}
        return state | {"bins": self.bins.sums}

    def cost(self, batch: Batch) -> Cost:
        """A batch in pictures, tokens and FLOPs: the backward pass is two forward ones, for low-rank updates one.

        The derivative of an average velocity counts as two forward passes of the pictures that it is taken of.
        """
        shapes = (tuple(batch.x0.shape), tuple(batch.text.shape))
        if shapes not in self.costs:
            count, _, height, width = batch.x0.shape
            inputs = batch.x0, torch.empty(count), Condition(batch.text, batch.pooled)
            times: float = 3 if self.base is None else 2
            told = (inputs[2]._replace(guidance=inputs[1]),) if self.pipeline.knows_guidance else inputs[2:]
            times += 2 * self.objective.average.share if self.objective.average else 0
            flops = round(times * forward_flops(self.shape[0], *inputs[:2], *told))
            for teacher, pipe in self.teacher:
                flops += (1 if teacher.range == (1, 1) else 2) * forward_flops(skeleton(pipe.network), *inputs)
            tokens = height * width // self.shape[0].unit ** 2 + batch.text.shape[1]
            self.costs[shapes] = Cost(count, count * tokens, flops)
        return self.costs[shapes]

    def learned(self) -> dict[str, Tensor]:
        """The network's part of the state: without what does not learn, if that is on disk as the base."""
        learning = {name for name, p in self.network.named_parameters() if p.requires_grad}
        state = self.network.state_dict()
        return {f"network.{name}": t for name, t in state.items() if self.base is None or name in learning}

    def numbers(self) -> dict[str, Any]:
        return {"best": self.best if math.isfinite(self.best) else None}

    def on_resume(self, step: int, numbers: dict[str, Any]) -> None:
        self.best = math.inf if numbers["best"] is None else numbers["best"]
        self.loaded_step = step  # Lightning's own is only for training
        self.guard.reset(self.optimization.max_skipped)
        if not self.trainer.is_global_zero:
            self.bins.sums.zero_()  # which stand for all processes
        if self.trainer.state.fn == "fit":
            self.lr_scheduler_step(self.lr_schedulers(), None, step)
