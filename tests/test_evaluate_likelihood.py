"""evaluate.py --likelihood: bits per dimension of real pictures under any model, and models that have none."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import stirred

import evaluate
from data.examined import Digits, Shapes
from data.latents import Pixels
from data.text.clip import CLIPText
from flow.density import Uniform
from flow.objective import Objective
from flow.path import Cosine, ImprovedCosine, VariancePreserving
from flow.path import Path as FlowPath
from flow.target import Epsilon, Target, V, Velocity
from flow.variance import LearnedVariance
from mmdit.model import MMDiT
from pipeline import Pipeline, Pull
from pipeline.likelihood import bits
from pipeline.sampling import Sampling, random_normals
from studies.likelihood import code_lengths

PLAIN = ["--guidance", "1"]


def measured(tmp_path: Path, *flags: str) -> list[dict]:
    evaluate.main(["--likelihood", *flags, "--out", str(tmp_path / "out")])
    return json.loads((tmp_path / "out/results.json").read_text())["rows"]


class Knows(torch.nn.Module):
    """A network that gives the best output for pictures of independent N(m, s²) in the codec's units."""

    guidance_embeds = text_mask = two_times = False
    picture_channels = in_channels = skippable = 0
    pooled_dim = 64

    def __init__(self, path: FlowPath, target: Target, mean: float, std: float) -> None:
        super().__init__()
        self.path, self.target, self.mean, self.std = path, target, mean, std
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, z: torch.Tensor, t: torch.Tensor, condition: object) -> torch.Tensor:
        time = t[0].double()
        (a, b), (p, q) = self.path(time), self.target.row(self.path, time)
        off = (z.double() - a * self.mean) / ((a * self.std) ** 2 + b**2)
        return (p * (self.mean + a * self.std**2 * off) + q * b * off).float()


def knowing(objective: Objective, text: CLIPText, mean: float, std: float) -> Pipeline:
    pipe = Pipeline(stirred(plain_digits()), objective, Pixels(1, 0.3, 2.66), text, Sampling(4, 1.0))
    pipe.network = Knows(objective.path, objective.target, mean, std)  # type: ignore[assignment]
    return pipe


def plain_digits(**more: Any) -> MMDiT:
    sizes = {"depth": 1, "width": 32, "heads": 1, "text_dim": 64, "pooled_dim": 64, "sample_size": 8}
    return MMDiT(1, **(sizes | {"pos_embed_max_size": 8} | more))


