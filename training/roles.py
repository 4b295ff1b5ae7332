"""The networks of a training step: how often a picture passes each, and with which precision."""

from typing import NamedTuple

from torch import Tensor

from engine.flops import forward_flops, training_flops
from mmdit.network import Condition, Network


class Role(NamedTuple):
    """What a network does in a training step. One network may have several roles.

    Attributes:
        name: network, teacher, critic, reference or regressor.
        network: the module.
        learned: its forward passes for one picture of the batch that a backward pass follows.
        frozen: its other forward passes for one picture.
        float32: whether it computes in float32, whatever the precision of the training.
    """

    name: str
    network: Network
    learned: float = 0.0
    frozen: float = 0.0
    float32: bool = False

    def forward_flops(self, z: Tensor, t: Tensor, condition: Condition) -> int:
        """FLOPs of one forward pass, with a guidance scale only if the network takes one."""
        return forward_flops(self.network, z, t, self.shown(t, condition))

    def flops(self, z: Tensor, t: Tensor, condition: Condition) -> float:
        """FLOPs of all passes in a step, with the backward passes to the weights and inputs that require gradients."""
        shown = self.shown(t, condition)
        learned = self.learned * training_flops(self.network, z, t, shown) if self.learned else 0.0
        return learned + (self.frozen * forward_flops(self.network, z, t, shown) if self.frozen else 0.0)

    def shown(self, t: Tensor, condition: Condition) -> Condition:
        """What the network is shown: a guidance scale only if it takes one."""
        return condition._replace(guidance=t if self.network.guidance_embeds else None)
