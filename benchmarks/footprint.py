"""Predicts memory, traffic and time of a training step of MMDiT on any GPUs, in closed form.

Activations are the bytes that autograd keeps, operation by operation of `mmdit.layers.JointBlock`, in eager mode. Times
are a roofline: matrix products at a share of the peak, everything else at the memory's bandwidth. `benchmarks.plan`
prints the result and checks it against measurements.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from engine.flops import forward_flops
from engine.hardware import Device
from engine.strategy import Strategy
from mmdit.lora import LoRA
from mmdit.model import Condition, MMDiT
from mmdit.quantized import BLOCK

MOVING = 0.8  # share of the data sheet's bandwidth that memory and links reach
RESERVE = 2e9  # bytes of CUDA context, libraries and NCCL's buffers
FRAGMENTED = 0.05  # share of all other memory that is lost between the allocator's blocks
CALL, HOP = 20e-6, 5e-6  # latency of a collective in seconds: of its start, and of each hop between nodes
BUCKET = 25e6  # bytes of gradient that DDP sends at a time


@dataclass(frozen=True)
class Job:
    """A training and its machines.

    Args:
        network: on any device; only shapes matter.
        device: the kind of GPU.
        gpus: number of GPUs.
        per_node: number of GPUs in a node.
        batch: pictures of one optimizer step.
        latent: (height, width) of the pictures' latents.
        tokens: of a caption.
        strategy: how the training is distributed.
        mixed: bfloat16 under autocast with float32 weights; else float32 throughout.
        averages: running averages of the weights.
        efficiency: share of the peak that matrix products reach.
        cuda: count what autograd keeps on CUDA; else on a CPU, where autocast and norms differ.
        lora: the updates, if they alone are trained. Activations are counted as if all were: that is an upper bound.
        frozen: bytes of each frozen weight as loaded, 4 or 2.

    Raises:
        ValueError: batch, replicas or nodes are not divisible as they must be; the network has other MLPs.
    """

    network: MMDiT
    device: Device
    gpus: int
    per_node: int
    batch: int
    latent: tuple[int, int]
    tokens: int
    strategy: Strategy
    mixed: bool
    averages: int
    efficiency: float = 0.5
    cuda: bool = True
    lora: LoRA | None = None
    frozen: int = 4

    def __post_init__(self) -> None:
        s = self.strategy
        if self.network.conv_mlp:
            raise ValueError("the prediction knows MLPs of linear layers alone: leave out network.conv_mlp")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(f"gpus must be a multiple of the {self.per_node} gpus_per_node, got {self.gpus}")
        if self.batch % (self.gpus * s.accumulate_grad_batches):
            parts = f"{self.gpus} gpus × {s.accumulate_grad_batches} accumulate_grad_batches"
            raise ValueError(f"the batch must be a multiple of {parts}, got {self.batch}")
        if s.kind == "fsdp2" and self.gpus % s.replicas:
            raise ValueError(f"strategy.replicas must divide the {self.gpus} gpus, got {s.replicas}")

    @property
    def trained(self) -> int:
        """Number of trained weights."""
        if self.lora is None:
            return sum(p.numel() for p in self.network.parameters())
        ends = tuple(f".{target}" for target in self.lora.targets)
        return sum(
            self.lora.rank * (module.in_features + module.out_features)
            for name, module in self.network.named_modules()
            if isinstance(module, nn.Linear) and f".{name}".endswith(ends)
        )

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights, frozen or trained."""
        if self.lora is None:
            return 4.0 * self.trained
        small = sum(decoded.weight.numel() for decoded in self.quantized)
        rows = sum(decoded.out_features for decoded in self.quantized)
        packed = {"none": 0.0, "int8": small + 4.0 * rows, "nf4": small / 2 + 4.0 * small / BLOCK}[self.lora.quantize]
        rest = sum(p.numel() for p in self.network.parameters()) - small
        return packed + self.frozen * rest + 4.0 * self.trained

    @property
    def quantized(self) -> list[nn.Linear]:
        """The layers that are decoded when they are used."""
        if self.lora is None or self.lora.quantize == "none":
            return []
        return [module for module in self.network.blocks.modules() if isinstance(module, nn.Linear)]

    @property
    def micro(self) -> int:
        """Pictures on one GPU at a time."""
        return self.batch // (self.gpus * self.strategy.accumulate_grad_batches)

    @property
    def image_tokens(self) -> int:
        return self.latent[0] * self.latent[1] // self.network.patch_size**2

    @property
    def shards(self) -> int:
        """Number of shards of weights, gradients, moments and averages."""
        return self.gpus // self.strategy.replicas if self.strategy.kind == "fsdp2" else 1

    @property
    def element(self) -> int:
        """Bytes of a number in matrix products and attention."""
        return 2 if self.mixed else 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step."""

    parameters: float
    positions: float
    gradients: float
    optimizer: float
    averages: float
    copies: float
    activations: float
    recomputed: float
    workspace: float
    decoded: float
    gathered: float
    reserve: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one step: bytes that one GPU receives, and seconds."""

    bytes: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, and speeds that follow from them."""

    flops: float  # of one picture's forward pass
    matrix: float
    elementwise: float
    recomputation: float
    optimizer: float
    communication: dict[str, Traffic]
    exposed: float
    total: float
    images_per_second: float
    mfu: float


# ---- memory


def stream_bytes(job: Job, qk_norm: bool, queries: bool = True) -> int:
    """Bytes that autograd keeps of one stream of a joint block for each token and channel.

    Args:
        job: for the types.
        qk_norm: q and k are normalised.
        queries: false for the last block's text, of which only k and v are used.
    """
    c = job.element
    gated = c if job.mixed and not job.cuda else 4  # CUDA's autocast widens addcmul's operands
    modulated = 4 + 4 + c  # the norm's input, its output for the scale's gradient, the linear layer's input
    normed = 2 if queries else 1  # of q, k
    norms = 0
    if qk_norm:
        inputs = 4 * normed if job.mixed else 12  # float32 copies; without autocast views that hold all of qkv
        norms = inputs + (0 if job.cuda else 4 * normed)  # on a CPU the norm is not fused and keeps its result twice
    if not queries:
        return modulated + norms + 2 * c
    attention = modulated + norms + 4 * c + c + gated  # q, k, v and the result; the projection's input and output
    return attention + modulated + 4 * c + 4 * c + gated  # GELU's input, the second layer's input and output


def block_bytes(job: Job, index: int, keep: str = "none") -> float:
    """Bytes that autograd keeps of one block for one picture.

    Args:
        job: for sizes and types.
        index: the block, from 0.
        keep: `none` keeps everything, `selective` inputs and the results of matrix products and attention, `full` only
            inputs.
    """
    n, c = job.network, job.element
    last, dual = index == n.depth - 1, index in n.dual_attention_layers
    image, text = job.image_tokens, job.tokens
    inputs = 4 * (image + text) * n.width
    statistics = 4 * n.heads * (image + text * (not last))  # attention's logarithms of sums
    if keep == "full":
        return inputs
    if keep == "selective":
        results = (10 + 5 * dual) * image + (3 if last else 10) * text
        return inputs + results * n.width * c + statistics + 15 * n.width * c
    numbers = stream_bytes(job, n.qk_norm) * image + stream_bytes(job, n.qk_norm, queries=not last) * text
    if last:
        numbers -= c * image  # with no text beside it, what was read needs no copy for the projection
    if dual:  # the norm's output, the linear layer's input, q, k, v and the result, the projection's output
        norms_only = stream_bytes(job, n.qk_norm) - stream_bytes(job, False)
        views = (4 if job.mixed else -4) if n.qk_norm else 0  # v, joined to nothing, is a view of all of qkv
        gated = c if job.mixed and not job.cuda else 4
        numbers += (4 + c + norms_only + 4 * c + views + gated) * image
        statistics += 4 * n.heads * image
    norms = 8 * (2 + dual) * image + 8 * (1 if last else 2) * text  # mean and deviation
    if n.qk_norm:
        norms += 4 * n.heads * ((2 + 2 * dual) * image + (1 if last else 2) * text)
    vectors = (8 if last else 15 if dual else 12) * c + 32  # modulation, 1 + scale and widened gates
    return numbers * n.width + statistics + norms + vectors * n.width


def checkpointed(job: Job, index: int) -> bool:
    """Whether a block is recomputed in the backward pass."""
    s = job.strategy
    return s.activation_checkpointing != "none" and index % s.activation_checkpointing_every == 0


def activation_bytes(job: Job) -> list[float]:
    """Bytes that autograd keeps between forward and backward for one picture: outside of blocks, then of each block.

    Copies of weights under autocast are not counted.
    """
    n, c = job.network, job.element
    ends = c * (n.in_channels * n.patch_size**2 * job.image_tokens + n.text_dim * job.tokens + n.pooled_dim)
    ends += (4 + 4 + c) * job.image_tokens * n.width
    kept = job.strategy.activation_checkpointing
    return [ends, *(block_bytes(job, i, kept if checkpointed(job, i) else "none") for i in range(n.depth))]


def recomputed_bytes(job: Job, index: int) -> float:
    """Bytes that the backward pass adds for one picture while it recomputes a checkpointed block."""
    kept = job.strategy.activation_checkpointing
    return block_bytes(job, index) - block_bytes(job, index, kept) if checkpointed(job, index) else 0.0


def memory(job: Job) -> Memory:
    """Peak memory of one GPU. Under DDP it holds everything; FSDP2 gathers a block while it computes another.

    The peak is at the end of the forward pass, when autocast has a copy of all weights, or in the backward pass, in the
    largest recomputed block.
    """
    n, c, s = job.network, job.element, job.strategy
    count = sum(p.numel() for p in n.parameters())
    sizes = [sum(p.numel() for p in block.parameters()) for block in n.blocks]
    ends = count - sum(sizes)
    learning = job.trained
    sharded = s.kind == "fsdp2" and job.gpus > 1
    # ends stay; of blocks this one, the next one twice, this one's gradient, and that in float32 to send
    gathered = c * ends + max(sizes) * (3 * c + c + 4) if sharded else 0.0
    kept = [job.micro * size for size in activation_bytes(job)]
    cast = count if job.lora is None or (job.frozen == 4 and not job.quantized) else 0  # those in bfloat16 need none
    held = 2.0 * cast if job.mixed and not sharded else 0.0  # autocast's copies
    moments = [(held, sum(kept), 0.0)]  # copies, activations, recomputed: at the end of the forward pass
    for i, size in enumerate(sizes):  # and in each block of the backward pass, when those behind it are let go
        alive = ends + size + sum(other for j, other in enumerate(sizes) if j != i and not checkpointed(job, j))
        again = job.micro * recomputed_bytes(job, i)
        moments.append((min(held, 2.0 * alive * (held > 0)), sum(kept[: i + 2]), again))
    copies, activations, again = max(moments, key=sum)
    pixels = n.in_channels * job.latent[0] * job.latent[1]
    given = 4 * (3 * pixels + n.text_dim * job.tokens + n.pooled_dim)  # the batch itself
    parts = {
        "parameters": job.weight_bytes / job.shards,
        "positions": 4.0 * n.positions.numel() * (1 + job.averages * sharded),  # there each average has its own
        "gradients": 4 * learning / job.shards,
        "optimizer": 8 * learning / job.shards,
        "averages": (4 * learning if job.shards == 1 else job.weight_bytes) / job.shards * job.averages,
        "copies": copies,
        "activations": activations + job.micro * given,
        "recomputed": again,
        "workspace": 8.0 * job.micro * (job.image_tokens + job.tokens) * n.width,  # two gradients of all tokens
        "decoded": 4.0 * max((layer.weight.numel() for layer in job.quantized), default=0),  # once before the scale
        "gathered": gathered,
    }
    return Memory(**parts, reserve=RESERVE + FRAGMENTED * sum(parts.values()))


# ---- time


def flops(job: Job) -> int:
    """FLOP of one picture's forward pass, a multiply-add counted as two."""
    n = job.network
    height, width = job.latent
    with torch.device("meta"):
        condition = Condition(torch.empty(1, job.tokens, n.text_dim), torch.empty(1, n.pooled_dim))
        return forward_flops(n, torch.empty(1, n.in_channels, height, width), torch.empty(1), condition)


