"""Small training runs as the tests start, kill and read them back."""

import json
import math
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import train
from data.batch import Batch
from engine.checkpoint import Checkpoints
from training.generator import Generator

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
OPERATIONS = ("mkdir", "fsync", "chmod", "replace", "unlink", "rmdir")  # of `os`, that a checkpoint is written with


def small(folder: Path) -> Path:
    """The digits config, made small: six steps of a network with one block; its run is in `folder`."""
    content = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    content["run"] |= {"folder": str(folder / "run"), "steps": 6, "validate_every": 3, "checkpoint_every": 3}
    content["run"]["log_every"] = 2
    content["text"]["init_args"]["folder"] = str(ROOT / "assets/digits/text")
    content["optimization"]["warmup"] = 2
    content["network"]["init_args"] |= {"depth": 1, "width": 16, "heads": 1}
    content["data"]["init_args"]["batch_size"] = 8
    content["grid"] = {"prompts": ["a handwritten seven"], "columns": 2}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def fit(config: Path, *flags: str, command: str = "fit") -> None:
    train.main([command, "--config", str(config), *flags])


def shell(config: Path, *flags: str, command: str = "fit") -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), command, "--config", str(config), *flags]


def ended(capsys: pytest.CaptureFixture, config: Path, *flags: str, command: str = "fit", status: int = 2) -> str:
    """The one line of error with which a call ends, after whatever it said before; it must end with that status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(config, *flags, command=command)
    told = capsys.readouterr().err
    lines = [line for line in told.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert (end.value.code, len(lines)) == (status, 1), told
    return lines[0]


def refused(capsys: pytest.CaptureFixture, config: Path, *flags: str, command: str = "fit") -> str:
    """The one line with which a call ends, before it said anything else; it must end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(config, *flags, command=command)
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line]
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def second_of(first: int) -> int | None:
    """The process of rank 1 that the first one has started; not another child, such as a library's `uname`."""
    for child in Path(f"/proc/{first}/task/{first}/children").read_text().split():
        with suppress(OSError):  # ended meanwhile
            if b"\0LOCAL_RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
    return None


# Processes that may be killed, forked from one that has imported everything: a start costs no imports.


class Change(NamedTuple):
    """What a process does before it trains: a function of a module, such as `die_at`, and its arguments."""

    make: Callable[..., None]
    given: tuple[Any, ...] = ()


def start(
    config: Path,
    *flags: str,
    said: Path | None = None,
    change: Change | None = None,
    env: dict[str, str] | None = None,
    command: str = "fit",
) -> BaseProcess:
    """Trains in a process of its own; what it prints goes into the file `said`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    argv = [command, "--config", str(config), *flags]
    process = context.Process(target=_train, args=(argv, said, change, env or {}))
    process.start()
    return process


def start_ranks(
    config: Path,
    *flags: str,
    world: int = 2,
    said: Path | None = None,
    changes: dict[int, Change] | None = None,
    command: str = "fit",
) -> list[BaseProcess]:
    """The same in processes that train together, started as torchrun starts them; `changes` are some of the ranks'.

    What rank r prints goes into `said`-r.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
              "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}  # fmt: skip
    flags = (*flags, "--run.devices", str(world))
    return [
        start(
            config,
            *flags,
            said=said and said.with_name(f"{said.name}-{rank}"),
            change=(changes or {}).get(rank),
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            command=command,
        )
        for rank in range(world)
    ]


def _train(argv: list[str], said: Path | None, change: Change | None, env: dict[str, str]) -> None:
    with (said or Path(os.devnull)).open("w") as out:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), stream.fileno())
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as usual
    if change:
        change.make(*change.given)
    train.main(argv)


