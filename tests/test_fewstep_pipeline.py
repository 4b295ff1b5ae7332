"""Pipelines of few steps: average velocities, learned guidance, and the path walked both ways."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from networks import stirred
from torch import Tensor

from data.latents import Pixels
from data.text.clip import CLIPText
from flow.grid import trailing
from flow.objective import Objective
from flow.path import Cosine, RectifiedFlow
from flow.target import Epsilon, V
from mmdit.model import Condition, MMDiT
from pipeline import Pipeline
from pipeline.sampling import Sampling

PROMPTS = ["a handwritten seven", "the digit 3", ""]
SEEDS = [4, 5, 6]


def made(text: CLIPText, objective: Objective | None = None, stir: float = 0.1, **more: float | bool) -> Pipeline:
    """A small pipeline with every weight random."""
    network = MMDiT(
        in_channels=1, depth=2, width=32, heads=2, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8,
        **more,
    )  # fmt: skip
    how = Sampling(steps=4, guidance=2.0)
    return Pipeline(stirred(network, stir), objective or Objective(shift=1.5), Pixels(1, 0.3, 2.66), text, how)


@pytest.fixture(scope="session")
def two(text: CLIPText) -> Pipeline:
    """Of two times."""
    return made(text, two_times=True)


@pytest.fixture(scope="session")
def taught(text: CLIPText) -> Pipeline:
    """Of learned guidance."""
    return made(text, guidance_embeds=True)


def way(pipe: Pipeline, **changes: object) -> Sampling:
    return replace(pipe.sampling, **changes)


def noise() -> Tensor:
    return torch.stack([torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])


@contextmanager
def evaluations(pipe: Pipeline) -> Iterator[list[int]]:
    """How many pictures each call of the network is of."""
    counts: list[int] = []
    handle = pipe.network.register_forward_pre_hook(lambda _, arguments: counts.append(len(arguments[0])))
    yield counts
    handle.remove()


def test_average_velocities_need_a_network_of_two_times(pipe: Pipeline, two: Pipeline, taught: Pipeline) -> None:
    for some in (pipe, taught):
        for ask in (some.plan, lambda how, some=some: some(PROMPTS, SEEDS, sampling=how)):
            with pytest.raises(ValueError, match="meanflow needs a network of two times") as refusal:
                ask(way(some, sampler="meanflow"))
            assert "\n" not in str(refusal.value)
        with pytest.raises(ValueError, match=r"two_times|two times"):
            some.integrate(noise(), PROMPTS, way(some, sampler="meanflow"))
    assert two(PROMPTS, SEEDS, sampling=way(two, sampler="meanflow")).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("objective", [Objective(Cosine(), V()), Objective(RectifiedFlow(), Epsilon())], ids=[0, 1])
def test_average_velocities_need_the_process_that_has_them(text: CLIPText, objective: Objective) -> None:
    how = Sampling(sampler="meanflow", steps=2)
    with pytest.raises(ValueError, match=r"with trailing spacing: .*(needs RectifiedFlow|does not determine)"):
        how.walk(objective)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_is_the_plain_loop_over_a_network_of_two_times(two: Pipeline, steps: int, guidance: float) -> None:
    """The sampler written out: the network is told where each step ends, in both branches of the guidance."""
    told, null = (Condition(*two.text.encode(prompts)) for prompts in (PROMPTS, [""] * 3))
    z = noise()
    for t, s in pairwise(trailing(RectifiedFlow(), steps, 1.5).tolist()):
        times = torch.full((3,), t), torch.full((3,), s)
        yes, no = (two.network(z, times[0], some, times[1]) for some in (told, null))
        z = z - (t - s) * (no + guidance * (yes - no))
    expected = (z / 2.66 + 0.3).clamp(0, 1)
    how = way(two, sampler="meanflow", steps=steps, guidance=guidance)
    with evaluations(two) as counts:
        torch.testing.assert_close(two(PROMPTS, SEEDS, sampling=how), expected, atol=1e-4, rtol=0)
    assert counts == [3 if guidance == 1 else 6] * steps
    euler = two(PROMPTS, SEEDS, sampling=replace(how, sampler="euler"))
    assert (euler - expected).abs().max() > 1e-3


def test_learned_guidance_takes_one_evaluation_a_step(pipe: Pipeline, taught: Pipeline) -> None:
    assert (pipe.network.guidance_embeds, taught.network.guidance_embeds) == (False, True)
    for guidance in (1.0, 4.0):
        with evaluations(taught) as counts:
            taught(PROMPTS, SEEDS, sampling=way(taught, guidance=guidance))
        assert counts == [3] * 4
        with evaluations(taught) as counts:
            taught(PROMPTS, SEEDS, sampling=way(taught, guidance=guidance, sampler="heun"))
        assert counts == [3] * 7
    with evaluations(pipe) as counts:
        pipe(PROMPTS, SEEDS, sampling=way(pipe, guidance=4.0))
    assert counts == [6] * 4


@torch.no_grad()
def test_learned_guidance_is_an_input_of_the_network(taught: Pipeline) -> None:
    text, pooled = taught.text.encode(PROMPTS)
    outs = []
    for guidance in (1.0, 2.0, 5.0):
        z = noise()
        condition = Condition(text, pooled, guidance=torch.full((3,), guidance))
        for t, s in pairwise(trailing(RectifiedFlow(), 4, 1.5).tolist()):
            z = z + (s - t) * taught.network(z, torch.full((3,), t), condition)
        outs.append(taught(PROMPTS, SEEDS, sampling=way(taught, guidance=guidance)))
        torch.testing.assert_close(outs[-1], (z / 2.66 + 0.3).clamp(0, 1), atol=1e-4, rtol=0)
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(outs))


def test_learned_guidance_can_be_learned_with_two_times(text: CLIPText) -> None:
    both = made(text, two_times=True, guidance_embeds=True)
    with evaluations(both) as counts:
        pictures = [both(PROMPTS, SEEDS, sampling=way(both, sampler="meanflow", steps=1, guidance=g)) for g in (1, 5)]
    assert counts == [3, 3]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes", [{"guider": "apg"}, {"rescale": 0.7}, {"interval": (0.2, 0.9)}, {"skip_layers": (1,)}], ids=str
)
def test_what_changes_guidance_cannot_change_a_learned_one(pipe: Pipeline, taught: Pipeline, changes: dict) -> None:
    how = way(taught, steps=10, skip_interval=(0.0, 1.0), **changes)
    with pytest.raises(ValueError, match="leave out guider, rescale, interval and skip_layers") as refusal:
        taught(PROMPTS, SEEDS, sampling=how)
    assert "\n" not in str(refusal.value)
    pipe.plan(how)


@pytest.mark.parametrize("more", [{"two_times": True}, {"guidance_embeds": True}, {"time_scale": 10.0}], ids=str)
def test_the_model_folder_gives_the_same_pictures(text: CLIPText, tmp_path: Path, more: dict) -> None:
    some = made(text, **more)
    some.save(tmp_path / "model")
    back = Pipeline.load(tmp_path / "model")
    how = way(some, steps=2, sampler="meanflow" if some.network.two_times else "euler")
    assert back.network.guidance_embeds == some.network.guidance_embeds
    assert torch.equal(back(PROMPTS, SEEDS, sampling=how), some(PROMPTS, SEEDS, sampling=how))


# The path, both ways.


@pytest.mark.parametrize(
    ("which", "sampler"),
    [("pipe", "euler"), ("pipe", "heun"), ("two", "euler"), ("two", "meanflow"), ("taught", "euler")],
)
def test_the_path_ends_where_a_picture_is_decoded(which: str, sampler: str, request: pytest.FixtureRequest) -> None:
    some: Pipeline = request.getfixturevalue(which)
    how = way(some, sampler=sampler, guidance=3.0)
    states: list[Tensor] = []
    pictures = some(PROMPTS, SEEDS, sampling=how, callback=lambda i, z, x0: states.append(z))
    ended = some.integrate(noise(), PROMPTS, how)
    torch.testing.assert_close(ended, states[-1])
    torch.testing.assert_close(some.codec.decode(ended), pictures)


def test_a_path_from_below_pure_noise_begins_with_its_own_variance(text: CLIPText) -> None:
    some = made(text, Objective())
    how = way(some, spacing="karras:sigma_max=3")
    ended = some.integrate(noise(), PROMPTS, how)
    torch.testing.assert_close(some.codec.decode(ended), some(PROMPTS, SEEDS, sampling=how))


def test_the_path_is_the_model_s_own_unless_told(pipe: Pipeline) -> None:
    torch.testing.assert_close(pipe.integrate(noise(), PROMPTS), pipe.integrate(noise(), PROMPTS, pipe.sampling))
    moved = pipe.integrate(noise(), PROMPTS) - pipe.integrate(noise(), PROMPTS, way(pipe, steps=5))
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("more", "sampler"),
    [({}, "heun"), ({}, "midpoint"), ({"guidance_embeds": True}, "heun"), ({"two_times": True}, "heun")],
    ids=str,
)
def test_backward_then_forward_is_where_it_began(text: CLIPText, more: dict, sampler: str) -> None:
    """To 3e-4 in 40 steps from standard normals; the error falls as a second-order method's, but for float32."""
    some = made(text, stir=0.05, time_scale=10.0, **more)
    start, off = noise(), []
    for steps in (10, 40):
        how = Sampling(steps=steps, guidance=2.0, sampler=sampler)
        turned = some.integrate(start, PROMPTS, how, backward=True)
        off.append((some.integrate(turned, PROMPTS, how) - start).abs().max().item())
        assert (turned - start).abs().max() > 0.1
    assert off[1] < 3e-4
    assert off[1] < off[0] / 6
    again = some.integrate(turned, PROMPTS, how)
    assert (some.integrate(turned, PROMPTS[1:] + PROMPTS[:1], how) - again).abs().max() > 1e-3  # prompts count


