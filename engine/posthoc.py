"""Averages of the weights whose width is chosen after training.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), §3 and appendix C.
A power-function average of the weights θ after t steps has the profile p:

    θ̂(t) = ∫₀ᵗ p(τ) θ(τ) dτ,    p_{t,γ}(τ) = (γ + 1) τ^γ / t^(γ+1) on [0, t],    width σ_rel = std(p) / t.

A few are tracked and stored now and then; one of another width is then the linear combination of nearest profile.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from storage.weights import Weights, fit, open_file, write_tensors

WIDEST = 12**-0.5  # of the plain mean of all steps, γ = 0; wider ones would favour the start of training
TOLERANCE = 0.1  # of a profile's norm that a combination may miss
NOISE = 1e-10  # of a profile's squared norm; bounds the coefficients where many profiles are nearly alike


class Snapshot(NamedTuple):
    """An average at a step (counted from 1), of a width σ_rel (a share of the steps so far)."""

    step: int
    width: float


def exponent(width: float) -> float:
    """The γ of a σ_rel: the largest root of γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻² = 0. ValueError outside (0, 1/√12)."""
    if not 0 < width < WIDEST:
        raise ValueError(f"the width of an average must be above 0 and below 1/√12 = {WIDEST:.4f}, got {width}")
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())  # below WIDEST all three are real


def width(exponent: float) -> float:
    """The σ_rel of a γ ≥ 0: sqrt((γ + 1) / ((γ + 2)² (γ + 3)))."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def decay(step: int, exponent: float) -> float:
    """The β of θ̂ ← β θ̂ + (1 − β) θ at a step counted from 1: (1 − 1/t)^(γ+1), so 0 at the first.

    The recursion is the integral itself for weights that stay θ(t) all through (t − 1, t].
    """
    if step < 1:
        raise ValueError(f"steps of an average are counted from 1, got {step}")
    return float((1 - 1 / step) ** (exponent + 1))


def inner_products(rows: Sequence[Snapshot], columns: Sequence[Snapshot]) -> np.ndarray:
    """∫ p_a p_b dτ of the profiles a of the rows and b of the columns: (rows, columns), float64, per step.

    For t_a ≤ t_b it is (γ_a + 1)(γ_b + 1) / (γ_a + γ_b + 1) · (t_a / t_b)^γ_b / t_b.
    """
    (ta, ga), (tb, gb) = (np.array([(s.step, exponent(s.width)) for s in side], float).T for side in (rows, columns))
    ta, ga = ta[:, None], ga[:, None]
    early, late, power = np.minimum(ta, tb), np.maximum(ta, tb), np.where(ta <= tb, gb, ga)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * (early / late) ** power / late


def coefficients(stored: Sequence[Snapshot], wanted: Snapshot) -> np.ndarray:
    """The x with which Σ xᵢ θ̂ᵢ comes nearest to an average that was not stored: (stored,), float64.

    The paper's x = A⁻¹ b minimises ‖Σ xᵢ pᵢ − p‖ (A, b: inner products). Here Σ xᵢ = 1 is asked for as well: else the
    weights come out too small or too large where few averages are stored. A stored one is found exactly (one-hot).

    Raises:
        ValueError: if more than TOLERANCE of the wanted profile is missed, naming the nearest width that can be made.
    """
    if not stored or len(set(stored)) < len(stored) or min(*stored, wanted).step < 1:
        raise ValueError("an average is made of one or more stored ones, all different, of steps counted from 1")
    if wanted in stored:
        return np.eye(len(stored))[list(stored).index(wanted)]
    x, missed = _nearest(stored, [wanted])
    if missed[0] > TOLERANCE:
        others = [Snapshot(wanted.step, round(float(w), 4)) for w in np.geomspace(0.002, 0.288, 200)]
        can = [s.width for s, miss in zip(others, _nearest(stored, others)[1], strict=True) if miss <= TOLERANCE]
        near = min(can, key=lambda w: abs(math.log(w / wanted.width)), default="none")
        raise ValueError(
            f"an average of width {wanted.width} at step {wanted.step} cannot be made from {len(stored)} stored ones "
            f"({missed[0]:.0%} of its profile would be missed): {near} can"
        )
    return x[:, 0]


