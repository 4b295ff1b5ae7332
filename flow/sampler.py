"""Samplers: pure functions of (denoiser, path, start, time grid). They know no network, guidance or text.

Every path is a straight line in w = z/(a + b) against τ = b/(a + b), with velocity dw/dτ = ε − x0. The general solvers
use these coordinates. On rectified flow they are z and t; at both ends of every path they are finite, unlike σ.

Times stay on the host, so that a sampler decides on them without waiting for the device that z is on. A stochastic
sampler takes its random numbers from `noise`, which returns a fresh standard normal of z's shape.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import Tensor

from flow.objective import Estimate
from flow.path import Discrete, Path, RectifiedFlow
from flow.variance import learned_log_variance, posterior

Denoiser = Callable[..., Estimate]  # (z (B, …), t ()) → estimate; `meanflow` also passes the step's end ()
Callback = Callable[[int, Tensor, Tensor], object]  # (steps done, z, x̂0)
Noise = Callable[[], Tensor]  # → (B, …) standard normal


def euler(denoise: Denoiser, path: Path, z: Tensor, grid: Tensor, callback: Callback | None = None) -> Tensor:
    """One evaluation per step: z_s = a(s)·x̂0 + b(s)·ε̂. First order.

    On the straight path this is Euler's method z + (s − t)·v; on a variance-preserving path it is DDIM with η = 0
    (Song et al. 2020, eq. 12).

    Args:
        denoise: estimates picture and noise.
        path: the path that z lives on.
        z: start at grid[0], (B, …) floating.
        grid: times in the order of the steps, (steps + 1,), on the host. The denoiser gets exactly these.
        callback: called after each step with (steps done, z, x̂0).

    Returns:
        z at grid[-1], (B, …).

    Example:
        >>> import torch
        >>> def denoise(z, t):  # all data is 3: the path is straight, so one step is exact
        ...     return Estimate(torch.full_like(z, 3.0), (z - (1 - t) * 3) / t)
        >>> euler(denoise, RectifiedFlow(), torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 0.0]))
        tensor([3., 3.])
    """
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        x0, noise, _ = denoise(z, t)
        a, b = path(s)
        z = a * x0 + b * noise
        if callback:
            callback(i, z, x0)
    return z


def meanflow(denoise: Denoiser, path: Path, z: Tensor, grid: Tensor, callback: Callback | None = None) -> Tensor:
    """Euler's method with average velocities, z_s = z − (t − s)·u(z, t, s): exact with any number of steps.

    For a network that takes both times, on rectified flow (Geng et al. 2025). Arguments and result as in `euler`, but
    the denoiser also gets the time at which the step ends.

    Example:
        >>> import torch
        >>> def denoise(z, t, s):  # all data is 3: average and instantaneous velocity are equal
        ...     return Estimate(torch.full_like(z, 3.0), (z - (1 - t) * 3) / t)
        >>> meanflow(denoise, RectifiedFlow(), torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 0.0]))
        tensor([3., 3.])
    """
    if not isinstance(path, RectifiedFlow):
        raise ValueError(f"meanflow needs RectifiedFlow, and the path is {type(path).__name__}: use euler")
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        x0, noise, _ = denoise(z, t, s)
        a, b = path(s)
        z = a * x0 + b * noise
        if callback:
            callback(i, z, x0)
    return z


def heun(denoise: Denoiser, path: Path, z: Tensor, grid: Tensor, callback: Callback | None = None) -> Tensor:
    """Heun's method in (w, τ): two evaluations per step, one in a last step to the data. Second order.

    Arguments and result as in `euler`.

    Example:
        >>> import torch
        >>> def denoise(z, t):  # the data is N(0, 1): the exact walk keeps z / √(a² + b²)
        ...     return Estimate((1 - t) * z / (t**2 + (1 - t) ** 2), t * z / (t**2 + (1 - t) ** 2))
        >>> z, grid = torch.ones(1, dtype=torch.float64), torch.linspace(1, 0.5, 65, dtype=torch.float64)
        >>> print(f"{heun(denoise, RectifiedFlow(), z, grid).item():.4f}")  # exact: √½
        0.7071
    """
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        (a, b), (a_s, b_s) = path(t), path(s)
        x0, noise, _ = denoise(z, t)
        step = b_s / (a_s + b_s) - b / (a + b)
        w, v = z / (a + b), noise - x0
        z = (a_s + b_s) * (w + step * v)
        if b_s > 0:
            x0, noise, _ = denoise(z, s)
            z = (a_s + b_s) * (w + step * (v + noise - x0) / 2)
        if callback:
            callback(i, z, x0)
    return z


def midpoint(denoise: Denoiser, path: Path, z: Tensor, grid: Tensor, callback: Callback | None = None) -> Tensor:
    """The midpoint method in (w, τ): two evaluations per step, on a continuous path. Second order.

    Arguments and result as in `euler`.

    Example:
        >>> import torch
        >>> def denoise(z, t):  # the data is N(0, 1): the exact walk keeps z / √(a² + b²)
        ...     return Estimate((1 - t) * z / (t**2 + (1 - t) ** 2), t * z / (t**2 + (1 - t) ** 2))
        >>> z, grid = torch.ones(1, dtype=torch.float64), torch.linspace(1, 0.5, 65, dtype=torch.float64)
        >>> print(f"{midpoint(denoise, RectifiedFlow(), z, grid).item():.4f}")  # exact: √½
        0.7071
    """
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        (a, b), (a_s, b_s) = path(t), path(s)
        step = b_s / (a_s + b_s) - b / (a + b)
        middle = path.time(b / (a + b) + step / 2)
        a_m, b_m = path(middle)
        x0, noise, _ = denoise(z, t)
        w = z / (a + b)
        x0, noise, _ = denoise((a_m + b_m) * (w + step / 2 * (noise - x0)), middle)
        z = (a_s + b_s) * (w + step * (noise - x0))
        if callback:
            callback(i, z, x0)
    return z


def dpmpp_2m(denoise: Denoiser, path: Path, z: Tensor, grid: Tensor, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M): one evaluation per step; keeps the last estimate (Lu et al. 2022b, algorithm 2). 2nd order.

    With h the step in ln(a/b), the picture is extrapolated to x0 + h/(2·h_last)·(x0 − x0_last), then DDIM's step is
    taken. It is first order where h or h_last is infinite: in the two steps from pure noise and in the one to the data.

    Arguments and result as in `euler`.

    Example:
        >>> import torch
        >>> def denoise(z, t):  # the data is N(0, 1): the exact walk keeps z / √(a² + b²)
        ...     return Estimate((1 - t) * z / (t**2 + (1 - t) ** 2), t * z / (t**2 + (1 - t) ** 2))
        >>> z, grid = torch.ones(1, dtype=torch.float64), torch.linspace(1, 0.5, 129, dtype=torch.float64)
        >>> print(f"{dpmpp_2m(denoise, RectifiedFlow(), z, grid).item():.4f}")  # exact: √½
        0.7071
    """
    last: tuple[Tensor, Tensor] | None = None  # x̂0 and h of the previous step
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        (a, b), (a_s, b_s) = path(t), path(s)
        x0, _, _ = denoise(z, t)
        h = (a_s / b_s).log() - (a / b).log()
        ahead = x0 if last is None or b_s == 0 else x0 + h / (2 * last[1]) * (x0 - last[0])
        z = b_s / b * z + (a_s - b_s / b * a) * ahead
        last = x0, h
        if callback:
            callback(i, z, x0)
    return z


