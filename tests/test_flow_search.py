"""Searched time grids: against brute force, on other noise, and the command as it is called."""

import json
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from gaussians import GAUSSIAN, TWO, Mixture
from test_sample import refused
from torch import Tensor

import sample
from flow.grid import given, trailing
from flow.objective import Estimate, Objective
from flow.path import EDM, Cosine, LDMLinear, RectifiedFlow
from flow.path import Path as NoisePath
from flow.sampler import euler
from flow.search import Trajectory, cheapest, coordinate_search, costs, record
from flow.target import Epsilon
from pipeline import Pipeline
from pipeline.pairs import Captions
from pipeline.sampling import Sampling
from pipeline.times import GridSearch, Request

PATHS = [RectifiedFlow(), Cosine(), EDM(-0.5, 1.2, 1.0), LDMLinear()]


def normals(seed: int, count: int = 64) -> Tensor:
    return torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def walked(data: Mixture, path: NoisePath, fine: int, seed: int = 0) -> tuple[Trajectory, Tensor]:
    times = trailing(path, fine)
    return record(data.denoiser(path), path, normals(seed), times), times


def chains(fine: int, steps: int) -> list[list[int]]:
    return [[0, *inner, fine] for inner in combinations(range(1, fine), steps - 1)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_record_is_eulers_walk_in_straight_coordinates(path: NoisePath) -> None:
    (tau, states, slopes), times = walked(TWO, path, 6)
    a, b = path(times[-1])
    assert torch.equal(states[-1] * (a + b), euler(TWO.denoiser(path), path, normals(0), times))
    assert (states.shape, slopes.shape) == ((7, 64, 1), (6, 64, 1))
    for i in range(6):  # the same straight line on each path
        torch.testing.assert_close(states[i + 1], states[i] + (tau[i + 1] - tau[i]) * slopes[i])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
def test_the_programme_is_as_good_as_brute_force(data: Mixture, steps: int) -> None:
    tau, w, v = walked(data, RectifiedFlow(), 8)[0]

    def price(chain: Sequence[int]) -> float:  # by the definition, step by step
        jumps = [w[i] + (tau[j] - tau[i]) * v[i] - w[j] for i, j in pairwise(chain)]
        return float(sum(jump.square().sum(1).mean() for jump in jumps))

    found = cheapest(costs(Trajectory(tau, w, v)), steps)
    assert found == min(chains(8, steps), key=price)
    assert len(found) == steps + 1


def test_the_mean_over_batches_is_the_cost_of_all() -> None:
    whole = walked(TWO, RectifiedFlow(), 5)[0]
    parts = [Trajectory(whole.tau, whole.states[:, s], whole.slopes[:, s]) for s in (slice(0, 16), slice(16, 64))]
    torch.testing.assert_close(costs(whole), costs(parts[0]) / 4 + costs(parts[1]) * 3 / 4)


@pytest.mark.parametrize("steps", [0, 9])
def test_more_steps_than_fine_ones_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to the 8 of the fine walk, got {steps}"):
        cheapest(costs(walked(TWO, RectifiedFlow(), 8)[0]), steps)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_on_a_single_picture_every_step_costs_nothing(path: NoisePath) -> None:
    picture = torch.full((64, 1), 0.7, dtype=torch.float64)

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        a, b = path(t)
        return Estimate(picture, (z - a * picture) / b)

    cost = costs(record(denoise, path, normals(0), trailing(path, 8)))
    assert float(cost[cost.isfinite()].max()) < 1e-20
    assert int(cost.isfinite().sum()) == 8 * 9 / 2  # each step forward has a price, and no other


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("steps", [3, 4])
def test_searched_times_are_better_than_even_ones_on_other_noise(path: NoisePath, steps: int) -> None:
    """On a narrow Gaussian mixture, whose paths bend late; noise 0 to search on, noise 1 to test on."""
    data = Mixture([-0.6, 0.8], [0.05, 0.1], [0.4, 0.6])
    fine, times = walked(data, path, 32)
    ends = {seed: walked(data, path, 32, seed)[0].states[-1] for seed in (0, 1)}

    def error(grid: Tensor, seed: int) -> float:
        a, b = path(grid[-1])
        off = euler(data.denoiser(path), path, normals(seed), grid) / (a + b) - ends[seed]
        return float(off.square().mean().sqrt())

    found = cheapest(costs(fine), steps)
    refined = coordinate_search(lambda stops: error(times[list(stops)], 0), found)
    assert error(times[refined], 0) <= error(times[found], 0)
    assert error(times[refined], 1) < error(trailing(path, steps), 1)


def test_descent_ends_where_no_single_move_helps() -> None:
    goal = [0, 3, 17, 30, 32]

    def error(stops: Sequence[int]) -> float:
        return sum((i - j) ** 2 for i, j in zip(stops, goal, strict=True))

    assert coordinate_search(error, [0, 8, 16, 24, 32]) == goal
    assert coordinate_search(lambda stops: 0.0, [0, 8, 32]) == [0, 8, 32]
    assert coordinate_search(lambda stops: -stops[1], [0, 1, 2, 5, 6]) == [0, 1, 2, 5, 6]  # stops never meet


def test_given_times_are_those_written_and_the_last_is_added() -> None:
    assert given(RectifiedFlow(), 3, 3.0, times="1/0.83/0.4").tolist() == [1, 0.83, 0.4, 0]
    assert given(LDMLinear(), 2, times="0.9996/0.41").tolist() == [1, 0.41, 0]
    _, times = Sampling(steps=2, spacing="given:times=1/0.3").walk(Objective(shift=3.0))
    assert times.tolist() == [1, 0.3, 0]


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ("", "needs times, such as given:times=1/0.83/0.4, got ''"),
        ("1/much", "needs times"),
        ("1/0.5/0.2", "has 3 times for 2 steps"),
        ("1", "has 1 times"),
        ("0.5/0.5", "falling times"),
        ("0.3/0.5", "falling times"),
        ("1/0", "falling times"),
        ("1.1/0.5", "at most 1"),
        ("nan/0.5", "falling times"),
        ("1/nan", "falling times"),
        ("0.5004/0.5", "are not distinct on LDMLinear"),
        ("0.5/0.0004", "are not distinct on LDMLinear"),
    ],
)
def test_impossible_times_are_refused(times: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        Sampling(steps=2, spacing=f"given:times={times}").walk(Objective(LDMLinear(), Epsilon()))
    assert "\n" not in str(refusal.value)


def prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("the digit 3\nthe digit 4\n")
    return folder / "prompts.txt"


def test_the_command_finds_times_that_can_be_sampled(
    pipe: Pipeline, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "found.json"
    argv = ["grid", "--model", model, "--prompts", prompts(tmp_path), "--num", "8", "--fine", "8", "--batch-size", "3"]
    sample.main([str(arg) for arg in [*argv, "--steps", "2", "3", "--seed", "5", "--out", out]])
    shown = capsys.readouterr().out
    for row, steps in zip(json.loads(out.read_text())["found"], (2, 3), strict=True):
        assert row["steps"] == steps
        assert f"--sampler euler --steps {steps} --spacing {row['spacing']}" in shown.splitlines()
        assert all(f"{distance:10.4f}" in shown for distance in row["distance"].values())
        told = Sampling(steps=steps, guidance=2.0, spacing=row["spacing"])
        # walks 4 to 7 are those tested on, from the noise of seeds 9 to 12: as sampling draws them
        captions = Captions(["the digit 3", "the digit 4"], 5)
        noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(9, 13)])
        drawn = [captions[number] for number in range(4, 8)]
        ends = pipe.integrate(noise, drawn, told)
        fine = pipe.integrate(noise, drawn, Sampling(steps=8, guidance=2.0))
        distance = float((ends - fine).square().mean().sqrt())
        assert row["distance"]["searched"] == pytest.approx(distance, rel=1e-3)
    sample.main(
        ["--model", str(model), "--prompt", "a six", "--steps", "3", "--spacing", row["spacing"],
         "--out", str(tmp_path / "pictures")]
    )  # fmt: skip


