"""How a training is spread over processes and fitted into memory: DDP, FSDP2 or HSDP, checkpointing, compilation."""

import copy
import os
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

TIMEOUT = timedelta(minutes=30)  # that processes wait for each other before they give up
aten = torch.ops.aten
KEPT = [  # by selective checkpointing: what is slow to compute again
    aten.mm.default, aten.addmm.default, aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Strategy:
    """How a training is spread over processes and fitted into their memory. What it computes stays the same.

    Args:
        kind: ddp, where every process holds the whole model, or fsdp2, where each holds a part of every tensor and the
            network's blocks are gathered as they are needed. One process needs neither.
        replicas: groups of processes that hold the whole model between them, for fsdp2 (HSDP); 1 shards over all.
        accumulate_grad_batches: parts that a process's share of a batch is computed in, one after another.
        activation_checkpointing: what the backward pass computes again instead of keeping it: nothing, whole blocks, or
            selectively all but the results of matrix products and attention.
        activation_checkpointing_every: of so many blocks one is checkpointed.
        compile: compile each block.
        sharded_checkpoint: every process writes its own part of a checkpoint; else the first one gathers it all, which
            takes 16 bytes of its memory for each parameter, and 4 more for each further average.
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
            raise ValueError("strategy.replicas and sharded_checkpoint are for kind fsdp2")
        if self.activation_checkpointing == "none" and self.activation_checkpointing_every > 1:
            raise ValueError("strategy.activation_checkpointing_every needs activation_checkpointing full or selective")

    def check(self, world: int, batch_size: int) -> None:
        """Raises ValueError if so many processes cannot share a global batch of that size in this way."""
        if world % self.replicas:
            raise ValueError(f"strategy.replicas must divide the {world} processes, got {self.replicas}")
        parts = world * self.accumulate_grad_batches
        if batch_size % parts:
            raise ValueError(
                f"data.batch_size must be a multiple of processes × accumulate_grad_batches, "
                f"{world} × {self.accumulate_grad_batches} = {parts}, got {batch_size}"
            )
        started = os.environ.get("WORLD_SIZE")  # as torchrun says it; Lightning would train as many times
        if started is not None and int(started) != world:
            raise ValueError(
                f"{started} processes were started, but run.devices × run.num_nodes is {world}: make them equal"
            )

    def lightning(self, world: int) -> LightningStrategy | Literal["auto"]:
        """Lightning's part in it: it starts the processes and joins them."""
        if world == 1:
            return "auto"
        if self.kind == "fsdp2":
            return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, timeout=TIMEOUT)
        # The gradients live in the communication buffers, and what does not change is not sent again.
        return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False, timeout=TIMEOUT)

    def prepare(self, network: nn.Module) -> None:
        """Makes the network's blocks checkpoint and compile, in place. The names of its parameters stay."""
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
        """The processes, those that hold a whole model between them side by side."""
        if self.replicas == 1:
            return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        return init_device_mesh(
            device.type, (self.replicas, world // self.replicas), mesh_dim_names=("replicate", "shard")
        )

    def shard(self, network: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
        """Divides every tensor of the network among the processes of the mesh, in place.

        Weights are kept and gradients summed in float32; `dtype` is what weights are sent and multiplied in. Inputs are
        left as they are, above all t.
        """
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*blocks(network), network):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def checkpointed(forward: Callable[..., Any], context: Callable[[], Any]) -> Callable[..., Any]:
    """A block's forward pass whose activations are computed again. A plain function, or `compile` would skip it."""

    def computed_again(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=context)

    return computed_again


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The layers that all else is arranged by; none for a network that has no `blocks`."""
    yield from getattr(network, "blocks", ())


def skeleton(network: M) -> M:
    """A copy of the network without numbers: its tensors are on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(network, memo).eval()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, which every process of its mesh must ask for."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
