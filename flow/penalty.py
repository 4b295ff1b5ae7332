"""Penalties: robust functions of a picture's mean square error."""

import torch
from torch import Tensor


class Penalty:
    """ρ(m) = ((m + c²)^(1−p) − c^(2(1−p))) / (1 − p) of the mean square m; at p = 1 its limit ln(1 + m/c²).

    Its gradient is that of m times (m + c²)^(−p), so that pictures with a large error do not dominate the batch. p = 0
    is the mean square; p = ½ is twice the pseudo-Huber loss (Song & Dhariwal 2023; Lee et al. 2024); p = 1 has the
    gradient of MeanFlow's adaptive weight (Geng et al. 2025).

    Args:
        power: p, from 0 to 1.
        c: > 0 and at most 1; root mean square errors below about c are penalised like the mean square.
        decay: c falls with t as c^t, from 1 at the data to c at the noise (Khrapov et al. 2024, "exponential").
    """

    def __init__(self, power: float = 0.5, c: float = 1e-3, decay: bool = False) -> None:
        if not 0 <= power <= 1 or not 0 < c <= 1:
            raise ValueError(f"Penalty needs 0 <= power <= 1 and 0 < c <= 1, got {power} and {c}")
        self.power, self.c, self.decay = power, c, decay

    def __call__(self, square: Tensor, t: Tensor) -> Tensor:
        """ρ of mean squares (B,) at times t (B,)."""
        c2 = self.c ** (2 * t) if self.decay else torch.full_like(t, self.c**2)
        if self.power == 1:
            return torch.log1p(square / c2)
        rest = 1 - self.power
        return c2**rest * torch.expm1(rest * torch.log1p(square / c2)) / rest
