"""How a training is distributed and fitted into memory: DDP, FSDP2 or HSDP, activation checkpointing, compilation."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

TIMEOUT = timedelta(minutes=30)  # processes wait so long for each other
aten = torch.ops.aten
KEPT = [  # results that selective checkpointing keeps: slow to recompute
    aten.mm.default, aten.addmm.default, aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Strategy:
    """How a training is distributed over processes and fitted into their memory. Its results stay the same.

    Args:
        kind: ddp: every process holds the whole model. fsdp2: each process holds a shard of every tensor, and blocks
            are gathered when they are needed. One process needs neither.
        replicas: number of groups of processes that each hold one model in shards, for fsdp2 (HSDP); 1 shards over all.
        accumulate_grad_batches: micro-batches into which a process's share of a batch is split.
        activation_checkpointing: what the backward pass recomputes instead of keeping it: nothing (none), whole blocks
            (full), or all but the results of matrix products and attention (selective).
        activation_checkpointing_every: one of so many blocks is checkpointed.
        compile: compile each block.
        sharded_checkpoint: every process writes its own part of a checkpoint; else the first process gathers all of it,
            which takes 16 bytes of host memory for each parameter, and 4 more for each further average.
    """

    kind: Literal["ddp", "fsdp2"] = "ddp"
    replicas: int = 1
    accumulate_grad_batches: int = 1
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    activation_checkpointing_every: int = 1
    compile: bool = False
    sharded_checkpoint: bool = False

    def __post_init__(self) -> None:
        counts = (self.replicas, self.accumulate_grad_batches, self.activation_checkpointing_every)
        if min(counts) < 1:
            raise ValueError(
                "strategy.replicas, accumulate_grad_batches and activation_checkpointing_every must be at least 1, got "
                f"{', '.join(map(str, counts))}"
            )
        if self.kind != "fsdp2" and (self.replicas > 1 or self.sharded_checkpoint):
            raise ValueError("strategy.replicas and sharded_checkpoint are for kind fsdp2: set it, or remove them")
        if self.activation_checkpointing == "none" and self.activation_checkpointing_every > 1:
            raise ValueError("strategy.activation_checkpointing_every needs activation_checkpointing full or selective")

    def check(self, world: int, batch_size: int) -> None:
        """ValueError if a global batch of this size cannot be split over `world` processes."""
        if world % self.replicas:
            raise ValueError(f"strategy.replicas must divide the {world} processes, got {self.replicas}")
        parts = world * self.accumulate_grad_batches
        if batch_size % parts:
            raise ValueError(
                f"data.batch_size must be a multiple of processes × accumulate_grad_batches, "
                f"{world} × {self.accumulate_grad_batches} = {parts}, got {batch_size}"
            )

    def lightning(self, world: int) -> LightningStrategy | Literal["auto"]:
        """Lightning's strategy, which starts the processes and connects them."""
        if world == 1:
            return "auto"
        if self.kind == "fsdp2":
            return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, timeout=TIMEOUT)
        # Gradients are views of the communication buffers; constant buffers are not sent again.
        return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False, timeout=TIMEOUT)

    def prepare(self, network: nn.Module) -> None:
        """Turns on checkpointing and compilation of the network's blocks, in place. Parameters keep their names."""
        for number, block in enumerate(blocks(network)):
            if self.activation_checkpointing != "none" and number % self.activation_checkpointing_every == 0:
                block.forward = checkpointed(block.forward, self._context())
            if self.compile:
                block.compile()

    def _context(self) -> Callable[[], Any]:
        if self.activation_checkpointing == "selective":
            return partial(create_selective_checkpoint_contexts, KEPT)
        return noop_context_fn

    def mesh(self, device: torch.device, world: int) -> DeviceMesh:
        """The mesh of processes: (shard,), or (replicate, shard) with replicas."""
        if self.replicas == 1:
            return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        return init_device_mesh(
            device.type, (self.replicas, world // self.replicas), mesh_dim_names=("replicate", "shard")
        )

    def shard(self, network: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
        """Shards every tensor of the network over the processes of the mesh, in place.

        Weights are kept and gradients summed in float32; `dtype` is the type in which weights are sent and multiplied.
        Inputs are not cast, so that t stays float32.
        """
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*blocks(network), network):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def checkpointed(forward: Callable[..., Any], context: Callable[[], Any]) -> Callable[..., Any]:
    """A block's forward pass whose activations are recomputed. A plain function: `compile` skips other callables."""

    def recomputed(*inputs: Any, **named: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=context, **named)

    return recomputed


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The network's `blocks`: units of sharding, checkpointing and compilation. Empty if it has none."""
    yield from getattr(network, "blocks", ())


def skeleton(network: M) -> M:
    """A copy of the network whose tensors are on the meta device, without values."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(network, memo).eval()


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor. Every process of its mesh must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
