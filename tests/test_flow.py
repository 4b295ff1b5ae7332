"""The process: derivatives, solves, densities, loss, weights, learned variance and guidance, against mathematics."""

import math
from typing import NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from flow.density import CosMap, Density, LogitNormal, Mode, Uniform, shift, stratified
from flow.grid import trailing
from flow.guidance import ClassifierFree, Weak, known
from flow.objective import Estimate, Objective, TimeBins
from flow.path import (
    EDM,
    Cosine,
    DDPMLinear,
    Discrete,
    ImprovedCosine,
    LDMLinear,
    Path,
    RectifiedFlow,
    ZeroTerminalSNR,
    expand_as,
)
from flow.sampler import euler
from flow.target import X0, Epsilon, Preconditioned, Target, V, Velocity, determinant, solve
from flow.variance import LearnedVariance, interpolated, posterior
from flow.weight import (
    P2,
    DensityWeight,
    EDMWeight,
    ExponentialWeight,
    LogSNRWeight,
    MinSNR,
    SechWeight,
    Weight,
    implied_weight,
)

CONTINUOUS = [RectifiedFlow(), Cosine(), EDM(), EDM(0.0, 0.6), EDM(-0.5, 1.2, 1.0)]
CHAINS = [DDPMLinear(), LDMLinear(), ImprovedCosine(), ZeroTerminalSNR(LDMLinear()), ZeroTerminalSNR(ImprovedCosine())]
PATHS = CONTINUOUS + CHAINS
TARGETS = [Epsilon(), X0(), V(), Velocity(), Preconditioned(), Preconditioned(1.0)]
PAIRS = [(p, t) for p in PATHS for t in TARGETS if not (isinstance(p, Discrete) and isinstance(t, Velocity))]
DENSITIES = [Uniform(), LogitNormal(0, 1), LogitNormal(0.5, 0.6), Mode(1.29), Mode(-0.5), CosMap()]
TIMES = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)  # inside (0, 1), and a multiple of 1/1000
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


def name(thing: object) -> str:
    if isinstance(thing, ZeroTerminalSNR):
        return f"ZeroTerminalSNR-{name(thing.path)}"
    if isinstance(thing, EDM):
        return f"EDM({thing.mean},{thing.std},{thing.sigma_data})"
    if isinstance(thing, Preconditioned):
        return f"Preconditioned({thing.sigma_data})"
    return type(thing).__name__


