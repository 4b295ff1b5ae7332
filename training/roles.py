"""The networks of a training step: how often a picture passes each, and with which precision."""

from typing import NamedTuple

from torch import Tensor

from engine.flops import forward_flops
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

    def passes(self, whole: bool) -> float:
        """All passes in units of a forward pass. The backward pass counts as two, or one unless `whole`: for a LoRA."""
        return (3 if whole else 2) * self.learned + self.frozen

    def forward_flops(self, z: Tensor, t: Tensor, condition: Condition) -> int:
        """FLOPs of one forward pass, with a guidance scale only if the network takes one."""
        guidance = t if self.network.guidance_embeds else None
        return forward_flops(self.network, z, t, condition._replace(guidance=guidance))