def end(process: BaseProcess, seconds: float = 60) -> int:
    """Waits for a process; its exit status, negative for a signal that killed it."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"the run did not end within {seconds} s")
    return process.exitcode


def die_at(operation: int, thread: str = "checkpoint") -> None:
    """Lets the process kill itself, as by kill -9, before this operation of those that a thread writes files with.

    That of checkpoints, or the MainThread, which writes all else.
    """
    count = 0

    def before(own: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if threading.current_thread().name.startswith(thread):
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
            return own(*args, **kwargs)

        return counted

    for name in OPERATIONS:
        setattr(os, name, before(getattr(os, name)))


def send_at(number: int, step: int, where: str = "training_step", times: int = 1) -> None:
    """Lets the process send itself and its loader processes a signal, in a step after so many that are done."""
    os.setpgrp()
    own = getattr(Generator, where)

    def sent(self: Generator, batch: Batch) -> Any:
        nonlocal times
        if self.global_step == step and times:
            while times:
                times -= 1
                os.killpg(0, number)
        return own(self, batch)

    setattr(Generator, where, sent)


def fill_at(step: int, size: int) -> None:
    """Lets no file grow beyond so many bytes after so many steps, as on a full disk."""
    own = Generator.training_step

    def filled(self: Generator, batch: Batch) -> Tensor:
        if batch.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return own(self, batch)

    setattr(Generator, "training_step", filled)  # noqa: B010


# What a run leaves


def lines(run: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (run / "log.jsonl").read_text().splitlines()]


def logged(run: Path) -> dict[tuple[float, bool], dict]:
    """What a run logged at each step, in training (False) and in validation (True); the last line of a step counts."""
    told = {}
    for line in lines(run):
        values = {name: value for name, value in line.items() if not name.startswith("perf/")}
        told[line["step"], "val/loss" in line] = values
    return told


def state(run: Path) -> dict[str, Any]:
    """All that the newest checkpoint of a run holds; tensors that were written in parts are whole."""
    found = Checkpoints(run / "checkpoints").newest()
    assert found
    rows: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for part in found.parts:
        assert found.intact(part)
        for name, tensor in load_file(part.file).items():
            rows[name].append((part.rows[name].first, tensor))
    parts = {name: [tensor for _, tensor in sorted(held, key=lambda held: held[0])] for name, held in rows.items()}
    tensors = {name: torch.cat(held) if len(held) > 1 else held[0] for name, held in parts.items()}
    return {"step": found.step, "numbers": found.numbers, "tensors": tensors}


def under(run: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a run's newest checkpoint whose names start so, without that."""
    tensors = state(run)["tensors"].items()
    return {name.removeprefix(prefix): tensor for name, tensor in tensors if name.startswith(prefix)}


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equality to the bit of nested containers of tensors."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict), where
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert isinstance(b, list | tuple), where
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert a == b, where


def assert_goes_on_to_the_bit(config: Path, *flags: str, stopped: int) -> None:
    """A run that SIGTERM ends in a step, and that goes on, is in the end equal to one that nothing stopped."""
    straight = config.parent / "straight"
    fit(config, *flags, "--run.folder", str(straight))
    assert end(start(config, *flags, change=Change(send_at, (signal.SIGTERM, stopped)))) == 128 + signal.SIGTERM
    fit(config, *flags)
    assert_same(state(config.parent / "run"), state(straight))


def assert_two_learn_as_one(config: Path, *flags: str, kind: str, relative: float = 1e-6) -> None:
    """Two processes log what one logs."""
    one = config.parent / "one"
    fit(config, *flags, "--run.folder", str(one))
    assert [end(rank) for rank in start_ranks(config, *flags, "--strategy.kind", kind)] == [0, 0]
    assert_near_logs(config.parent / "run", one, relative)


def bright(pictures: Tensor, captions: Sequence[str]) -> Tensor:
    """A reward that only says yes or no, so that many pictures have the same."""
    return (pictures.mean((1, 2, 3)) > 0.34).float()


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor], relative: float = 1e-6) -> None:
    """Of all tensors together, the difference's norm is at most so small a part of their norm; ten times it of each."""
    assert a.keys() == b.keys()
    sizes = {name: float(tensor.double().norm()) for name, tensor in b.items()}
    distances = {name: float((a[name] - b[name]).double().norm()) for name in b}
    assert math.hypot(*distances.values()) <= relative * math.hypot(*sizes.values())
    worst = {name: distance for name, distance in distances.items() if distance > 10 * relative * sizes[name]}
    assert not worst, {name: (distance, sizes[name]) for name, distance in worst.items()}


def assert_near_logs(run: Path, other: Path, relative: float = 1e-6) -> None:
    """Two runs logged the same at the same steps, each number to so small a part of it.

    A Fréchet distance is a difference of large numbers, so it has an absolute tolerance.
    """
    assert logged(run).keys() == logged(other).keys()
    for place, line in logged(other).items():
        near = {
            key: value if value is None else pytest.approx(value, relative, abs=1e-4 if key == "val/fd" else None)
            for key, value in line.items()
        }
        assert logged(run)[place] == near
