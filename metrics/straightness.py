"""The straightness of a sampler's walk from noise to picture.

For any a and b, a path z = a·x₀ + b·ε becomes the line w = (1 − τ)·x₀ + τ·ε with w = z / (a + b), τ = b / (a + b).
Walks on different paths are compared in these coordinates. A walk is a list of n + 1 ≥ 2 states `w_i (B, …)` at `τ_i`.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def norms(x: Tensor) -> Tensor:
    """‖x‖₂ over all but the first dimension, `(B, …)` → `(B,)`, float64."""
    return torch.linalg.vector_norm(x.double().flatten(1), dim=1)


def path_length(w: Sequence[Tensor]) -> Tensor:
    """Returns Σ_i ‖w_{i+1} − w_i‖₂, `(B,)` float64: P. Esser et al., 2024, Table 6. At least ‖w_n − w_0‖₂.

    ValueError for fewer than two states.
    """
    if len(w) < 2:
        raise ValueError(f"a walk has two states or more, got {len(w)}")
    return torch.stack([norms(after.double() - before.double()) for before, after in pairwise(w)]).sum(dim=0)


def straightness(w: Sequence[Tensor], tau: Tensor) -> Tensor:
    """Returns S = Σ_i |Δτ_i| ‖(w_n − w_0) / (τ_n − τ_0) − Δw_i / Δτ_i‖², `(B,)` float64.

    X. Liu et al., "Flow Straight and Fast", 2022, section 2.2: S(Z) = ∫ E‖(Z₁ − Z₀) − Ż_t‖² dt, here for each picture
    and a walk of finite steps. S is 0 if and only if w is linear in τ: straight and at constant speed.

    `tau (n + 1,)` must rise or fall strictly. ValueError if it does not, or does not fit `w`.
    """
    if len(w) < 2 or tau.shape != (len(w),):
        raise ValueError(f"a walk has two states or more and one τ for each, got {len(w)} and τ {tuple(tau.shape)}")
    tau = tau.double()
    steps = tau.diff()
    if not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f"τ must rise or fall strictly, got {tau.tolist()}")
    chord = (w[-1].double() - w[0].double()) / (tau[-1] - tau[0])
    terms = [
        step.abs() * norms(chord - (after.double() - before.double()) / step).square()
        for step, (before, after) in zip(steps, pairwise(w), strict=True)
    ]
    return torch.stack(terms).sum(dim=0)
