"""Discrete paths: the published chains of betas, their steps, and a terminal signal-to-noise ratio of zero."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from processes import CHAINS, ENDS, TIMES, name, pair

from flow.density import LogitNormal
from flow.objective import Objective
from flow.path import DDPMLinear, Discrete, ImprovedCosine, LDMLinear, RectifiedFlow, ZeroTerminalSNR
from flow.target import V, Velocity


@pytest.mark.parametrize(
    ("path", "values", "rtol"),
    [
        (DDPMLinear(), {0: 0.9999, 99: 0.897018, 499: 0.0785872, 999: 4.03583e-5}, 1e-6),
        (LDMLinear(), {499: 0.277670, 999: 0.00466010}, 2e-6),
        (ImprovedCosine(), {499: 0.493844, 999: 2.4288e-9}, 2e-5),
        (ZeroTerminalSNR(LDMLinear()), {0: 0.99915, 499: 0.242359, 999: 0.0}, 1e-6),
    ],
    ids=pair,
)
def test_chains_have_the_published_alphas(path: Discrete, values: dict[int, float], rtol: float) -> None:
    found = {k: path.alphas_cumprod[k].item() for k in values}
    assert found == pytest.approx(values, rel=rtol, abs=0)
    a, b = path(torch.tensor([(k + 1) / 1000 for k in values], dtype=torch.float64))  # theirs counts from 0
    torch.testing.assert_close(a**2, torch.tensor(list(found.values()), dtype=torch.float64), atol=0, rtol=1e-12)
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(a))


def test_cosine_chain_clips_one_beta() -> None:
    bar = torch.cat([torch.ones(1, dtype=torch.float64), ImprovedCosine().alphas_cumprod])
    beta = 1 - bar[1:] / bar[:-1]
    assert int((beta > 0.999 - 1e-9).sum()) == 1
    assert beta[-1].item() == pytest.approx(0.999)


@pytest.mark.parametrize("chain", CHAINS[:3], ids=name)
def test_zero_terminal_snr_shifts_and_scales_the_root(chain: Discrete) -> None:
    old, new = chain.alphas_cumprod.sqrt(), ZeroTerminalSNR(chain).alphas_cumprod.sqrt()
    assert new[0].item() == pytest.approx(old[0].item())
    assert new[-1] == 0
    torch.testing.assert_close(new.diff() / old.diff(), (old[0] / (old[0] - old[-1])).expand(999))


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize(
    ("path", "schedule"),
    [
        (DDPMLinear(), {"beta_schedule": "linear"}),
        (LDMLinear(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (ImprovedCosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
    ids=pair,
)
def test_chains_are_those_of_diffusers(path: Discrete, schedule: dict, scheduler: type) -> None:
    theirs = scheduler(**schedule).alphas_cumprod.double()  # added up in float32, hence the tolerance
    torch.testing.assert_close(path.alphas_cumprod, theirs, atol=2e-7, rtol=1e-4)
    theirs = scheduler(**schedule, rescale_betas_zero_snr=True).alphas_cumprod.double()
    torch.testing.assert_close(ZeroTerminalSNR(path).alphas_cumprod, theirs, atol=2e-7, rtol=1e-3)


@pytest.mark.parametrize("path", CHAINS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cell_draws_each_step_equally_often_and_never_the_data(path: Discrete, dtype: torch.dtype) -> None:
    u = ((torch.arange(5000, dtype=torch.float64) + 0.5) / 5000).to(dtype)
    n = (path.training_time(u) * 1000).round().long()
    assert n.bincount().tolist() == [0] + [5] * 1000
    assert (path.training_time(ENDS.to(dtype)) * 1000).tolist() == [1, 1000]
    objective = Objective(path, V(), density=LogitNormal(-8.0))  # all its mass is near the data
    assert objective.training_time(torch.rand(100, dtype=torch.float64), 64).min() == torch.tensor(0.001)


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_a_chain_has_no_times_between_its_steps(path: Discrete) -> None:
    with pytest.raises(ValueError, match="discrete and has no rate: use Epsilon, X0 or V") as refusal:
        Objective(path, Velocity())
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="no times in between"):
        path.time(TIMES)


def test_only_a_chain_has_a_terminal_snr() -> None:
    with pytest.raises(ValueError, match="RectifiedFlow is continuous"):
        ZeroTerminalSNR(RectifiedFlow())  # type: ignore[arg-type]