def pair(thing: object) -> str:
    return "-".join(map(name, thing)) if isinstance(thing, tuple) else name(thing)


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_rate_is_the_derivative(path: Path) -> None:
    for i in range(2):
        _, derivative = torch.func.jvp(lambda t, i=i: path(t)[i], (TIMES,), (torch.ones_like(TIMES),))
        torch.testing.assert_close(path.rate(TIMES)[i], derivative)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_ends_are_data_and_noise(path: Path) -> None:
    a, b = path(ENDS)
    assert a[0] == pytest.approx(1 / path.sigma_data if isinstance(path, EDM) else 1)
    assert b[0] == 0
    last = path.alphas_cumprod[-1].item() if isinstance(path, Discrete) else 0.0
    assert (a[1] ** 2, b[1] ** 2) == pytest.approx((last, 1 - last), abs=1e-15)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_noise_takes_over_from_picture(path: Path) -> None:
    a, b = path(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert bool(((b / (a + b)).diff() > 0).all())


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_coefficients_keep_the_shape_and_type_of_t(path: Path) -> None:
    for t in (torch.rand(2, 3), torch.rand(4).double(), torch.tensor(0.5)):
        assert [(c.shape, c.dtype) for c in path(t)] == [(t.shape, t.dtype)] * 2
        torch.testing.assert_close(path(t), tuple(c.to(t) for c in path(path.snap(t.double()))), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("path", [p for p in PATHS if not isinstance(p, (RectifiedFlow, EDM))], ids=name)
def test_variance_preserving_paths_preserve_it(path: Path) -> None:
    a, b = path(torch.linspace(0, 1, 1001, dtype=torch.float64))
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(a))


@pytest.mark.parametrize("path", [p for p in CONTINUOUS if isinstance(p, EDM)], ids=name)
def test_edm_is_a_log_normal_sigma_seen_through_c_in(path: EDM) -> None:
    a, b = path(TIMES)
    sigma = Normal(0.0, 1.0).icdf(TIMES).mul(path.std).add(path.mean).exp()
    torch.testing.assert_close(b / a, sigma)
    torch.testing.assert_close(a, 1 / (sigma**2 + path.sigma_data**2).sqrt())


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_time_inverts_the_share_of_noise(path: Path) -> None:
    tau = torch.cat([ENDS, torch.tensor([1e-6, 0.001, 0.3, 0.5, 0.9, 0.98], dtype=torch.float64)])
    a, b = path(path.time(tau))
    torch.testing.assert_close(b / (a + b), tau, atol=0, rtol=1e-8)
    a, b = path(TIMES)
    torch.testing.assert_close(path.time(b / (a + b)), TIMES)


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
def test_cell_gives_each_step_alike_and_never_the_data(path: Discrete, dtype: torch.dtype) -> None:
    u = ((torch.arange(5000, dtype=torch.float64) + 0.5) / 5000).to(dtype)
    n = (path.cell(u) * 1000).round().long()
    assert n.bincount().tolist() == [0] + [5] * 1000
    assert (path.cell(ENDS.to(dtype)) * 1000).tolist() == [1, 1000]
    objective = Objective(path, V(), density=LogitNormal(-8.0))  # all its mass is near the data
    assert objective.time(torch.rand(100, dtype=torch.float64), 64).min() == torch.tensor(0.001)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_snap_goes_to_the_nearest_time(path: Path) -> None:
    t = torch.tensor([0.0, 0.0004, 0.0006, 0.12349, 0.12351, 1.0], dtype=torch.float64)
    if isinstance(path, Discrete):
        expected = torch.tensor([0, 0, 0.001, 0.123, 0.124, 1], dtype=torch.float64)
        torch.testing.assert_close(path.snap(t), expected)
        torch.testing.assert_close(path(path.snap(t)), path(t))
    else:
        assert torch.equal(path.snap(t), t)
        assert torch.equal(path.cell(t), t)


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_a_chain_has_nothing_in_between(path: Discrete) -> None:
    with pytest.raises(ValueError, match="discrete and has no rate: use Epsilon, X0 or V") as refusal:
        Objective(path, Velocity())
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="no times in between"):
        path.time(TIMES)


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_a_learned_variance_needs_a_chain(path: Path) -> None:
    with pytest.raises(ValueError, match="a learned variance needs a discrete path"):
        Objective(path, V(), variance=LearnedVariance())


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (EDM, {"std": 0.0}),
        (EDM, {"sigma_data": -1.0}),
        (Preconditioned, {"sigma_data": 0.0}),
        (LearnedVariance, {"weight": 0.0}),
        (MinSNR, {"gamma": 0.0}),
        (P2, {"k": 0.0}),
        (P2, {"gamma": -1.0}),
        (EDMWeight, {"std": 0.0}),
        (EDMWeight, {"sigma_data": 0.0}),
    ],
)
def test_impossible_parameters_are_refused(make: type, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"needs .* got"):
        make(**bad)


@pytest.mark.parametrize("both", PAIRS, ids=pair)
def test_solve_recovers_picture_and_noise(both: tuple[Path, Target]) -> None:
    path, target = both
    x0, noise = torch.randn(2, 49, 3, 4, 4, dtype=torch.float64)
    a, b, p, q = (expand_as(c, x0) for c in (*path(TIMES), *target.row(path, TIMES)))
    found = solve(path, target, a * x0 + b * noise, p * x0 + q * noise, TIMES)
    torch.testing.assert_close(found, (x0, noise))


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_determinants(path: Path) -> None:
    a, b = path(TIMES)
    torch.testing.assert_close(determinant(path, Epsilon(), TIMES), a)
    torch.testing.assert_close(determinant(path, X0(), TIMES), -b)
    torch.testing.assert_close(determinant(path, V(), TIMES), a**2 + b**2)
    torch.testing.assert_close(determinant(path, Preconditioned(0.7), TIMES), -((b**2 + (0.7 * a) ** 2).sqrt()) / 0.7)


def test_velocity_is_determined_everywhere() -> None:
    t = torch.cat([ENDS, TIMES])
    torch.testing.assert_close(determinant(RectifiedFlow(), Velocity(), t), torch.ones_like(t))
    torch.testing.assert_close(determinant(Cosine(), Velocity(), t), torch.full_like(t, math.pi / 2))


def test_velocity_of_the_straight_line_solves_at_both_ends() -> None:
    x0, noise = torch.randn(2, 2, 3)
    t = torch.tensor([0.0, 1.0])
    z = torch.stack([x0[0], noise[1]])
    torch.testing.assert_close(solve(RectifiedFlow(), Velocity(), z, noise - x0, t), (x0, noise))


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("target", [V(), Preconditioned(), Preconditioned(1.0)], ids=name)
def test_v_and_preconditioned_solve_at_both_ends(path: Path, target: Target) -> None:
    x0, noise = torch.randn(2, 2, 3, dtype=torch.float64)
    a, b, p, q = (expand_as(c, x0) for c in (*path(ENDS), *target.row(path, ENDS)))
    found = solve(path, target, a * x0 + b * noise, p * x0 + q * noise, ENDS)
    torch.testing.assert_close(found[0][0], x0[0])
    torch.testing.assert_close(found[1][1], noise[1])


