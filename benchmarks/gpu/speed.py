"""Speed and memory: of the card itself, of training steps, and of sampling."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.footprint import Job, flops, memory, step
from benchmarks.gpu.machine import Machine, Row, Rows, installed, race, reported, seconds, timed
from data.store.reader import Store
from engine.ema import EMA, Averages
from engine.guard import Guard
from engine.hardware import DEVICES, Device, find
from engine.strategy import Strategy, skeleton
from flow.guidance import ClassifierFree
from flow.objective import Objective
from mmdit import checkpoint
from mmdit.model import Condition, MMDiT
from pipeline.sampling import Sampling, random_normals
from training.optimization import Optimization

ROOT = Path(__file__).parents[2]
FACTOR = 8  # pixels to a latent's pixel
TOKENS, SAMPLED_TOKENS = 154, 333  # of a caption, in training and in sampling
BATCHES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # that are tried, the largest that fits first
FULL = 0.8  # share of the memory that a step is planned to take
BUDGET = 4.0  # seconds of measuring for each figure
Keep = Literal["none", "full", "selective"]


def budget(machine: Machine) -> float:
    return 0.01 if machine.tiny else BUDGET


# The card


def card(machine: Machine, rows: Rows) -> None:
    """The card's own peak: bfloat16 products of square matrices, and a copy from and to its memory."""
    sides = (64,) if machine.tiny else (4096, 8192, 16384)
    for side in sides:
        a, b = (torch.randn(side, side, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
        took = timed(machine, lambda a=a, b=b: a @ b, budget(machine) / 4)  # type: ignore[misc]
        rows({"what": f"products of {side} × {side}, bfloat16", "TFLOP/s": 2e-12 * side**3 / took})
    count = 2**12 if machine.tiny else 2**30
    source = torch.randn(count, device=machine.device)
    target = torch.empty_like(source)
    took = timed(machine, lambda: target.copy_(source), budget(machine) / 4)
    rows({"what": f"a copy of {4e-9 * count:.1f} GB, read and written", "TB/s": 8e-12 * count / took})


# Training


def presets(machine: Machine, depth: int) -> MMDiT:
    """SD3's network of a depth, without weights; in a rehearsal a tiny one."""
    with torch.device("meta"):
        if machine.tiny:
            return MMDiT(in_channels=4, depth=2, width=32, heads=1, text_dim=8, pooled_dim=8, sample_size=8)
        return MMDiT(depth=depth)


def materialised(machine: Machine, network: MMDiT, dtype: torch.dtype = torch.float32) -> MMDiT:
    """A network on the device with small random weights, so that no gate is zero."""
    built = network.to(dtype).to_empty(device=machine.device)
    with torch.no_grad():
        for tensor in (*built.parameters(), *built.buffers()):
            tensor.normal_(std=0.02)
    return built


def job(machine: Machine, network: MMDiT, side: int, strategy: Strategy, averages: int) -> Job:
    """The largest job that fits: `benchmarks.footprint` plans it. ValueError if none does."""
    latent, has = (8 if machine.tiny else side // FACTOR), machine.memory()
    known = find(torch.cuda.get_device_name(machine.device)) if machine.device.type == "cuda" else None
    device: Device = replace(known or DEVICES["h200"], memory=has)
    tokens = 5 if machine.tiny else TOKENS
    for batch in (2,) if machine.tiny else BATCHES:
        planned = Job(network, device, 1, 1, batch, (latent, latent), tokens, strategy, True, averages)
        if memory(planned).total < FULL * has:
            return planned
    needed = memory(planned).total
    raise ValueError(f"one picture at a time needs {needed / 1e9:.0f} GB, and the GPU has {has / 1e9:.0f}")


def batch_of(machine: Machine, planned: Job) -> tuple[Tensor, Tensor, Condition]:
    """Random latents, times and captions of a job's batch."""
    network, count = planned.network, planned.batch
    with machine.device:
        z = torch.randn(count, network.in_channels, *planned.latent)
        text, pooled = torch.randn(count, planned.tokens, network.text_dim), torch.randn(count, network.pooled_dim)
        return z, torch.rand(count), Condition(text, pooled)


def training_step(
    machine: Machine, network: MMDiT, draw: Callable[[], tuple[Tensor, Tensor, Condition]]
) -> Callable[[], None]:
    """What a step of `train.py fit` computes: loss, backward, clipping, the guard, AdamW and an average.

    Args:
        machine: where it runs.
        network: is trained.
        draw: latents, times and condition of the next batch.
    """
    optimization, objective, guard = Optimization(), Objective(), Guard().to(machine.device)
    optimizer = optimization.build(dict(network.named_parameters()))
    averages = EMA(Averages(), [skeleton(network).to_empty(device=machine.device)], network)
    weights = list(network.parameters())

    def once() -> None:
        x0, t, condition = draw()
        noise = torch.randn_like(x0)
        optimizer.zero_grad()
        with torch.autocast(machine.device.type, torch.bfloat16):
            loss = objective.loss(network, x0, noise, t, condition).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, optimization.clip)
        optimizer.found_inf = guard.check(norm)  # type: ignore[attr-defined]
        optimizer.step()
        averages.update(network, 1)

    return once


def training(machine: Machine, rows: Rows, depth: int, side: int, compiled: bool, keep: Keep) -> None:
    """A preset's training step at a size: speed, memory and what the planner says of it."""
    shape = presets(machine, depth)
    strategy = Strategy(compile=compiled and not machine.tiny, activation_checkpointing=keep)
    planned = job(machine, shape, side, strategy, averages=1)
    works, count = flops(planned), sum(p.numel() for p in shape.parameters())
    row: Row = {"network": f"d{depth}", "pictures": f"{side}²", "compiled": compiled, "checkpointing": keep}
    row |= {"at a time": planned.batch, "tokens": planned.image_tokens + planned.tokens, "parameters": count}
    with reported(row, rows) as row:
        machine.forget_peak()
        network = materialised(machine, shape)
        strategy.prepare(network)
        batch = batch_of(machine, planned)
        once = training_step(machine, network, lambda: batch)
        took = timed(machine, once, budget(machine))
        row |= {"ms": 1e3 * took, "pictures/s": planned.batch / took}
        row |= {"TFLOP/s": 1e-12 * works[0].step * planned.batch / took, "GB": machine.gigabytes()}
        row |= {"planned ms": 1e3 * step(planned, works).total, "planned GB": memory(planned).total / 1e9}


def opponents(machine: Machine, rows: Rows, depth: int, side: int, compiled: bool) -> None:
    """A training step against diffusers' network: same weights, batch and optimizer, in turns, no average."""
    if not installed("diffusers"):
        rows({"against diffusers": f"d{depth}", "fault": "diffusers is not installed"})
        return
    from diffusers import SD3Transformer2DModel

    from benchmarks.step import stepper

    shape = presets(machine, depth)
    planned = job(machine, shape, side, Strategy(), averages=2)  # room for the second network
    planned = replace(planned, batch=max(1, planned.batch // 4))
    row: Row = {"against diffusers": f"d{depth}", "pictures": f"{side}²", "compiled": compiled}
    row["at a time"] = planned.batch
    with reported(row, rows) as row:
        ours = materialised(machine, shape)
        theirs = twin(machine, ours, SD3Transformer2DModel).train()
        if compiled and not machine.tiny:
            Strategy(compile=True).prepare(ours)
            theirs.compile()
        goal, t, condition = batch_of(machine, planned)

        works: dict[str, Callable[[], object]] = {
            "ours": stepper(ours, lambda: ours(goal, t, condition), goal, True),
            "diffusers": stepper(
                theirs,
                lambda: theirs(goal, condition.text, condition.pooled, 1000 * t, return_dict=False)[0],
                goal,
                True,
            ),
        }
        took = race(machine, works, 2 * budget(machine))
        row |= {f"{name}, ms": 1e3 * one for name, one in took.items()}
        row["times as fast"] = took["diffusers"] / took["ours"]


def twin(machine: Machine, ours: MMDiT, kind: Any) -> nn.Module:
    """diffusers' network with our weights, on the device."""
    with torch.device("meta"):
        theirs: nn.Module = kind.from_config(checkpoint.config(ours))
    theirs = theirs.to(next(ours.parameters()).dtype).to_empty(device=machine.device)
    theirs.load_state_dict(checkpoint.export(ours, "diffusers"), strict=False)  # all but its table of positions
    return theirs


def from_store(machine: Machine, rows: Rows) -> None:
    """A compiled training of d12 at 512² whose batches come from a store on disk, with all text tokens.

    The smallest network is the fastest, so this is the most that the store can be asked for.
    """
    from benchmarks.store import SHAPES, FromStore, batches, write

    samples, most, workers = (64, 4, 0) if machine.tiny else (1000, 64, 8)
    with torch.device("meta"):
        depth, width = (1, 32) if machine.tiny else (12, None)
        shape = MMDiT(depth=depth, width=width, text_dim=SHAPES["tokens"][1], pooled_dim=SHAPES["pooled"][0])
    strategy = Strategy(compile=not machine.tiny)
    row: Row = {"source": "store", "network": "d12", "at a time": most, "loader processes": workers}
    with tempfile.TemporaryDirectory() as place, reported(row, rows) as row:
        for _ in write(Path(place), samples):
            pass
        network = materialised(machine, shape)
        strategy.prepare(network)
        order = [rows[:most] for seed in range(10) for rows in batches(samples, seed)]
        loader = DataLoader(
            FromStore(Store(Path(place)), True), sampler=order, batch_size=None, num_workers=workers,
            pin_memory=machine.device.type == "cuda",
        )  # fmt: skip
        given, waited = iter(loader), 0.0

        def draw() -> tuple[Tensor, Tensor, Condition]:
            nonlocal waited
            start = time.perf_counter()
            read = next(given)
            waited += time.perf_counter() - start
            x0, tokens, pooled = (x.to(machine.device, non_blocking=True).float() for x in read)
            return x0, torch.rand(len(x0), device=machine.device), Condition(tokens, pooled)

        once = training_step(machine, network, draw)
        seconds(machine, once, 3)
        steps, waited = (2 if machine.tiny else 60), 0.0
        took = seconds(machine, once, steps)
        row |= {
            "ms": 1e3 * took,
            "pictures/s": len(order[0]) / took,
            "waiting for data": f"{waited / steps / took:.1%}",
        }


# Where the time of a step goes

KINDS = {  # kind of kernel → words of its name; the first that fits
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "addmm", "::mm", "::bmm", "splitk"),
    "optimizer, averages and clipping": ("multi_tensor", "adam", "foreach", "lpnorm"),
    "copies": ("memcpy", "memset", "copy"),
}
REST, IDLE = "element by element", "waiting for the host"


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)


def profile(machine: Machine, rows: Rows, depth: int, side: int, compiled: bool) -> None:
    """The share of each kind of kernel in a training step, by torch's profiler."""
    shape, strategy = presets(machine, depth), Strategy(compile=compiled and not machine.tiny)
    planned = job(machine, shape, side, strategy, averages=1)
    row: Row = {"network": f"d{depth}", "pictures": f"{side}²", "compiled": compiled, "at a time": planned.batch}
    with reported(row, rows) as row:
        network = materialised(machine, shape)
        strategy.prepare(network)
        batch = batch_of(machine, planned)
        once = training_step(machine, network, lambda: batch)
        wall = timed(machine, once, budget(machine) / 2)
        on_device = machine.device.type == "cuda"
        kind = torch.profiler.ProfilerActivity.CUDA if on_device else torch.profiler.ProfilerActivity.CPU
        steps = 3
        with torch.profiler.profile(activities=[kind]) as seen:
            seconds(machine, once, steps)
        spent = dict.fromkeys((*KINDS, REST), 0.0)
        for event in seen.key_averages():
            spent[kind_of(event.key)] += event.self_device_time_total if on_device else event.self_cpu_time_total
        row["ms"] = 1e3 * wall
        row |= {f"{name}, ms": 1e-3 * total / steps for name, total in spent.items()}
        row[f"{IDLE}, ms"] = max(0.0, 1e3 * wall - 1e-3 * sum(spent.values()) / steps)


# Sampling


def released(machine: Machine, name: str) -> MMDiT:
    """The shape of a released network, from its config; in a rehearsal a tiny one."""
    if machine.tiny:
        return presets(machine, 0)
    content = yaml.safe_load((ROOT / f"configs/network/{name}.yaml").read_text())
    arguments = content["network"]["init_args"]
    arguments["dual_attention_layers"] = tuple(arguments.get("dual_attention_layers", ()))
    with torch.device("meta"):
        return MMDiT(**arguments)


def sampling(machine: Machine, rows: Rows, name: str, side: int) -> None:
    """A picture's 28 steps with guidance by Euler, in bfloat16 with random weights; without text encoders and VAE.

    The same loop runs diffusers' network.
    """
    shape = released(machine, name)
    latent, tokens = (8, 5) if machine.tiny else (side // FACTOR, SAMPLED_TOKENS)
    network = materialised(machine, shape, torch.bfloat16).eval()
    with machine.device:
        text = torch.randn(1, tokens, network.text_dim).bfloat16()
        pooled = torch.randn(1, network.pooled_dim).bfloat16()
    condition, null = Condition(text, pooled), Condition(torch.zeros_like(text), torch.zeros_like(pooled))
    objective, z = Objective(shift=3.0), torch.randn(1, network.in_channels, latent, latent, device=machine.device)
    walk, _ = Sampling(steps=2 if machine.tiny else 28).walk(objective)
    noise = random_normals([0], tuple(z.shape[1:]), machine.device)

    def drawer(model: Callable[..., Tensor]) -> Callable[[], object]:
        guidance = ClassifierFree(model, null, 4.5)

        def denoise(z: Tensor, t: Tensor, end: Tensor | None = None) -> Any:
            return objective.denoise(guidance.at(t), z, t, condition, end)

        @torch.no_grad()
        def draw() -> object:
            return walk(denoise, z, noise, None)

        return draw

    ways: list[tuple[str, Callable[..., Tensor], nn.Module]] = [("ours", network, network)]
    if installed("diffusers"):
        from diffusers import SD3Transformer2DModel

        theirs = twin(machine, network, SD3Transformer2DModel).eval()

        def their_velocity(z: Tensor, t: Tensor, condition: Condition) -> Tensor:
            y: Tensor = theirs(z.bfloat16(), condition.text, condition.pooled, 1000 * t, return_dict=False)[0]
            return y

        ways.append(("diffusers", their_velocity, theirs))
    modes: dict[str, dict[str, Any] | None] = {"eager": None}
    if not machine.tiny:
        modes |= {"compiled": {}, "compiled, CUDA graphs": {"mode": "reduce-overhead"}}
    for how, compile_options in modes.items():
        for who, model, module in ways:
            if compile_options is not None:
                torch._dynamo.reset()
                module.compile(**compile_options)
            row: Row = {"network": name, "pictures": f"{side}²", "how": how, "whose": who}
            with reported(row, rows) as row:
                machine.forget_peak()
                took = timed(machine, drawer(model), budget(machine), turns=3)
                row |= {"s a picture": took, "GB": machine.gigabytes()}
