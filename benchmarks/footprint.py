"""Predicts memory, traffic and time of a training step of MMDiT on any GPUs, in closed form.

All networks of the training count with their weights and passes. Activations are the bytes that autograd keeps,
operation by operation of `mmdit.layers.JointBlock`, in eager mode. Times are a roofline: matrix products at a share of
the peak, everything else at the memory's bandwidth. `benchmarks.plan` prints the result and checks it against
measurements.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import nn

from engine.hardware import Device
from engine.strategy import Strategy
from mmdit.lora import LoRA
from mmdit.model import Condition, MMDiT
from mmdit.quantized import BLOCK
from training.roles import Role

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
        roles: what the network and others do in a step; none is one pass of the network, which it learns from. The
            parameters of the others that require a gradient are trained. A network that learns is an MMDiT.
        encoders: text encoders that learn with the network, of which only the weights are counted.

    Raises:
        ValueError: batch, replicas or nodes are not divisible as they must be; a network that learns is no MMDiT, or
            has other MLPs.
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
    roles: tuple[Role, ...] = ()
    encoders: nn.ModuleDict | None = None

    def __post_init__(self) -> None:
        s = self.strategy
        if not self.roles:
            object.__setattr__(self, "roles", (Role("network", self.network, learned=1),))
        for role in self.roles:
            if role.learned and not isinstance(role.network, MMDiT):
                kind = type(role.network).__name__
                raise ValueError(f"only an MMDiT can be planned, the {role.name} is a {kind}: name an MMDiT")
        if any(network.conv_mlp for network in self.learners):
            raise ValueError("the prediction knows MLPs of linear layers alone: leave out network.conv_mlp")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(f"gpus must be a multiple of the {self.per_node} gpus_per_node, got {self.gpus}")
        if self.batch % (self.gpus * s.accumulate_grad_batches):
            parts = f"{self.gpus} gpus × {s.accumulate_grad_batches} accumulate_grad_batches"
            raise ValueError(f"the batch must be a multiple of {parts}, got {self.batch}")
        if s.kind == "fsdp2" and self.gpus % s.replicas:
            raise ValueError(f"strategy.replicas must divide the {self.gpus} gpus, got {s.replicas}")

    @property
    def learners(self) -> dict[MMDiT, float]:
        """The networks with activations, the main one first, and their passes that a backward pass follows."""
        found = {self.network: 0.0}
        for role in self.roles:
            if role.learned and isinstance(role.network, MMDiT):
                found[role.network] = found.get(role.network, 0.0) + role.learned
        return found

    @property
    def others(self) -> list[nn.Module]:
        """All other modules with weights."""
        found = [role.network for role in self.roles] + ([self.encoders] if self.encoders else [])
        return [module for module in dict.fromkeys(found) if module is not self.network]

    @property
    def whole(self) -> bool:
        """Whether the network's own weights are trained."""
        return self.lora is None and any(p.requires_grad for p in self.network.parameters())

    @property
    def averaged(self) -> int:
        """Number of trained weights that are averaged: all but a critic's."""
        return self.trained + (trained_of(self.encoders) if self.encoders else 0)

    @property
    def learning(self) -> int:
        """Number of trained weights of all networks."""
        return self.trained + sum(map(trained_of, self.others))

    @property
    def trained(self) -> int:
        """Number of trained weights of the network."""
        if self.lora is None:
            return trained_of(self.network)
        ends = tuple(f".{target}" for target in self.lora.targets)
        return sum(
            self.lora.rank * (module.in_features + module.out_features)
            for name, module in self.network.named_modules()
            if isinstance(module, nn.Linear) and f".{name}".endswith(ends)
        )

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights of the network, frozen or trained."""
        if self.lora is None:
            return (4.0 if self.whole else self.frozen) * sum(p.numel() for p in self.network.parameters())
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
    def sharded(self) -> bool:
        """Whether FSDP2 divides the weights that learn."""
        return self.strategy.kind == "fsdp2" and self.gpus > 1

    @property
    def element(self) -> int:
        """Bytes of a number in matrix products and attention."""
        return 2 if self.mixed else 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step."""

    parameters: float
    others: float
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
    work: float  # FLOP of one picture in the whole step
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


