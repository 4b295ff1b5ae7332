"""Muon against torch's, several optimizers as one, skipped steps, and what a checkpoint holds of an optimizer."""

import json
import math
import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from engine.optimizer import (
    Muon,
    Together,
    optimizer_numbers,
    optimizer_state,
    orthogonalised,
    set_optimizer_numbers,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(optimizer: type[torch.optim.Optimizer], weights: list[Tensor], **options: object) -> list[Tensor]:
    """Weights after three steps with gradients of their own."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    made = optimizer(parameters, **options)  # type: ignore[arg-type]
    for step in range(3):
        for number, parameter in enumerate(parameters):
            parameter.grad = normal(*parameter.shape, seed=10 * step + number)
        made.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (12, 5)])
def test_muon_is_torch_s_with_the_rates_of_adamw(shape: tuple[int, int]) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    found = trained(Muon, [normal(*shape)], **options)
    wanted = trained(torch.optim.Muon, [normal(*shape)], adjust_lr_fn="match_rms_adamw", **options)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_its_update_has_singular_values_near_1_and_the_directions_of_the_gradient() -> None:
    matrix = normal(16, 40)
    found = orthogonalised(matrix).float()
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() < values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), 0) > 0.97


def test_stacked_matrices_are_each_orthogonalised() -> None:
    """The fused q, k and v are three matrices."""
    alone = [normal(4, 6, seed=seed) for seed in range(3)]
    fused, parts = nn.Parameter(torch.cat(alone)), [nn.Parameter(one.clone()) for one in alone]
    optimizers = Muon([{"params": [fused], "stacked": 3}], lr=0.1), Muon(parts, lr=0.1)
    for optimizer in optimizers:
        for parameter, gradient in ((fused, normal(12, 6)), *zip(parts, normal(12, 6).chunk(3), strict=True)):
            parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.cat(parts).detach(), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"takes 3 matrices in one, got \(4, 6\)"):
        Muon([{"params": [nn.Parameter(alone[0])], "stacked": 3}])
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        Muon([nn.Parameter(alone[0][:, 0].contiguous())])


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.NAdam])  # which do not know found_inf
def test_a_step_that_is_not_finite_changes_nothing(other: type[torch.optim.Optimizer]) -> None:
    weights = [nn.Parameter(normal(4, 4, seed=seed)) for seed in range(3)]
    adamw = torch.optim.AdamW(weights[1:2], lr=0.1, fused=True)
    optimizer = Together([Muon(weights[:1], lr=0.1), adamw, other(weights[2:], lr=0.1)])  # type: ignore[call-arg]

    def step(bad: float) -> list[Tensor]:
        for weight in weights:
            weight.grad = torch.full_like(weight, torch.nan if bad else 1.0) + normal(4, 4)
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        state = [x for each in weights for x in optimizer.state[each].values() if isinstance(x, Tensor)]
        return [x.detach().clone() for x in (*weights, *state)]

    first, skipped, second = (step(bad) for bad in (0.0, 1.0, 0.0))
    assert all(map(torch.equal, first, skipped))
    assert not any(map(torch.equal, skipped[:3], second[:3]))
    assert all(x.isfinite().all() for x in second)


def test_the_groups_of_all_parts_are_those_of_the_whole() -> None:
    weights = [nn.Parameter(normal(3, 3)) for _ in range(2)]
    optimizer = Together([Muon(weights[:1]), torch.optim.SGD(weights[1:], lr=0.1)])
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [0.5, 0.5]


def test_numbers_of_groups_and_of_parameters_are_kept_without_the_rates() -> None:
    network = nn.Linear(3, 3)
    optimizer = Together([Muon([network.weight], lr=0.1), torch.optim.SGD([network.bias], lr=0.1)])
    optimizer.param_groups[0] |= {"counter": 3, "most": math.inf, "on": True, "name": "a"}
    optimizer.state[network.bias] |= {"steps": 7, "least": -math.inf, "mean": torch.ones(2)}
    numbers = json.loads(json.dumps(optimizer_numbers(optimizer, dict(network.named_parameters())), allow_nan=False))
    assert numbers["parameters"] == {"bias": {"steps": 7, "least": "-inf"}}
    assert not {"lr", "initial_lr", "name"} & numbers["groups"][0].keys()

    optimizer.param_groups[0] |= {"counter": 4, "most": 1.0, "on": False, "lr": 0.2, "momentum": 0.5}
    optimizer.state[network.bias] |= {"steps": 8, "least": 0.0}
    set_optimizer_numbers(optimizer, dict(network.named_parameters()), numbers)
    group, state = optimizer.param_groups[0], optimizer.state[network.bias]
    kept = {"counter": 3, "most": math.inf, "on": True, "lr": 0.2, "momentum": 0.95}
    assert {key: group[key] for key in kept} == kept
    assert (state["steps"], state["least"]) == (7, -math.inf)
    set_optimizer_numbers(optimizer, dict(network.named_parameters()), [{"counter": 5}, {}])  # as checkpoints were once
    assert optimizer.param_groups[0]["counter"] == 5


def test_a_tensor_that_consists_of_others_is_given_by_its_parts() -> None:
    network = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    whole = TwoTensor(normal(2, 3), normal(2, 3, seed=1))
    optimizer.state[network.weight] = {"momentum_buffer": whole}
    found = optimizer_state(optimizer, dict(network.named_parameters()))
    assert found.keys() == {"weight.momentum_buffer.a", "weight.momentum_buffer.b"}
    found["weight.momentum_buffer.b"].zero_()
    assert not whole.b.any()
    assert whole.a.all()


def sharded(rank: int, port: str) -> None:
    """In one of two processes: sharded matrices, also uneven ones, learn as whole ones."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = [normal(*shape, seed=i) for i, shape in enumerate([(6, 4), (9, 5), (12, 4)])]
    groups = [{"params": [0, 1]}, {"params": [2], "stacked": 3}]
    results = []
    for divide in (False, True):
        made = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)]) if divide else x.clone()) for x in whole]
        optimizer = Muon([group | {"params": [made[i] for i in group["params"]]} for group in groups], lr=0.1)
        for step in range(3):
            for i, weight in enumerate(made):
                gradient = normal(*weight.shape, seed=10 * step + i)
                weight.grad = distribute_tensor(gradient, mesh, [Shard(0)]) if divide else gradient
            optimizer.step()
        results.append([x.full_tensor() if divide else x for x in made])  # type: ignore[attr-defined]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    dist.destroy_process_group()


def test_sharded_matrices_learn_as_whole_ones() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    ranks = [context.Process(target=sharded, args=(rank, port)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0, 0]


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_the_state_begins_without_a_change_of_weights_or_rates(rate: float | Tensor) -> None:
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, fused=True)
    before = [weight.detach().clone() for weight in network.parameters()]
    assert {name.partition(".")[2] for name in optimizer_state(optimizer, dict(network.named_parameters()))} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert all(map(torch.equal, before, network.parameters()))
    assert optimizer.param_groups[0]["lr"] == rate == pytest.approx(0.1)
    assert (optimizer.param_groups[0]["lr"] is rate) or not isinstance(rate, Tensor)