def ddim(
    denoise: Denoiser,
    path: Path,
    z: Tensor,
    grid: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    *,
    eta: float = 0.0,
) -> Tensor:
    """DDIM: z_s = a_s·x̂0 + √(b_s² − σ²)·ε̂ + σ·n with σ² = η²·β̃ of the step (Song et al. 2020, eqs. 12 and 16).

    Other arguments and result as in `euler`, which is the case η = 0.

    Args:
        eta: η; 1 gives the variance of DDPM's posterior.

    Example:
        >>> import torch
        >>> def denoise(z, t):  # all data is 3, so any walk ends there
        ...     return Estimate(torch.full_like(z, 3.0), (z - (1 - t) * 3) / t)
        >>> z, grid = torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 0.5, 0.0])
        >>> ddim(denoise, RectifiedFlow(), z, grid, noise=lambda: torch.randn(2), eta=1.0)
        tensor([3., 3.])
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim needs 0 <= eta <= 1, got {eta}")
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        x0, e, _ = denoise(z, t)
        a, b = path(s)
        if eta:
            variance = eta**2 * posterior(path, t, s).small
            z = a * x0 + (b**2 - variance).clamp(min=0).sqrt() * e + variance.sqrt() * noise()
        else:
            z = a * x0 + b * e
        if callback:
            callback(i, z, x0)
    return z


def sde(
    denoise: Denoiser,
    path: Path,
    z: Tensor,
    grid: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    *,
    w: Literal["noise", "product", "sbdm"] = "noise",
    scale: float = 1.0,
) -> Tensor:
    """The reverse SDE by Euler–Maruyama: Euler's step, plus (t − s)·w·score and noise of variance 2·w·(t − s).

    Every w(t) ≥ 0 has the marginals of the ODE, and is chosen after the training (Ma et al. 2024, "SiT"). The
    score is −ε̂/b. `sbdm` is the w of the forward SDE, as in DDPM, on rectified flow t/(1 − t) (Song et al. 2021). A
    step from pure noise and the step to the data add none. First order. Few steps lose
    less variance than those of `ddim:eta=1`; very few of `sbdm` end with too much.

    Needs a continuous path. Other arguments and result as in `euler`.

    Args:
        w: b (noise), a·b (product), or b·ḃ − b²·ȧ/a (sbdm).
        scale: factor on w, ≥ 0; 0 is the ODE.

    Example:
        >>> import torch
        >>> def denoise(z, t):  # all data is 3, so any walk ends there
        ...     return Estimate(torch.full_like(z, 3.0), (z - (1 - t) * 3) / t)
        >>> z, grid = torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 0.5, 0.0])
        >>> sde(denoise, RectifiedFlow(), z, grid, noise=lambda: torch.randn(2))
        tensor([3., 3.])
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"sde needs scale >= 0, got {scale}")
    if isinstance(path, Discrete):
        raise ValueError(f"sde needs a continuous path, and {type(path).__name__} is discrete: use ddim:eta=1")
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        x0, e, _ = denoise(z, t)
        (a, b), (a_s, b_s) = path(t), path(s)
        z = a_s * x0 + b_s * e
        if a > 0 and s > 0 and scale:
            rate_a, rate_b = path.rate(t)
            strength = scale * {"noise": b, "product": a * b, "sbdm": b * rate_b - b**2 * rate_a / a}[w]
            z = z - (t - s) * strength / b * e + (2 * strength * (t - s)).sqrt() * noise()
        if callback:
            callback(i, z, x0)
    return z


