"""The optimizer: which one learns which weights, which of them decay, and how large a gradient it takes."""

import signal
from pathlib import Path

import pytest
import torch
from networks import plain, stirred
from trials import ROOT, Change, assert_same, end, fit, lines, refused, send_at, small, start, start_ranks, state, under

from engine.optimizer import Muon, Together
from training.optimization import Group, Optimization


def test_matrices_alone_decay_by_lr_times_weight_decay() -> None:
    network = stirred(plain()).train()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = Optimization(lr=0.1, weight_decay=0.2).build(dict(network.named_parameters()))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        kept = 1 - 0.1 * 0.2 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name], msg=name)


def test_the_whole_gradient_has_at_most_the_norm_of_clip(tmp_path: Path) -> None:
    """After one step Adam's first moment is a tenth of the gradient, as β₁ is 0.9."""
    flags = {"run.steps": 1, "run.validate_every": 1, "run.checkpoint_every": 1, "run.log_every": 1,
             "optimization.warmup": 0, "optimization.clip": 0.01}  # fmt: skip
    fit(small(tmp_path), *(part for name, value in flags.items() for part in (f"--{name}", str(value))))
    moments = under(tmp_path / "run", "optimizer.")
    norm = torch.cat([x.flatten() for name, x in moments.items() if name.endswith(".exp_avg")]).norm().item()
    logged = next(line["train/grad_norm"] for line in lines(tmp_path / "run") if "train/grad_norm" in line)
    assert logged > 0.01  # of the gradient before it is clipped
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-4)


def names_of(network: torch.nn.Module, weights: list[torch.Tensor]) -> set[str]:
    return {name for name, weight in network.named_parameters() if any(weight is one for one in weights)}


def test_muon_learns_the_matrices_of_blocks_but_not_the_modulation() -> None:
    network = plain(dual_attention_layers=(0,))
    built = Optimization(matrices=Muon).build(dict(network.named_parameters()))
    assert isinstance(built, Together)
    rest, matrices = built.parts
    groups = {group["stacked"]: names_of(network, group["params"]) for group in matrices.param_groups}
    assert groups.keys() == {1, 3}
    layers = {name.removesuffix(".weight").partition(".")[2].partition(".")[2] for name in groups[1]}
    assert layers == {f"{part}.{layer}" for part in ("image", "text") for layer in ("proj", "mlp.fc1", "mlp.fc2")} | {
        "dual.proj"
    }
    assert all(name.endswith("qkv.weight") for name in groups[3])
    others = [weight for group in rest.param_groups for weight in group["params"]]
    learned = names_of(network, others) | groups[1] | groups[3]
    assert learned == {name for name, weight in network.named_parameters() if weight.requires_grad}
    for name in ("patch.weight", "context.weight", "blocks.0.modulation.weight", "final.linear.weight"):
        assert name in names_of(network, others)


def test_groups_have_rates_and_decays_of_their_own() -> None:
    groups = (Group("modulation", lr=0.5, weight_decay=0.0), Group("^blocks", lr=2.0), Group("blocks", lr=9.0))
    network = plain()
    built = Optimization(lr=0.1, weight_decay=0.2, groups=groups).build(dict(network.named_parameters()))
    told = {name: (group["lr"], group["weight_decay"])
            for group in built.param_groups for name in names_of(network, group["params"])}  # fmt: skip
    assert told["blocks.0.modulation.weight"] == (0.05, 0.0)
    assert told["final.modulation.weight"] == (0.05, 0.0)
    assert told["blocks.0.image.qkv.weight"] == (0.2, 0.2)
    assert told["blocks.0.image.qkv.bias"] == (0.2, 0.0)
    assert told["patch.weight"] == (0.1, 0.2)


MUON = ("--optimization.matrices", "engine.optimizer.Muon")
OPTIMIZERS = {  # flags, and the tensors of a matrix's state
    "muon": (MUON, {"momentum_buffer"}),
    "sgd": (("--optimization.optimizer", "torch.optim.SGD", "--optimization.optimizer.momentum", "0.9"),
            {"momentum_buffer"}),
    "adamw": (("--optimization.optimizer", "torch.optim.AdamW", "--optimization.optimizer.betas", "[0.9, 0.95]",
               "--optimization.optimizer.eps", "1e-15"), {"step", "exp_avg", "exp_avg_sq"}),
    "adafactor": (("--optimization.optimizer", "transformers.Adafactor", "--optimization.optimizer.relative_step",
                   "false", "--optimization.optimizer.scale_parameter", "false"),
                  {"exp_avg_sq_row", "exp_avg_sq_col", "RMS"}),  # counts steps for each weight, in a Python number
    "prodigy": (("--optimization.optimizer", "prodigyopt.Prodigy", "--optimization.lr", "1"),
                {"s", "p0", "exp_avg", "exp_avg_sq"}),  # has an infinite number among its settings
    "schedule-free": (("--optimization.optimizer", "schedulefree.AdamWScheduleFree"),
                      {"z", "exp_avg_sq"}),  # refuses a step outside its training mode
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_any_optimizer_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    config, (flags, keys) = small(tmp_path), OPTIMIZERS[name]
    fit(config, *flags, "--run.folder", str(tmp_path / "straight"))
    process = start(config, *flags, change=Change(send_at, (signal.SIGTERM, 3)))
    assert end(process) == 128 + signal.SIGTERM
    assert state(tmp_path / "run")["step"] == 4
    fit(config, *flags)
    found, wanted = (state(tmp_path / folder) for folder in ("run", "straight"))
    assert_same(found["tensors"], wanted["tensors"])
    assert found["numbers"] == wanted["numbers"]
    place = "optimizer.blocks.0.image.qkv.weight."
    assert {key.removeprefix(place) for key in found["tensors"] if key.startswith(place)} == keys


def test_two_processes_learn_with_muon_as_one(tmp_path: Path) -> None:
    config = small(tmp_path)
    fit(config, *MUON, "--network.depth", "2")
    two = ("--run.folder", str(tmp_path / "two"), "--strategy.kind", "fsdp2")
    ranks = start_ranks(config, *MUON, "--network.depth", "2", *two)
    assert [end(rank) for rank in ranks] == [0, 0]
    one, other = (under(tmp_path / folder, "network.") for folder in ("run", "two"))
    for name in one:  # a rounding in bfloat16, in which matrices are orthogonalised, may fall to the other side
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimization.optimizer", "torch.optim.Adamm"], "Adamm"),
        (["--optimization.optimizer", "torch.optim.AdamW", "--optimization.optimizer.beta", "1"], "beta"),
        (["--optimization.optimizer", "torch.nn.Linear"], "torch.nn.Linear"),
        (["--optimization.optimizer", "torch.optim.SparseAdam"], "SparseAdam learns from sparse gradients"),
        (["--optimization.matrices", "engine.optimizer.Together"], "Together joins optimizers"),
        ([*MUON, "--optimization.matrices.momentum", "1.5"], "momentum from 0 to below 1"),
        ([*MUON, "--config", str(ROOT / "configs/network/unet-flops.yaml")], "needs a network whose blocks have"),
        (["--optimization.groups", "[{pattern: nothing}]"], "no trained weight's name has a match of 'nothing'"),
        (["--optimization.groups", "[{pattern: '('}]"], "'(' is no regular expression"),
        (["--optimization.groups", "[{pattern: a, lr: -1}]"], "of at least 0, got -1.0"),
    ],
)  # fmt: skip
def test_bad_optimizers_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert message in refused(capsys, small(tmp_path), *flags)
    assert not (tmp_path / "run").exists()