def _nearest(stored: Sequence[Snapshot], wanted: Sequence[Snapshot]) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (stored, wanted), and the share of each wanted profile's L2 norm that they miss (wanted,)."""
    gram, targets = inner_products(stored, stored), inner_products(stored, wanted)
    scale = gram.diagonal() ** -0.5  # makes all profiles of norm 1: early ones are far larger than late ones
    length = np.linalg.norm(scale)
    system = np.zeros((len(stored) + 1,) * 2)  # the last row asks for Σ x = 1, the last unknown is its multiplier
    system[:-1, :-1] = gram * scale * scale[:, None] + NOISE * np.eye(len(stored))
    system[-1, :-1] = system[:-1, -1] = scale / length
    right = np.vstack([targets * scale[:, None], np.full((1, len(wanted)), 1 / length)])
    x = np.linalg.solve(system, right)[:-1] * scale[:, None]
    norms = inner_products(wanted, wanted).diagonal()  # squared, as what is missed
    missed = (x * (gram @ x - 2 * targets)).sum(0) + norms
    return x, np.sqrt(np.maximum(missed, 0) / norms)


def write_snapshot(folder: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Writes folder/step-0001000.safetensors, whole or not at all, and the folder for it; replaces an older one.

    `averages` is width → parameter's name → float32 tensor on the CPU, the same parameters for each width; ValueError
    if it is not, OSError as `weights.write_tensors`.
    """
    if step < 1 or len({frozenset(average) for average in averages.values()}) != 1:
        raise ValueError("a snapshot needs a step counted from 1 and averages of the same parameters for each width")
    tensors: dict[str, Tensor] = {}
    for wide, average in averages.items():
        exponent(wide)  # refuses what would not be read back
        tensors |= {f"{float(wide)}/{name}": tensor.contiguous() for name, tensor in average.items()}
    if other := {tensor.dtype for tensor in tensors.values()} - {torch.float32}:
        raise ValueError(f"averages are kept in float32, got {other.pop()}")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / f"step-{step:07d}.safetensors")


def snapshots(folder: Path) -> dict[int, Path]:
    """Step → file of all snapshots in a folder, in their order."""
    matches = ((re.fullmatch(r"step-(\d+)\.safetensors", file.name), file) for file in folder.glob("step-*"))
    return dict(sorted((int(match[1]), file) for match, file in matches if match))


def reconstruct(folder: Path, width: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of any width at a snapshot's step (none: the last), from all snapshots up to there.

    Parameter's name → float32 tensor on the CPU, summed in float64. A stored width comes back to the bit.

    Raises:
        FileNotFoundError: if there are no snapshots.
        ValueError: if none is of that step, one is truncated or of other names or shapes, or the width is out of reach.
    """
    files = snapshots(folder)
    if not files:
        raise FileNotFoundError(f"no snapshots of averages (step-0001000.safetensors, …) in {folder}")
    at = max(files) if step is None else step
    if at not in files:
        near = sorted(sorted(files, key=lambda other: abs(other - at))[:2])
        raise ValueError(f"{folder} has no snapshot of step {at}: the nearest are of {' and '.join(map(str, near))}")
    opened = {taken: open_file(file) for taken, file in files.items() if taken <= at}
    for weights in opened.values():
        fit(weights, {name: place.shape for name, place in opened[at].places.items()}, f"the snapshot of step {at}")
    prefixes, names = _parts(opened[at])
    stored = [(taken, prefix) for taken in opened for prefix in prefixes]
    found = coefficients([Snapshot(taken, float(prefix)) for taken, prefix in stored], Snapshot(at, width))
    used = [(source, x) for source, x in zip(stored, found.tolist(), strict=True) if x]  # one file for a stored width
    result: dict[str, Tensor] = {}
    for name in names:
        total = torch.zeros(opened[at].shape(f"{prefixes[0]}/{name}"), dtype=torch.float64)
        for (taken, prefix), x in used:
            total.add_(opened[taken][f"{prefix}/{name}"], alpha=x)
        result[name] = total.float()
    return result


def _parts(weights: Weights) -> tuple[list[str], list[str]]:
    """A snapshot's widths, as written, and parameters; ValueError if it is no snapshot."""
    prefixes, names = (sorted({full.partition("/")[part] for full in weights}) for part in (0, 2))
    numbers = all(re.fullmatch(r"0\.\d+|[\d.]+e-\d+", prefix) for prefix in prefixes)
    if not numbers or {f"{prefix}/{name}" for prefix in prefixes for name in names} != set(weights):
        raise ValueError(f"{weights.source} is no snapshot: each tensor's name must be a width/parameter, all of each")
    return prefixes, names