def moved_bytes(job: Job) -> float:
    """Bytes that one picture's forward pass reads and writes outside of matrix products and attention.

    Without compilation each operation reads its operands and writes its result; with it, neighbours are fused.
    """
    n, c = job.network, job.element
    cast = 4 + c if job.mixed else 0
    if job.strategy.compile:
        modulated, joined = 4 + c, 6 * c
    else:
        modulated, joined = 8 + 8 + cast, 6 * c
        if n.qk_norm:  # q and k to float32, normed, joined to those of the other stream and back
            joined = 2 * (cast + 8 + 8 + cast) + 2 * c
    split, residual, gelu = 2 * c, 8 + c, 8 * c
    stream = 2 * modulated + joined + split + 2 * residual + gelu
    dual = modulated + joined + residual
    tokens = n.depth * (job.image_tokens + job.tokens)  # the last block's text does less, which is not counted
    return n.width * (tokens * stream + len(n.dual_attention_layers) * job.image_tokens * dual)


def collective(job: Job, size: float, members: int, neighbours: int, tree: bool = False) -> Traffic:
    """One all-gather or reduce-scatter of `size` bytes in all; an all-reduce is two.

    It uses all links of a node at once; data crosses between nodes once.

    Args:
        job: for the links.
        size: bytes in all.
        members: number of GPUs that take part.
        neighbours: number of them on one node.
        tree: log2(nodes) hops, as in an all-reduce; else a ring of nodes.
    """
    if members == 1:
        return Traffic(0.0, 0.0)
    nodes = members // neighbours
    hops = math.log2(nodes) if tree else nodes - 1
    received = size * (members - 1) / members
    inside = received / (MOVING * job.device.link) if neighbours > 1 else 0.0
    between = size * (nodes - 1) / nodes / (neighbours * MOVING * job.device.network)
    return Traffic(received, max(inside, between) + CALL + HOP * hops)


