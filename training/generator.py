"""Generator: the Lightning module. It holds the training step, the validation and the samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from data.batch import Batch
from data.module import Examples
from data.order import NOT_COUNTED, Use, normal, stream
from data.raw.pictures import save_png, sheet
from engine.ema import EMA, Averages, share_frozen
from engine.guard import Guard, spread_nonfinite
from engine.optimizer import optimizer_numbers, optimizer_state, set_optimizer_numbers
from engine.strategy import Strategy, skeleton, whole
from flow.density import stratified
from flow.objective import Interval, TimeBins
from mmdit.network import Condition, HiddenStates, Network
from pipeline import Pipeline
from pipeline.sampling import sent
from training.chosen import JudgeModel
from training.optimization import CRITIC, Optimization
from training.run_folder import Run
from training.saving import ModelWriter, gather
from training.teacher import Lesson, TeacherModel, prepare_frozen
from training.terms import LossTerm

VALIDATION_TIMES = 8
MOST_COLUMNS = 256  # of the sheet of samples
SAMPLED = 64  # pictures at a time
LEARNERS = ("network.", CRITIC)  # begin the names of the weights in a checkpoint


@dataclass(frozen=True)
class Grid:
    """The sheet of samples that each validation draws: one row for each prompt.

    Args:
        prompts: the prompts.
        columns: pictures for each prompt.
    """

    prompts: tuple[str, ...] = ()
    columns: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.columns <= MOST_COLUMNS:
            raise ValueError(f"grid.columns must be from 1 to {MOST_COLUMNS}, got {self.columns}")


class Generator(L.LightningModule):
    """Trains a network on an objective, validates it, draws samples and writes the best model.

    Args:
        pipeline: the model that is trained: network, objective, codec, text and sampling.
        run: folder, seed, number of steps and log of the run.
        batch_size: pictures in the global batch.
        optimization: optimizer and schedule.
        averages: the averages of the weights that are kept.
        strategy: how the training is divided among processes and fits into memory.
        grid: the samples that are drawn.
        side: height and width of the samples, in pixels.
        writer: writes the model.
        teacher: the model that the network learns from.
        terms: further losses, on hidden states.
        examples: input pictures of the samples, for a network that works from pictures.
        judge: judges the pictures that the network learns from.

    Raises:
        ValueError: network.guidance_embeds does not fit the teacher, or the network lacks a block that a term reads.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        run: Run,
        batch_size: int,
        optimization: Optimization,
        averages: Averages,
        strategy: Strategy,
        grid: Grid,
        side: int,
        writer: ModelWriter,
        teacher: TeacherModel | None = None,
        terms: Sequence[LossTerm] = (),
        examples: Examples | None = None,
        judge: JudgeModel | None = None,
    ) -> None:
        super().__init__()
        self.pipeline, self.network, self.objective = pipeline, pipeline.network, pipeline.objective
        self.run, self.batch_size, self.side = run, batch_size, side
        self.optimization, self.averages, self.strategy, self.grid = optimization, averages, strategy, grid
        self.writer, self.teacher, self.terms, self.examples = writer, teacher, tuple(terms), examples
        self.judge = judge
        self.critic = teacher.critic if teacher else None
        low, high = teacher.teacher.range if teacher else (1.0, 1.0)
        if self.network.guidance_embeds != (low < high):
            raise ValueError("network.guidance_embeds and a range of teacher.guidance, such as [1, 6], need each other")
        self.read_blocks = frozenset(block for term in self.terms for block in term.blocks)
        if not self.read_blocks <= set(range(self.network.skippable)):
            raise ValueError(f"terms read the blocks {sorted(self.read_blocks)} of an MMDiT, and this network has "
                             f"{self.network.skippable}: name other blocks")  # fmt: skip
        self.bins = TimeBins()
        self.guard = Guard()
        self.losses = torch.zeros(1 + len(self.terms))  # mean losses of this rank's share of the global batch so far
        self.best = math.inf
        self.loaded_step = 0

    def configure_model(self) -> None:
        """Shards the network, makes the averages of its weights, and gives the first average to the pipeline."""
        if hasattr(self, "ema"):
            return
        strategy, device, world = self.strategy, self.trainer.strategy.root_device, self.trainer.world_size
        if self.teacher:
            self.teacher.prepare(device, strategy)
        if self.pipeline.regressor:
            prepare_frozen(self.pipeline.regressor.network, device, strategy)
        learners = [self.network, *([self.critic] if self.critic else [])]
        for network in learners:
            strategy.prepare(network)
        copies = [skeleton(self.writer.network) for _ in self.averages.decays()]
        if strategy.kind == "fsdp2" and world > 1:
            mesh = strategy.mesh(device, world)
            dtype = torch.float32 if self.trainer.precision == "32-true" else torch.bfloat16
            for network in (*learners, *copies):
                strategy.shard(network, mesh, dtype)
            for copied in copies:
                copied.to_empty(device=next(self.network.parameters()).device)
        else:
            for network in learners:
                network.to(device)  # before parts are shared: moving a buffer makes another one
            for copied in copies:
                share_frozen(self.network, copied)
        self.ema = EMA(self.averages, copies, self.network)
        self.weights = [[p for p in network.parameters() if p.requires_grad] for network in learners]
        self.pipeline = Pipeline(copies[0], *self.pipeline.parts[1:])
        if self.judge:
            self.judge.follow(self.pipeline, device, strategy)

    # One step: draw t, mix picture and noise, compare (Esser et al. 2024, §2 and §3.1).

    def training_step(self, batch: Batch) -> Tensor:
        """The mean loss of one micro-batch: a part of this rank's share of global batch `batch.step`."""
        u = self.uniforms(batch)
        if self.judge:
            u = self.judge.twins(u, 1)
            if self.begins(batch):
                self.judge.watched.clear()
        send = partial(sent, device=batch.x0.device)
        times, interval = self.objective.times(u[:3], area(batch))
        t, interval = send(times), interval and Interval(*map(send, interval))
        states = HiddenStates(self.read_blocks)
        model = partial(self.network, hidden_states=states) if self.terms else self.network
        if self.judge:
            lesson = self.judged(batch)
        else:
            lesson = self.lesson(batch, send(u[3].float()), self.teacher.uses if self.teacher else 1)
        loss = lesson.loss(self.objective, model, t, interval)
        self.bins.add(t, loss)
        means = torch.stack([loss.mean(), *(term(states.tokens).mean() for term in self.terms)])
        self.add_losses(means.detach(), batch)
        return spread_nonfinite(means.sum())

    def uniforms(self, batch: Batch) -> Tensor:
        """Four uniform numbers for each picture, (4, b), stratified over the global batch by (seed, step)."""
        seed = int(stream(self.run.seed, Use.TIME, batch.step).bit_generator.random_raw())
        draw = torch.Generator().manual_seed(seed)
        return torch.stack([stratified(self.batch_size, draw) for _ in range(4)])[:, batch.positions]

    def lesson(self, batch: Batch, u: Tensor, uses: int = 1) -> Lesson:
        """What is learned from a batch. With a teacher, the uniform numbers u (b,) draw the guidance scales."""
        condition = Condition(**batch.condition())
        if self.teacher:
            fresh = self.fresh(batch, Use.MATCHED) if self.critic else None
            lesson = self.teacher.lesson(condition, batch.x0, batch.noise, u, uses, fresh)
        elif self.pipeline.regressor:
            residual = self.pipeline.regressor.residual(condition, batch.x0.shape)
            lesson = Lesson(condition, residual.of(batch.x0), batch.noise)
        else:
            lesson = Lesson(condition, batch.x0, batch.noise)
        lesson.loss_mask = batch.loss_mask
        return lesson

    def judged(self, batch: Batch) -> Lesson:
        """What is learned from judged pictures of a batch's captions."""
        assert self.judge
        return self.judge.lesson(batch, self.fresh(batch, Use.JUDGED))

    def fresh(self, batch: Batch, use: Use) -> Tensor:
        """More noise for a batch, (b, C, H, W), independent of its own: a function of (seed, step) and the pictures."""
        step = max(batch.step, 0)  # a repeated share of the validation has none
        return sent(normal(self.run.seed, use, step, batch.positions, batch.noise.shape[1:]), batch.noise.device)

    def add_losses(self, means: Tensor, batch: Batch) -> None:
        """Adds the mean losses of a micro-batch to those of this rank's share of the global batch, for the log."""
        share = means / self.strategy.accumulate_grad_batches
        self.losses = share if self.begins(batch) else self.losses + share

    def begins(self, batch: Batch) -> bool:
        """Whether a micro-batch is the first of this rank's share of its global batch."""
        return bool(batch.positions[0] % (self.batch_size // self.trainer.world_size) == 0)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clips the norm of each network's whole gradient; makes the optimizer skip a step that is not finite."""
        norms = [whole(torch.nn.utils.clip_grad_norm_(own, self.optimization.clip)) for own in self.weights]
        norm = torch.stack(norms).norm() if self.critic else norms[0]
        self.trainer.optimizers[0].found_inf = self.guard.check(norm)  # type: ignore[attr-defined]
        step, most = self.global_step + 1, self.optimization.max_skipped
        if step % self.run.log_every and step % (most + 1):
            return
        longest, total = self.guard.skipped_steps()
        if longest > most:
            raise FloatingPointError(
                f"loss or gradient was not finite in {longest} steps in a row, up to step {step}: "
                "try a lower lr, or check the pictures of these steps"
            )
        if step % self.run.log_every == 0:
            self.log("step", float(step))
            names = ["loss", *(f"{type(term).__name__}_{i}" for i, term in enumerate(self.terms))]
            for name, loss in zip(names, self.losses, strict=True):
                self.log(f"train/{name}", loss, sync_dist=True)
            bins = self.bins.means(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
            self.log_dict({f"train/loss_bin{i}": value for i, value in enumerate(bins)})
            values = {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "skipped": total}
            values["grad_spikes"] = self.guard.spikes()
            if self.judge:
                values |= self.judge.means(
                    lambda sums: self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
                )
            self.log_dict({f"train/{name}": float(value) for name, value in values.items()})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes Lightning's step, then updates the averages of the weights."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update(self.network, self.global_step + 1)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimization.build(self.named_weights())
        schedule = self.optimization.rates(optimizer, self.run.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def named_weights(self) -> dict[str, nn.Parameter]:
        """All weights of the network, and under `critic.` those of a critic."""
        critic = self.critic.named_parameters(prefix=CRITIC.rstrip(".")) if self.critic else ()
        return dict(self.network.named_parameters()) | dict(critic)

    def lr_scheduler_step(self, scheduler: Any, metric: object, step: int | None = None) -> None:
        """Sets the rates of the step."""
        scheduler.set(self.global_step if step is None else step)

    # Validation: the same pictures, noise and times each time.

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(VALIDATION_TIMES + 1, dtype=torch.float64, device=self.device)  # losses by t; count
        self.judged_sums: dict[str, Tensor] = {}

    def validation_step(self, batch: Batch) -> None:
        """Adds up the loss of the main average at eight equally spaced t. Each picture has its own fixed noise."""
        counted = batch.step != NOT_COUNTED
        lesson = self.lesson(batch, torch.full((len(batch.x0),), 0.5, device=self.device))
        middles = (torch.arange(VALIDATION_TIMES, dtype=torch.float32) + 0.5) / VALIDATION_TIMES
        times = self.objective.validation_time(middles, area(batch))
        for time in times.unique():  # an objective with few steps validates at few times
            t = time.expand(len(batch.x0)).to(self.device)
            here = (times == time).double()
            loss = lesson.loss(self.objective, self.ema.main, t).double().sum()
            self.sums[:-1] += counted * here.to(self.device) * loss
            if self.judge:
                compared = self.judge.compared(self.objective, self.ema.main, batch, lesson, t)
                self.add_judged({name: value * here.mean().item() for name, value in compared.items()}, counted)
        self.sums[-1] += counted * len(batch.x0)
        if self.judge:
            self.add_judged(self.judge.verdict(batch, lesson.condition), counted)

    def add_judged(self, values: dict[str, Tensor], counted: bool) -> None:
        """Adds values of the pictures of a batch, each (b, …), to the sums of the validation."""
        for name, value in values.items():
            self.judged_sums[name] = self.judged_sums.get(name, 0.0) + counted * value.double().sum(0).to(self.device)

    def on_validation_epoch_end(self) -> None:
        """Logs the loss, draws the samples and writes the model if it is the best so far."""
        sums = self.trainer.strategy.reduce(self.sums, reduce_op="sum")
        losses = (sums[:-1] / sums[-1]).tolist()
        mean = sum(losses) / len(losses)
        times = [(i + 0.5) / VALIDATION_TIMES for i in range(VALIDATION_TIMES)]
        values = {"val/loss": mean} | {f"val/loss_t{t:.4f}": loss for t, loss in zip(times, losses, strict=True)}
        score = mean
        if self.judge:
            judged = {
                name: (self.trainer.strategy.reduce(own, reduce_op="sum") / sums[-1]).cpu()
                for name, own in self.judged_sums.items()
            }
            score = self.judge.score(judged, int(sums[-1]))
            values |= {f"val/{name}": float(value) for name, value in judged.items()}
        self.log_dict(values | {"step": float(self.global_step or self.loaded_step)}, rank_zero_only=True)
        if self.trainer.state.fn != "fit":
            return
        if not math.isfinite(mean):
            raise FloatingPointError(f"the validation loss is {mean} at step {self.global_step}: try a lower lr")
        self.draw_samples()
        if score < self.best or self.critic:  # a critic learns, so that early losses are no better than late ones
            self.best = score
            weights = gather(self.trainer, self.kept(self.ema.main))
            if weights is not None:
                self.writer.write(weights)

    def draw_samples(self) -> None:
        """Draws the sheet of samples into the run's folder and the loggers. Every rank draws; rank 0 writes.

        For a network that works from pictures, the rows are its inputs, its outputs and the real pictures.
        """
        if self.examples:
            shown, columns = self.examples, len(self.examples.captions)
            height, width = shown.real.shape[-2:]
            seeds = range(columns)
            drawn = self.pipeline(shown.captions, seeds, height=height, width=width, picture=shown.pictures)
            pictures = torch.cat([self.examples.enlarged(), drawn, shown.real])
        else:
            prompts, columns = [p for p in self.grid.prompts for _ in range(self.grid.columns)], self.grid.columns
            if not prompts:
                return
            parts = [range(len(prompts))[i : i + SAMPLED] for i in range(0, len(prompts), SAMPLED)]
            pictures = torch.cat(
                [self.pipeline([prompts[i] for i in part], part, height=self.side, width=self.side) for part in parts]
            )
        image = sheet(pictures, columns)
        if self.trainer.is_global_zero:
            save_png(image, self.run.folder / "samples" / f"step-{self.global_step:07d}.png")
        for logger in self.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [image], step=self.global_step)

    # What a checkpoint holds (`engine.resume`).

    def state(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """All tensors that training changes, by name."""
        self.bins.sums = self.trainer.strategy.reduce(self.bins.sums.to(self.device), reduce_op="sum")
        if not self.trainer.is_global_zero:
            self.bins.sums.zero_()
        state = self.network_state()
        state |= {f"average.{name}": tensor for name, tensor in self.ema.named().items()}
        state |= {f"guard.{name}": tensor for name, tensor in self.guard.named_buffers()}
        if optimizer:
            own = optimizer_state(optimizer, self.named_weights())
            state |= {f"optimizer.{name}": tensor for name, tensor in own.items()}
        return state | {"bins": self.bins.sums}

    def network_state(self) -> dict[str, Tensor]:
        """The part of the state of the network, and of a critic: the weights that learn. The others are built anew."""
        critic: Mapping[str, Tensor] = self.critic.state_dict() if self.critic else {}
        state, learning = self.network.state_dict(), self.learning()
        own = {f"network.{name}": tensor for name, tensor in state.items() if name in learning}
        return own | {CRITIC + name: tensor for name, tensor in critic.items()}

    def unchanged(self) -> set[str]:
        """Names, as in a checkpoint, of the network's tensors that do not learn. Older checkpoints hold them, too."""
        return {f"network.{name}" for name in self.network.state_dict().keys() - self.learning()}

    def learning(self) -> set[str]:
        """Names of the network's weights that learn."""
        return {name for name, p in self.network.named_parameters() if p.requires_grad}

    def kept(self, network: Network) -> dict[str, Tensor]:
        """The tensors of the network or of an average in a model: all, or for a LoRA training the trained ones."""
        state, learning = network.state_dict(), self.learning()
        return {name: t for name, t in state.items() if self.writer.base is None or name in learning}

    def numbers(self) -> dict[str, Any]:
        own = optimizer_numbers(self.trainer.optimizers[0], self.named_weights())
        regressor = self.pipeline.regressor
        scale = {"residual_scale": regressor.scale} if regressor else {}
        return {"best": self.best if math.isfinite(self.best) else None, "optimizer": own, **scale}

    def keep_scale(self, numbers: dict[str, Any]) -> None:
        """Takes the scale of the residual from a checkpoint's numbers, if they have it and the YAML file does not."""
        if (regressor := self.pipeline.regressor) and regressor.measured:
            regressor.scale = numbers.get("residual_scale", regressor.scale)

    def on_resume(self, step: int, numbers: dict[str, Any]) -> None:
        self.keep_scale(numbers)
        there = self.writer.folder.exists()  # not yet in a run that begins from another's checkpoint
        self.best = numbers["best"] if there and numbers["best"] is not None else math.inf
        self.loaded_step = step  # Lightning keeps its own step only for training
        self.guard.reset(self.optimization.max_skipped)
        if not self.trainer.is_global_zero:
            self.bins.sums.zero_()  # rank 0 keeps the sums of all processes
        if self.trainer.state.fn == "fit":
            if own := numbers.get("optimizer"):
                set_optimizer_numbers(self.trainer.optimizers[0], self.named_weights(), own)
            self.lr_scheduler_step(self.lr_schedulers(), None, step)


def area(batch: Batch) -> int:
    """Height × width of the latents."""
    return batch.x0[0, 0].numel()
