"""Averages whose width is chosen after training: the formulas, and averages made against averages tracked."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import posthoc
from engine.posthoc import Snapshot, coefficients, decay, exponent, inner_products, reconstruct, snapshots
from engine.posthoc import write_snapshot as write

STEPS = 1024
STORED = (0.05, 0.1)


def walk(drift: float = 0.0, start: float = 0.0) -> Tensor:
    """Weights (step, 300), float64, of a random walk with steps of 1e-3."""
    noise = torch.randn(STEPS, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return start + ((noise + drift) * 1e-3).cumsum(0)


def tracked(weights: Tensor, sigma: float) -> Tensor:
    """The average after every step, by the recursion, float64."""
    average, told = torch.full_like(weights[0], 1e6), []  # the first β is 0: whatever was there is forgotten
    for step, now in enumerate(weights, 1):
        average = torch.lerp(now, average, decay(step, exponent(sigma)))
        told.append(average)
    return torch.stack(told)


def store(folder: Path, weights: Tensor, every: int) -> None:
    averages = {sigma: tracked(weights, sigma).float() for sigma in STORED}
    for step in range(every, STEPS + 1, every):
        kept = {s: {"blocks.0.w": a[step - 1, :200].view(10, 20), "b": a[step - 1, 200:]} for s, a in averages.items()}
        write(folder, step, kept)


def flat(average: dict[str, Tensor]) -> Tensor:
    return torch.cat([average["blocks.0.w"].flatten(), average["b"]])


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_exponents_are_the_papers(sigma: float, gamma: float) -> None:
    assert exponent(sigma) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("sigma", [1e-3, 0.01, 0.05, 0.0777, 0.2, 0.2886])
def test_width_is_the_profiles_standard_deviation(sigma: float) -> None:
    gamma = exponent(sigma)
    assert posthoc.width(gamma) == pytest.approx(sigma, rel=1e-9)
    edges = np.linspace(0, 1, 200_001)
    mass, middle = np.diff(edges ** (gamma + 1)), (edges[1:] + edges[:-1]) / 2
    mean = (mass * middle).sum()
    assert math.sqrt((mass * (middle - mean) ** 2).sum()) == pytest.approx(sigma, rel=1e-4)
    assert exponent(posthoc.width(2.5)) == pytest.approx(2.5)


@pytest.mark.parametrize("sigma", [-0.1, 0.0, posthoc.WIDEST, 0.295, 1.0, math.nan])
def test_no_exponent_beyond_the_plain_mean(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"0\.2887"):
        exponent(sigma)
    assert posthoc.width(0.0) == pytest.approx(posthoc.WIDEST)


def test_recursion_is_the_integral() -> None:
    """With θ constant on (τ − 1, τ], ∫ p θ is Σ θ(τ) (τ^(γ+1) − (τ−1)^(γ+1)) / t^(γ+1)."""
    weights = walk(start=3.0)
    for sigma in (0.03, 0.1, 0.25):
        averages, power = tracked(weights, sigma), exponent(sigma) + 1
        for t in (1, 2, 37, STEPS):
            mass = torch.arange(t + 1, dtype=torch.float64).div(t).pow(power).diff()
            torch.testing.assert_close(averages[t - 1], mass @ weights[:t], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="counted from 1"):
        decay(0, 1.0)


@pytest.mark.parametrize(
    ("a", "b"),
    [((300, 0.05), (700, 0.1)), ((300, 0.1), (700, 0.05)), ((500, 0.2), (500, 0.03)), ((40, 0.28), (41, 0.28))],
)
def test_inner_product_is_the_integral(a: tuple[int, float], b: tuple[int, float]) -> None:
    nodes, mass = np.polynomial.legendre.leggauss(200)
    upper = min(a[0], b[0])  # beyond, one of them is 0
    tau, wanted = (nodes + 1) * upper / 2, mass * upper / 2
    for step, sigma in (a, b):
        gamma = exponent(sigma)
        wanted = wanted * (gamma + 1) * (tau / step) ** gamma / step
    ab, ba = inner_products([Snapshot(*a)], [Snapshot(*b)]), inner_products([Snapshot(*b)], [Snapshot(*a)])
    assert ab.item() == pytest.approx(wanted.sum(), rel=1e-6)
    assert ab.item() == pytest.approx(ba.item(), rel=1e-14)


def test_coefficients_are_the_nearest_of_those_that_sum_to_one() -> None:
    stored = [Snapshot(step, sigma) for step in (256, 512, 768, 1024) for sigma in STORED]
    wanted = Snapshot(1024, 0.07)
    x = coefficients(stored, wanted)
    assert x.sum() == pytest.approx(1, abs=1e-12)

    def missed(x: np.ndarray) -> float:
        return x @ inner_products(stored, stored) @ x - 2 * x @ inner_products(stored, [wanted])[:, 0]

    for seed in range(20):
        other = np.random.default_rng(seed).normal(size=8) * 1e-2
        assert missed(x + other - other.mean()) > missed(x)  # another combination that sums to one
    free = np.linalg.solve(inner_products(stored, stored), inner_products(stored, [wanted])[:, 0])
    assert abs(free.sum() - 1) > 0.005  # the reason to ask for it
    many = [Snapshot(16 * i, sigma) for i in range(1, 65) for sigma in STORED]
    free = np.linalg.solve(inner_products(many, many), inner_products(many, [wanted])[:, 0])
    np.testing.assert_allclose(coefficients(many, wanted), free, atol=1e-3)  # with many it asks for nothing more


@pytest.mark.parametrize("widths", [(0.03, 0.05, 0.1, 0.2), (0.05, 0.05 + 1e-9, 0.1)])
def test_many_averages_that_are_nearly_alike(widths: tuple[float, ...]) -> None:
    """The system is then singular in float64; coefficients in the thousands would add up float32 rounding."""
    stored = [Snapshot(8 * i, sigma) for i in range(1, 257) for sigma in widths]
    wanted, tau = Snapshot(2048, 0.07), np.arange(2049)
    x, mass = coefficients(stored, wanted), np.diff((tau / 2048) ** (exponent(0.07) + 1))
    profiles = [np.diff(np.minimum(tau / one.step, 1) ** (exponent(one.width) + 1)) for one in stored]
    assert np.linalg.norm(x @ np.array(profiles) - mass) < 1e-4 * np.linalg.norm(mass)
    assert abs(x).sum() < 10


def test_a_stored_average_is_itself(tmp_path: Path) -> None:
    stored = [Snapshot(step, sigma) for step in range(64, 1025, 64) for sigma in STORED]
    for i, one in enumerate(stored):
        assert coefficients(stored, one).tolist() == [float(j == i) for j in range(len(stored))]
    beside = coefficients(stored, Snapshot(1024, 0.1 + 1e-9))  # so does the system of equations itself
    np.testing.assert_allclose(beside, np.eye(32)[-1], atol=1e-5)
    weights = walk()
    store(tmp_path, weights, every=64)
    for step in (256, None):
        for sigma in STORED:
            assert torch.equal(
                flat(reconstruct(tmp_path, sigma, step)), tracked(weights, sigma)[(step or 0) - 1].float()
            )


@pytest.mark.parametrize(("sigma", "tolerance"), [(0.04, 4e-3), (0.07, 1e-3), (0.12, 5e-4), (0.2, 5e-3)])
def test_a_held_out_width_from_16_snapshots(tmp_path: Path, sigma: float, tolerance: float) -> None:
    """RMS error over the average's own RMS distance to the last weights."""
    weights = walk()
    store(tmp_path, weights, every=STEPS // 16)
    for step in (STEPS, STEPS // 2):
        wanted = tracked(weights, sigma)[step - 1]
        error = (flat(reconstruct(tmp_path, sigma, step)) - wanted).norm() / (wanted - weights[step - 1]).norm()
        assert error < (tolerance if step == STEPS else 12 * tolerance)  # half as many snapshots by then


def test_more_snapshots_come_nearer(tmp_path: Path) -> None:
    for name, weights in (("walk", walk()), ("drift", walk(drift=0.3, start=5.0))):
        wanted, errors = tracked(weights, 0.07)[-1], []
        for count in (1, 2, 4, 8, 16, 32):
            folder = tmp_path / name / str(count)
            store(folder, weights, every=STEPS // count)
            errors.append(float((flat(reconstruct(folder, 0.07)) - wanted).norm() / (wanted - weights[-1]).norm()))
        assert all(later < earlier for earlier, later in itertools.pairwise(errors))
        assert errors[-1] < 1e-2 * errors[0]


def test_weights_that_stand_still_stay(tmp_path: Path) -> None:
    still = torch.tensor([1.0, -2.0, 0.0])
    for step in (500, 1000):
        write(tmp_path, step, {sigma: {"w": still.clone()} for sigma in STORED})
    for sigma in (0.04, 0.07, 0.12):
        torch.testing.assert_close(reconstruct(tmp_path, sigma)["w"], still)


def test_sums_round_once(tmp_path: Path) -> None:
    store(tmp_path, walk(start=3.0), every=64)
    stored = [Snapshot(step, sigma) for step in snapshots(tmp_path) for sigma in STORED]
    parts = [load_file(snapshots(tmp_path)[one.step])[f"{one.width}/b"].double() for one in stored]
    wanted = torch.from_numpy(coefficients(stored, Snapshot(STEPS, 0.03))) @ torch.stack(parts)
    assert ((reconstruct(tmp_path, 0.03)["b"] - wanted) / wanted).abs().max() < 2**-24 * (1 + 1e-6)


def test_later_snapshots_do_not_count(tmp_path: Path) -> None:
    store(tmp_path, walk(), every=64)
    before = reconstruct(tmp_path, 0.07, step=512)
    for step, file in snapshots(tmp_path).items():
        if step > 512:
            file.write_bytes(b"nothing")
    assert torch.equal(flat(reconstruct(tmp_path, 0.07, step=512)), flat(before))


@pytest.mark.parametrize("sigma", [0.01, 0.02, 0.28])
def test_a_width_out_of_reach_is_refused_and_the_nearest_named(tmp_path: Path, sigma: float) -> None:
    store(tmp_path, walk(), every=STEPS // 8)
    with pytest.raises(ValueError, match=f"width {sigma}") as caught:
        reconstruct(tmp_path, sigma)
    assert "\n" not in str(caught.value)
    near = float(str(caught.value).split()[-2])
    assert min(sigma, 0.1) < near or max(sigma, 0.05) > near
    reconstruct(tmp_path, near)


def test_errors_of_steps_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no snapshots"):
        reconstruct(tmp_path / "absent", 0.07)
    store(tmp_path, walk(), every=256)
    for step, near in ((100, "256 and 512"), (300, "256 and 512"), (5000, "768 and 1024")):
        with pytest.raises(ValueError, match=f"no snapshot of step {step}: the nearest are of {near}"):
            reconstruct(tmp_path, 0.07, step)
    with pytest.raises(ValueError, match=r"0\.2887"):
        reconstruct(tmp_path, 0.5)


def test_bad_snapshots_are_refused(tmp_path: Path) -> None:
    store(tmp_path, walk(), every=256)
    good, victim = reconstruct(tmp_path, 0.07), snapshots(tmp_path)[512]
    content = victim.read_bytes()
    one = {f"{sigma}/b": torch.zeros(100) for sigma in STORED}
    shape = one | {f"{sigma}/blocks.0.w": torch.zeros(20, 10) for sigma in STORED}
    bad = {
        "truncated": lambda: victim.write_bytes(content[:-100]),
        "truncated or": lambda: victim.write_bytes(b""),
        "4 missing .*left over": lambda: save_file({"weight": torch.zeros(2)}, victim),
        "2 missing": lambda: save_file(one, victim),
        "mis-shaped": lambda: save_file(shape, victim),
    }
    for told, spoil in bad.items():
        spoil()
        with pytest.raises(ValueError, match=told) as caught:
            reconstruct(tmp_path, 0.07)
        assert "512" in str(caught.value)
        assert "\n" not in str(caught.value)
    victim.write_bytes(content)
    assert torch.equal(flat(reconstruct(tmp_path, 0.07)), flat(good))
    for names in (["w"], ["wide/w"], ["0.05/w", "0.1/v"]):
        folder = tmp_path / names[-1].replace("/", "-")
        folder.mkdir()
        save_file({name: torch.zeros(2) for name in names}, folder / "step-0000001.safetensors")
        with pytest.raises(ValueError, match="is no snapshot"):
            reconstruct(folder, 0.07)


def test_what_is_written(tmp_path: Path) -> None:
    strided = torch.arange(6.0).view(2, 3).T
    write(tmp_path / "new", 1000, {0.05: {"blocks.0.w": strided}, 0.1: {"blocks.0.w": strided + 1}})
    file = tmp_path / "new/step-0001000.safetensors"
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    header = json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert header["0.05/blocks.0.w"]["dtype"] == "F32"
    assert header.keys() - {"__metadata__"} == {"0.05/blocks.0.w", "0.1/blocks.0.w"}
    assert torch.equal(reconstruct(tmp_path / "new", 0.1)["blocks.0.w"], strided + 1)
    one = {"w": torch.zeros(2)}
    for step, averages, told in (
        (0, {0.05: one}, "counted from 1"),
        (1, {}, "averages"),
        (1, {0.05: one, 0.1: {"v": torch.zeros(2)}}, "same parameters"),
        (1, {0.05: {"w": torch.zeros(2, dtype=torch.bfloat16)}}, "float32"),
        (1, {0.5: one}, r"0\.2887"),
    ):
        with pytest.raises(ValueError, match=told):
            write(tmp_path, step, averages)
    assert not snapshots(tmp_path)


def test_a_changed_number_in_any_snapshot_that_is_used_is_refused(tmp_path: Path) -> None:
    for step in (500, 1000):
        write(tmp_path, step, {sigma: {"w": torch.ones(4)} for sigma in STORED})
    damaged = tmp_path / "step-0000500.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-0000500.safetensors is damaged"):
        reconstruct(tmp_path, 0.07)
    assert torch.equal(reconstruct(tmp_path, 0.1)["w"], torch.ones(4))  # is stored in the other file
