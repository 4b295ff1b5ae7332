"""Samplers against diffusers' schedulers on the same grids, models and noise."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor
from walks import forbidden, name, numbers, reading, toy

from flow.grid import karras, leading, linspace, trailing
from flow.objective import Objective
from flow.path import EDM, DDPMLinear, Discrete, ImprovedCosine, LDMLinear, RectifiedFlow
from flow.sampler import ddim, ddpm, dpmpp_2m, euler
from flow.target import X0, Epsilon, Preconditioned, Target, V


def chained(scheduler: type, path: Discrete, **options: object):
    """diffusers' scheduler with our ᾱ, which is float64."""
    theirs = scheduler(clip_sample=False, **options)
    theirs.alphas_cumprod = path.alphas_cumprod
    return theirs


def stepped(theirs: object, model: Callable, z: Tensor, **options: object) -> Tensor:
    for k in theirs.timesteps:
        z = theirs.step(model(z, (k + 1).double().expand(len(z)) / 1000, None), k, z, **options).prev_sample
    return z


READINGS = [
    (DDPMLinear(), Epsilon(), "epsilon"),
    (LDMLinear(), V(), "v_prediction"),
    (ImprovedCosine(), X0(), "sample"),
    (ImprovedCosine(), Epsilon(), "epsilon"),
]


@pytest.mark.parametrize(("path", "target", "prediction"), READINGS, ids=name)
@pytest.mark.parametrize(("variance", "theirs_is"), [("small", "fixed_small"), ("large", "fixed_large")])
@pytest.mark.parametrize(("grid", "steps"), [(trailing, 1000), (linspace, 50), (leading, 7), (linspace, 48)])
def test_ddpm_is_that_of_diffusers(
    path: Discrete, target: Target, prediction: str, variance: str, theirs_is: str, grid: Callable, steps: int
) -> None:
    theirs = chained(
        DDPMScheduler, path, variance_type=theirs_is, prediction_type=prediction, timestep_spacing=name(grid)
    )  # fmt: skip
    theirs.set_timesteps(steps)
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = stepped(theirs, toy, z, generator=torch.Generator().manual_seed(3))
    times = grid(path, steps)
    assert (times[:-1] * 1000 - 1).round().tolist() == theirs.timesteps.tolist()
    found = ddpm(reading(path, target), path, z, times, numbers(3, z), variance=variance)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize(("grid", "steps"), [(trailing, 1000), (linspace, 50), (leading, 7)])
def test_ddpm_with_a_learned_variance_is_that_of_diffusers(grid: Callable, steps: int) -> None:
    path = ImprovedCosine()

    def model(z: Tensor, t: Tensor, condition: object) -> Tensor:
        return torch.cat([toy(z, t, None), torch.cos(3 * z)], 1)

    theirs = chained(DDPMScheduler, path, variance_type="learned_range", timestep_spacing=name(grid))
    theirs.set_timesteps(steps)
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = stepped(theirs, model, z, generator=torch.Generator().manual_seed(3))
    found = ddpm(reading(path, Epsilon(), model, 3), path, z, grid(path, steps), numbers(3, z), variance="learned")
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())


def test_the_last_step_of_ddpm_adds_no_noise_unlike_diffusers() -> None:
    path = LDMLinear()
    theirs = chained(DDPMScheduler, path, variance_type="fixed_large", timestep_spacing="trailing")
    theirs.set_timesteps(10)
    z, k = torch.randn(2, 3, 4, dtype=torch.float64), theirs.timesteps[-1]
    assert k > 0  # where theirs adds noise, even though the step ends at the data
    found = ddpm(reading(path, Epsilon()), path, z, trailing(path, 10)[-2:], forbidden, variance="large")
    expected = theirs.step(
        toy(z, (k + 1).double().expand(2) / 1000, None), k, z, generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(found, expected.pred_original_sample)
    assert not torch.allclose(found, expected.prev_sample, atol=0.01)


@pytest.mark.parametrize(("path", "target", "prediction"), READINGS, ids=name)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("grid", "steps"), [(trailing, 50), (leading, 50), (trailing, 1), (linspace, 1000)])
def test_ddim_is_that_of_diffusers(
    path: Discrete, target: Target, prediction: str, eta: float, grid: Callable, steps: int
) -> None:
    theirs = chained(DDIMScheduler, path, prediction_type=prediction, timestep_spacing=name(grid))
    theirs.set_timesteps(steps)
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = stepped(theirs, toy, z, eta=eta, generator=torch.Generator().manual_seed(3))
    times = grid(path, steps)
    assert (times[:-1] * 1000 - 1).round().tolist() == theirs.timesteps.tolist()
    found = ddim(reading(path, target), path, z, times, numbers(3, z), eta=eta)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())
    if eta == 0:
        assert torch.equal(found, euler(reading(path, target), path, z, times))