def times(traffic: Traffic, count: float) -> Traffic:
    return Traffic(count * traffic.bytes, count * traffic.seconds)


def communication(job: Job) -> dict[str, Traffic]:
    """All collectives of one step. FSDP2 gathers for forward and backward, and reduces, in every micro-batch."""
    count = job.trained
    s, groups = job.strategy, job.network.depth + 1
    here = min(job.shards, job.per_node)  # of a group of shards, on one node
    if job.gpus == 1:
        return {}
    if s.kind == "ddp":
        buckets = 4 * count / BUCKET
        neighbours = min(job.gpus, job.per_node)
        return {"all-reduce": times(collective(job, BUCKET, job.gpus, neighbours, tree=True), 2 * buckets)}
    calls = groups * s.accumulate_grad_batches
    gather = collective(job, job.element * count / groups, job.shards, here)
    reduce = collective(job, 4 * count / groups, job.shards, here)
    found = {"all-gather, forward": times(gather, calls), "all-gather, backward": times(gather, calls)}
    found["reduce-scatter"] = times(reduce, calls)
    if s.replicas > 1:
        together = max(1, min(job.gpus, job.per_node) // job.shards)  # replicas on one node
        part = collective(job, 4 * count / groups / job.shards, s.replicas, min(together, s.replicas), tree=True)
        found["all-reduce of replicas"] = times(part, 2 * calls)
    return found


def step(job: Job, forward: int | None = None) -> Step:
    """The seconds of one optimizer step; `forward` is `flops(job)`, if known.

    Backward counts as two forward passes, in products and in bytes. Communication overlaps with computing, except one
    block's share of it; under DDP it overlaps with the last backward pass.
    """
    forward = flops(job) if forward is None else forward
    n, s, device = job.network, job.strategy, job.device
    images = job.batch / job.gpus
    peak = (device.bf16 if job.mixed else device.fp32) * job.efficiency
    memory_speed = MOVING * device.bandwidth
    count = job.trained
    passes = 3 if job.lora is None else 2  # without the gradients of the weights
    matrix = passes * forward * images / peak
    casts = 6 * count * s.accumulate_grad_batches if job.mixed and not (s.kind == "fsdp2" and job.gpus > 1) else 0
    moved = moved_bytes(job) * images
    elementwise = (3 * moved + casts) / memory_speed
    share = sum(checkpointed(job, i) for i in range(n.depth)) / n.depth
    again = share * (moved / memory_speed + (s.activation_checkpointing == "full") * forward * images / peak)
    # clipping reads and rewrites gradients, AdamW reads four numbers and writes three, an average two and one
    optimizer = (12 + 28 + 12 * job.averages) * count / job.shards / memory_speed
    traffic = communication(job)
    busy = [t.seconds for t in traffic.values()]
    if s.replicas > 1 and job.shards <= job.per_node:  # shards use links in a node, replicas links between nodes
        busy = [max(sum(busy[:-1]), busy[-1])]
    hiding = matrix + elementwise + again
    if s.kind == "ddp":
        hiding *= 2 / 3 / s.accumulate_grad_batches
    exposed = max(sum(busy) / (n.depth + 1), sum(busy) - hiding * n.depth / (n.depth + 1))
    total = matrix + elementwise + again + optimizer + exposed
    mfu = passes * forward * images / total / (device.bf16 if job.mixed else device.fp32)
    return Step(forward, matrix, elementwise, again, optimizer, traffic, exposed, total, job.batch / total, mfu)


def alternatives(job: Job) -> Iterator[Job]:
    """The same training with other strategies: sharded, with recomputed activations, in more micro-batches."""
    at_most = job.batch // job.gpus
    counts = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if at_most % k == 0]
    kinds: list[tuple[Literal["ddp", "fsdp2"], int]] = [("ddp", 1)]
    if job.gpus > 1 and not job.quantized:
        kinds += [("fsdp2", job.strategy.replicas), ("fsdp2", 1)]
    keeps: list[Literal["none", "selective", "full"]] = ["none", "selective", "full"]
    for (kind, replicas), keep, count in itertools.product(kinds, keeps, counts):
        strategy = replace(
            job.strategy, kind=kind, replicas=replicas, activation_checkpointing=keep,
            activation_checkpointing_every=1, accumulate_grad_batches=count,
            sharded_checkpoint=job.strategy.sharded_checkpoint and kind == "fsdp2",
        )  # fmt: skip
        yield replace(job, strategy=strategy)


def fastest_fit(job: Job) -> Strategy | None:
    """The fastest strategy with which the job fits into memory; None if there is none."""
    forward = flops(job)
    fitting = [other for other in alternatives(job) if memory(other).total <= job.device.memory]
    return min(fitting, key=lambda other: step(other, forward).total).strategy if fitting else None