def trained_of(module: nn.Module) -> int:
    """Number of a module's weights that require a gradient."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def frozen_bytes(module: nn.Module) -> int:
    """Bytes of a module's other weights, and of its buffers."""
    frozen = (p for p in module.parameters() if not p.requires_grad)
    return sum(x.numel() * x.element_size() for x in (*frozen, *module.buffers()))


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


def kept_bytes(job: Job, network: MMDiT) -> float:
    """Bytes that autograd keeps of a learning pass of a micro-batch."""
    own = job if network is job.network else replace(job, network=network, roles=())
    return job.micro * sum(activation_bytes(own))


def recomputed_bytes(job: Job, index: int) -> float:
    """Bytes that the backward pass adds for one picture while it recomputes a checkpointed block."""
    kept = job.strategy.activation_checkpointing
    return block_bytes(job, index) - block_bytes(job, index, kept) if checkpointed(job, index) else 0.0


def pass_peak(job: Job, network: MMDiT) -> tuple[float, float, float]:
    """Autocast's copies of weights, activations and recomputed bytes at the peak of one learning pass.

    The peak is at the end of the forward pass, when autocast has a copy of all weights, or in the backward pass, in the
    largest recomputed block.
    """
    own = job if network is job.network else replace(job, network=network, roles=())
    sizes = [sum(p.numel() for p in block.parameters()) for block in network.blocks]
    ends = sum(p.numel() for p in network.parameters()) - sum(sizes)
    kept, held = [job.micro * size for size in activation_bytes(own)], copied_bytes(job, network)
    moments = [(held, sum(kept), 0.0)]  # at the end of the forward pass
    for i, size in enumerate(sizes):  # and in each block of the backward pass, when those behind it are let go
        alive = ends + size + sum(other for j, other in enumerate(sizes) if j != i and not checkpointed(job, j))
        again = job.micro * recomputed_bytes(own, i)
        moments.append((min(held, 2.0 * alive), sum(kept[: i + 2]), again))
    return max(moments, key=sum)


def copied_bytes(job: Job, network: MMDiT) -> float:
    """Bytes of autocast's copies of all weights of a network that learns."""
    ready = network is job.network and not job.whole and (job.frozen == 2 or bool(job.quantized))  # in bfloat16 or less
    return 2.0 * sum(p.numel() for p in network.parameters()) * (job.mixed and not job.sharded and not ready)


def memory(job: Job) -> Memory:
    """Peak memory of one GPU. Under DDP it holds everything; FSDP2 gathers a block while it computes another.

    Weights that do not learn are whole on every GPU, but for those of a LoRA's base. The peak is that of one learning
    pass, while the others keep all that they need for their backward passes.
    """
    n, c = job.network, job.element
    sizes = [sum(p.numel() for p in block.parameters()) for network in job.learners for block in network.blocks]
    ends = sum(p.numel() for network in job.learners for p in network.parameters()) - sum(sizes)
    # ends stay; of blocks this one, the next one twice, this one's gradient, and that in float32 to send
    gathered = c * ends + max(sizes) * (3 * c + c + 4) if job.sharded else 0.0
    whole = {network: (copied_bytes(job, network), kept_bytes(job, network)) for network in job.learners}
    kept = sum(passes * whole[network][1] for network, passes in job.learners.items())
    moments = []
    for network, (held, once) in whole.items():
        copies, activations, again = pass_peak(job, network)
        copies += sum(other for other, _ in whole.values()) - held
        moments.append((copies, activations + kept - once, again))
    copies, activations, again = max(moments, key=sum)
    pixels = n.in_channels * job.latent[0] * job.latent[1]
    given = 4 * (3 * pixels + n.text_dim * job.tokens + n.pooled_dim)  # the batch itself
    width = max(network.width for network in job.learners)
    parts = {
        "parameters": (job.weight_bytes + 4 * (job.learning - job.trained)) / job.shards,
        "others": sum(map(frozen_bytes, job.others)),
        "positions": 4.0 * n.positions.numel() * (1 + job.averages * job.sharded),  # there each average has its own
        "gradients": 4 * job.learning / job.shards,
        "optimizer": 8 * job.learning / job.shards,
        "averages": (4 * job.averaged if job.shards == 1 else job.weight_bytes) / job.shards * job.averages,
        "copies": copies,
        "activations": activations + job.micro * given,
        "recomputed": again,
        "workspace": 8.0 * job.micro * (job.image_tokens + job.tokens) * width,  # two gradients of all tokens
        "decoded": 4.0 * max((layer.weight.numel() for layer in job.quantized), default=0),  # once before the scale
        "gathered": gathered,
    }
    return Memory(**parts, reserve=RESERVE + FRAGMENTED * sum(parts.values()))


