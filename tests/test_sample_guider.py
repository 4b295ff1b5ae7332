"""`--guider`: other ways to guide, by name; the same in any batch and from a picture again; what makes no sense."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import refused

import evaluate
import sample
from data.examined import Digits
from flow.guidance import of_picture
from flow.objective import Objective
from flow.path import Cosine
from flow.target import V
from pipeline import Pipeline, Pull
from pipeline.sampling import Sampling
from pipeline.times import GridSearch, Request
from studies.measure import Setting, draw

APG, ZERO = "apg:eta=0.2,threshold=3,momentum=-0.5", "zero-star:zero_steps=2"
PROMPTS = ["a handwritten seven", "a one"]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ddim:eta=1"])
@pytest.mark.parametrize("guider", [APG, ZERO])
def test_a_picture_depends_neither_on_its_batch_nor_on_earlier_ones(pipe: Pipeline, guider: str, sampler: str) -> None:
    way = replace(pipe.sampling, guidance=5.0, guider=guider, sampler=sampler)
    both = pipe(PROMPTS, [3, 4], sampling=way)
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(pipe([prompt], [3 + i], sampling=way)[0], both[i], atol=1e-5, rtol=0)
    assert torch.equal(pipe(PROMPTS, [3, 4], sampling=way), both)
    assert (pipe(PROMPTS, [3, 4], sampling=replace(way, guider="cfg")) - both).abs().max() > 0.01


def test_a_step_of_apg_is_the_formula(pipe: Pipeline) -> None:
    """On another path and target: x̂0_cond + (s − 1)·(d − (1 − η)·d∥), with t = 1 where z is noise."""
    other = Pipeline(pipe.network, Objective(Cosine(), V()), *pipe.parts[2:])
    way = replace(pipe.sampling, steps=1, guidance=5.0, guider="apg:eta=0.25", sampler="euler", spacing="trailing")
    z, t = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(4))[None], torch.ones(1)
    with torch.no_grad():
        null, cond = (-pipe.network(z, t, pipe.condition([prompt])) for prompt in ("", "a one"))
    d = cond - null
    along = (d * cond).sum() / cond.square().sum() * cond
    wanted = other.codec.decode(cond + 4 * (d - 0.75 * along))
    torch.testing.assert_close(other(["a one"], [4], sampling=way), wanted, atol=1e-4, rtol=0)


def test_steps_without_velocity_cost_no_evaluation(pipe: Pipeline) -> None:
    way = replace(pipe.sampling, steps=4, guidance=2.0, sampler="euler")
    for guider, evaluations in (("cfg", 8), (ZERO, 4), ("zero-star:zero_steps=0", 8), (APG, 8)):
        asked = Digits(1)
        assert draw(Setting("x", "x", pipe, replace(way, guider=guider)), asked, 0, 10).evaluations == evaluations


def test_a_guider_goes_with_the_rest(pipe: Pipeline) -> None:
    """A negative prompt, an interval, rescaling and a reward of x̂0 change the picture; to leave oneself does not."""
    way = replace(pipe.sampling, steps=6, guidance=3.0, guider=APG)
    pull = Pull(lambda prompts, denoise: of_picture(denoise, lambda x0: x0.flatten(1).sum(1)), 0.5)
    drawn = [
        pipe(PROMPTS, [3, 4], sampling=way),
        pipe(PROMPTS, [3, 4], negative="a two", sampling=way),
        pipe(PROMPTS, [3, 4], sampling=replace(way, interval=(0.2, 0.8))),
        pipe(PROMPTS, [3, 4], sampling=replace(way, rescale=0.7)),
        pipe.pulled([pull])(PROMPTS, [3, 4], sampling=way),
    ]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(drawn) for b in drawn[:i])
    same = pipe.away_from(pipe, 2.0)(PROMPTS, [3, 4], sampling=way)
    torch.testing.assert_close(same, drawn[0], atol=1e-5, rtol=0)


def test_the_command_does_it_and_repeats_it(model: Path, tmp_path: Path) -> None:
    flags = ["--model", str(model), "--prompt", PROMPTS[0], "--steps", "4", "--guidance", "5"]
    sample.main([*flags, "--out", str(tmp_path / "plain")])
    sample.main([*flags, "--guider", APG, "--out", str(tmp_path / "apg")])
    sample.main(["--like", str(next((tmp_path / "apg").glob("a-*.png"))), "--out", str(tmp_path / "again")])
    plain, apg, again = (np.asarray(Image.open(tmp_path / name / "sheet.png")) for name in ("plain", "apg", "again"))
    assert not np.array_equal(plain, apg)
    assert np.array_equal(apg, again)
    assert json.loads((tmp_path / "apg" / "samples.json").read_text())[0]["guider"] == APG


def test_evaluate_does_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate.main(["--model", str(model), "--steps", "4", "--samples", "70", "--guider", ZERO,
                   "--out", str(tmp_path / "out")])  # fmt: skip
    assert "| 4 | 4 |" in capsys.readouterr().out  # steps, evaluations


def test_a_folder_keeps_it_and_older_folders_have_none(pipe: Pipeline, tmp_path: Path) -> None:
    Pipeline(*pipe.parts[:4], replace(pipe.sampling, guider=APG)).save(tmp_path / "model")
    assert Pipeline.load(tmp_path / "model").sampling.guider == APG
    assert Pipeline.load(Path("assets/digits/model")).sampling.guider == "cfg"  # written before there were guiders


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--guider", "apf"], "there is no guider 'apf': choose one of cfg, apg, zero-star"),
        (["--guider", "apg:r=2"], "guider apg has no option 'r': its options are eta, threshold, momentum"),
        (["--guider", "cfg:eta=0"], "guider cfg has no option 'eta': it has none"),
        (["--guider", "zero-star:zero_steps=0.5"], "zero-star takes zero_steps as a whole number, got '0.5'"),
        (["--guider", "apg:eta=2"], "0 <= eta <= 1"),
        (["--guider", "zero-star:zero_steps=4"], "zero_steps from 0 to below the 4 steps of the walk, got 4"),
        (["--guider", "apg", "--guidance", "1"], "--guider need guidance, which is 1 (off)"),
        (["--guider", "apg", "--guidance", "0.5"], "guider apg needs a guidance above 1, got 0.5: take cfg"),
        (["--guider", "apg:momentum=-0.5", "--sampler", "reference"], "depends on the walk"),
        (["--guider", "zero-star", "--sampler", "reference"], "depends on the walk"),
        (["--guider", "zero-star", "--image", "docs/digits.png"], "begins at pure noise, not at an image"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Path, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    given = ["--model", str(model), "--prompt", "7", *flags, "--out", str(tmp_path / "out")]
    if "--image" in flags:
        given += ["--height", "8", "--width", "8"]
    assert words in refused(capsys, *given)
    assert not (tmp_path / "out").exists()


def test_walks_that_need_a_field_refuse_what_depends_on_the_walk(pipe: Pipeline) -> None:
    z = torch.randn(1, 1, 8, 8)
    search = Request((2,), 4, 8, 0, 4, replace(pipe.sampling, sampler="euler"))
    for guider, field in ((APG, "apg"), (ZERO, "zero-star:zero_steps=0")):
        way = replace(pipe.sampling, guider=guider, sampler="euler")
        with pytest.raises(ValueError, match="depends on the walk"):
            pipe.integrate(z, ["a one"], way, backward=True)
        with pytest.raises(ValueError, match="depends on the walk"):
            GridSearch(pipe, ["a one"] * 4, replace(search, sampling=way))  # type: ignore[arg-type]
        assert pipe.integrate(z, ["a one"], replace(way, guider=field), backward=True).isfinite().all()
        GridSearch(pipe, ["a one"] * 4, replace(search, sampling=replace(way, guider=field)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is for a velocity at one time, and not for average velocities"):
        Sampling(guider="apg", sampler="meanflow").walk(pipe.objective)
    with pytest.raises(ValueError, match="sampler, spacing and guider must be text"):
        Sampling(guider=None)  # type: ignore[arg-type]