@pytest.mark.parametrize(("grid", "steps"), [(trailing, 7), (trailing, 30), (linspace, 50)])
def test_ddim_reads_the_next_time_where_diffusers_computes_it(grid: Callable, steps: int) -> None:
    path = LDMLinear()
    theirs = chained(DDIMScheduler, path, timestep_spacing=name(grid))
    theirs.set_timesteps(steps)
    times = grid(path, steps)
    assert (times[:-1] * 1000 - 1).round().tolist() == theirs.timesteps.tolist()
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = stepped(theirs, toy, z)
    denoise = reading(path, Epsilon())
    computed = z
    for t in times[:-1]:
        computed = euler(denoise, path, computed, torch.stack([t, (t - 1000 // steps / 1000).clamp(min=0)]))
    torch.testing.assert_close(computed, expected)  # theirs jumps as if the steps divided the chain,
    assert not torch.allclose(euler(denoise, path, z, times), expected, rtol=1e-3)  # and so not to the listed times


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_euler_on_the_straight_line_is_that_of_diffusers(alpha: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=alpha)
    theirs.set_timesteps(sigmas=np.linspace(1, 0, 8)[:-1])
    times = trailing(RectifiedFlow(), 7, alpha)
    torch.testing.assert_close(theirs.sigmas, times.float())
    z = x = torch.randn(2, 3, 4)
    for t in theirs.timesteps:
        x = theirs.step(toy(x, (t / 1000).expand(2), None), t, x).prev_sample
    objective = Objective()
    found = euler(lambda z, t: objective.denoise(toy, z, t, None), RectifiedFlow(), z, times)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "walk"), [(EDMEulerScheduler, euler), (EDMDPMSolverMultistepScheduler, dpmpp_2m)], ids=name
)
@pytest.mark.parametrize("steps", [1, 2, 10, 30])
def test_edm_path_is_that_of_diffusers(scheduler: type, walk: Callable, steps: int) -> None:
    path, theirs = EDM(), scheduler()
    theirs.set_timesteps(steps)
    times = karras(path, steps)
    a, b = path(times)
    torch.testing.assert_close((b / a).float(), theirs.sigmas, rtol=1e-5, atol=0)
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    x = (z / a[0]).float()
    for k, t in zip(theirs.timesteps, times, strict=False):
        x = theirs.step(toy(theirs.scale_model_input(x, k), t.expand(2), None), k, x).prev_sample
    found = walk(reading(path, Preconditioned()), path, z, times)
    torch.testing.assert_close((found / a[-1]).float(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("target", "prediction"), [(Epsilon(), "epsilon"), (V(), "v_prediction")], ids=name)
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_dpmpp_2m_on_a_chain_is_that_of_diffusers(target: Target, prediction: str, steps: int) -> None:
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction,
        timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    z = torch.randn(2, 3, 4)
    times = trailing(LDMLinear(), steps)
    assert (times[:-1] * 1000 - 1).round().tolist() == theirs.timesteps.tolist()
    found = dpmpp_2m(reading(LDMLinear(), target), LDMLinear(), z.double(), times).float()
    torch.testing.assert_close(found, stepped(theirs, toy, z), rtol=1e-3, atol=1e-4)  # theirs counts in float32
