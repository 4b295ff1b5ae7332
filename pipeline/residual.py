"""A regressor under a model that draws what it leaves: stochastic refinement (Whang et al. 2022)."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.network import Condition, Network
from storage.weights import digest

ALIKE = ("in_channels", "text_dim", "pooled_dim", "sample_size", "picture_channels", "level_embeds", "text_mask")


class Residual(NamedTuple):
    """Latents x0 as r = (x0 − mean)·scale, each (B, C, H, W). Without arguments r is x0."""

    mean: Tensor | float = 0.0
    scale: float = 1.0

    def of(self, x0: Tensor) -> Tensor:
        """The scaled residual of latents."""
        return (x0 - self.mean) * self.scale

    def whole(self, residual: Tensor) -> Tensor:
        """The latents of a scaled residual."""
        return self.mean + residual / self.scale


class Regressor:
    """A network that gives the mean of all latents that a condition allows; a model draws the scaled residual.

    Args:
        network: learned x0 from noise alone. It is shown zeros, the mean of the noise.
        scale: of the residual, one over its standard deviation: a model draws latents of unit variance.

    Attributes:
        measured: whether a training measured the scale; that of a checkpoint then replaces it.

    Raises:
        ValueError: the scale is no positive number.
    """

    def __init__(self, network: Network, scale: float = 1.0) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"the scale of a residual must be a positive number, got {scale}")
        self.network, self.scale, self.measured = network.eval().requires_grad_(False), scale, False

    def check(self, network: Network) -> None:
        """ValueError, in one line, if it does not give the mean of the latents that this network draws."""
        for name in ALIKE:
            own, other = getattr(self.network, name), getattr(network, name)
            if own != other:
                raise ValueError(f"the regressor's {name} is {own}, and the network's {other}: make them equal")
        if self.network.out_channels != self.network.in_channels:
            raise ValueError("the regressor has learned a variance or codes: take one that learned X0 alone")
        if network.unit % self.network.unit or (self.network.largest or math.inf) < (network.largest or math.inf):
            raise ValueError("the regressor does not give all sizes that the network draws: take one of its sizes")
        if not network.picture_channels:
            raise ValueError("a regressor works from a picture, and this network from none: set its picture_channels")
        if self.network.two_times or self.network.guidance_embeds:
            raise ValueError("the regressor takes two times or a guidance: take one that learned X0 alone")

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the residual depends on except picture and condition, as JSON."""
        return {"weights": digest(self.network.state_dict()), "scale": self.scale}

    @torch.no_grad()
    def residual(self, condition: Condition, size: torch.Size) -> Residual:
        """The residual under a condition, for latents of size (B, C, H, W). It is computed in float32."""
        device = condition.pooled.device
        z, t = torch.zeros(size, device=device), torch.ones(size[0], device=device)
        with torch.autocast(device.type, enabled=False):
            return Residual(self.network(z, t, condition._replace(guidance=None)).float(), self.scale)
