"""Builds the trainer, the module and the data from a config."""

import os
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from cli import srun_used
from data.module import Data
from engine.checkpoint import Checkpoints
from engine.log import JSONLinesLogger
from engine.meter import Meter
from engine.progress import StepProgress
from engine.resume import Resume
from mmdit import lora
from mmdit.model import MMDiT
from mmdit.quantized import quantize
from pipeline import Pipeline
from pipeline.folder import REGRESSOR
from training.cost import StepCost
from training.generator import Generator
from training.reader import of_network, reading
from training.run_folder import CHECKPOINTS, Run, wandb_id
from training.saving import ModelWriter, Snapshots

if TYPE_CHECKING:
    from jsonargparse import Namespace  # any object with these sections will do


def lora_base(config: "Namespace") -> str | None:
    """The base model of a training of a LoRA or new words; None for others. ValueError if it is not on disk."""
    if config.lora is None and config.new_words is None:
        return None
    kind = "lora" if config.lora else "new_words"
    if config.network.class_path != "mmdit.checkpoint.load":
        raise ValueError(f"{kind} needs a network from disk: network.class_path must be mmdit.checkpoint.load")
    arguments = config.network.init_args
    grown = [name for name in signature(MMDiT.grow).parameters if name != "self" and arguments[name]]
    if grown:
        raise ValueError(f"{kind} cannot train new parts of a network: leave out network.{', '.join(grown)}")
    base = Path(config.network.init_args.path).resolve()
    base = base.parent if base.name == "transformer" and not (base / "model_index.json").exists() else base
    if base.is_dir() and not (base / "model_index.json").is_file():
        raise ValueError(f"{kind} needs a whole model folder, and {base} has no model_index.json: give another path")
    if (base / REGRESSOR).is_dir():
        raise ValueError(
            f"{kind} trains whole pictures, and {base} draws the residual of a regressor: give another path"
        )
    return str(base)


def build(config: "Namespace", base: str | None) -> tuple[L.Trainer, Generator, Data]:
    """Builds the trainer, the module and the data of an instantiated config.

    Args:
        config: all sections.
        base: the base model of a LoRA training.

    Raises:
        ValueError: the sections do not fit together.
    """
    generator, data = build_generator(config, base)
    trainer = build_trainer(config, generator)
    if config.residual and generator.pipeline.regressor:
        config.residual.measure(generator.pipeline.regressor, data, trainer.strategy.root_device)
    return trainer, generator, data