def pc(
    denoise: Denoiser,
    path: Path,
    z: Tensor,
    grid: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    *,
    step: float = 0.1,
) -> Tensor:
    """Predictor and corrector: after Euler's step to s, one of Langevin dynamics there (Song et al. 2021, §4.2).

    z ← z + α/2·score + √α·n with α = step·b², as in `langevin`. The authors' signal-to-noise ratio r is step = 4·r²,
    about 0.1; a constant, as they average r over the batch, so that a picture would depend on its neighbours.
    Two evaluations per step, one in a last step to the data. Other arguments and result as in `euler`.

    Args:
        step: α/b², from 0 to below 2.

    Example:
        >>> import torch
        >>> def denoise(z, t):  # all data is 3, so any walk ends there
        ...     return Estimate(torch.full_like(z, 3.0), (z - (1 - t) * 3) / t)
        >>> z, grid = torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 0.5, 0.0])
        >>> pc(denoise, RectifiedFlow(), z, grid, noise=lambda: torch.randn(2))
        tensor([3., 3.])
    """
    if not 0 <= step < 2:
        raise ValueError(f"pc needs 0 <= step < 2, got {step}")
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        x0, e, _ = denoise(z, t)
        a, b = path(s)
        z = a * x0 + b * e
        if s > 0:
            _, e, _ = denoise(z, s)
            z = z - step / 2 * b * e + math.sqrt(step) * b * noise()
        if callback:
            callback(i, z, x0)
    return z


