"""Guidance by gradients from files: a classifier and a CLIP of noisy pictures; what does not fit is refused."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import refused
from torch import Tensor

import evaluate
import sample
from baselines.classifier import PROBE, Classifier, NoisyCLIP
from data.examined import Digits
from flow.guidance import Score, of_picture
from flow.objective import Objective
from flow.path import Cosine
from flow.sampler import Denoiser
from mmdit.model import MMDiT
from pipeline import Pipeline, Pull
from pipeline.gradients import pulled
from studies.measure import Setting, draw

PROMPT = "a handwritten seven"
CLASSIFIER = "assets/digits/classifier"
SIZES = {"in_channels": 1, "sample_size": 8, "channels": (16, 32), "layers": 1, "head_channels": 16, "groups": 8}


def with_classifier(pipe: Pipeline, scale: float = 2.0, prompts: Sequence[str] = (PROMPT,)) -> Pipeline:
    return pulled(pipe, f"{CLASSIFIER}:{scale}", None, None, prompts)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_one_step_is_the_formula(pipe: Pipeline, guidance: float) -> None:
    """x̂0 = z − v + (b²/a)·s·∇ ln p, at t = 0.9 of the straight line, whose w is z."""
    way = replace(pipe.sampling, steps=1, guidance=guidance, sampler="euler", spacing="given:times=0.9")
    drawn = with_classifier(pipe)([PROMPT], [4], sampling=way)
    classifier, t = Classifier.load(Path(CLASSIFIER)), torch.tensor([0.9])
    z = (0.1**2 + 0.9**2) ** 0.5 * torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(4))[None]
    leaf = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(classifier(leaf, t).log_softmax(1)[0, 7], leaf)
    with torch.no_grad():
        null, y = (pipe.network(z, t, pipe.condition([prompt])) for prompt in ("", PROMPT))
        x0 = z - 0.9 * (null + guidance * (y - null)) + 0.9**2 / 0.1 * 2 * g
    torch.testing.assert_close(drawn, pipe.codec.decode(x0), atol=1e-4, rtol=0)


def test_another_path_is_read_by_the_same_classifier(pipe: Pipeline) -> None:
    """∇_z ln p(c | z) = ∇_w ln p(c | w)/(a + b)."""
    other = Pipeline(pipe.network, Objective(Cosine()), *pipe.parts[2:])
    t, z = torch.tensor(0.3, dtype=torch.float64), torch.randn(2, 1, 8, 8)
    a, b = math.cos(0.15 * math.pi), math.sin(0.15 * math.pi)
    way, prompts = replace(pipe.sampling, guidance=1.0), ["a one", "a two"]
    plain, guided = (
        each.denoiser(prompts, "", way, torch.ones(1))(z, t) for each in (other, with_classifier(other, 2.0, prompts))
    )
    w = (z / (a + b)).requires_grad_()
    likely = Classifier.load(Path(CLASSIFIER))(w, torch.full((2,), b / (a + b))).log_softmax(1)
    (g,) = torch.autograd.grad(likely[0, 1] + likely[1, 2], w)
    torch.testing.assert_close(guided.noise - plain.noise, -b * 2 * g / (a + b), atol=1e-5, rtol=1e-4)


def test_a_picture_does_not_depend_on_its_batch(pipe: Pipeline) -> None:
    prompts = ["a one", PROMPT]
    both = with_classifier(pipe, 2.0, prompts)(prompts, [1, 4])
    torch.testing.assert_close(with_classifier(pipe)([PROMPT], [4])[0], both[1], atol=1e-5, rtol=0)


def test_the_unconditional_network_computes_one_branch(pipe: Pipeline) -> None:
    way = replace(pipe.sampling, steps=2, guidance=0.0, sampler="euler")
    asked = Digits(1)
    guided = with_classifier(pipe, 2.0, asked.prompts)
    assert draw(Setting("x", "x", guided, way), asked, 0, 10).evaluations == 2


def test_any_reward_of_pictures_is_followed_through_the_network(pipe: Pipeline) -> None:
    def bright(prompts: Sequence[str], denoise: Denoiser) -> Score:
        return of_picture(denoise, lambda x0: x0.flatten(1).sum(1))

    way = replace(pipe.sampling, steps=4, guidance=2.0, sampler="heun")
    plain, guided = (each([PROMPT], [0], sampling=way) for each in (pipe, pipe.pulled([Pull(bright, 0.5)])))
    assert guided.mean() > plain.mean() + 0.02


def test_autoguidance_keeps_the_gradients(pipe: Pipeline) -> None:
    both = with_classifier(pipe).away_from(pipe, 2.0)  # moves away from itself: nothing
    torch.testing.assert_close(both([PROMPT], [0]), with_classifier(pipe)([PROMPT], [0]), atol=1e-5, rtol=0)
    assert pipe.guides.weak is None


def test_the_command_does_it_and_repeats_it(model: Path, tmp_path: Path) -> None:
    flags = ["--model", str(model), "--prompt", PROMPT, "--steps", "3", "--guidance", "0"]
    more = ["--classifier", f"{CLASSIFIER}:3", "--gradient-interval", "0.1", "0.95"]
    sample.main([*flags, *more, "--out", str(tmp_path / "drawn")])
    sample.main(["--like", str(next((tmp_path / "drawn").glob("a-*.png"))), "--out", str(tmp_path / "again")])
    drawn, again = (np.asarray(Image.open(tmp_path / name / "sheet.png")) for name in ("drawn", "again"))
    assert np.array_equal(drawn, again)
    entry = json.loads((tmp_path / "drawn" / "samples.json").read_text())[0]
    assert (entry["classifier"], entry["gradient_interval"]) == (f"{CLASSIFIER}:3", [0.1, 0.95])


def test_a_refiner_follows_the_same_gradient(model: Path, tmp_path: Path) -> None:
    flags = ["--model", str(model), "--prompt", PROMPT, "--guidance", "0", "--classifier", f"{CLASSIFIER}:3"]
    sample.main([*flags, "--out", str(tmp_path / "alone")])
    sample.main([*flags, "--refiner", str(model), "--handover", "0.6", "--out", str(tmp_path / "refined")])
    alone, refined = (np.asarray(Image.open(tmp_path / name / "sheet.png")) for name in ("alone", "refined"))
    assert np.array_equal(alone, refined)


def test_evaluate_does_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate.main(["--model", str(model), "--steps", "2", "--samples", "70", "--guidance", "0",
                   "--classifier", f"{CLASSIFIER}:3", "--out", str(tmp_path / "out")])  # fmt: skip
    assert f"model guided by {CLASSIFIER}:3" in capsys.readouterr().out


def test_a_clip_of_noisy_pictures(drawer: Path, tmp_path: Path) -> None:
    pipe = Pipeline.load(drawer)
    sizes = SIZES | {"in_channels": 4, "sample_size": 8, "codec": pipe.codec.fingerprint()}
    clip = NoisyCLIP(outputs=16, pooled_dim=128, **sizes)
    clip.probe.copy_(pipe.text.encode([PROBE]).pooled[0])
    clip.save(tmp_path / "clip")
    prompts = ["a red circle", "two blue squares"]
    guided = pulled(pipe, None, f"{tmp_path / 'clip'}:2", None, prompts)
    w, tau = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.6])
    loaded = NoisyCLIP.load(tmp_path / "clip")
    matrix = loaded.similarity(w, tau, pipe.text.encode(prompts).pooled)
    torch.testing.assert_close(loaded.score(w, tau, pipe.text.encode(prompts).pooled), matrix.diagonal())
    assert matrix.abs().max() <= loaded.log_scale.exp() + 1e-4
    seeds = [0, 1]
    assert not torch.equal(guided(prompts, seeds), pipe(prompts, seeds))

    clip.probe.copy_(pipe.text.encode(["a square"]).pooled[0])
    clip.save(tmp_path / "other")
    with pytest.raises(ValueError, match="reads other text encoders than the model's"):
        pulled(pipe, None, f"{tmp_path / 'other'}:2", None, prompts)
    with pytest.raises(ValueError, match="describes a NoisyCLIP, not a Classifier"):
        pulled(pipe, f"{tmp_path / 'clip'}:2", None, None, prompts)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--classifier", CLASSIFIER], "is not MODEL:SCALE, such as"),
        (["--classifier", f"{CLASSIFIER}:0"], "a finite scale other than 0, which is none, got 0"),
        (["--classifier", f"{CLASSIFIER}:inf"], "a finite scale other than 0"),
        (["--classifier", "assets/digits/judge:2"], "describes something else, not a Classifier"),
        (["--classifier", "nowhere:2"], "nowhere/config.json"),
        (["--clip-guidance", "assets/digits/model:2"], "--clip-guidance assets/digits/model is no NoisyCLIP of noisy"),
        (["--classifier", f"{CLASSIFIER}:2", "--prompt", "a cat"], "'a cat' names 0 of the classifier's classes"),
        (["--classifier", f"{CLASSIFIER}:2", "--prompt", "one or 2"], "'one or 2' names 2 of the classifier's classes"),
        (["--classifier", f"{CLASSIFIER}:2", "--gradient-interval", "0", "1"], "at t = 1 there is no picture left"),
        (["--classifier", f"{CLASSIFIER}:2", "--gradient-interval", "0.9", "0.1"], "0 <= from <= to <= 1, got 0.9"),
        (["--classifier", f"{CLASSIFIER}:2", "--height", "16"], "reads 1 × 8 × 8 numbers, and the model draws 1 × 16"),
        (["--gradient-interval", "0", "0.9"], "--gradient-interval needs --classifier or --clip-guidance"),
        (["--guidance", "0"], "guidance 0 would ignore the prompt"),
        (
            ["--classifier", f"{CLASSIFIER}:2", "--guidance", "0", "--interval", "0", "0.5"],
            "guidance 0 with a gradient makes the network unconditional: leave out interval",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Path, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    prompt = [] if "--prompt" in flags else ["--prompt", PROMPT]
    assert words in refused(capsys, "--model", str(model), *prompt, *flags, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_latents_and_average_velocities_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    loaded = Classifier.load(Path(CLASSIFIER))
    other = Classifier(loaded.classes, **SIZES, codec=loaded.codec | {"scaling_factor": 2.0})
    other.save(tmp_path)
    with pytest.raises(ValueError, match="reads the latents of another codec"):
        pulled(pipe, f"{tmp_path}:2", None, None, [PROMPT])
    network = MMDiT(1, depth=1, width=16, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8,
                    two_times=True)  # fmt: skip
    with pytest.raises(ValueError, match="guides no average velocities"):
        with_classifier(Pipeline(network, *pipe.parts[1:]))


def test_the_classifier_reads_noise_and_says_so_of_its_sizes() -> None:
    loaded = Classifier.load(Path(CLASSIFIER))
    assert loaded.labels(["Seven.", "3, written by hand"]).tolist() == [7, 3]
    phrases = Classifier([["Fire truck", "engine"], ["truck stop"]], **SIZES, codec={})
    assert phrases.labels(["a red fire truck", "an engine", "the Truck stop"]).tolist() == [0, 0, 1]
    w: Tensor = torch.randn(3, 1, 8, 8)
    same = torch.full((3,), 0.2)
    one = loaded(w[1:2], same[:1])
    torch.testing.assert_close(loaded(w, same)[1:2], one, atol=1e-5, rtol=0)
    assert (loaded(w, same + 0.5) - loaded(w, same)).abs().max() > 0.1
    with pytest.raises(ValueError, match="reads 1 × 8 × 8 numbers, got 1 × 4 × 4"):
        loaded(w[..., :4, :4], same)
    for wrong, words in (
        ({"channels": ()}, "must not be empty"),
        ({"channels": (16, 20)}, "multiples of head_channels and of groups"),
        ({"sample_size": 7}, "cannot be halved 1 times"),
        ({"layers": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Classifier([["a"]], **(SIZES | wrong), codec={})


def test_a_damaged_classifier_is_named(pipe: Pipeline, tmp_path: Path) -> None:
    Classifier.load(Path(CLASSIFIER)).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layers": 2}))
    with pytest.raises(ValueError, match=r"do not fit this Classifier's config"):
        Classifier.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer": 2}))
    with pytest.raises(ValueError, match="is no whole config of a Classifier"):
        Classifier.load(tmp_path)
