"""How a model is sampled, in words: what is understood, what is refused, and where the random numbers come from."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from flow.grid import karras, trailing
from flow.objective import Objective
from flow.path import EDM, Cosine, DDPMLinear, LDMLinear, RectifiedFlow, VariancePreserving, ZeroTerminalSNR
from flow.target import X0, Epsilon, Preconditioned, V, Velocity
from flow.variance import LearnedVariance
from pipeline.sampling import GRIDS, SAMPLERS, Sampling, parse_choice, random_normals

LINE = Objective()
CHAIN = Objective(LDMLinear(), Epsilon())
KARRAS = Objective(EDM(), Preconditioned())


def words(thing: object) -> str:
    if isinstance(thing, Objective):
        return f"{type(thing.path).__name__}-{type(thing.target).__name__}"
    return str(thing)


@pytest.mark.parametrize(
    ("text", "function", "options"),
    [
        ("euler", "euler", {}),
        ("ddim", "ddim", {}),
        ("ddim:eta=0.5", "ddim", {"eta": 0.5}),
        ("ddim:eta=1", "ddim", {"eta": 1.0}),
        ("ddpm:variance=large", "ddpm", {"variance": "large"}),
        ("edm:churn=40,churn_min=0.05,churn_max=inf", "edm", {"churn": 40, "churn_min": 0.05, "churn_max": math.inf}),
        ("langevin:repeats=3,step=1e-1", "langevin", {"repeats": 3, "step": 0.1}),
        ("reference:tolerance=1e-7", "reference", {"tolerance": 1e-7}),
    ],
)
def test_a_sampler_is_a_name_and_options(text: str, function: str, options: dict[str, Any]) -> None:
    found = parse_choice(SAMPLERS, "sampler", text)
    assert found.func is SAMPLERS[function]
    assert found.keywords == options
    assert all(type(found.keywords[key]) in (float, int, str) for key in options)
    assert Sampling(sampler=text).sampler == text


def test_a_spacing_is_a_name_and_options() -> None:
    found = parse_choice(GRIDS, "spacing", "karras:rho=5,sigma_max=40")
    assert found.func is karras
    times = Sampling(steps=6, spacing="karras:rho=5,sigma_max=40").walk(KARRAS)[1]
    assert torch.equal(times, karras(EDM(), 6, rho=5.0, sigma_max=40.0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "eular"}, "there is no sampler 'eular': choose one of euler, heun, "),
        ({"sampler": ""}, "there is no sampler ''"),
        ({"spacing": "even"}, "there is no spacing 'even': choose one of trailing, flow_match, leading, "),
        ({"sampler": "ddim:sigma=1"}, "sampler ddim has no option 'sigma': its options are eta"),
        ({"sampler": "euler:eta=1"}, "sampler euler has no option 'eta': it has none"),
        ({"sampler": "ddim:callback=1"}, "no option 'callback'"),
        ({"sampler": "ddim:noise=1"}, "no option 'noise'"),
        ({"spacing": "trailing:alpha=3"}, "no option 'alpha'"),
        ({"sampler": "ddim:eta"}, "ddim takes eta as a number, got ''"),
        ({"sampler": "ddim:eta=much"}, "ddim takes eta as a number, got 'much'"),
        ({"sampler": "ddim:eta=nan"}, "ddim takes eta as a number, got 'nan'"),
        ({"sampler": "langevin:repeats=2.5"}, "langevin takes repeats as a whole number, got '2.5'"),
        ({"sampler": "ddpm:variance=medium"}, "ddpm takes variance as small or large or learned, got 'medium'"),
        ({"spacing": "karras:rho=seven"}, "karras takes rho as a number, got 'seven'"),
        ({"steps": 0}, "steps must be at least 1 and at most 10,000, got 0"),
        ({"steps": -5}, "steps must be at least 1 and at most 10,000, got -5"),
        ({"guidance": math.nan}, "guidance must be a finite number"),
        ({"guidance": math.inf}, "guidance must be a finite number"),
        ({"rescale": -0.1}, "rescale must be between 0 and 1"),
        ({"rescale": 1.1}, "rescale must be between 0 and 1"),
        ({"rescale": math.nan}, "rescale must be between 0 and 1"),
        ({"interval": (0.5, 0.4)}, "interval must be two numbers"),
        ({"interval": (-0.1, 0.4)}, "interval must be two numbers"),
        ({"interval": (0.1, 1.4)}, "interval must be two numbers"),
        ({"interval": (0.1, math.nan)}, "interval must be two numbers"),
        ({"interval": (0.1,)}, "interval must be two numbers"),
        ({"interval": (0.1, 0.2, 0.3)}, "interval must be two numbers"),
    ],
    ids=str,
)
def test_words_that_mean_nothing_are_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        Sampling(**options)
    assert "\n" not in str(refusal.value)


def test_an_interval_from_json_is_a_tuple_of_floats() -> None:
    assert Sampling(interval=[0, 1]) == Sampling()  # type: ignore[arg-type]


SINGULAR = "does not determine picture and noise"
PURE = "needs a finite first sigma, and this grid starts at pure noise: use karras spacing"
BETWEEN = "LDMLinear is discrete and has no times in between"


@pytest.mark.parametrize(
    ("objective", "options", "said"),
    [
        (LINE, {"sampler": "ddpm"}, "ddpm needs a discrete path, and RectifiedFlow is continuous: use ddim:eta=1"),
        (KARRAS, {"sampler": "ddpm:variance=large"}, "is continuous: use ddim:eta=1"),
        (CHAIN, {"sampler": "ddpm:variance=learned"}, "needs a model with learned variance"),
        (Objective(target=Epsilon()), {}, f"at t = 1 Epsilon {SINGULAR}"),
        (Objective(Cosine(), Epsilon()), {}, f"at t = 1 Epsilon {SINGULAR}"),
        (Objective(EDM(), Epsilon()), {}, f"at t = 1 Epsilon {SINGULAR}"),
        (Objective(EDM(), Velocity()), {}, f"at t = 1 Velocity {SINGULAR}"),  # has no rate at the ends
        (Objective(ZeroTerminalSNR(LDMLinear()), Epsilon()), {}, f"at t = 1 Epsilon {SINGULAR}"),
        (Objective(ZeroTerminalSNR(LDMLinear()), Epsilon()), {"spacing": "linspace"}, f"at t = 1 Epsilon {SINGULAR}"),
        (Objective(target=X0()), {"sampler": "reference"}, f"X0 {SINGULAR}"),  # looks at the very data
        (Objective(EDM(), X0()), {"sampler": "reference", "spacing": "karras"}, f"at t = 0 X0 {SINGULAR}"),
        (CHAIN, {"spacing": "karras"}, "karras spacing needs a continuous path, and LDMLinear is discrete"),
        (LINE, {"spacing": "leading"}, "needs a discrete path"),
        (LINE, {"spacing": "linspace"}, "needs a discrete path"),
        (LINE, {"sampler": "edm"}, f"edm {PURE}"),
        (KARRAS, {"sampler": "edm:churn=40"}, f"edm {PURE}"),
        (KARRAS, {"sampler": "langevin"}, f"langevin {PURE}"),
        (Objective(ZeroTerminalSNR(LDMLinear()), V()), {"sampler": "langevin"}, f"langevin {PURE}"),
        (CHAIN, {"sampler": "midpoint"}, f"sampler midpoint with trailing spacing: {BETWEEN}"),
        (CHAIN, {"sampler": "reference"}, f"sampler reference with trailing spacing: {BETWEEN}"),
        (CHAIN, {"sampler": "edm:churn=5"}, f"sampler edm:churn=5 with trailing spacing: {BETWEEN}"),
        (CHAIN, {"sampler": "sde"}, "sde needs a continuous path, and LDMLinear is discrete: use ddim:eta=1"),
        (LINE, {"sampler": "sde:scale=-1"}, "sde needs scale >= 0, got -1"),
        (LINE, {"sampler": "pc:step=3"}, "pc needs 0 <= step < 2, got 3"),
        (Objective(VariancePreserving(), Velocity()), {"sampler": "reference"}, f"at t = 0 Velocity {SINGULAR}"),
        (LINE, {"sampler": "ddim:eta=2"}, "ddim needs 0 <= eta <= 1, got 2.0"),
        (KARRAS, {"sampler": "edm:churn=-1", "spacing": "karras"}, "edm needs churn >= 0"),
        (KARRAS, {"sampler": "langevin:step=3", "spacing": "karras"}, "0 < step < 2"),
        (CHAIN, {"steps": 1001}, "steps must be at most the 1000 of LDMLinear, got 1001"),
        (Objective(LDMLinear(), V(), shift=3.0), {"steps": 1000}, "give equal times"),
        (Objective(EDM(), Preconditioned(), shift=3.0), {"spacing": "karras"}, "karras spacing has no shift, got 3.0"),
        (KARRAS, {"spacing": "karras:sigma_min=100"}, "0 < sigma_min < sigma_max"),
        (Objective(EDM(std=0.2), Preconditioned()), {"spacing": "karras"}, "give equal times"),
    ],
    ids=words,
)
def test_what_does_not_fit_is_refused_in_one_line_before_any_model(
    objective: Objective, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        Sampling(**options).walk(objective)
    assert "\n" not in str(refusal.value)


OTHERS = ("ddpm", "meanflow", "autoregressive")  # do not go with numbers on a continuous path


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        *((LINE, {"sampler": word}) for word in ("euler", "heun", "midpoint", "dpmpp_2m", "reference", "ddim:eta=1")),
        *((CHAIN, {"sampler": word}) for word in ("euler", "heun", "dpmpp_2m", "ddim:eta=1", "ddpm", "edm")),
        (CHAIN, {"sampler": "langevin"}),
        *((CHAIN, {"spacing": word}) for word in ("trailing", "leading", "linspace")),
        *((KARRAS, {"sampler": word, "spacing": "karras"}) for word in SAMPLERS if word not in OTHERS),
        (Objective(Cosine(), V()), {}),
        (Objective(Cosine(), V()), {"sampler": "edm:churn=5", "spacing": "karras"}),
        (Objective(Cosine(), Epsilon()), {"spacing": "karras"}),
        (Objective(target=X0()), {}),
        (Objective(target=X0()), {"sampler": "heun"}),
        (LearnedVariance(DDPMLinear(), Epsilon()), {"sampler": "ddpm:variance=learned"}),
        (Objective(ZeroTerminalSNR(LDMLinear()), V()), {}),
        (Objective(ZeroTerminalSNR(LDMLinear()), Epsilon()), {"spacing": "leading"}),
    ],
    ids=words,
)
def test_what_fits_walks_to_a_finite_picture(objective: Objective, options: dict[str, Any]) -> None:
    walk, times = Sampling(steps=3, **options).walk(objective)
    assert times.dtype == torch.float64
    assert len(times) == 4

    def model(z: Tensor, t: Tensor, condition: object) -> Tensor:
        return torch.cat([z / 2, z], 1) if objective.outputs == 2 else z / 2

    z = torch.randn(2, 1, 2, 2)
    seen, told = [], []
    end = walk(
        lambda z, t: seen.append(t) or objective.denoise(model, z, t, None),
        z,
        random_normals([7, 8], (1, 2, 2), z.device),
        lambda done, z, x0: told.append(done),
    )
    assert seen[0] == times[0] or "churn" in options["sampler"]  # which starts above
    assert told == [1, 2, 3]
    assert end.shape == z.shape
    assert end.dtype == torch.float32
    assert bool(end.isfinite().all())


def test_options_reach_the_sampler() -> None:
    z = torch.randn(2, 1, 2, 2)

    def end(word: str) -> Tensor:
        walk, _ = Sampling(steps=3, sampler=word).walk(CHAIN)
        draw = random_normals([7, 8], (1, 2, 2), z.device)
        return walk(lambda z, t: CHAIN.denoise(lambda z, t, c: z / 2, z, t, None), z, draw)

    torch.testing.assert_close(end("ddim:eta=0"), end("euler"))
    torch.testing.assert_close(end("ddim:eta=1"), end("ddpm:variance=small"))
    assert not torch.allclose(end("ddim:eta=0.5"), end("ddim:eta=1"))
    assert not torch.allclose(end("ddpm:variance=large"), end("ddpm"))


def test_the_shift_of_the_training_is_taken_unless_another_is_given() -> None:
    objective = Objective(shift=3.0)
    assert torch.equal(Sampling(steps=5).walk(objective)[1], trailing(RectifiedFlow(), 5, 3.0))
    assert torch.equal(Sampling(steps=5).walk(objective, 1.5)[1], trailing(RectifiedFlow(), 5, 1.5))
    with pytest.raises(ValueError, match="shift must be > 0"):
        Sampling().walk(objective, 0.0)


@pytest.mark.parametrize(("strength", "left"), [(1.0, 10), (0.95, 10), (0.6, 6), (0.55, 6), (0.05, 1)])
def test_strength_takes_the_last_steps(strength: float, left: int) -> None:
    whole, part = (Sampling(steps=10).walk(LINE, strength=s)[1] for s in (1.0, strength))
    assert torch.equal(part, whole[10 - left :])
    for wrong in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="strength must be"):
            Sampling(steps=10).walk(LINE, strength=wrong)


def test_skip_layer_guidance_works_in_its_share_of_the_steps() -> None:
    """Where 0.01·steps < i < 0.2·steps, as in the released model's code: the second to the sixth of 28."""
    sampling = Sampling(steps=28, skip_layers=[7, 8, 9], spacing="flow_match")
    times = sampling.walk(LINE, 3.0)[1]
    first, last = sampling.skip_times(times)
    assert [i for i, t in enumerate(times.float()) if first <= t <= last] == [1, 2, 3, 4, 5]
    inner = Sampling(steps=16, skip_layers=(7,), skip_interval=(0.125, 0.5))  # not step 2, and not step 8
    assert inner.skip_times(torch.linspace(1, 0, 17)) == (1 - 7 / 16, 1 - 3 / 16)
    assert Sampling(steps=28).skip_times(times) is None
    assert Sampling(steps=4, skip_layers=(1,)).skip_times(Sampling(steps=4).walk(LINE)[1]) is None
    with pytest.raises(ValueError, match="need classifier-free guidance"):
        Sampling(skip_layers=(7,), guidance=1.0)


def test_random_numbers_belong_to_the_picture_not_to_the_batch() -> None:
    shape = (2, 3, 4)
    together = random_normals([5, 6, 7], shape, torch.device("cpu"))
    alone = random_normals([6], shape, torch.device("cpu"))
    draws = [together() for _ in range(3)]
    assert all(torch.equal(draw[1:2], alone()) for draw in draws)
    assert len({draw.sum().item() for draw in draws}) == 3  # fresh at each call
    for seed, first in zip([5, 6, 7], draws[0], strict=True):
        assert torch.equal(first, torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(random_normals([5, 5], shape, torch.device("cpu"))()[0], draws[0][0])