def test_backward_visits_the_same_times_from_the_data_on(pipe: Pipeline) -> None:
    how = Sampling(steps=6, sampler="heun")
    _, there = how.walk(pipe.objective)
    _, back = how.walk(pipe.objective, backward=True)
    assert torch.equal(back, there.flip(0))
    assert (back[0], back[-1]) == (0, 1)


@pytest.mark.parametrize(
    "sampler",
    [
        "ddpm",
        "ddim",
        "ddim:eta=1",
        "edm",
        "langevin",
        "meanflow",
        "meanflow:",
        "dpmpp_2m",
    ],
)
def test_what_cannot_go_backward_is_refused(two: Pipeline, sampler: str) -> None:
    with pytest.raises(ValueError, match="cannot go backward: take euler, heun or midpoint") as refusal:
        two.integrate(noise(), PROMPTS, way(two, sampler=sampler), backward=True)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("sampler", "near"), [("euler", 0.05), ("midpoint", 2e-3), ("reference", 2e-3)])
def test_all_that_go_backward_come_to_the_same_noise(text: CLIPText, sampler: str, near: float) -> None:
    some = made(text, stir=0.05, time_scale=10.0)
    found, heun = (
        some.integrate(noise(), PROMPTS, Sampling(steps=30, guidance=1.0, sampler=name), backward=True)
        for name in (sampler, "heun")
    )
    assert (found - heun).abs().max() < near
    assert (heun - noise()).abs().max() > 4 * near