@pytest.mark.parametrize("path", [p for p in CONTINUOUS if isinstance(p, EDM)], ids=name)
def test_preconditioned_is_edm_of_the_paper(path: EDM) -> None:
    x0, noise, output = torch.randn(3, 49, 5, dtype=torch.float64)
    a, b = path(TIMES)
    sigma, data = (b / a)[:, None], path.sigma_data
    x = x0 + sigma * noise
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2).sqrt()
    c_in = 1 / (sigma**2 + data**2).sqrt()
    z = a[:, None] * x0 + b[:, None] * noise
    torch.testing.assert_close(z, c_in * x)
    target = Preconditioned(data)
    p, q = target.row(path, TIMES)
    torch.testing.assert_close(p[:, None] * x0 + q[:, None] * noise, (x0 - c_skip * x) / c_out)
    denoised, rest = solve(path, target, z, output, TIMES)
    torch.testing.assert_close(denoised, c_skip * x + c_out * output)
    torch.testing.assert_close(rest, (x - denoised) / sigma)
    karras = (sigma**2 + data**2) / (sigma * data) ** 2  # their λ(σ), which makes the loss on F unweighted
    error = (output - (x0 - c_skip * x) / c_out).square()
    torch.testing.assert_close(error, karras * (denoised - x0).square())
    loss = Objective(path, target).loss(lambda *_: output, x0, noise, TIMES.float(), None)
    torch.testing.assert_close(loss.double(), error.mean(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", [p for p in PATHS if not isinstance(p, (RectifiedFlow, EDM))], ids=name)
def test_preconditioned_of_unit_data_is_minus_v(path: Path) -> None:
    found, v = Preconditioned(1.0).row(path, TIMES), V().row(path, TIMES)
    torch.testing.assert_close(found, (-v[0], -v[1]))


@pytest.mark.parametrize("density", DENSITIES, ids=name)
def test_density_maps_uniform_numbers_to_its_pdf(density: Density) -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    edges = torch.linspace(0, 1, 41, dtype=torch.float64)
    share = torch.histogram(density(u), edges)[0] / len(u)
    fine = (torch.arange(40 * 200, dtype=torch.float64) + 0.5) / (40 * 200)
    expected = density.pdf(fine).reshape(40, 200).mean(1) / 40
    torch.testing.assert_close(share, expected, atol=2e-5, rtol=2e-3)


def test_density_values_of_the_paper() -> None:
    half = torch.tensor([0.5], dtype=torch.float64)
    assert Mode(1.29).pdf(half).item() == pytest.approx(1 / (1 - 1.29 * (math.pi / 2 - 1)))
    assert CosMap().pdf(half).item() == pytest.approx(4 / math.pi)
    assert LogitNormal(0, 1).pdf(half).item() == pytest.approx(4 / math.sqrt(2 * math.pi))
    assert LogitNormal(1, 0.6)(half).item() > 0.5  # a positive mean moves mass toward the noise


@pytest.mark.parametrize(("make", "bad"), [(Mode, 2.0), (Mode, -1.1), (lambda s: LogitNormal(0, s), 0.0)])
def test_impossible_densities_are_refused(make: type, bad: float) -> None:
    with pytest.raises(ValueError, match="needs"):
        make(bad)


def test_stratified_has_one_number_in_each_cell_and_replays() -> None:
    u = stratified(64, torch.Generator().manual_seed(1))
    assert (u * 64).floor().sort().values.tolist() == list(range(64))
    assert not torch.equal(u, u.sort().values)
    assert torch.equal(u, stratified(64, torch.Generator().manual_seed(1)))


def test_stratified_lowers_the_variance_of_a_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    t = LogitNormal()
    plain = torch.stack([t(torch.rand(16, dtype=torch.float64, generator=draw)).mean() for _ in range(500)])
    strata = torch.stack([t(stratified(16, draw)).mean() for _ in range(500)])
    assert strata.var() < 0.05 * plain.var()
    assert abs(strata.mean().item() - 0.5) < 0.002


def test_shift_moves_mass_to_the_noise_and_keeps_the_ends() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift(t, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    torch.testing.assert_close(shift(shift(t, 2.0), 3.0), shift(t, 6.0))  # so a second application shows
    assert torch.equal(shift(t, 1.0), t)


def test_shift_enters_training_and_grid_once_and_equally() -> None:
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    times = Objective(density=Uniform(), shift=3.0).time(u, 64)
    torch.testing.assert_close(times.flip(0), trailing(RectifiedFlow(), 8, 3.0).float())


def test_shift_grows_with_the_root_of_the_area() -> None:
    """Esser et al. 2024, eq. 23: α = √(m / n), so four times the pixels double it."""
    objective = Objective(density=Uniform(), shift=3.0, shift_area=128 * 128)
    assert [objective.alpha(side * side) for side in (64, 128, 256)] == pytest.approx([1.5, 3.0, 6.0])
    assert objective.alpha(64 * 256) == pytest.approx(3.0)
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    for area in (64 * 64, 128 * 128, 96 * 160):
        alpha = 3.0 * (area / 128**2) ** 0.5
        torch.testing.assert_close(objective.time(u, area).flip(0), trailing(RectifiedFlow(), 8, alpha).float())


def test_without_an_area_one_shift_is_for_all() -> None:
    objective = Objective(shift=3.0)
    u = torch.rand(100, dtype=torch.float64)
    assert {objective.alpha(area) for area in (1, 64, 2**20)} == {3.0}
    assert torch.equal(objective.time(u, 1), objective.time(u, 2**20))
    assert torch.equal(objective.time(u, 64), Objective(shift=3.0, shift_area=64).time(u, 64))
    for wrong in ({"shift": 0.0}, {"shift_area": 0}, {"shift_area": -4}):
        with pytest.raises(ValueError, match="must be > 0"):
            Objective(**wrong)


def exact_model(objective: Objective, x0: Tensor, noise: Tensor):
    """A model that knows the pair, and so predicts the target without error."""

    def model(z: Tensor, t: Tensor, condition: object) -> Tensor:
        p, q = (expand_as(c, x0) for c in objective.target.row(objective.path, t))
        return p * x0 + q * noise

    return model


@pytest.mark.parametrize("both", PAIRS, ids=pair)
def test_loss_is_zero_for_the_target_and_counts_per_image(both: tuple[Path, Target]) -> None:
    path, target = both
    objective = Objective(path, target)
    x0, noise = torch.randn(2, 5, 2, 4, 4)
    t = objective.path.cell(torch.linspace(0.1, 0.9, 5))
    model = exact_model(objective, x0, noise)
    torch.testing.assert_close(objective.loss(model, x0, noise, t, None), torch.zeros(5), atol=1e-10, rtol=0)
    off = torch.arange(5.0).reshape(5, 1, 1, 1)
    loss = objective.loss(lambda *a: model(*a) + off, x0, noise, t, None)
    torch.testing.assert_close(loss, torch.arange(5.0) ** 2, rtol=1e-5, atol=0)
    a, b = (expand_as(c, x0) for c in path(t))
    estimate = objective.denoise(model, a * x0 + b * noise, t, None)
    torch.testing.assert_close((estimate.x0, estimate.noise), (x0, noise), rtol=1e-3, atol=1e-4)
    assert estimate.variance is None


def test_loss_gives_the_model_the_point_on_the_path_and_the_condition() -> None:
    x0, noise = torch.randn(2, 3, 1, 2, 2)
    t = torch.tensor([0.0, 0.25, 1.0])
    seen = []
    Objective().loss(lambda z, t, c: seen.append((z, t, c)) or z, x0, noise, t, "condition")
    z, time, condition = seen[0]
    torch.testing.assert_close(z, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]]))
    assert torch.equal(time, t)
    assert condition == "condition"