def test_keeping_all_fine_steps_reproduces_the_fine_walk(pipe: Pipeline) -> None:
    request = Request((6,), 4, 6, 0, None, Sampling(guidance=1.0))
    (found,) = GridSearch(pipe, Captions(["the digit 3"]), request).run()
    assert found["distance"]["searched"] < 1e-4
    assert found["distance"]["own"] == 0
    assert found["distance"]["uniform"] > 0.01  # the model has a shift


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_a_chain_is_searched_among_its_own_times(pipe: Pipeline, spacing: str) -> None:
    chain = Pipeline(pipe.network, Objective(LDMLinear(), Epsilon()), pipe.codec, pipe.text)
    request = Request((2,), 4, 8, 0, None, Sampling(guidance=1.0, spacing=spacing))
    (found,) = GridSearch(chain, Captions(["the digit 3"]), request).run()
    _, times = Sampling(steps=2, spacing=found["spacing"]).walk(chain.objective)
    _, fine = Sampling(steps=8, spacing=spacing).walk(chain.objective)
    assert set(times.tolist()) <= set(fine.tolist())
    assert times[0] == fine[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--steps", "9", "--fine", "8"], "steps must be from 1 to the 8 of the reference walk, got 9: raise --fine"),
        (["--num", "1"], "num must be at least 2"),
        (["--num", "0"], "must be at least 1"),
        (["--sampler", "heun"], "searched for sampler euler, not for heun"),
        (["--skip-layers", "1"], "skip-layer guidance depends on the number of steps"),
        (["--spacing", "leading"], "needs a discrete path"),
        (["--prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
        (["--model", "nowhere"], "nowhere is no model folder"),
    ],
)
def test_bad_input_ends_in_one_line(
    argv: list[str], said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert said in refused(capsys, "grid", "--model", model, "--prompts", prompts(tmp_path), *argv)
