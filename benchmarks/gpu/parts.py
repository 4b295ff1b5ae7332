"""The parts of the report, the most valuable first."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.gpu.machine import Machine, Rows


class Part(NamedTuple):
    """One part of the report, which runs in a process of its own.

    Attributes:
        group: what `--only` names.
        run: measures and hands on rows, as it finds them.
        seconds: that it takes on an H200, with imports and compilation; an estimate until one has measured it.
    """

    group: str
    run: Callable[[Machine, Rows], None]
    seconds: float


def check(name: str, machine: Machine, rows: Rows) -> None:
    """A check of `benchmarks.gpu.correctness`."""
    from benchmarks.gpu.correctness import CHECKS

    for what, found, most, note in CHECKS[name](machine.device):
        rows({"check": what, "found": float(found), "at most": float(most), "held": found <= most, "note": note})


def measure(name: str, *arguments: object) -> Callable[[Machine, Rows], None]:
    """A measurement of `benchmarks.gpu.speed`, which is imported in the part's own process."""

    def run(machine: Machine, rows: Rows) -> None:
        from benchmarks.gpu import speed

        getattr(speed, name)(machine, rows, *arguments)

    return run


def whole(name: str) -> Callable[[Machine, Rows], None]:
    """A measurement of `benchmarks.gpu.commands`."""

    def run(machine: Machine, rows: Rows) -> None:
        from benchmarks.gpu import commands

        getattr(commands, name)(machine, rows)

    return run


def correct(name: str, seconds: float) -> Part:
    return Part("correctness", partial(check, name), seconds)


def trained(depth: int, side: int, compiled: bool, keep: str, seconds: float) -> dict[str, Part]:
    name = f"d{depth}, {side}², {'compiled' if compiled else 'eager'}, checkpointing {keep}"
    return {name: Part("training", measure("training", depth, side, compiled, keep), seconds)}


PARTS: dict[str, Part] = {
    "card": Part("card", measure("card"), 10),
    "forward and gradients": correct("forward_and_gradients", 10),
    "hidden waits": correct("hidden_waits", 15),
    "stop and resume": correct("stopped_and_resumed", 30),
    **trained(24, 512, True, "none", 50),
    "against diffusers, d18, 512², eager": Part("training", measure("opponents", 18, 512, False), 30),
    "against diffusers, d18, 512², compiled": Part("training", measure("opponents", 18, 512, True), 75),
    "SD3 medium, 1024²": Part("sampling", measure("sampling", "sd3-medium", 1024), 110),
    "profile, compiled": Part("profile", measure("profile", 24, 512, True), 45),
    **trained(24, 512, False, "none", 25),
    **trained(24, 256, True, "none", 45),
    "rewritten": correct("rewritten", 45),
    "FSDP2": correct("sharded", 10),
    "skipped step": correct("skipped_step", 8),
    "averages": correct("averages", 8),
    "checkpoint": correct("saved", 8),
    "samplers": correct("samplers", 10),
    "MeanFlow": correct("average_velocity", 8),
    "pinned loading": correct("pinned_loading", 15),
    "from a store": Part("training", measure("from_store"), 60),
    "trainer against a bare loop": Part("trainer", whole("trainer"), 40),
    "profile, eager": Part("profile", measure("profile", 24, 512, False), 25),
    "the demo": Part("trainer", whole("demo"), 60),
    "SD3.5 medium, 1024²": Part("sampling", measure("sampling", "sd35-medium", 1024), 120),
    **trained(24, 512, True, "selective", 55),
    **trained(18, 512, True, "none", 40),
    **trained(12, 512, True, "none", 35),
    **trained(18, 256, True, "none", 40),
    **trained(12, 256, True, "none", 35),
    **trained(24, 256, False, "none", 25),
    **trained(18, 512, False, "none", 20),
    **trained(12, 512, False, "none", 20),
    **trained(24, 512, False, "selective", 25),
    "SD3 medium, 512²": Part("sampling", measure("sampling", "sd3-medium", 512), 80),
    "SD3.5 medium, 512²": Part("sampling", measure("sampling", "sd35-medium", 512), 90),
}
GROUPS = tuple(dict.fromkeys(part.group for part in PARTS.values()))