def test_loss_is_float32_around_a_bfloat16_network() -> None:
    x0, noise = torch.randn(2, 4, 1, 2, 2, dtype=torch.bfloat16)
    seen = []
    loss = Objective().loss(lambda z, t, c: seen.append((z, t)) or z.bfloat16(), x0, noise, torch.rand(4), None)
    assert (loss.dtype, seen[0][0].dtype, seen[0][1].dtype) == (torch.float32,) * 3
    with pytest.raises(TypeError, match="float32"):
        Objective().loss(lambda z, t, c: z, x0, noise, torch.rand(4, dtype=torch.bfloat16), None)


def test_weighting_by_a_density_equals_drawing_from_it() -> None:
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x0, noise = torch.zeros(2, 4000, 1, dtype=torch.float64)

    def model(z: Tensor, t: Tensor, condition: object) -> Tensor:
        return t[:, None] ** 2  # so that the loss depends on t

    drawn = Objective(density=LogitNormal())
    weighted = Objective(density=Uniform(), weight=DensityWeight(LogitNormal()))
    a, b = (o.loss(model, x0, noise, o.time(u, 1), None).mean().item() for o in (drawn, weighted))
    assert a == pytest.approx(b, rel=1e-3)
    unweighted = Objective(density=Uniform()).loss(model, x0, noise, u.float(), None).mean().item()
    assert a != pytest.approx(unweighted, rel=0.05)


def test_time_bins_average_by_t_and_start_afresh() -> None:
    bins = TimeBins(4)
    assert all(map(math.isnan, bins.means()))
    bins.add(torch.tensor([0.0, 0.1, 0.3]), torch.tensor([1.0, 3.0, 5.0]))
    bins.add(torch.tensor([1.0]), torch.tensor([7.0]))
    kept = bins.sums.clone()
    assert kept.tolist() == [[4.0, 5.0, 0.0, 7.0], [2.0, 1.0, 0.0, 1.0]]
    means = bins.means()
    assert means[:2] == [2.0, 5.0]
    assert math.isnan(means[2])
    assert means[3] == 7.0
    assert all(map(math.isnan, bins.means()))
    bins.sums.copy_(kept)  # as a run that goes on
    assert bins.means(lambda sums: 3 * sums)[:2] == [2.0, 5.0]


