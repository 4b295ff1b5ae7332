"""The reverse step of a noising chain: its exact posterior, and a variance that the network learns."""

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from flow.path import Discrete, Path, expand_as


class Posterior(NamedTuple):
    """q(z_s | z_t, x0) = N(a_s·x0 + √(b_s² − small)·ε, small), for s < t (Ho et al. 2020, eqs. 6–7).

    Each has t's shape, float64.
    """

    small: Tensor  # β̃, the posterior's variance
    large: Tensor  # β, the variance of the forward step from s to t
    gain: Tensor  # of x0 in the mean, z_t held fixed


def posterior(path: Path, t: Tensor, s: Tensor) -> Posterior:
    """The posterior of the step from t back to s, on any path: s need not be t's neighbour.

    With α = a_t/a_s: β = b_t² − α²·b_s² and β̃ = β·b_s²/b_t².
    """
    (a_t, b_t), (a_s, b_s) = path(t.double()), path(s.double())
    large = b_t**2 - (a_t / a_s * b_s) ** 2
    return Posterior(large * b_s**2 / b_t**2, large, a_s * large / b_t**2)


def interpolated(posterior: Posterior, output: Tensor) -> Tensor:
    """ln Σ = v·ln β + (1 − v)·ln β̃ with v = (output + 1)/2 (Nichol & Dhariwal 2021, eq. 15), of output's shape."""
    low, high = (expand_as(x.log(), output) for x in (posterior.small, posterior.large))
    v = (output + 1) / 2
    return v * high + (1 - v) * low


@final
class LearnedVariance:
    """Trains the second half of the network's output: λ·L_vlb, with the mean held fixed (Nichol & Dhariwal 2021, §3.1).

    Args:
        weight: λ, of the whole chain's variational bound in bits per dimension, on top of the mean's own loss.
    """

    def __init__(self, weight: float = 1e-3) -> None:
        if weight <= 0:
            raise ValueError(f"LearnedVariance needs weight > 0, got {weight}")
        self.weight = weight

    def loss(self, path: Discrete, x0: Tensor, estimate: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """λ·T times step n's term of the bound: KL of the posteriors, or −ln N(x0; x̂0, Σ) at n = 1.

        β̃ is zero at n = 1; as in their code that of n = 2 bounds the variance there.

        Args:
            path: the chain, of T steps.
            x0: pictures, (B, …).
            estimate: x̂0, (B, …); no gradient flows into it.
            output: the network's second half, (B, …).
            t: times n/T with n ≥ 1, (B,).

        Returns:
            (B,), in bits per dimension.
        """
        steps = path.steps
        n = (t.double() * steps).round()
        exact = posterior(path, n / steps, (n - 1) / steps)
        second = torch.full_like(n, 2 / steps)
        bound = torch.where(n == 1, posterior(path, second, second / 2).small, exact.small)
        log_variance = interpolated(exact._replace(small=bound), output)
        error = expand_as(exact.gain, x0) * (x0 - estimate.detach())
        log_true = expand_as(bound.log(), x0)
        kl = (log_variance - log_true - 1 + (log_true - log_variance).exp() + error**2 * (-log_variance).exp()) / 2
        nll = (math.log(2 * math.pi) + log_variance + error**2 * (-log_variance).exp()) / 2
        term = torch.where(expand_as(n == 1, x0).bool(), nll, kl)
        return self.weight * steps / math.log(2) * term.flatten(1).mean(1)
