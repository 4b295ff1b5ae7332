"""Predicts whether a training fits into memory and how long it takes, on any GPUs.

    python -m benchmarks.plan --config configs/sd3/d24.yaml --gpus 256 --gpu h200
    python -m benchmarks.plan --check

It reads an experiment's network, batch, strategy, averages and precision from the YAML, and the shapes of a teacher, a
judge's reference and a regressor from their folders. All numbers are predictions of benchmarks/footprint.py; `--check`
compares them with measurements on this machine.
"""

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from torch import nn

from benchmarks.footprint import FRAGMENTED, MOVING, Job, Memory, Step, fastest_fit, memory, step, trained_of
from cli import fail, one_line_errors
from engine.ema import Averages
from engine.hardware import DEVICES
from engine.strategy import Strategy
from flow.objective import Objective
from mmdit.model import MMDiT
from mmdit.network import Network
from pipeline import LoadOptions
from pipeline.folder import read_network
from storage.models import find_model
from training.cost import common_roles
from training.experiment import Parser, parser, short_cause
from training.reader import reading
from training.roles import Role

PICTURES = 500_000 * 4096  # of Stable Diffusion 3's training at 256² (Esser et al. 2024, §5.3)
FACTOR = 8  # pixels to a latent's pixel, in SD3's VAE
DAY = 86400


@dataclass(frozen=True)
class Bill:
    """The cost of a whole training."""

    pictures: int
    steps: int
    days: float
    gpu_hours: float
    price: float | None


def arguments() -> Parser:
    """The experiment's own flags, and the machine's."""
    p = parser(__doc__ or "")
    p.add_argument("--gpus", type=int | None, help="number in all; default: run.devices × run.num_nodes")
    p.add_argument("--gpu", default="h200", help=f"kind: {', '.join(DEVICES)}")
    p.add_argument("--gpus-per-node", type=int, default=8, help="number in a node")
    p.add_argument("--side", type=int, default=256, help="height and width of the pictures, in pixels")
    p.add_argument("--tokens", type=int, default=154, help="of a caption")
    p.add_argument("--batch_size", type=int | None, help="pictures of one step; default: data's")
    p.add_argument(
        "--steps",
        type=int | None,
        help="to count; default: run.steps, and but for a LoRA 500,000 × 4,096 pictures' worth",
    )
    p.add_argument("--price", type=float | None, help="of one GPU for an hour")
    p.add_argument("--efficiency", type=float, default=0.5, help="share of the peak that matrix products reach")
    p.add_argument("--frozen", type=Literal["float32", "bfloat16"], default="bfloat16",
                   help="type of the network's frozen weights as they are loaded: network.dtype")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return p


def shape_of(config: Namespace) -> MMDiT:
    """The config's network on the meta device. ValueError if it is not an MMDiT."""
    name = config.network.class_path
    if name.endswith("checkpoint.load"):
        raise ValueError(
            "the network is read from disk: add a file with its shape, such as --config configs/network/sd3-medium.yaml"
        )
    if name.rpartition(".")[2] != "MMDiT":
        raise ValueError(f"only an MMDiT can be planned, network is {name}: name an MMDiT")
    with torch.device("meta"):
        network: MMDiT = built(config, "network").network
    return network


def built(config: Namespace, *sections: str) -> Namespace:
    """The objects of these sections. ValueError in one line if they are wrong."""
    part = Namespace({name: config[name] for name in ("run", *sections)})  # a parser always makes the run
    try:
        return parser("", exit_on_error=False).instantiate(part)
    except ValueError as error:
        raise ValueError(short_cause(str(error))) from None


def saved(model: Path) -> tuple[Network, Objective]:
    """A saved model's network on the meta device, in its stored type, and its process.

    Raises:
        ValueError, FileNotFoundError: in one line, if there is no whole model.
    """
    network, process, _ = read_network(find_model(model), LoadOptions("meta", dtype="stored"))
    return network, process


def roles_of(config: Namespace, network: Network) -> list[Role]:
    """What the networks do in a step of this config's training. Errors are those of `saved`."""
    drawing = bool(config.judgement and config.judgement.rewards)
    if config.judgement:
        config = config.clone()
        config.judgement.rewards = []  # which may read models
    parts = built(config, "objective", "teacher", "residual", "judgement")
    found = [] if parts.judgement else [Role("network", network, learned=1)]
    if judgement := parts.judgement:
        base = network if config.lora or config.new_words else None
        reference = saved(judgement.reference)[0].requires_grad_(False) if judgement.reference else base
        if judgement.preference.paired and not reference:
            raise ValueError("judgement.reference is missing: give the model to begin from")
        found += judgement.roles(network, reference, choices=not drawing)
    if teacher := parts.teacher:
        own, process = saved(teacher.model) if teacher.model else (network, parts.objective)
        critic = copy.deepcopy(own).float() if teacher.matching else None
        if teacher.model:
            own.requires_grad_(False)
        found += teacher.roles(own, process, critic, network, teacher.walked(parts.objective))
    regressor = saved(parts.residual.regressor)[0].requires_grad_(False) if parts.residual else None
    return found + common_roles(network, parts.objective, regressor)