def snr(path: Path, t: Tensor) -> Tensor:
    a, b = path(t)
    return (a / b) ** 2


def log_snr(path: Path, t: Tensor) -> Tensor:
    return snr(path, t).log()


def constant(values: Tensor) -> bool:
    return bool((values / values.mean() - 1).abs().max() < 1e-9)


def test_implied_weights_of_the_paper() -> None:
    t = TIMES
    torch.testing.assert_close(implied_weight(RectifiedFlow(), Velocity(), t), t / (1 - t))
    cosine = log_snr(Cosine(), t)
    assert constant(implied_weight(Cosine(), V(), t) / torch.exp(-cosine / 2))
    assert constant(implied_weight(Cosine(), Epsilon(), t) * torch.cosh(cosine / 2))


@pytest.mark.parametrize("path", [p for p in CONTINUOUS if isinstance(p, EDM)], ids=name)
def test_implied_weight_of_edm(path: EDM) -> None:
    value = log_snr(path, TIMES)
    mean, std = (torch.tensor(2 * c, dtype=torch.float64) for c in (-path.mean, path.std))
    normal = Normal(mean, std).log_prob(value).exp()
    implied = implied_weight(path, Preconditioned(path.sigma_data), TIMES)
    assert constant(implied / (normal * (torch.exp(-value) + path.sigma_data**2)))


@pytest.mark.parametrize(
    ("weight", "path", "target"),
    [
        (ExponentialWeight(), RectifiedFlow(), Velocity()),
        (ExponentialWeight(), Cosine(), V()),
        (ExponentialWeight(), Cosine(), Velocity()),
        (SechWeight(), Cosine(), Epsilon()),
        (EDMWeight(), EDM(), Preconditioned()),
        (EDMWeight(0.3, 0.7, 1.5), EDM(0.3, 0.7, 1.5), Preconditioned(1.5)),
    ],
    ids=name,
)
def test_a_formulation_needs_no_factor_for_the_weight_it_implies(weight: Weight, path: Path, target: Target) -> None:
    assert constant(weight(path, target, TIMES))
    assert not constant(weight(path, X0(), TIMES))


def test_exponential_weight_of_rectified_flow_is_one() -> None:
    factor = ExponentialWeight()(RectifiedFlow(), Velocity(), TIMES)
    torch.testing.assert_close(factor, torch.ones_like(TIMES))


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("weight", [MinSNR(), MinSNR(1.0), P2(), P2(0.5, 2.0), ExponentialWeight(), SechWeight(),
                                    EDMWeight()], ids=name)  # fmt: skip
