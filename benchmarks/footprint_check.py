"""Compares `benchmarks.footprint` with measurements: `python -m benchmarks.plan --check`, a minute on a CPU.

It measures four things: the bytes that autograd keeps, on this CPU and, without a GPU, by PyTorch's rules for CUDA;
the peak memory of a step on this CPU; the time of a step on this CPU, with its peak speed and bandwidth measured
between the steps; what a LoRA training holds.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from benchmarks.footprint import Job, activation_bytes, memory, step
from engine.ema import share_frozen
from engine.hardware import DEVICES, Device
from engine.strategy import Strategy, skeleton
from mmdit.lora import LoRA, add
from mmdit.model import Condition, MMDiT
from mmdit.quantized import quantize

TURNS = 9
FUSED = patch("mmdit.layers.WRITTEN_OUT", 0)  # attention by the fused kernel also on a CPU, as it is predicted
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler warns that there is no GPU


class Flash(TorchFunctionMode):
    """Replaces attention by the operation that CUDA would choose, which torch does not choose without a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cuda") else args[0].dtype
        return torch.ops.aten._scaled_dot_product_flash_attention(*(x.to(dtype) for x in args[:3]))[0]


@contextmanager
def autocast(device: str, on: bool) -> Iterator[None]:
    """torch.autocast to bfloat16, also for an absent device."""
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, on)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before)
        torch.clear_autocast_cache()


def job(network: MMDiT, batch: int, side: int, tokens: int, mixed: bool, keep: Any, device: Device, cuda: bool) -> Job:
    """One GPU's training of a network in one go, at a latent's side."""
    strategy = Strategy(activation_checkpointing=keep)
    return Job(network, device, 1, 1, batch, (side, side), tokens, strategy, mixed, 0, 1.0, cuda)


def inputs(network: MMDiT, batch: int, side: int, tokens: int) -> tuple[Tensor, Tensor, Condition]:
    condition = Condition(torch.randn(batch, tokens, network.text_dim), torch.randn(batch, network.pooled_dim))
    return torch.randn(batch, network.in_channels, side, side), torch.rand(batch), condition


@FUSED
def kept_bytes(network: MMDiT, batch: int, side: int, tokens: int, mixed: bool, device: str = "cpu") -> int:
    """Bytes of storages that autograd keeps after a forward pass, without weights and autocast's copies of them."""
    weights = {*network.parameters(), *network.buffers()}
    own = {x.untyped_storage()._cdata for x in weights}
    shapes = {x.t().shape for x in weights if x.ndim == 2}
    held: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        copy = x.dtype == torch.bfloat16 and x.shape in shapes and x.stride(0) == 1  # transposed, as no token is
        if storage._cdata not in own and not copy:
            held.setdefault(storage._cdata, (storage.nbytes(), x))  # alive, so that no address comes back
        return x

    given = inputs(network, batch, side, tokens)
    with autocast(device, mixed), saved_tensors_hooks(pack, lambda x: x):
        network(*given)
    return sum(size for size, _ in held.values())


def kept_on_cuda(build: Callable[[], MMDiT], batch: int, side: int, tokens: int, mixed: bool, keep: Any) -> int:
    """`kept_bytes` by PyTorch's rules for CUDA, on fake tensors, which need no GPU."""
    with FakeTensorMode(), torch.device("cuda"), Flash():
        network = build()
        Strategy(activation_checkpointing=keep).prepare(network)
        return kept_bytes(network, batch, side, tokens, mixed, "cuda")


@FUSED
def passes(network: nn.Module, given: tuple[Tensor, Tensor, Condition], mixed: bool) -> None:
    """Forward and backward."""
    with autocast("cpu", mixed):
        y = network(*given)
    (y.float() - given[0]).square().mean().backward()


def peak_bytes(network: MMDiT, batch: int, side: int, tokens: int, mixed: bool) -> int:
    """Peak bytes of a forward and a backward pass on this CPU beyond weights, gradients and inputs."""
    given = inputs(network, batch, side, tokens)
    passes(network, given, mixed)  # gradients are there from now on
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        passes(network, given, mixed)
    events = profile.profiler.kineto_results.events()
    now = top = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def lora_job(network: MMDiT, updates: LoRA, batch: int, side: int, tokens: int) -> Job:
    """One GPU's LoRA training of a network in bfloat16, with one average and all blocks recomputed."""
    strategy = Strategy(activation_checkpointing="full")
    size = (batch, (side, side), tokens)
    return Job(network, DEVICES["h200"], 1, 1, *size, strategy, True, 1, cuda=False, lora=updates, frozen=2)


def lora_bytes(network: MMDiT, updates: LoRA, batch: int, side: int, tokens: int) -> tuple[int, int]:
    """Bytes that this training holds, with AdamW and one average, and those of its peak on this CPU beyond these."""
    network.to(torch.bfloat16)
    add(network, updates)
    averaged = skeleton(network)
    if updates.quantize != "none":
        quantize(network, updates.quantize)
    share_frozen(network, averaged)
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for part in (network, averaged)
             for x in (*part.parameters(), *part.buffers())}  # fmt: skip
    learning = sum(p.numel() for p in network.parameters() if p.requires_grad)
    Strategy(activation_checkpointing="full").prepare(network)
    return sum(found.values()) + 3 * 4 * learning, peak_bytes(network, batch, side, tokens, True)


