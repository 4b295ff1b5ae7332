"""A training that is spread over processes costs less and computes the same."""

import json
import math
import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from trials import (
    Change,
    assert_near,
    assert_near_logs,
    assert_same,
    end,
    lines,
    logged,
    refused,
    small,
    start,
    start_ranks,
    state,
    under,
)

from data.batch import Batch
from engine.checkpoint import Checkpoints, is_writer, local, read_checkpoint, rows_of
from engine.strategy import Strategy
from training.generator import Generator

FLAGS = ("--run.log_every", "1", "--network.depth", "2", "--ema.more", "[0.5]", "--ema.widths", "[0.1]",
         "--ema.snapshot_every", "3")  # fmt: skip
FSDP2 = ("--strategy.kind", "fsdp2")
SPREAD = {  # how the two processes share the work
    "ddp": (),
    "fsdp2": FSDP2,
    "sharded": (*FSDP2, "--strategy.sharded_checkpoint", "true"),
    "hsdp": (*FSDP2, "--strategy.replicas", "2", "--strategy.sharded_checkpoint", "true"),
}


def trace(file: Path, spoiled: range = range(0)) -> None:
    """Lets a process write down what it drew and what its part of the weights was after each step.

    In the steps that are `spoiled` its first picture holds a NaN.
    """
    draw, step = Generator.training_step, Generator.optimizer_step
    told: dict[str, list[Any]] = {"positions": [], "noise": [], "weights": []}

    def drawn(self: Generator, batch: Batch) -> Tensor:
        told["positions"].append(batch.positions.tolist())
        told["noise"].append(float(batch.noise.sum()))
        if batch.step in spoiled:
            batch.x0[0, 0, 0, 0] = math.nan
        return draw(self, batch)

    def stepped(self: Generator, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        parts = b"".join(local(p).numpy().tobytes() for p in self.network.parameters())
        told["weights"].append(xxhash.xxh3_64(parts).hexdigest())
        file.write_text(json.dumps(told))

    Generator.training_step, Generator.optimizer_step = drawn, stepped  # type: ignore[assignment, method-assign]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("spread"))


@pytest.fixture(scope="module")
def runs(config: Path) -> dict[str, Path]:
    """The same training by one process and by two in each way."""
    runs = {name: config.parent / name for name in ("one", *SPREAD)}
    assert end(start(config, *FLAGS, "--run.folder", str(runs["one"]))) == 0
    for name, flags in SPREAD.items():
        changes = {rank: Change(trace, (config.parent / f"{name}-{rank}.json",)) for rank in (0, 1)}
        ranks = start_ranks(config, *FLAGS, *flags, "--run.folder", str(runs[name]), changes=changes)
        assert [end(rank) for rank in ranks] == [0, 0], name
    return runs


@pytest.mark.parametrize("name", SPREAD)
def test_two_processes_train_like_one(runs: dict[str, Path], name: str) -> None:
    """Losses to 1e-6 of each; weights, averages and moments to 1e-6 of all of a kind together."""
    one, two = runs["one"], runs[name]
    assert_near_logs(two, one, 1e-6)
    assert state(two)["tensors"].keys() == state(one)["tensors"].keys()
    for kind in ("network.", "average.decay-0.999.", "average.decay-0.5.", "average.width-0.1."):
        assert_near(under(two, kind), under(one, kind))
    assert_near(under(two, "optimizer."), under(one, "optimizer."), 1e-5)
    for step in (3, 6):
        assert_near(*(load_file(run / f"snapshots/step-{step:07d}.safetensors") for run in (two, one)))
    assert_near(*(load_file(run / "model/transformer/diffusion_pytorch_model.safetensors") for run in (two, one)))
    marks = list((two / "checkpoints/step-0000006").glob("*.json"))
    assert len(marks) == (2 if name == "sharded" else 1 if name != "hsdp" else 2)


@pytest.mark.parametrize("name", SPREAD)
def test_processes_draw_different_parts_of_a_batch(runs: dict[str, Path], name: str) -> None:
    first, second = (json.loads(runs[name].with_name(f"{name}-{rank}.json").read_text()) for rank in (0, 1))
    assert first["positions"] == [[0, 1, 2, 3]] * 6
    assert second["positions"] == [[4, 5, 6, 7]] * 6
    assert len({*first["noise"], *second["noise"]}) == 12
    assert (first["weights"] == second["weights"]) == (name in ("ddp", "hsdp"))


def test_a_divided_checkpoint_holds_everything_once(runs: dict[str, Path]) -> None:
    """Each row of each tensor is in one part, and neither part has all."""
    for name, whole in (("sharded", 2), ("hsdp", 1)):
        found = read_checkpoint(runs[name] / "checkpoints/step-0000006")
        assert found
        held = [sum(tensor.numel() for tensor in load_file(part.file).values()) for part in found.parts]
        total = sum(tensor.numel() for tensor in state(runs["one"])["tensors"].values())
        assert sum(held) == total
        assert sum(count > total / 3 for count in held) == whole


@pytest.mark.parametrize(
    ("writer", "reader"), [("sharded", "one"), ("one", "sharded"), ("ddp", "hsdp"), ("hsdp", "fsdp2")]
)
def test_a_run_resumes_from_a_checkpoint_of_any_strategy(
    config: Path, runs: dict[str, Path], tmp_path: Path, writer: str, reader: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[writer], run)
    flags = (*FLAGS, *SPREAD.get(reader, ()), "--run.folder", str(run))

    def train(command: str) -> None:
        ranks = start_ranks(config, *flags, world=1 if reader == "one" else 2, command=command)
        assert {end(rank) for rank in ranks} == {0}

    train("validate")
    validated = [line["val/loss"] for line in lines(run) if "val/loss" in line]
    assert len(validated) == 3
    assert validated[-1] == pytest.approx(validated[-2], rel=1e-6)
    shutil.rmtree(run / "checkpoints/step-0000006")
    train("fit")
    assert_near_logs(run, runs["one"], 1e-6)
    assert_near(under(run, "network."), under(runs["one"], "network."))
    assert_near(under(run, "average."), under(runs["one"], "average."))


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_a_nonfinite_step_in_one_process_is_skipped_by_all(config: Path, tmp_path: Path, name: str) -> None:
    run, files = tmp_path / "run", [tmp_path / f"{rank}.json" for rank in (0, 1)]
    changes = {0: Change(trace, (files[0],)), 1: Change(trace, (files[1], range(2, 4)))}
    ranks = start_ranks(config, *FLAGS, *SPREAD[name], "--run.folder", str(run), changes=changes)
    assert [end(rank) for rank in ranks] == [0, 0]
    for file in files:
        weights = json.loads(file.read_text())["weights"]
        assert weights[1] == weights[2] == weights[3]
        assert len(set(weights)) == 4
    if name == "ddp":
        assert json.loads(files[0].read_text())["weights"] == json.loads(files[1].read_text())["weights"]
    told = [line for (_, validation), line in logged(run).items() if not validation]
    assert [line["train/skipped"] for line in told] == [0, 0, 1, 2, 2, 2]
    assert [line["train/grad_norm"] is None for line in told] == [False, False, True, True, False, False]
    tensors = state(run)["tensors"]
    assert all(tensor.isfinite().all() for name, tensor in tensors.items() if name != "bins")
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".step")} == {4.0}
    assert all(math.isfinite(line["val/loss"]) for line in lines(run) if "val/loss" in line)


