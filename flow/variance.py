"""The reverse step of a noising chain: its exact posterior, and a variance that the network learns."""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flow.density import Density
from flow.objective import Estimate, Field, Interval, Model, Objective, mean_of_places, output, output_at
from flow.path import Discrete, Path, expand_as
from flow.penalty import Penalty
from flow.target import Target, solve
from flow.weight import Weight


class Posterior(NamedTuple):
    """q(z_s | z_t, x0) = N(a_s·x0 + √(b_s² − small)·ε, small), for s < t (Ho et al. 2020, eqs. 6–7).

    Each has t's shape, float64.
    """

    small: Tensor  # β̃, the posterior's variance
    large: Tensor  # β, the variance of the forward step from s to t
    x0_coefficient: Tensor  # of x0 in the mean as a function of x0 and z_t


def posterior(path: Path, t: Tensor, s: Tensor) -> Posterior:
    """The posterior of the step from t to any s < t, on any path.

    With α = a_t/a_s: β = b_t² − α²·b_s² and β̃ = β·b_s²/b_t².
    """
    (a_t, b_t), (a_s, b_s) = path(t.double()), path(s.double())
    large = b_t**2 - (a_t / a_s * b_s) ** 2
    return Posterior(large * b_s**2 / b_t**2, large, a_s * large / b_t**2)


def step_posterior(path: Discrete, n: Tensor) -> Posterior:
    """The posterior of the step from n to n − 1 of a chain, for n (…) in 1 … T.

    β̃ is zero at n = 1; there it is the β̃ of n = 2, as in the code of Nichol & Dhariwal 2021.
    """
    n = n.double()
    exact = posterior(path, n / path.steps, (n - 1) / path.steps)
    second = torch.full_like(n, 2 / path.steps)
    return exact._replace(small=torch.where(n == 1, posterior(path, second, second / 2).small, exact.small))


def divergence(log_true: Tensor, log_variance: Tensor, error: Tensor) -> Tensor:
    """KL of normal distributions, number by number: of ln variance `log_true` from `log_variance`.

    Args:
        log_true: of the first.
        log_variance: of the second.
        error: difference of their means.
    """
    ratio = (log_true - log_variance).exp() + error**2 * (-log_variance).exp()
    return (log_variance - log_true - 1 + ratio) / 2


def learned_log_variance(posterior: Posterior, output: Tensor) -> Tensor:
    """ln Σ = v·ln β + (1 − v)·ln β̃ with v = (output + 1)/2 (Nichol & Dhariwal 2021, eq. 15), of output's shape."""
    low, high = (expand_as(x.log(), output) for x in (posterior.small, posterior.large))
    v = (output + 1) / 2
    return v * high + (1 - v) * low


class LearnedVariance(Objective):
    """Also learns the reverse step's variance, from the second half of the output: L_simple + λ·L_vlb.

    L_vlb has no gradient to the mean (Nichol & Dhariwal 2021, §3.1). The network has twice the output channels.

    Args:
        path: a discrete path.
        target: what the first half of the output predicts.
        density: distribution that training draws t from.
        weight: an extra factor on the loss of the first half at t; none means 1.
        shift: α of the resolution shift.
        shift_area: height × width of the latents that `shift` is for; none means one α for all.
        penalty: applied to each picture's mean square error in the first half; none means no penalty.
        vlb_weight: λ, the weight of the whole chain's variational bound in bits per dimension.

    Example:
        >>> from flow.path import DDPMLinear
        >>> from flow.target import Epsilon
        >>> LearnedVariance(DDPMLinear(), Epsilon()).outputs
        2
    """

    outputs: ClassVar[int] = 2
    path: Discrete

    def __init__(
        self,
        path: Path,
        target: Target | None = None,
        density: Density | None = None,
        weight: Weight | None = None,
        shift: float = 1.0,
        shift_area: int | None = None,
        penalty: Penalty | None = None,
        vlb_weight: float = 1e-3,
    ) -> None:
        if not isinstance(path, Discrete):
            raise ValueError(
                f"LearnedVariance needs a discrete path, such as ImprovedCosine, got {type(path).__name__}"
            )
        super().__init__(path, target, density, weight, shift, shift_area, penalty)
        if vlb_weight <= 0:
            raise ValueError(f"LearnedVariance needs vlb_weight > 0, got {vlb_weight}")
        self.vlb_weight = vlb_weight

    def loss(
        self,
        model: Model,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        condition: Any,
        interval: Interval | None = None,
        field: Field | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """As `Objective.loss`, plus λ·L_vlb."""
        z, target = self.point_and_target(x0, noise, t, condition, field)
        y, v = output(model, z, t, condition, interval.end if interval else None).chunk(2, dim=1)
        estimate, _ = solve(self.path, self.target, z, y, t)
        return self.error(y, target, t, loss_mask) + self.bound(x0.float(), estimate, v, t, loss_mask)

    def denoise(self, model: Model, z: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Estimate:
        """As `Objective.denoise`, with the output for the variance."""
        y, v = output_at(model, z, t, condition, end).chunk(2, dim=1)
        return Estimate(*solve(self.path, self.target, z, y, t), v)

    def describe(self) -> dict[str, Any]:
        """As `Objective.describe`, with the variance."""
        return super().describe() | {"variance": {"class": "LearnedVariance", "weight": self.vlb_weight}}

    def bound(self, x0: Tensor, estimate: Tensor, v: Tensor, t: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """λ·T times the term of step n in the bound: KL of the posteriors, or −ln N(x0; x̂0, Σ) at n = 1.

        Args:
            x0: pictures, (B, …).
            estimate: x̂0, (B, …); no gradient flows into it.
            v: the second half of the output, (B, …).
            t: times n/T with n ≥ 1, (B,).
            loss_mask: the weight of each place, (B, 1, H, W); none means 1.

        Returns:
            (B,), in bits per dimension.
        """
        steps = self.path.steps
        n = (t.double() * steps).round()
        exact = step_posterior(self.path, n)
        log_variance = learned_log_variance(exact, v)
        error = expand_as(exact.x0_coefficient, x0) * (x0 - estimate.detach())
        kl = divergence(expand_as(exact.small.log(), x0), log_variance, error)
        nll = (math.log(2 * math.pi) + log_variance + error**2 * (-log_variance).exp()) / 2
        term = torch.where(expand_as(n == 1, x0).bool(), nll, kl)
        return self.vlb_weight * steps / math.log(2) * mean_of_places(term, loss_mask)
