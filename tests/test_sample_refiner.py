"""A base and a refiner on one grid: which model is asked when, and what does not fit."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_sample import refused

import sample
from data.latents import Pixels
from flow.objective import Objective
from flow.path import Cosine
from flow.target import V
from mmdit.model import MMDiT
from mmdit.network import Condition
from pipeline import Pipeline, Refiner

PROMPTS = ["a handwritten seven", "the digit 3"]


@pytest.fixture
def late(pipe: Pipeline) -> Pipeline:
    """A model with other weights and another target."""
    torch.manual_seed(3)
    network = MMDiT(1, depth=1, width=32, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(network, replace_target(pipe.objective), pipe.codec, pipe.text)


def replace_target(objective: Objective) -> Objective:
    return Objective(objective.path, V(), shift=objective.shift)


@pytest.mark.parametrize("sampler", ["euler", "heun", "midpoint", "dpmpp_2m", "ddim:eta=1"])
def test_a_model_that_refines_itself_changes_no_bit(pipe: Pipeline, sampler: str) -> None:
    """A sampler that remembers earlier steps goes on over the handover, and no noise is added there."""
    way = replace(pipe.sampling, steps=6, sampler=sampler, guidance=3.0)
    plain = pipe(PROMPTS, [1, 2], sampling=way)
    assert torch.equal(pipe(PROMPTS, [1, 2], sampling=way, refiner=Refiner(pipe, 0.4)), plain)


def test_each_model_walks_its_part_of_one_grid(pipe: Pipeline, late: Pipeline) -> None:
    """The sampler written out: velocities of the one network above the handover, x̂0 of the other one's V below."""
    steps, alpha, handover = 5, 1.5, 0.5
    way = replace(pipe.sampling, steps=steps, guidance=1.0)
    text = pipe.text.encode(PROMPTS[:1])
    z = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(4))[None]
    times = [1 - i / steps for i in range(steps + 1)]
    times = [alpha * t / (1 + (alpha - 1) * t) for t in times]
    asked = []
    with torch.no_grad():
        for t, s in pairwise(times):
            network = pipe.network if t >= handover else late.network
            y = network(z, torch.tensor([t]), Condition(*text))
            asked.append(network is late.network)
            if network is late.network:  # V = a·ε − b·x0 with a = 1 − t, b = t
                a, b = 1 - t, t
                x0, noise = ((a * z - b * y) / (a**2 + b**2), (b * z + a * y) / (a**2 + b**2))
                y = noise - x0
            z = z + (s - t) * y
    assert asked == [False] * sum(t >= handover for t in times[:-1]) + [True] * sum(t < handover for t in times[:-1])
    assert 0 < sum(asked) < steps
    drawn = pipe(PROMPTS[:1], [4], sampling=way, refiner=Refiner(late, handover))
    torch.testing.assert_close(drawn, (z / 2.66 + 0.3).clamp(0, 1), atol=1e-4, rtol=0)


def test_the_command_draws_so_and_its_picture_says_how(
    pipe: Pipeline, late: Pipeline, model: Path, tmp_path: Path
) -> None:
    late.save(tmp_path / "late")
    flags = ["--model", str(model), "--prompt", "seven", "--steps", "9", "--seed", "4"]
    sample.main([*flags, "--refiner", str(tmp_path / "late"), "--handover", "0.5", "--out", str(tmp_path / "one")])
    entry = json.loads((tmp_path / "one/samples.json").read_text())[0]
    assert (entry["refiner"], entry["handover"]) == (str(tmp_path / "late"), 0.5)
    sample.main(["--like", str(tmp_path / "one/seven_4.png"), "--out", str(tmp_path / "two")])
    sample.main([*flags, "--out", str(tmp_path / "plain")])
    one, two, plain = ((tmp_path / name / "seven_4.png").read_bytes() for name in ("one", "two", "plain"))
    assert one == two != plain
    sample.main([*flags, "--refiner", str(tmp_path / "late"), "--out", str(tmp_path / "default")])
    assert json.loads((tmp_path / "default/samples.json").read_text())[0]["handover"] == 0.2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--handover", "0.5"], "--handover needs a --refiner"),
        (["--refiner", "nowhere"], "nowhere is no model folder"),
        (["--refiner", "MODEL", "--handover", "0"], "the handover must be a time between 0 and 1, got 0"),
        (["--refiner", "MODEL", "--handover", "1"], "the handover must be a time between 0 and 1, got 1"),
        (["--refiner", "MODEL", "--handover", "0.1", "--steps", "2"], "no step begins below the handover"),
        (["--refiner", "OTHER", "--steps", "9"], "the refiner has another path than the model"),
        (["--refiner", "CODEC", "--steps", "9"], "the refiner has another codec than the model"),
        (["--refiner", "PICTURE", "--steps", "9"], "the refiner works from a picture"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    pipe: Pipeline, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    def network(**more: int) -> MMDiT:
        return MMDiT(1, depth=1, width=32, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8,
                     **more)  # fmt: skip

    Pipeline(network(), Objective(Cosine()), pipe.codec, pipe.text).save(tmp_path / "OTHER")
    Pipeline(network(), pipe.objective, Pixels(1, 0.5, 2.0), pipe.text).save(tmp_path / "CODEC")
    Pipeline(network(picture_channels=1), pipe.objective, pipe.codec, pipe.text).save(tmp_path / "PICTURE")
    given = [
        str(model) if flag == "MODEL" else str(tmp_path / flag) if (tmp_path / flag).is_dir() else flag
        for flag in flags
    ]
    told = refused(capsys, "--model", model, "--prompt", "7", *given, "--out", tmp_path / "out")
    assert message in told
    assert not (tmp_path / "out").exists()