def test_a_weighted_loss_is_the_same_whatever_the_target(weight: Weight, path: Path) -> None:
    if isinstance(weight, LogSNRWeight) and isinstance(path, Discrete):
        with pytest.raises(ValueError, match="discrete"):
            weight(path, V(), TIMES)
        with pytest.raises(ValueError, match="discrete"):  # and so does an objective, before any training
            Objective(path, V(), weight=weight)
        return
    x0, noise, error = torch.randn(3, 49, dtype=torch.float64)
    a, b = path(TIMES)
    guess = (a * x0 + b * noise - b * (noise + error)) / a  # of x0, by whoever takes noise + error for the noise
    losses = []
    for target in (target for p, target in PAIRS if p is path):
        p, q = target.row(path, TIMES)
        loss = (p * (guess - x0) + q * error).square()
        losses.append(weight(path, target, TIMES) * loss)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_of_the_paper(path: Path, gamma: float) -> None:
    ratio = snr(path, TIMES)
    assert (ratio.min() < gamma) & (ratio.max() > gamma)
    least = ratio.clamp(max=gamma)
    torch.testing.assert_close(MinSNR(gamma)(path, X0(), TIMES), least)
    torch.testing.assert_close(MinSNR(gamma)(path, Epsilon(), TIMES), least / ratio)
    if not isinstance(path, (RectifiedFlow, EDM)):
        torch.testing.assert_close(MinSNR(gamma)(path, V(), TIMES), least / (ratio + 1))


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize(("k", "gamma"), [(1.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_p2_of_the_paper(path: Path, k: float, gamma: float) -> None:
    ratio = snr(path, TIMES)
    factor = (k + ratio) ** -gamma
    torch.testing.assert_close(P2(k, gamma)(path, Epsilon(), TIMES), factor)
    torch.testing.assert_close(P2(k, gamma)(path, X0(), TIMES), factor * ratio)
    if not isinstance(path, (RectifiedFlow, EDM)):
        torch.testing.assert_close(P2(k, gamma)(path, V(), TIMES), factor * ratio / (ratio + 1))


def test_weight_multiplies_the_loss() -> None:
    x0, noise = torch.randn(2, 5, 1, 4, 4)
    t = torch.linspace(0.1, 0.9, 5)
    plain, weighted = (
        Objective(Cosine(), V(), weight=weight).loss(lambda z, t, c: z, x0, noise, t, None)
        for weight in (None, MinSNR())
    )
    torch.testing.assert_close(weighted, MinSNR()(Cosine(), V(), t) * plain)


LEAPS = [(n, s) for n in (1, 2, 3, 500, 999, 1000) for s in (0, 1, 2, 400, 998, 999) if s < n]


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_posterior_is_that_of_ddpm_over_any_leap(path: Discrete) -> None:
    bar = torch.cat([torch.ones(1, dtype=torch.float64), path.alphas_cumprod])
    n, s = torch.tensor(LEAPS).T
    found = posterior(path, n / 1000, s / 1000)
    beta = 1 - bar[n] / bar[s]
    close = {"rtol": 1e-8, "atol": 1e-15}
    torch.testing.assert_close(found.large, beta, **close)
    torch.testing.assert_close(found.small, (1 - bar[s]) / (1 - bar[n]) * beta, **close)
    torch.testing.assert_close(found.gain, bar[s].sqrt() * beta / (1 - bar[n]), **close)
    x0, noise = torch.randn(2, len(n), dtype=torch.float64)
    z = bar[n].sqrt() * x0 + (1 - bar[n]).sqrt() * noise
    eq7 = bar[s].sqrt() * beta / (1 - bar[n]) * x0 + (1 - beta).sqrt() * (1 - bar[s]) / (1 - bar[n]) * z
    mean = bar[s].sqrt() * x0 + ((1 - bar[s]) - found.small).clamp(min=0).sqrt() * noise
    torch.testing.assert_close(mean, eq7, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_posterior_is_bayes_rule(path: Path) -> None:
    t, s = torch.tensor([[0.9, 0.5], [0.5, 0.499], [0.02, 0.01], [1.0, 0.3]], dtype=torch.float64).T
    (a, b), (a_s, b_s) = path(t), path(s)
    found = posterior(path, t, s)
    alpha = a / a_s
    torch.testing.assert_close((alpha * b_s) ** 2 + found.large, b**2)  # s → t adds noise of variance β
    precision = 1 / b_s**2 + alpha**2 / found.large  # prior of z_s given x0 × likelihood of z_t
    torch.testing.assert_close(found.small, 1 / precision)
    torch.testing.assert_close(found.gain, a_s / b_s**2 / precision)


@pytest.mark.parametrize("path", CHAINS, ids=name)
@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_posterior_is_that_of_diffusers(path: Discrete, steps: int) -> None:
    theirs = DDPMScheduler(timestep_spacing="linspace")
    theirs.alphas_cumprod = path.alphas_cumprod  # theirs is float32
    theirs.set_timesteps(steps)
    for k, before in zip(theirs.timesteps[:-1], theirs.timesteps[1:], strict=True):
        found = posterior(path, (k + 1) / 1000, (before + 1) / 1000)
        small, large, learned = (
            theirs._get_variance(k, torch.tensor(0.3), kind) for kind in ("fixed_small", "fixed_large", "learned_range")
        )
        assert (found.small.item(), found.large.item()) == pytest.approx((small.item(), large.item()), rel=1e-7)
        between = interpolated(found, torch.tensor([0.3], dtype=torch.float64))
        assert between.item() == pytest.approx(learned.item(), rel=1e-6)


def test_interpolated_variance_goes_from_small_to_large() -> None:
    exact = posterior(LDMLinear(), torch.tensor([0.5, 1.0]), torch.tensor([0.499, 0.9]))
    output = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).expand(2, 3)
    middle = (exact.small * exact.large).sqrt()
    torch.testing.assert_close(interpolated(exact, output).exp(), torch.stack([exact.small, middle, exact.large], 1))


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_learned_variance_is_the_bound_in_bits(path: Discrete) -> None:
    n = torch.tensor([1, 2, 3, 500, 999, 1000])
    x0, estimate = torch.randn(2, 6, 2, 4, 4, dtype=torch.float64)
    output = torch.rand(6, 2, 4, 4, dtype=torch.float64) * 2 - 1
    found = LearnedVariance(0.25).loss(path, x0, estimate, output, (n / 1000).float())
    bar = torch.cat([torch.ones(1, dtype=torch.float64), path.alphas_cumprod])
    beta = (1 - bar[n] / bar[n - 1])[:, None, None, None]
    before, after = ((1 - bar[k])[:, None, None, None] for k in (n - 1, n))
    small = before / after * beta
    small[0] = (1 - bar[1]) / (1 - bar[2]) * (1 - bar[2] / bar[1])  # β̃ of n = 1 is 0, that of n = 2 stands in
    z = torch.randn_like(x0)
    true, guess = (
        (1 - before).sqrt() * beta / after * x + (1 - beta).sqrt() * before / after * z for x in (x0, estimate)
    )
    std = ((output + 1) / 4 * beta.log() + (1 - output) / 4 * small.log()).exp()
    bound = kl_divergence(Normal(true, small.sqrt()), Normal(guess, std))
    bound[0] = -Normal(estimate[0], std[0]).log_prob(x0[0])
    torch.testing.assert_close(found, 0.25 * 1000 * bound.flatten(1).mean(1) / math.log(2), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_the_bound_is_zero_for_the_true_step(path: Discrete) -> None:
    n = torch.arange(2, 1001)
    x0 = torch.randn(999, 4, dtype=torch.float64)
    bound = LearnedVariance(1.0).loss(path, x0, x0, torch.full_like(x0, -1), n / 1000)
    torch.testing.assert_close(bound, torch.zeros_like(bound), atol=1e-9, rtol=0)
    worse = LearnedVariance(1.0).loss(path, x0, x0, torch.full_like(x0, -0.5), n / 1000)
    assert bool((worse > 0).all())


@pytest.mark.parametrize("target", [Epsilon(), X0(), V()], ids=name)
def test_hybrid_loss_adds_the_bound_and_holds_the_mean(target: Target) -> None:
    path, part = DDPMLinear(), LearnedVariance()
    x0, noise = torch.randn(2, 4, 3, 2, 2)
    t = torch.tensor([0.001, 0.01, 0.5, 0.9])
    output = torch.randn(4, 6, 2, 2, requires_grad=True)
    y, v = output.chunk(2, 1)
    both = Objective(path, target, variance=part).loss(lambda *_: output, x0, noise, t, None)
    simple = Objective(path, target).loss(lambda *_: y, x0, noise, t, None)
    a, b = (expand_as(c, x0) for c in path(t))
    estimate, _ = solve(path, target, a * x0 + b * noise, y, t)
    bound = part.loss(path, x0, estimate, v, t)
    torch.testing.assert_close(both, simple + bound.float())
    (of_both,) = torch.autograd.grad(both.sum(), output, retain_graph=True)
    (of_simple,) = torch.autograd.grad(simple.sum(), output, retain_graph=True)
    (of_bound,) = torch.autograd.grad(bound.sum(), output)
    torch.testing.assert_close(of_both[:, :3], of_simple[:, :3])
    assert bool((of_bound[:, :3] == 0).all())
    assert bool((of_both[:2, 3:] != 0).all())  # near the noise β̃ is as good as β


def test_denoise_hands_on_the_learned_variance() -> None:
    z, output = torch.randn(4, 3, 2, 2), torch.randn(4, 6, 2, 2)
    t = torch.full((4,), 0.5)
    estimate = Objective(LDMLinear(), Epsilon(), variance=LearnedVariance()).denoise(lambda *_: output, z, t, None)
    assert torch.equal(estimate.variance, output[:, 3:])
    torch.testing.assert_close(estimate.noise, output[:, :3])
    torch.testing.assert_close(estimate[:2], solve(LDMLinear(), Epsilon(), z, output[:, :3], t))


class Told(NamedTuple):
    value: Tensor
    mask: Tensor | None = None


def test_guidance_extrapolates_every_channel_in_one_call() -> None:
    calls = []

    def model(z: Tensor, t: Tensor, condition: Told) -> Tensor:
        calls.append(len(z))
        return z + condition.value[:, :, None, None]

    z, t = torch.randn(3, 4, 2, 2), torch.rand(3)
    condition, null = Told(torch.randn(3, 4)), Told(torch.randn(1, 4))
    expected = z + (null.value + 2.5 * (condition.value - null.value))[:, :, None, None]
    torch.testing.assert_close(ClassifierFree(model, null, 2.5)(z, t, condition), expected)
    assert calls == [6]
    torch.testing.assert_close(ClassifierFree(model, null, 1.0)(z, t, condition), model(z, t, condition))
    torch.testing.assert_close(
        ClassifierFree(model, null, 0.0)(z, t, condition), model(z, t, Told(null.value.expand(3, 4)))
    )
    with pytest.raises(ValueError, match="same fields"):
        ClassifierFree(model, null, 2.0)(z, t, Told(condition.value, torch.ones(3, 4, dtype=torch.bool)))


def two_branches() -> tuple[ClassifierFree, Tensor, Tensor, Told, list[int]]:
    calls = []

    def model(z: Tensor, t: Tensor, condition: Told) -> Tensor:
        calls.append(len(z))
        return z * condition.value[:, :, None, None] + t[:, None, None, None]

    z, condition = torch.randn(3, 4, 5, 5), Told(torch.randn(3, 4))
    return ClassifierFree(model, Told(torch.randn(1, 4)), 6.0), z, torch.full((3,), 0.3), condition, calls


def test_rescaled_guidance_has_the_spread_of_the_conditional_branch() -> None:
    plain, z, t, condition, _ = two_branches()
    alone = plain.model(z, t, condition)

    def guided(rescale: float) -> Tensor:
        return ClassifierFree(plain.model, plain.null, plain.scale, rescale)(z, t, condition)

    assert torch.equal(guided(0.0), plain(z, t, condition))
    torch.testing.assert_close(guided(1.0).flatten(1).std(1), alone.flatten(1).std(1))
    assert bool((plain(z, t, condition).flatten(1).std(1) > 1.5 * alone.flatten(1).std(1)).all())
    torch.testing.assert_close(guided(0.7), 0.7 * guided(1.0) + 0.3 * guided(0.0))
    torch.testing.assert_close(guided(0.7), rescale_noise_cfg(guided(0.0), alone, 0.7))


def test_guidance_outside_its_interval_is_the_plain_model_at_half_the_cost() -> None:
    plain, z, t, condition, calls = two_branches()
    within = ClassifierFree(plain.model, plain.null, plain.scale, interval=(0.25, 0.75))
    for time, inside in ((0.0, False), (0.24, False), (0.25, True), (0.5, True), (0.75, True), (0.76, False)):
        t = torch.full((3,), time)
        calls.clear()
        found = within(z, t, condition)
        assert calls == [6 if inside else 3]
        assert torch.equal(found, plain(z, t, condition) if inside else plain.model(z, t, condition))


def test_guidance_leaves_a_learned_variance_to_the_conditional_branch() -> None:
    def model(z: Tensor, t: Tensor, condition: Told) -> Tensor:
        y = z + condition.value[:, :, None, None]
        return torch.cat([y, 10 * y], 1)

    z, t = torch.randn(3, 4, 2, 2), torch.rand(3)
    condition, null = Told(torch.randn(3, 4)), Told(torch.randn(1, 4))
    for rescale in (0.0, 0.7):
        guided = ClassifierFree(model, null, 2.5, rescale, channels=4)(z, t, condition)
        y, v = guided.chunk(2, dim=1)
        torch.testing.assert_close(v, model(z, t, condition)[:, 4:])
        mean = ClassifierFree(lambda *told: model(*told)[:, :4], null, 2.5, rescale)(z, t, condition)
        torch.testing.assert_close(y, mean)


def test_a_weak_model_is_moved_away_from_in_its_interval() -> None:
    plain, z, t, condition, calls = two_branches()

    def worse(z: Tensor, t: Tensor, condition: Told) -> Tensor:
        calls.append(-len(z))
        return z + condition.value[:, :, None, None]

    guided = ClassifierFree(plain.model, plain.null, plain.scale, weak=Weak(worse, 2.8, (0.25, 0.75)))
    guided(z, t, Told(torch.randn(3, 4)))  # another condition before leaves no trace
    expected = plain(z, t, condition) + 2.8 * (plain.model(z, t, condition) - worse(z, t, condition))
    calls.clear()
    torch.testing.assert_close(guided(z, t, condition), expected)
    assert calls == [6, -3]
    for time in (0.2, 0.8):
        outside = torch.full((3,), time)
        assert torch.equal(guided(z, outside, condition), plain(z, outside, condition))
    only = ClassifierFree(plain.model, plain.null, 6.0, interval=(0.9, 1.0), weak=Weak(worse, 0.5))
    told = plain.model(z, t, condition)
    torch.testing.assert_close(only(z, t, condition), told + 0.5 * (told - worse(z, t, condition)))


def test_what_is_known_follows_its_own_path_and_the_rest_is_the_model_s() -> None:
    x0, noise, other, mine = torch.randn(4, 2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, 1:3, 2:] = 1

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        return Estimate(mine, other, mine)

    seen = []
    path, grid = Cosine(), torch.tensor([0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
    a, b = path(grid[0])
    euler(known(denoise, x0, noise, mask), path, a * x0 + b * noise, grid, lambda i, z, _: seen.append((grid[i], z)))
    for t, z in seen:
        a, b = path(t)
        blended = mask * (a * mine + b * other) + (1 - mask) * (a * x0 + b * noise)
        torch.testing.assert_close(z, blended.to(z.dtype))
    assert len(seen) == 3
    assert known(denoise, x0, noise, mask)(x0, grid).variance is mine


def test_only_a_chain_has_a_terminal_snr() -> None:
    with pytest.raises(ValueError, match="RectifiedFlow is continuous"):
        ZeroTerminalSNR(RectifiedFlow())  # type: ignore[arg-type]
