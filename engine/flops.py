"""Floating point operations of a network's forward and backward passes."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(network: nn.Module, *inputs: Any) -> int:
    """Floating point operations of one forward pass at these inputs, a multiply-add counted as two.

    Matrix products, convolutions and attention are counted, attention in full whatever its mask; element-wise
    operations are not. Only shapes matter: nothing is computed or allocated, and the network is not changed.

    Args:
        network: on any device, also meta. Its weights must not be sharded yet.
        inputs: tensors on any device, alone or in tuples, lists, dicts and dataclasses; other values are passed on.
    """
    return _flops(network, inputs, backward=False)


def training_flops(network: nn.Module, *inputs: Any) -> int:
    """The same of a forward pass and its backward pass, to all weights and inputs that require gradients.

    The backward pass takes two products for each of the forward pass, one for the gradient of its input and one for
    that of its weight, where these are needed: that of a frozen weight is not, nor that of an input before which
    nothing learns. What checkpoints of activations compute again is counted, too. The network's output is one tensor.
    """
    return _flops(network, inputs, backward=True)


def _flops(network: nn.Module, inputs: Any, backward: bool) -> int:
    state = {name: _to_meta(x) for name, x in (*network.named_parameters(), *network.named_buffers())}
    counter = FlopCounterMode(display=False)
    # Attention as plain matrix products: fused kernels pad heads, and their counts would differ between machines.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.set_grad_enabled(backward), torch.compiler.set_stance("force_eager"), plain, counter:
        output = functional_call(network, state, tree_map(_to_meta, inputs))
        if backward and output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops()


def _to_meta(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().to("meta").requires_grad_(leaf.requires_grad)
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
        return dataclasses.replace(leaf, **tree_map(_to_meta, fields))
    return leaf