# ---- time


class Work(NamedTuple):
    """FLOP of one picture in a role, a multiply-add counted as two."""

    forward: int  # of one forward pass
    step: float  # of all passes of a step, the backward passes too


def flops(job: Job) -> list[Work]:
    """The work in each of the job's roles. If only a LoRA or text learns, a backward pass counts as a forward pass."""
    n = job.network
    with torch.device("meta"):
        z, t = torch.empty(1, n.in_channels, *job.latent), torch.empty(1)
        condition = Condition(
            torch.empty(1, job.tokens, n.text_dim),
            torch.empty(1, n.pooled_dim),
            torch.ones(1, job.tokens, dtype=torch.bool) if n.text_mask else None,
            picture=torch.empty(1, n.picture_channels, *job.latent) if n.picture_channels else None,
            level=t if n.level_embeds else None,
        )
        unique = {role.network: role for role in job.roles}
        once = {network: role.forward_flops(z, t, condition) for network, role in unique.items()}
        found = []
        for role in job.roles:
            forward = once[role.network]
            short = role.network is job.network and not job.whole
            taken = (2 * role.learned + role.frozen) * forward if short else role.flops(z, t, condition)
            found.append(Work(forward, taken))
    return found


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
    count = job.learning
    s, groups = job.strategy, sum(network.depth + 1 for network in job.learners)
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


def step(job: Job, works: Sequence[Work] | None = None) -> Step:
    """The seconds of one optimizer step; `works` is `flops(job)`, if known.

    In bytes a backward pass counts as two forward passes. What other networks move is in proportion to their FLOP.
    Communication overlaps with computing, except one block's share of it; under DDP it overlaps with the last
    backward pass.
    """
    works = flops(job) if works is None else works
    roles = [(role, work.forward) for role, work in zip(job.roles, works, strict=True)]
    n, s, device = job.network, job.strategy, job.device
    own = next(count for role, count in roles if role.network is n)
    images = job.batch / job.gpus
    peak = device.bf16 if job.mixed else device.fp32
    memory_speed = MOVING * device.bandwidth
    total_work = sum(work.step for work in works)
    peaks = (device.fp32 if role.float32 else peak for role in job.roles)
    matrix = sum(work.step / most for work, most in zip(works, peaks, strict=True)) * images / job.efficiency
    casts = 6 * job.learning * s.accumulate_grad_batches if job.mixed and not job.sharded else 0
    moved = moved_bytes(job) * images
    passes = sum((3 * role.learned + role.frozen) * count for role, count in roles) / own
    elementwise = (passes * moved + casts) / memory_speed
    share = sum(checkpointed(job, i) for i in range(n.depth)) / n.depth
    learned = sum(role.learned * count for role, count in roles) / own
    products = (s.activation_checkpointing == "full") * own * images / (peak * job.efficiency)
    again = share * learned * (moved / memory_speed + products)
    # clipping reads and rewrites gradients, AdamW reads four numbers and writes three, an average two and one
    optimizer = (40 * job.learning + 12 * job.averages * job.averaged) / job.shards / memory_speed
    traffic = communication(job)
    busy = [t.seconds for t in traffic.values()]
    if s.replicas > 1 and job.shards <= job.per_node:  # shards use links in a node, replicas links between nodes
        busy = [max(sum(busy[:-1]), busy[-1])]
    hiding = matrix + elementwise + again
    if s.kind == "ddp":
        hiding *= 2 / 3 / s.accumulate_grad_batches
    exposed = max(sum(busy) / (n.depth + 1), sum(busy) - hiding * n.depth / (n.depth + 1))
    total = matrix + elementwise + again + optimizer + exposed
    mfu = total_work * images / total / peak
    return Step(own, total_work, matrix, elementwise, again, optimizer, traffic, exposed, total, job.batch / total, mfu)


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
    works = flops(job)
    fitting = [other for other in alternatives(job) if memory(other).total <= job.device.memory]
    return min(fitting, key=lambda other: step(other, works).total).strategy if fitting else None