def ddpm(
    denoise: Denoiser,
    path: Path,
    z: Tensor,
    grid: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    *,
    variance: Literal["small", "large", "learned"] = "small",
) -> Tensor:
    """Ancestral sampling of a chain: the posterior's mean, then noise (Ho et al. 2020, algorithm 2).

    With fewer than T steps the chain is that of the grid's times (Nichol & Dhariwal 2021, §4). The step to the data
    adds no noise. `large` is the σ̂ of DDIM (Song et al. 2020, appendix D.3).

    Other arguments and result as in `euler`.

    Args:
        variance: β̃ (small), β (large), or the network's value between the two (learned).

    Example:
        >>> import torch
        >>> from flow.path import DDPMLinear
        >>> def denoise(z, t):  # all data is 3, so any walk ends there
        ...     a, b = DDPMLinear()(t)
        ...     return Estimate(torch.full_like(z, 3.0), (z - a * 3) / b)
        >>> z, grid = torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 0.5, 0.0])
        >>> ddpm(denoise, DDPMLinear(), z, grid, noise=lambda: torch.randn(2))
        tensor([3., 3.])
    """
    if not isinstance(path, Discrete):
        raise ValueError(f"ddpm needs a discrete path, and {type(path).__name__} is continuous: use ddim:eta=1")
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        x0, e, v = denoise(z, t)
        exact = posterior(path, t, s)
        a, b = path(s)
        z = a * x0 + (b**2 - exact.small).clamp(min=0).sqrt() * e
        if s > 0:
            if variance == "learned":
                if v is None:
                    raise ValueError("ddpm:variance=learned needs a model with learned variance: use small or large")
                z = z + (learned_log_variance(exact, v) / 2).exp() * noise()
            else:
                z = z + (exact.small if variance == "small" else exact.large).sqrt() * noise()
        if callback:
            callback(i, z, x0)
    return z