def test_too_many_nonfinite_steps_in_a_row_end_the_run_in_one_line(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = (*FLAGS, "--run.folder", str(run), "--optimization.max_skipped", "1", "--run.checkpoint_every", "1")
    change = {1: Change(trace, (tmp_path / "told", range(3, 9)))}
    ranks = start_ranks(config, *flags, said=tmp_path / "said", changes=change)
    assert [end(rank) for rank in ranks] == [2, 2]
    for rank in (0, 1):
        told = (tmp_path / f"said-{rank}").read_text()
        (line,) = [line for line in told.splitlines() if "rror" in line]
        assert line.startswith("error: loss or gradient was not finite in 2 steps in a row, up to step 5: ")
        assert "Traceback" not in told
    found = Checkpoints(run / "checkpoints").newest()
    assert found
    assert found.step == 4
    assert all(map(found.intact, found.parts))


def divided(rank: int, port: str, folder: Path) -> None:
    """In a process of two: rows of uneven tensors in each mesh, and a divided checkpoint of them."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for replicas in (1, 2):
        mesh = Strategy("fsdp2", replicas).mesh(torch.device("cpu"), 2)
        network = uneven()
        wanted = {name: p.detach().clone() for name, p in network.named_parameters()}
        Strategy("fsdp2", replicas).shard(network, mesh, torch.float32)
        for name, parameter in network.named_parameters():
            first, held, shape = rows_of(parameter)
            assert shape == list(wanted[name].shape)
            assert torch.equal(local(parameter), wanted[name][first : first + held]), (name, replicas)
            assert is_writer(parameter) == (replicas == 1 or rank == 0)
        tensors = dict(network.named_parameters()) | {"scalar": torch.tensor(7.0), "list": torch.arange(3.0)}
        checkpoints = Checkpoints(folder / str(replicas), sharded=True)
        checkpoints.save(replicas, tensors, {})
        checkpoints.wait()
        dist.barrier()
        others = Checkpoints(folder / str(3 - replicas)).find() if replicas == 2 else None
        if others:  # those that were written without replicas
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.zero_()
            others.restore(dict(network.named_parameters()))
            for name, parameter in network.named_parameters():
                assert torch.equal(parameter.full_tensor(), wanted[name])  # type: ignore[attr-defined]
    for rows in (1, 2, 3, 5, 8):
        for columns in (1, 3):
            whole = torch.arange(float(rows * columns)).view(rows, columns)
            tensor = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
            first, held, _ = rows_of(tensor)
            assert torch.equal(local(tensor), whole[first : first + held])
    dist.destroy_process_group()


def uneven() -> nn.Module:
    network = nn.Module()
    draw = torch.Generator().manual_seed(0)
    for name, shape in {"five": (5, 3), "one": (1, 4), "bias": (3,), "even": (4, 2), "tall": (7, 1, 2)}.items():
        network.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw)))
    return network


def summed(rank: int, port: str) -> None:
    """In one of two processes: the gradients that both computed in bfloat16 are summed in float32."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    network = nn.Linear(4, 3, bias=False)
    Strategy("fsdp2").shard(network, init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)), torch.bfloat16)
    inputs = torch.tensor([[1.0, 3.0, 5.0, 7.0], [2**-7, 2**-6, 2**-7, 2**-5]]).bfloat16()
    network(inputs[rank : rank + 1]).float().sum().backward()
    gradient = network.weight.grad.full_tensor()  # type: ignore[union-attr, operator]
    assert torch.equal(gradient, inputs.float().mean(0).expand(3, 4))
    assert not torch.equal(gradient, gradient.bfloat16().float())
    dist.destroy_process_group()


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Runs work(rank, port, *arguments) in two processes, which must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    ranks = [context.Process(target=work, args=(rank, port, *arguments)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    assert [end(rank) for rank in ranks] == [0, 0]


def test_gradients_are_summed_in_float32_whatever_they_are_computed_in() -> None:
    in_two_processes(summed)


def test_rows_are_those_that_each_process_holds(tmp_path: Path) -> None:
    in_two_processes(divided, tmp_path)
    wanted = {name: p.detach() for name, p in uneven().named_parameters()}
    wanted |= {"scalar": torch.tensor(7.0), "list": torch.arange(3.0)}
    for replicas in (1, 2):
        found = Checkpoints(tmp_path / str(replicas)).find()
        assert found
        found.compare({name: tensor.shape for name, tensor in wanted.items()})
        read = {name: torch.full_like(tensor, math.nan) for name, tensor in wanted.items()}
        found.restore(read)
        assert_same(read, wanted)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategy.accumulate_grad_batches", "3"], "accumulate_grad_batches, 1 × 3 = 3, got 8"),
        (["--run.devices", "2", "--strategy.accumulate_grad_batches", "8"], "2 × 8 = 16, got 8"),
        ([*FSDP2, "--strategy.replicas", "3", "--run.devices", "2"], "must divide the 2 processes, got 3"),
        (["--strategy.replicas", "2", "--run.devices", "2"], "are for kind fsdp2"),
        (["--strategy.sharded_checkpoint", "true"], "are for kind fsdp2"),
        (["--strategy.replicas", "0"], "must be at least 1, got 0, 1, 1"),
        (["--strategy.activation_checkpointing_every", "2"], "needs activation_checkpointing full or selective"),
        (["--strategy.kind", "fsdp1"], "fsdp1"),
        (["--run.num_nodes", "2", "--data.batch_size", "9"], "2 × 1 = 2, got 9"),
    ],
)
def test_impossible_strategies_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert message in refused(capsys, small(tmp_path), *flags)
    assert not (tmp_path / "run").exists()


def test_more_processes_than_the_config_says_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    message = refused(capsys, small(tmp_path))
    assert "4 processes were started" in message
    assert "run.devices × run.num_nodes is 1 × 1: make them equal" in message
    assert not (tmp_path / "run").exists()
