"""Likelihoods: of a flow exactly, along its ODE; of a chain and of an autoencoder by their variational bounds."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal

from flow.path import Discrete, Path
from flow.reference import solutions
from flow.sampler import Denoiser
from flow.variance import divergence, learned_log_variance, step_posterior

Field = Callable[[Tensor], Tensor]  # w (B, D) → v (B, D)


def exact_trace(field: Field, w: Tensor) -> tuple[Tensor, Tensor]:
    """v(w) (B, D) and its divergence (B,): one vector–Jacobian product for each of the D numbers."""
    v, pull = torch.func.vjp(field, w)[:2]
    divergence = torch.zeros_like(w[:, 0])
    for i in range(w.shape[1]):
        unit = torch.zeros_like(v)
        unit[:, i] = 1
        divergence = divergence + pull(unit)[0][:, i]
    return v, divergence


def hutchinson(probe: Tensor) -> Callable[[Field, Tensor], tuple[Tensor, Tensor]]:
    """As `exact_trace`, but the unbiased estimate ηᵀ·J·η (Hutchinson 1990) with one product.

    Args:
        probe: η, random signs (B, D). It stays the same during one solve, or the error control would follow its noise.
    """

    def trace(field: Field, w: Tensor) -> tuple[Tensor, Tensor]:
        v, pull = torch.func.vjp(field, w)[:2]
        return v, (pull(probe.to(v))[0] * probe).sum(1)

    return trace


def log_likelihood(
    denoise: Denoiser, path: Path, x0: Tensor, probe: Tensor | None = None, tolerance: float = 1e-5
) -> Tensor:
    """ln p(x0) under the ODE of a model, in nats, (B,) float64.

    In w = z/(a + b) and τ = b/(a + b), in which every path is a straight line, dw/dτ = ε̂ − x̂0 and
    ln p(x0) = ln p₁(w₁) + ∫ div_w(ε̂ − x̂0) dτ (Chen et al. 2018, eq. 8; Song et al. 2021, appendix D.2), solved by
    `flow.reference`. w₁ is the noise, or on a path that does not end in noise alone nearly so.

    Args:
        denoise: estimates picture and noise at any z and time; differentiable by z.
        path: a continuous path.
        x0: (B, …).
        probe: random signs of x0's shape for Hutchinson's estimate of the divergence; none computes it exactly.
        tolerance: of a step, as in `flow.reference`.

    Raises:
        ValueError: the path is discrete, the model's output does not determine picture and noise at one of the ends,
            or the steps become too small.

    Example:
        >>> from flow.objective import Estimate
        >>> from flow.path import RectifiedFlow
        >>> def denoise(z, t):  # the data is N(0, 1)
        ...     return Estimate((1 - t) * z / (t**2 + (1 - t) ** 2), t * z / (t**2 + (1 - t) ** 2))
        >>> x0 = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> print([f"{value:.4f}" for value in log_likelihood(denoise, RectifiedFlow(), x0)])  # −½·ln(2π) − x²/2
        ['-0.9189', '-1.4189']
    """
    shape = x0.shape
    trace = exact_trace if probe is None else hutchinson(probe.flatten(1))

    def slope(tau: float, state: Tensor) -> Tensor:
        t = path.time(torch.tensor(tau, dtype=torch.float64))
        a, b = path(t)

        def field(w: Tensor) -> Tensor:
            estimate = denoise((a + b) * w.view(shape), t)
            return (estimate.noise - estimate.x0).flatten(1)

        v, divergence = trace(field, state[:, :-1])
        if not v.isfinite().all():
            raise ValueError(f"the model's output does not give a finite picture and noise at t = {t:g}: "
                             "train on V, say")  # fmt: skip
        return torch.cat([v, divergence[:, None]], 1).detach()

    w = x0.double().flatten(1)
    start = torch.cat([w, torch.zeros_like(w[:, :1])], 1)
    a, b = (c.item() for c in path(torch.ones((), dtype=torch.float64)))
    ((end, _),) = solutions(slope, start, (0.0, b / (a + b)), tolerance)
    std = math.hypot(a, b) / (a + b)  # of w at t = 1, for data of unit variance
    return end[:, -1] + Normal(0.0, std).log_prob(end[:, :-1]).sum(1)


def bits_per_dimension(log_density: Tensor, dimensions: int, width: float) -> Tensor:
    """Bits for one number of a picture with discrete levels, from ln p of the picture after uniform dequantisation.

    −(ln p + D·ln width) / (D·ln 2), an upper bound of the discrete code's length (Theis et al. 2016, §3.1).

    Args:
        log_density: ln p, (B,).
        dimensions: D.
        width: distance of two levels in the units of p.

    Example:
        Eight bits, uniform on [−1, 1]:

        >>> bits_per_dimension(torch.tensor([-3 * math.log(2)]), 3, 2 / 256)
        tensor([8.])
    """
    return -(log_density / dimensions + math.log(width)) / math.log(2)


def discretised(x0: Tensor, mean: Tensor, log_variance: Tensor, width: float, low: float, high: float) -> Tensor:
    """ln P of levels under a normal distribution: the mass within half a `width` of each (Ho et al. 2020, eq. 13).

    The lowest and the highest level, at `low` and `high`, have the tails. Result: (B,), summed over a picture.

    Example:
        All levels together have the mass 1:

        >>> levels = torch.linspace(-1, 1, 17, dtype=torch.float64)[:, None]
        >>> zero = torch.zeros_like(levels)
        >>> print(f"{discretised(levels, zero + 0.3, zero - 2, 1 / 8, -1.0, 1.0).exp().sum():.6f}")
        1.000000
    """
    scale = (log_variance / 2).exp()
    above, below = ((x0 - mean + sign * width / 2) / scale for sign in (1, -1))
    infinite = torch.full_like(above, math.inf)
    above = torch.where(x0 >= high - width / 4, infinite, above)
    below = torch.where(x0 <= low + width / 4, -infinite, below)
    flip = below > 0  # Φ(b) − Φ(a) of two large numbers is that of their negatives, without cancellation
    above, below = torch.where(flip, -below, above), torch.where(flip, -above, below)
    upper, lower = torch.special.log_ndtr(above), torch.special.log_ndtr(below)
    return (upper + torch.log1p(-(lower - upper).exp().clamp(max=1 - 1e-12))).flatten(1).sum(1)


def variational_bound(
    denoise: Denoiser,
    path: Path,
    x0: Tensor,
    noise: Callable[[], Tensor],
    width: float,
    ends: tuple[float, float],
) -> Tensor:
    """The bound on −ln P(x0) of a chain, in nats, all T terms (Ho et al. 2020, eq. 5): (3, B) float64.

    The rows are the divergence of the noise from its prior, the sum of the divergences of the steps n = T … 2, and
    −ln P(x0 | z_1). A step's variance is β̃, at n = 1 that of n = 2, or what the model has learned. Estimates are not
    clipped.

    Args:
        denoise: estimates picture and noise, and the variance if the model has learned one.
        path: a chain.
        x0: pictures of discrete levels, (B, …).
        noise: a fresh standard normal of x0's shape at each call: z_n of each term.
        width: distance of two levels.
        ends: the lowest and the highest level.

    Raises:
        ValueError: the path is continuous.
    """
    if not isinstance(path, Discrete):
        raise ValueError(f"the bound needs a chain, and {type(path).__name__} is continuous: take log_likelihood")
    x0 = x0.double()
    a, b = path(torch.ones((), dtype=torch.float64))
    prior = ((a * x0).square() + b**2 - 1 - 2 * b.log()).flatten(1).sum(1) / 2
    total = torch.zeros_like(prior)
    for n in torch.arange(path.steps, 0, -1, dtype=torch.float64, device="cpu"):
        t = n / path.steps
        a, b = path(t)
        z = a * x0 + b * noise().double()
        estimate = denoise(z, t)
        exact = step_posterior(path, n)
        log_variance = exact.small.log()
        if estimate.variance is not None:
            log_variance = learned_log_variance(exact, estimate.variance.double())
        if n == 1:
            last = -discretised(x0, estimate.x0.double(), log_variance, width, *ends)
        else:
            error = exact.x0_coefficient * (x0 - estimate.x0.double())
            total = total + divergence(exact.small.log(), log_variance, error).flatten(1).sum(1)
    return torch.stack([prior, total, last])


def continuous_bound(
    denoise: Denoiser,
    path: Path,
    x0: Tensor,
    noise: Callable[[], Tensor],
    log_variances: tuple[float, float] = (-9.2, 9.2),
    points: int = 128,
) -> Tensor:
    """The bound on −ln p(x0) of a continuous path, in nats, (B,) float64 (VDM, Kingma et al. 2021).

    With γ = ln(b²/a²) it is ½·∫ E‖ε − ε̂‖² dγ, whatever the path, plus the divergence of z from N(0, I) at the upper
    end, plus the entropy of the noise at the lower end. For an exact denoiser it is −ln p(x0) itself.

    Args:
        denoise: estimates picture and noise.
        path: a continuous path.
        x0: (B, …).
        noise: a fresh standard normal of x0's shape at each call: ε of each point.
        log_variances: the two ends of γ; −9.2 and 9.2 are b/a = 0.01 and 100.
        points: of the midpoint rule.

    Raises:
        ValueError: the path is discrete.
    """
    if isinstance(path, Discrete):
        raise ValueError(f"the integral needs a continuous path, and {type(path).__name__} is a chain: "
                         "take variational_bound")  # fmt: skip
    x0 = x0.double()
    first, last = log_variances
    total = torch.zeros_like(x0.flatten(1)[:, 0])
    for point in range(points):
        ratio = math.exp((first + (point + 0.5) / points * (last - first)) / 2)  # b/a
        t = path.time(torch.tensor(ratio / (1 + ratio), dtype=torch.float64))
        a, b = path(t)
        drawn = noise().double()
        error = drawn - denoise(a * x0 + b * drawn, t).noise.double()
        total = total + error.square().flatten(1).sum(1) * (last - first) / points / 2
    share = 1 / (1 + math.exp(last))  # of the picture in the variance of z, for data of unit variance
    prior = ((share * x0**2 - share - math.log1p(-share)) / 2).flatten(1).sum(1)
    return total + prior + x0[0].numel() / 2 * (math.log(2 * math.pi * math.e) + first)


def log_weights(
    mean: Tensor, log_variance: Tensor, log_likelihood: Callable[[Tensor], Tensor], noise: Callable[[], Tensor], k: int
) -> Tensor:
    """ln p(x | z)·p(z)/q(z | x), k draws of z from an autoencoder's posterior q(z | x), with p(z) = N(0, I): (k, B).

    Their mean is the evidence lower bound, the ELBO (Kingma & Welling 2014, eq. 2), in nats.

    Args:
        mean: of the posterior, (B, …).
        log_variance: of the posterior, (B, …).
        log_likelihood: z (B, …) → ln p(x | z), (B,).
        noise: a fresh standard normal of z's shape at each call.
        k: number of draws.
    """
    found = []
    for _ in range(k):
        drawn = noise()
        z = mean + (log_variance / 2).exp() * drawn
        log_ratio = (drawn**2 + log_variance - z**2) / 2  # ln p(z) − ln q(z | x), number by number
        found.append(log_likelihood(z) + log_ratio.flatten(1).sum(1))
    return torch.stack(found)


def importance_weighted(log_weights: Tensor, k: int) -> Tensor:
    """The importance-weighted bound of k draws (IWAE, Burda et al. 2016), in nats, (B,): the mean over groups of k.

    1 gives the ELBO. It never falls when groups are joined.

    Args:
        log_weights: of `log_weights`, (K, B).
        k: draws in a group, a divisor of K.

    Raises:
        ValueError: k does not divide K.

    Example:
        >>> log_weights = torch.tensor([[0.0], [2.0], [1.0], [1.0]])
        >>> print([f"{importance_weighted(log_weights, k).item():.3f}" for k in (1, 2, 4)])
        ['1.000', '1.217', '1.240']
    """
    if k < 1 or len(log_weights) % k:
        raise ValueError(f"{len(log_weights)} draws cannot be divided into groups of {k}")
    groups = log_weights.unflatten(0, (-1, k))
    return (groups.logsumexp(1) - math.log(k)).mean(0)