def encoders_of(config: Namespace, network: Network) -> nn.ModuleDict | None:
    """The text encoders that learn, as the training loads them. Errors are those of `training.reader.reading`."""
    parts = built(config, "lora", "new_words")
    if not parts.new_words and not (parts.lora and parts.lora.text_encoders):
        return None
    return reading(network, built(config, "text").text.to("cpu"), parts.lora, parts.new_words)[0].encoders


def job_of(config: Namespace) -> Job:
    """The job of these flags and files. ValueError if they contradict each other."""
    if config.gpu not in DEVICES:
        raise ValueError(f"gpu must be one of {', '.join(DEVICES)}, got {config.gpu}")
    network = shape_of(config)
    counts = {name: config[name] for name in ("gpus", "gpus_per_node", "side", "tokens", "batch_size", "steps")}
    if wrong := [f"{name} {count}" for name, count in counts.items() if count is not None and count < 1]:
        raise ValueError(f"all counts must be at least 1, got {', '.join(wrong)}")
    if not 0 < config.efficiency <= 1:
        raise ValueError(f"efficiency must be above 0 and at most 1, got {config.efficiency}")
    unit = FACTOR * network.patch_size
    if config.side % unit or config.side > FACTOR * network.largest:
        raise ValueError(f"side must be a multiple of {unit} and at most {FACTOR * network.largest}, got {config.side}")
    averages = Averages(**config.ema.as_dict())
    encoders = encoders_of(config, network)
    if config.new_words and not config.lora:
        network.requires_grad_(False)
    return Job(
        network=network,
        device=DEVICES[config.gpu],
        gpus=config.run.devices * config.run.num_nodes if config.gpus is None else config.gpus,
        per_node=config.gpus_per_node,
        batch=config.batch_size or config.data.init_args.batch_size,
        latent=(config.side // FACTOR, config.side // FACTOR),
        tokens=config.tokens,
        strategy=Strategy(**config.strategy.as_dict()),
        mixed=config.run.precision == "bf16-mixed",
        averages=len(averages.decays()),
        efficiency=config.efficiency,
        lora=built(config, "lora").lora,
        frozen=4 if config.frozen == "float32" else 2,
        roles=tuple(roles_of(config, network)),
        encoders=encoders,
    )


def bills(job: Job, seconds: float, config: Namespace) -> list[Bill]:
    """The cost of `--steps`; without it that of run.steps, and but for a LoRA of the paper's number of pictures."""
    whole = [] if config.lora else [-(-PICTURES // job.batch)]
    counts = [config.steps] if config.steps else [config.run.steps, *whole]
    found = []
    for steps in dict.fromkeys(counts):
        hours = job.gpus * steps * seconds / 3600
        price = None if config.price is None else hours * config.price
        found.append(Bill(steps * job.batch, steps, steps * seconds / DAY, hours, price))
    return found


# ---- table


def flags_of(strategy: Strategy) -> str:
    """The flags of a strategy."""
    flags = {name: value for name, value in asdict(strategy).items() if value != getattr(Strategy(), name)}
    return " ".join(f"--strategy.{name} {str(value).lower()}" for name, value in flags.items()) or "--strategy.kind ddp"


def verdict(job: Job, needed: Memory) -> str:
    """Whether the job fits, and if not, the flags with which it does."""
    has = job.device.memory
    if needed.total <= has:
        return f"fits: {needed.total / has:.0%} of {has / 1e9:.0f} GB"
    other = fastest_fit(job)
    better = f"the fastest that does: {flags_of(other)}" if other else "no strategy does: take more or larger GPUs"
    return f"does not fit in {has / 1e9:.0f} GB; {better}"


def heading(job: Job) -> list[str]:
    n, s = job.network, job.strategy
    count = sum(p.numel() for p in n.parameters())
    shared = (
        f"fsdp2 over {job.shards}" + f" in {s.replicas} replicas" * (s.replicas > 1) if s.kind == "fsdp2" else "ddp"
    )
    saved = s.activation_checkpointing + f" in one of {s.activation_checkpointing_every} blocks" * (
        s.activation_checkpointing_every > 1
    )
    where = f"{job.gpus:,} × {job.device.name}, {min(job.gpus, job.per_node)} a node"
    kept = "" if job.lora is None or job.lora.quantize == "none" else f" in {job.lora.quantize}"
    updates = f"; {job.trained:,} of updates, the others frozen{kept}" if job.lora else "; frozen" * (not job.whole)
    return [
        f"MMDiT of depth {n.depth} and width {n.width}: {count:,} parameters{updates}",
        f"{where}; {shared if job.gpus > 1 else 'one GPU'}; activation checkpointing {saved}{'; compiled' * s.compile}",
        f"{job.batch:,} pictures a step, {job.micro} at a time on a GPU (micro-batches: {s.accumulate_grad_batches}); "
        f"{job.image_tokens} + {job.tokens} tokens; {'bf16-mixed' if job.mixed else '32-true'}",
        *passes(job),
    ]


def passes(job: Job) -> list[str]:
    """What each network does in a step, if there is more than the usual pass; and which text encoders learn."""
    usual = (Role("network", job.network, learned=1),)
    roles = () if job.roles == usual else job.roles
    lines = [
        f"{role.name} of {sum(p.numel() for p in role.network.parameters()):,} parameters: "
        f"a picture passes it {role.learned:g} × with a backward pass and {role.frozen:g} × without"
        for role in roles
    ]
    learned = [f"{name} ({trained_of(module):,} weights)" for name, module in (job.encoders or nn.ModuleDict()).items()]
    return lines + ([f"text encoders learn: {', '.join(learned)}"] if learned else [])


def aligned(title: str, rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A block of the table: names left-aligned, figures right-aligned."""
    lines = [title]
    lines += [f"  {name:<34}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in rows]
    return ["", *(line.rstrip() for line in lines)]


def table(job: Job, needed: Memory, taken: Step, trainings: list[Bill]) -> str:
    names = {
        "parameters": "parameters, float32" if job.whole else "parameters",
        "others": "frozen weights of other networks",
        "positions": "tables of positions",
        "gradients": "gradients",
        "optimizer": "AdamW's moments",
        "averages": "averages",
        "copies": "weights in bf16 (autocast)",
        "activations": "activations",
        "recomputed": "the block that is recomputed",
        "workspace": "gradients of tokens",
        "decoded": "the layer that is decoded",
        "gathered": "gathered blocks",
        "reserve": "CUDA, NCCL, fragmentation",
    }
    held = [(names[name], f"{size / 1e9:.2f}") for name, size in asdict(needed).items() if size]
    sent = [(name, f"{t.bytes / 1e9:.2f}", f"{1e3 * t.seconds:.1f}") for name, t in taken.communication.items()]
    spent = {
        "matrix products": taken.matrix,
        "element by element": taken.elementwise,
        "recomputation": taken.recomputation,
        "clipping, AdamW, averages": taken.optimizer,
        "communication that is not hidden": taken.exposed,
        "total": taken.total,
    }
    lines = heading(job)
    lines += aligned(
        "memory of each GPU, GB", [*held, ("total", f"{needed.total / 1e9:.2f}", " " + verdict(job, needed))]
    )
    if sent:
        lines += aligned("communication of each GPU in a step, GB received and ms", sent)
    lines += aligned(
        "time of a step, ms", [(name, f"{1e3 * seconds:.1f}") for name, seconds in spent.items() if seconds]
    )
    lines += aligned(
        "speed",
        [
            ("forward pass, TFLOP a picture", f"{taken.flops / 1e12:.3f}"),
            ("all passes of a step", f"{taken.work / 1e12:.3f}"),
            ("pictures a second", f"{taken.images_per_second:,.0f}"),
            ("of the GPU's peak (MFU)", f"{taken.mfu:.1%}"),
        ],
    )
    for whole in trainings:
        cost = [] if whole.price is None else [("price", f"{whole.price:,.0f}")]
        lines += aligned(
            f"{whole.steps:,} steps, {whole.pictures:,} pictures",
            [("days", f"{whole.days:,.1f}"), ("GPU-hours", f"{whole.gpu_hours:,.0f}"), *cost],
        )
    lines += ["", *assumed(job)]
    return "\n".join(lines)


def assumed(job: Job) -> list[str]:
    behind = "computing, but for one block's share" if job.strategy.kind == "fsdp2" else "the last backward pass"
    hidden = f"; communication hides behind {behind}" if job.gpus > 1 else ""
    return [
        f"Predicted, not measured: matrix products at {job.efficiency:.0%} of the peak, memory and links at",
        f"{MOVING:.0%} of the data sheet{hidden}; {FRAGMENTED:.0%} of memory is fragmented.",
        "Not counted: codec, a judge's rewards and features, text encoders but for the weights of those that learn.",
    ]


def as_json(job: Job, needed: Memory, taken: Step, trainings: list[Bill]) -> dict[str, Any]:
    """The same numbers, in bytes and seconds."""
    fits = needed.total <= job.device.memory
    other = None if fits else fastest_fit(job)
    return {
        "gpus": job.gpus,
        "gpu": asdict(job.device),
        "parameters": sum(p.numel() for p in job.network.parameters()),
        "batch_size": job.batch,
        "micro_batch": job.micro,
        "strategy": asdict(job.strategy),
        "roles": [{"name": role.name, "learned": role.learned, "frozen": role.frozen} for role in job.roles],
        "memory": asdict(needed) | {"total": needed.total},
        "fits": fits,
        "fastest_that_fits": asdict(other) if other else None,
        "step": asdict(taken),
        "training": [asdict(whole) for whole in trainings],
    }


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--check" in argv:
        if argv != ["--check"]:
            fail("--check takes no other flag")
        from benchmarks.footprint_check import report  # slow to import

        print(report())
        return
    config = arguments().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        job = job_of(config)
        needed, taken = memory(job), step(job)
        trainings = bills(job, taken.total, config)
    if config.json:
        print(json.dumps(as_json(job, needed, taken, trainings), indent=2))
    else:
        print(table(job, needed, taken, trainings))


if __name__ == "__main__":
    main()