def edm(
    denoise: Denoiser,
    path: Path,
    z: Tensor,
    grid: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """EDM's sampler: Heun's method in σ = b/a, with noise added before each step (Karras et al. 2022, algorithm 2).

    x has the size of σ and loses it in few steps. It is therefore float64, as in the authors' code, and so is the z
    that the denoiser gets; the result has the type of the start.

    Needs a grid whose first σ is finite, and for churn a continuous path. Other arguments and result as in `euler`.

    Args:
        churn: S_churn. Each step uses S_churn/steps, at most √2 − 1, and ends at t = 1 at the latest; 0 gives the
            deterministic algorithm 1.
        churn_min: S_tmin, the smallest σ that gets new noise.
        churn_max: S_tmax, the largest.
        churn_noise: S_noise, the standard deviation of the new noise.

    Example:
        >>> import torch
        >>> def denoise(z, t):  # all data is 3: the path is straight in σ, so one step is exact
        ...     return Estimate(torch.full_like(z, 3.0), (z - (1 - t) * 3) / t)
        >>> z, grid = torch.tensor([-1.0, 2.0]), torch.tensor([0.75, 0.0])
        >>> edm(denoise, RectifiedFlow(), z, grid, noise=lambda: torch.randn(2))
        tensor([3., 3.])
    """
    if churn < 0 or churn_noise < 0:
        raise ValueError(f"edm needs churn >= 0 and churn_noise >= 0, got {churn} and {churn_noise}")
    x = _variance_exploding(path, z.double(), grid[0], "edm")
    last_a, last_b = path(grid.new_ones(()))
    most = last_b / last_a  # σ at t = 1, mostly infinite
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        (a, b), (a_s, b_s) = path(t), path(s)
        sigma, sigma_s = b / a, b_s / a_s
        gamma = min(churn / (len(grid) - 1), math.sqrt(2) - 1) if churn_min <= sigma <= churn_max else 0.0
        more = (sigma * (1 + gamma)).minimum(most)
        if more > sigma:
            x = x + (more**2 - sigma**2).sqrt() * churn_noise * noise()
            sigma, t = more, path.time(more / (1 + more))
            a, b = path(t)
        x0, e, _ = denoise(a * x, t)
        ahead = x + (sigma_s - sigma) * e
        if sigma_s > 0:
            x0, e_s, _ = denoise(a_s * ahead, s)
            ahead = x + (sigma_s - sigma) * (e + e_s) / 2
        x = ahead
        if callback:
            callback(i, (a_s * x).to(z.dtype), x0.to(z.dtype))
    return (path(grid[-1])[0] * x).to(z.dtype)


def langevin(
    denoise: Denoiser,
    path: Path,
    z: Tensor,
    grid: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    *,
    repeats: int = 20,
    step: float = 0.2,
) -> Tensor:
    """Annealed Langevin dynamics: at each level x ← x + α/2·score + √α·n (Song & Ermon 2019, algorithm 1).

    In x = z/a with σ = b/a, where the score is −ε̂/σ; α = step·σ², a constant share of the level's variance. The last
    level's estimate of the picture, not its noisy x, is the result (Jolicoeur-Martineau et al. 2020, §3.1).

    Needs a grid whose first σ is finite. Other arguments and result as in `euler`.

    Args:
        repeats: steps, and so network evaluations, at each level; too few do not mix.
        step: α/σ².

    Example:
        >>> import torch
        >>> def denoise(z, t):  # all data is 3, so any walk ends there
        ...     return Estimate(torch.full_like(z, 3.0), (z - (1 - t) * 3) / t)
        >>> z, grid = torch.tensor([-1.0, 2.0]), torch.tensor([0.75, 0.5, 0.0])
        >>> langevin(denoise, RectifiedFlow(), z, grid, noise=lambda: torch.randn(2))
        tensor([3., 3.])
    """
    if repeats < 1 or not 0 < step < 2:
        raise ValueError(f"langevin needs repeats >= 1 and 0 < step < 2, got {repeats} and {step}")
    x = _variance_exploding(path, z, grid[0], "langevin")
    for i, (t, s) in enumerate(pairwise(grid), start=1):
        a, b = path(t)
        a_s, b_s = path(s)
        sigma = b / a
        for _ in range(repeats):
            x0, e, _ = denoise(a * x, t)
            x = x - step / 2 * sigma * e + math.sqrt(step) * sigma * noise()
        if callback and i < len(grid) - 1:
            callback(i, a_s * x, x0)  # at the scale of the next level
    x0, e, _ = denoise(a * x, t)
    z = a_s * x0 + b_s * e
    if callback:
        callback(len(grid) - 1, z, x0)
    return z


def _variance_exploding(path: Path, z: Tensor, t: Tensor, name: str) -> Tensor:
    """z in variance-exploding coordinates, x0 + σ·ε; ValueError where σ is infinite."""
    a, _ = path(t)
    if a == 0:
        raise ValueError(f"{name} needs a finite first sigma, and this grid starts at pure noise: use karras spacing")
    return z / a