def build_generator(config: "Namespace", base: str | None) -> tuple[Generator, Data]:
    """Builds the module and the data. Arguments and errors are those of `build`."""
    run: Run = config.run
    network, text, codec, objective = config.network.train(), config.text, config.codec, config.objective
    if config.lora:
        lora.add(network, config.lora)
    elif config.new_words:
        network.requires_grad_(False)
    if config.new_words or (config.lora and config.lora.text_encoders):
        if config.teacher or config.judgement or config.strategy.kind == "fsdp2":
            raise ValueError(
                "text encoders that learn exclude teacher, judgement and strategy.kind fsdp2: leave them out"
            )
        network, text = reading(network, text, config.lora, config.new_words)
    if any(p.requires_grad and p.dtype != torch.float32 for p in network.parameters()):
        raise ValueError("trained weights must be float32, or small steps vanish: leave out network.init_args.dtype")
    data: Data = config.data(text, codec, run.seed)
    config.strategy.check(run.world, data.batch_size)
    data.check(run.world)
    for word in config.new_words.words if config.new_words else ():
        if not data.mentions(word):
            raise ValueError(f"no caption of the data has the new word {word}: write it into them")
    for name in ("text_mask", "picture_channels", "level_embeds"):
        needed = getattr(data, name)
        if getattr(network, name) != needed:
            raise ValueError(f"network.{name} is {getattr(network, name)}, but the data need {needed}: make them equal")
    if data.masked and (config.judgement or (config.teacher and (config.teacher.pairs or config.teacher.matching))):
        raise ValueError("masks of the loss belong to the data's pictures, and here the network learns from others: "
                         "take a store without masks")  # fmt: skip
    teacher = config.teacher and config.teacher.load(objective, codec, text, network, data, base)
    if config.teacher and config.teacher.pairs:
        if data.paired:
            raise ValueError("the data are pairs already: give a store of pictures, or leave out teacher.pairs")
        config.teacher.pairs.check(data.batch_size, run.world * config.strategy.accumulate_grad_batches)
    judge = None
    if data.choices and not config.judgement:
        raise ValueError("the data are choices between two pictures: set judgement.loss DPO to learn from them")
    if config.judgement:
        if config.teacher:
            raise ValueError("judgement and teacher exclude each other: leave one of them out")
        shares = run.world * config.strategy.accumulate_grad_batches
        judge = config.judgement.load(objective, codec, text, network, data, shares, base)
    regressor = None
    if config.residual:
        if config.teacher or judge or base:
            raise ValueError("residual goes with no teacher, judgement or lora: leave them out")
        regressor = config.residual.load(codec, text, network)
    pipeline = Pipeline(network, objective, codec, text, config.sampling, regressor, data.image_encoder)
    if data.sized != pipeline.sized:
        needed = pipeline.parts.pooled_dim(data.sized)
        how = "with" if data.sized else "without"
        raise ValueError(f"network.pooled_dim must be {needed} {how} data.size_conditioning, got {network.pooled_dim}")
    if config.grid.prompts and not codec.decodes:
        raise ValueError("this codec's latents have no pixels to show: leave out grid.prompts")
    for height, width in {(data.side, data.side), *data.sizes}:  # fails now if a size does not fit the patch size
        pipeline.plan(config.sampling, None, height, width)
    generator = Generator(
        pipeline, run, data.batch_size, config.optimization, config.ema, config.strategy, config.grid, data.side,
        ModelWriter(pipeline, run.folder, base), teacher, config.terms, data.examples(config.grid.columns), judge,
    )  # fmt: skip
    config.optimization.check(generator.named_weights(), run.steps)
    if config.lora and config.lora.quantize != "none":
        if config.strategy.kind == "fsdp2":
            raise ValueError("lora.quantize goes with strategy.kind ddp: fsdp2 shards weights that are not quantized")
        quantize(
            of_network(network), config.lora.quantize
        )  # last: what is built above reads the shapes of the layers' weights
    return generator, data


def build_trainer(config: "Namespace", generator: Generator) -> L.Trainer:
    """Builds Lightning's trainer for a module."""
    run, strategy, writer = config.run, config.strategy, generator.writer
    learning = {name for name, weight in of_network(generator.network).named_parameters() if weight.requires_grad}
    cost = StepCost(
        of_network(writer.network), generator.objective, generator.teacher, learning, generator.judge,
        generator.pipeline.regressor, generator.network is not of_network(generator.network),
    )  # fmt: skip
    meter = Meter(run.log_every, cost, run.precision)
    checkpoints = Checkpoints(run.folder / CHECKPOINTS, strategy.sharded_checkpoint)
    callbacks: list[Callback] = [StepProgress()]
    if every := config.ema.snapshot_every:
        callbacks.append(Snapshots(run.folder / "snapshots", every, config.ema.widths, meter))
    callbacks += [meter, Resume(checkpoints, run.checkpoint_every, run.validate_every, meter)]
    return L.Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        plugins=[cluster()],
        num_nodes=run.num_nodes,
        strategy=strategy.lightning(run.world),
        precision=run.precision,
        accumulate_grad_batches=strategy.accumulate_grad_batches,
        max_steps=run.steps,
        val_check_interval=run.validate_every * strategy.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=run.log_every,
        logger=JSONLinesLogger(run.folder / "log.jsonl"),
        callbacks=callbacks,
        inference_mode=False,  # weights that are gathered in inference mode could not be trained any more
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=run.folder,
    )


def cluster() -> ClusterEnvironment:
    """How Lightning learns of the other processes, by who started this one, as `cli.own_ranks` knows it."""
    if srun_used():
        return SLURMEnvironment(auto_requeue=False)
    if "RANK" in os.environ:
        return TorchElasticEnvironment()
    return LightningEnvironment()  # starts the others of its machine


def wandb_logger(run: Run) -> WandbLogger:
    """The logger of a claimed run. A resumed run continues the same run of Weights & Biases."""
    name, offline = run.folder.resolve().name, run.wandb == "offline"
    return WandbLogger(project="mmdit", name=name, id=wandb_id(run.folder), save_dir=run.folder, offline=offline)
