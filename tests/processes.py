"""The paths and targets that the tests of flow/ go through, and what pytest calls them."""

import torch

from flow.path import (
    EDM,
    Cosine,
    DDPMLinear,
    Discrete,
    ImprovedCosine,
    LDMLinear,
    RectifiedFlow,
    VariancePreserving,
    ZeroTerminalSNR,
)
from flow.target import X0, Epsilon, Preconditioned, V, Velocity

CONTINUOUS = [
    RectifiedFlow(),
    Cosine(),
    EDM(),
    EDM(0.0, 0.6),
    EDM(-0.5, 1.2, 1.0),
    VariancePreserving(),
    VariancePreserving(sub=True),
]
CHAINS = [DDPMLinear(), LDMLinear(), ImprovedCosine(), ZeroTerminalSNR(LDMLinear()), ZeroTerminalSNR(ImprovedCosine())]
PATHS = CONTINUOUS + CHAINS
PRESERVING = [
    p for p in PATHS if not isinstance(p, (RectifiedFlow, EDM)) and not getattr(p, "sub", False)
]  # a² + b² = 1
TARGETS = [Epsilon(), X0(), V(), Velocity(), Preconditioned(), Preconditioned(1.0)]
PAIRS = [(p, t) for p in PATHS for t in TARGETS if not (isinstance(p, Discrete) and isinstance(t, Velocity))]
TIMES = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)  # inside (0, 1), and a multiple of 1/1000
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


def name(thing: object) -> str:
    if isinstance(thing, ZeroTerminalSNR):
        return f"ZeroTerminalSNR-{name(thing.path)}"
    if isinstance(thing, EDM):
        return f"EDM({thing.mean},{thing.std},{thing.sigma_data})"
    if isinstance(thing, VariancePreserving):
        return "sub-VP" if thing.sub else "VP"
    if isinstance(thing, Preconditioned):
        return f"Preconditioned({thing.sigma_data})"
    return type(thing).__name__


def pair(thing: object) -> str:
    return "-".join(map(name, thing)) if isinstance(thing, tuple) else name(thing)
