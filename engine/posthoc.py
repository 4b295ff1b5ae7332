"""Averages of the weights whose width is chosen after training.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), §3 and appendix C.
A power-function average of the weights θ after t steps has the profile p:

    θ̂(t) = ∫₀ᵗ p(τ) θ(τ) dτ,    p_{t,γ}(τ) = (γ + 1) τ^γ / t^(γ+1) on [0, t],    width σ_rel = std(p) / t.

A few widths are tracked and stored as snapshots; an average of another width is a linear combination of these.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from storage.seal import check_seal
from storage.weights import Weights, check_tensors, open_file, write_tensors

WIDEST = 12**-0.5  # the width of the plain mean of all steps, γ = 0; wider ones would favour the start of training
TOLERANCE = 0.1  # largest error of a combination's profile, as a share of the profile's norm
NOISE = 1e-10  # share of a profile's squared norm; bounds the coefficients if many profiles are nearly equal


class Snapshot(NamedTuple):
    """An average at a step (counted from 1) with a width σ_rel (a share of the steps so far)."""

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

    The recursion is exactly the integral if the weights are θ(t) throughout (t − 1, t].
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


def coefficients(stored: Sequence[Snapshot], target: Snapshot) -> np.ndarray:
    """The x for which Σ xᵢ θ̂ᵢ is nearest to an average that was not stored: (stored,), float64.

    The paper's x = A⁻¹ b minimises ‖Σ xᵢ pᵢ − p‖ (A, b: inner products). Here also Σ xᵢ = 1: without it the weights
    come out too small or too large if few averages are stored. For a stored average x is one-hot.

    Raises:
        ValueError: the error is more than TOLERANCE of the target's profile; the message names the nearest width that
            can be made.
    """
    if not stored or len(set(stored)) < len(stored) or min(*stored, target).step < 1:
        raise ValueError("an average needs one or more stored averages, all different, of steps counted from 1")
    if target in stored:
        return np.eye(len(stored))[list(stored).index(target)]
    x, error = _nearest(stored, [target])
    if error[0] > TOLERANCE:
        others = [Snapshot(target.step, round(float(w), 4)) for w in np.geomspace(0.002, 0.288, 200)]
        possible = [s.width for s, e in zip(others, _nearest(stored, others)[1], strict=True) if e <= TOLERANCE]
        near = min(possible, key=lambda w: abs(math.log(w / target.width)), default=None)
        cure = "store more snapshots" if near is None else f"take width {near} instead"
        raise ValueError(
            f"an average of width {target.width} at step {target.step} cannot be made from {len(stored)} stored ones "
            f"(error {error[0]:.0%} of its profile): {cure}"
        )
    return x[:, 0]


def _nearest(stored: Sequence[Snapshot], targets: Sequence[Snapshot]) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (stored, targets), and the error of each target's profile as a share of its L2 norm (targets,)."""
    gram, products = inner_products(stored, stored), inner_products(stored, targets)
    scale = gram.diagonal() ** -0.5  # gives all profiles norm 1: early ones are far larger than late ones
    length = np.linalg.norm(scale)
    system = np.zeros((len(stored) + 1,) * 2)  # the last row is Σ x = 1, the last unknown its multiplier
    system[:-1, :-1] = gram * scale * scale[:, None] + NOISE * np.eye(len(stored))
    system[-1, :-1] = system[:-1, -1] = scale / length
    right = np.vstack([products * scale[:, None], np.full((1, len(targets)), 1 / length)])
    x = np.linalg.solve(system, right)[:-1] * scale[:, None]
    norms = inner_products(targets, targets).diagonal()  # squared, as the error
    error = (x * (gram @ x - 2 * products)).sum(0) + norms
    return x, np.sqrt(np.maximum(error, 0) / norms)


def write_snapshot(folder: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Writes folder/step-0001000.safetensors atomically, and makes the folder; replaces an older file.

    `averages` is width → parameter's name → float32 tensor on the CPU, the same parameters for each width. ValueError
    if it is not so, OSError as `weights.write_tensors`.
    """
    if step < 1 or len({frozenset(average) for average in averages.values()}) != 1:
        raise ValueError("a snapshot needs a step counted from 1 and averages of the same parameters for each width")
    tensors: dict[str, Tensor] = {}
    for wide, average in averages.items():
        exponent(wide)  # raises for a width that could not be read back
        tensors |= {f"{float(wide)}/{name}": tensor.contiguous() for name, tensor in average.items()}
    if other := {tensor.dtype for tensor in tensors.values()} - {torch.float32}:
        raise ValueError(f"averages are kept in float32, got {other.pop()}")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / f"step-{step:07d}.safetensors")


def snapshots(folder: Path) -> dict[int, Path]:
    """Step → file of all snapshots in a folder, steps ascending."""
    matches = ((re.fullmatch(r"step-([0-9]+)\.safetensors", file.name), file) for file in folder.glob("step-*"))
    return dict(sorted((int(match[1]), file) for match, file in matches if match))


def reconstruct(folder: Path, width: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of any width at a snapshot's step (None: the last), from all snapshots up to it.

    Parameter's name → float32 tensor on the CPU, summed in float64. A stored width comes back unchanged.

    Raises:
        FileNotFoundError: there are no snapshots.
        ValueError: none is of that step, one is damaged or has other names or shapes, or the width cannot be made.
    """
    files = snapshots(folder)
    if not files:
        raise FileNotFoundError(
            f"no snapshots of averages (step-0001000.safetensors, …) in {folder}: train with ema.widths"
        )
    last = max(files) if step is None else step
    if last not in files:
        near = sorted(sorted(files, key=lambda other: abs(other - last))[:2])
        raise ValueError(f"{folder} has no snapshot of step {last}: the nearest are of {' and '.join(map(str, near))}")
    opened = {taken: open_file(file) for taken, file in files.items() if taken <= last}
    shapes = {name: place.shape for name, place in opened[last].places.items()}
    for weights in opened.values():
        check_tensors(weights, shapes, f"the snapshot of step {last}")
    prefixes, names = _parts(opened[last])
    stored = [(taken, prefix) for taken in opened for prefix in prefixes]
    found = coefficients([Snapshot(taken, float(prefix)) for taken, prefix in stored], Snapshot(last, width))
    used = [(source, x) for source, x in zip(stored, found.tolist(), strict=True) if x]  # one file for a stored width
    for taken in {taken for (taken, _), _ in used}:
        check_seal(files[taken])
    result: dict[str, Tensor] = {}
    for name in names:
        total = torch.zeros(opened[last].shape(f"{prefixes[0]}/{name}"), dtype=torch.float64)
        for (taken, prefix), x in used:
            total.add_(opened[taken][f"{prefix}/{name}"], alpha=x)
        result[name] = total.float()
    return result


def _parts(weights: Weights) -> tuple[list[str], list[str]]:
    """A snapshot's widths, as written, and parameters' names; ValueError if it is not a snapshot."""
    prefixes, names = (sorted({full.partition("/")[part] for full in weights}) for part in (0, 2))
    numbers = all(re.fullmatch(r"0\.\d+|[\d.]+e-\d+", prefix) for prefix in prefixes)
    if not numbers or {f"{prefix}/{name}" for prefix in prefixes for name in names} != set(weights):
        raise ValueError(
            f"{weights.source} is no snapshot: name its tensors WIDTH/PARAMETER, every parameter for every width"
        )
    return prefixes, names