def predicted_peak(network: MMDiT, batch: int, side: int, tokens: int, mixed: bool, keep: Any) -> float:
    """The prediction of `memory` for `peak_bytes`."""
    needed = memory(job(network, batch, side, tokens, mixed, keep, DEVICES["h200"], cuda=False))
    return needed.copies + needed.activations + needed.recomputed + needed.workspace


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measured_step(network: MMDiT, batch: int, side: int, tokens: int) -> tuple[float, float, Device]:
    """Predicted and measured seconds of a step in float32 on this CPU, and the CPU as it was between the steps."""
    given = inputs(network, batch, side, tokens)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    rows, width = batch * side**2 // network.patch_size**2, network.width
    x, weight = torch.randn(rows, width), torch.randn(width, 4 * width)  # the MLP's product: the most of a step
    source = torch.randn(2**24)
    target = torch.empty_like(source)

    def one() -> None:
        optimizer.zero_grad()
        passes(network, given, False)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    one()
    turns = [(seconds(one), seconds(lambda: x @ weight), seconds(lambda: target.copy_(source))) for _ in range(TURNS)]
    taken, product, copied = (statistics.median(turn[i] for turn in turns) for i in range(3))
    flops, bandwidth = 2 * x.numel() * 4 * width / product, 2 * 4 * source.numel() / copied
    cpu = Device("this CPU", flops, flops, 0, bandwidth, 0, 0)
    return step(job(network, batch, side, tokens, False, "none", cpu, cuda=False)).total, taken, cpu


def small(depth: int, width: int = 256) -> MMDiT:
    return MMDiT(depth=depth, width=width, text_dim=64, pooled_dim=64, sample_size=32, pos_embed_max_size=16)


def report() -> str:
    """A table of all comparisons: predicted, measured, their ratio."""
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # the CPU's unfused norm
    lines = [f"{'':<66}{'predicted':>12}{'measured':>12}{'ratio':>8}"]

    def row(name: str, predicted: float, measured: float, unit: str) -> None:
        lines.append(f"{name:<66}{predicted:>9.1f} {unit}{measured:>9.1f} {unit}{predicted / measured:>8.3f}")

    size = (8, 32, 40)
    for mixed in (False, True):
        for keep in ("none", "full"):
            network = small(6)
            predicted = 8 * sum(activation_bytes(job(network, *size, mixed, keep, DEVICES["h200"], cuda=False)))
            Strategy(activation_checkpointing=keep).prepare(network)
            mode = f"{'bf16-mixed' if mixed else '32-true'}, checkpointing {keep}"
            kept = kept_bytes(network, *size, mixed)
            row(f"kept for backward, CPU, small, {mode}", predicted / 1e6, kept / 1e6, "MB")
    for mixed in (False, True):
        for keep in ("none", "selective", "full"):
            network = small(6)
            predicted = predicted_peak(network, *size, mixed, keep)
            Strategy(activation_checkpointing=keep).prepare(network)  # type: ignore[arg-type]
            mode = f"{'bf16-mixed' if mixed else '32-true'}, checkpointing {keep}"
            row(f"peak of a step, CPU, small, {mode}", predicted / 1e6, peak_bytes(network, *size, mixed) / 1e6, "MB")
    for kind in ("none", "int8", "nf4"):
        network = MMDiT(depth=4, width=1536, heads=24, sample_size=32, pos_embed_max_size=32)
        updates = LoRA(quantize=kind)
        count, needed = sum(p.numel() for p in network.parameters()), memory(lora_job(network, updates, 1, 32, 40))
        held, peak = lora_bytes(network, updates, 1, 32, 40)
        frozen = "bfloat16" if kind == "none" else kind
        wanted = needed.parameters + needed.positions + needed.gradients + needed.optimizer + needed.averages
        row(f"held by a LoRA training for each weight, width 1536, {frozen}", wanted / count, held / count, "B ")
        wanted = needed.copies + needed.activations + needed.recomputed + needed.workspace + needed.decoded
        row(f"its peak beyond that, CPU, checkpointing full, {frozen}", wanted / 1e6, peak / 1e6, "MB")
    for depth in (24, 38):
        with torch.device("meta"):
            network = MMDiT(depth=depth)
        for keep in ("none", "full"):
            predicted = 4 * sum(activation_bytes(job(network, 4, 32, 154, True, keep, DEVICES["h200"], cuda=True)))
            found = kept_on_cuda(lambda depth=depth: MMDiT(depth=depth), 4, 32, 154, True, keep)  # type: ignore[misc]
            row(f"kept, CUDA's rules, depth {depth}, bf16-mixed, {keep}", predicted / 1e6, found / 1e6, "MB")
    for depth, width in ((6, 256), (4, 768)):
        predicted, measured, cpu = measured_step(small(depth, width), 8, 16, 40)
        speed = f"{cpu.fp32 / 1e9:.0f} GFLOP/s, {cpu.bandwidth / 1e9:.1f} GB/s"
        row(f"step, CPU, depth {depth}, width {width}, {speed}", 1e3 * predicted, 1e3 * measured, "ms")
    return "\n".join(lines)