@pytest.mark.parametrize("objective", [Objective(), Objective(Cosine(), V())])
def test_the_bits_are_those_of_a_known_density_with_the_right_offset(objective: Objective, text: CLIPText) -> None:
    """Of a normal distribution in the codec's units: a number of the picture moves by scale/16 from level to level."""
    mean, std = -0.2, 0.4
    pipe = knowing(objective, text, mean, std)
    pixels = Digits(2).real["held_out"][:4]
    both = bits(pipe, pixels, ["a"] * 4, 17, range(4), exact_trace=True)
    found, again = both["ODE"], bits(pipe, pixels, ["a"] * 4, 17, range(4))["ODE"]
    torch.testing.assert_close(found, again, atol=1e-3, rtol=0)  # its Jacobian is diagonal
    normal = torch.distributions.Normal(mean, std)
    noise = torch.special.ndtr(random_normals(range(4), (1, 8, 8), pixels.device)()) - 0.5
    assert noise.std() == pytest.approx(12**-0.5, rel=0.1)
    x = ((pixels + noise / 16) - 0.3) * 2.66
    expected = -(normal.log_prob(x).mean((1, 2, 3)) + math.log(2.66 / 16)) / math.log(2)
    torch.testing.assert_close(found, expected.double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(both["bound"], expected.double(), atol=0.3, rtol=0)  # of one draw of the noise
    assert both["bound"].mean() == pytest.approx(expected.mean().item(), abs=0.1)


def test_a_picture_s_bits_do_not_depend_on_its_batch(text: CLIPText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.likelihood.TOLERANCE", 1e-5)  # the steps are the batch's
    pipe = Pipeline(stirred(plain_digits()), Objective(), Pixels(1, 0.3, 2.66), text, Sampling(4, 1.0))
    pixels, captions = Digits(1).real["held_out"][:3], ["a zero", "a one", "a two"]
    whole, turned = (bits(pipe, pixels, order, 17, range(5, 8)) for order in (captions, captions[::-1]))
    alone, other_noise = (bits(pipe, pixels[1:2], captions[1:2], 17, [seed]) for seed in (6, 5))
    for kind, each in whole.items():
        torch.testing.assert_close(alone[kind], each[1:2], atol=2e-3, rtol=0)
        assert (turned[kind] - each).abs()[[0, 2]].min() > 1e-2  # the caption matters
        assert (other_noise[kind] - alone[kind]).abs() > 5e-2  # and so does the noise


def test_histograms_are_counted_on_other_pictures_and_forbid_nothing() -> None:
    others = torch.tensor([0, 0, 0, 1.0])[:, None, None, None].expand(4, 1, 1, 2)
    pictures = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 1, 1, 2)
    found = code_lengths(pictures, others, 3)["histogram of each pixel"]
    torch.testing.assert_close(found, -torch.tensor([4 / 7, 1 / 7, 2 / 7]).log2())


def test_the_command_measures_every_model(text: CLIPText, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    objectives = {"flow": Objective(density=Uniform()), "chain": LearnedVariance(ImprovedCosine(), Epsilon())}
    for name, objective in objectives.items():
        network = stirred(plain_digits(out_channels=objective.outputs), 0.02)
        Pipeline(network, objective, Pixels(1, 0.3, 2.66), text, Sampling(4, 1.0)).save(tmp_path / name)
    flags = ["--model", str(tmp_path / "flow"), "--model", str(tmp_path / "chain"), "--samples", "3"]
    uniform, histogram, flow, bound, chain = measured(tmp_path, *flags)
    assert uniform["bits_per_dim"] == pytest.approx(math.log2(17))
    assert 1 < histogram["bits_per_dim"] < uniform["bits_per_dim"]
    assert [row["likelihood"] for row in (flow, bound, chain)] == ["ODE", "bound", "bound"]
    assert 2 < flow["bits_per_dim"] < bound["bits_per_dim"] < chain["bits_per_dim"] < 2000  # their weights are random
    assert flow["samples"] == 3
    assert flow["bits_per_dim_error"] > 0
    assert "| bits / dim | error |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "guidance changes the field"),
        ([*PLAIN, "--steps", "4"], "--steps does not go with --likelihood"),
        ([*PLAIN, "--by", "category"], "--by does not go with --likelihood"),
        ([*PLAIN, "--samples", "501"], "there are 500 held_out pictures"),
        (["--guidance", "3"], "take a model without, and --guidance 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--likelihood", "--model", str(model), *flags, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_models_of_latents_of_averages_and_of_guidance_have_none(
    drawer: Path, text: CLIPText, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = {"averages": plain_digits(two_times=True), "guided": plain_digits(guidance_embeds=True)}
    for name, network in made.items():
        sampling = Sampling(1, 1.0, "meanflow" if network.two_times else "euler")
        Pipeline(network, Objective(), Pixels(1, 0.3, 2.66), text, sampling).save(tmp_path / name)
    wanted = {
        str(drawer): "works in an autoencoder's latents",
        str(tmp_path / "averages"): "has learned average velocities",
        str(tmp_path / "guided"): "guidance changes the field",
    }
    for folder, message in wanted.items():
        with pytest.raises(SystemExit) as end:
            evaluate.main(["--likelihood", "--model", folder, *PLAIN, "--out", str(tmp_path / "out")])
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_models_of_other_pictures_and_of_targets_without_ends_are_refused_before_any_file(
    text: CLIPText, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    colour = MMDiT(3, depth=1, width=32, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8)
    large, grey = plain_digits(sample_size=16, pos_embed_max_size=16), Pixels(1, 0.3, 2.66)
    made = {
        "large": (large, Objective(), grey, "(1, 16, 16) numbers, not (1, 8, 8)"),
        "colour": (colour, Objective(), Pixels(3), "(3, 8, 8) numbers, not (1, 8, 8)"),
        "noise": (plain_digits(), Objective(target=Epsilon()), grey, "at t = 1 Epsilon does not determine"),
        "vp": (plain_digits(), Objective(VariancePreserving(), Velocity()), grey, "at t = 0 Velocity does not"),
    }
    for name, (network, objective, codec, message) in made.items():
        spacing = "karras" if name == "noise" else "trailing"
        Pipeline(network, objective, codec, text, Sampling(2, 1.0, "euler", spacing)).save(tmp_path / name)
        with pytest.raises(SystemExit) as end:
            evaluate.main(["--likelihood", "--model", str(tmp_path / name), "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert (end.value.code, error.count("\n")) == (2, 1)
        assert message in error
        assert not (tmp_path / "out").exists()


def test_one_picture_has_bits_and_no_error(text: CLIPText, tmp_path: Path) -> None:
    Pipeline(stirred(plain_digits(), 0.02), Objective(), Pixels(1, 0.3, 2.66), text, Sampling(1, 1.0)).save(
        tmp_path / "m"
    )
    assert measured(tmp_path, "--model", str(tmp_path / "m"), "--samples", "1")[-1]["bits_per_dim_error"] is None


def test_pixels_between_the_levels_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="256 levels are wrong"):
        bits(pipe, Digits(1).real["train"][:1], ["a"], 256, [0])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        bits(pipe, Digits(1).real["train"][:1] * 2, ["a"], 17, [0])


def test_a_model_guided_by_a_gradient_has_none(pipe: Pipeline) -> None:
    guided = pipe.pulled([Pull(lambda prompts, denoise: lambda z, t: z.flatten(1).sum(1), 1.0)])
    with pytest.raises(ValueError, match="guidance changes the field"):
        bits(guided, Digits(1).real["train"][:1], ["a"], 17, [0])


def test_every_real_picture_has_a_caption(text: CLIPText) -> None:
    digits, shapes = Digits(1), Shapes.held_out(3, 4)
    for half in ("train", "held_out"):
        for examined in (digits, shapes):
            assert len(examined.captions(half)) == len(examined.real[half])
    assert shapes.captions("held_out")[:3] == shapes.prompts
    labels = digits.halves["held_out"].labels
    assert digits.captions("held_out")[4] == Digits.said(labels)[4]
