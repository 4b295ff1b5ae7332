"""The machine that is measured, and what every part of the report shares."""

import importlib.metadata
import importlib.util
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

LEAST = 8e9  # bytes of GPU memory below which no part fits
PACKAGES = ("torch", "lightning", "timm", "transformers", "diffusers", "triton")
Row = dict[str, Any]  # column → number or text
Rows = Callable[[Row], None]  # takes a row of the report when it is measured


class Machine(NamedTuple):
    """Where the parts run.

    Attributes:
        device: the GPU, or the CPU of a rehearsal.
        tiny: a rehearsal: every part runs with tiny shapes, and its figures mean nothing.
    """

    device: torch.device
    tiny: bool

    def wait(self) -> None:
        """Waits until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gigabytes(self) -> float:
        """Peak memory since the last `forget_peak`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> float:
        """Bytes of the device."""
        return float(torch.cuda.get_device_properties(self.device).total_memory) if self.device.type == "cuda" else 4e9

    def describe(self) -> Row:
        """The card, the driver and the versions."""
        found: Row = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            found |= {"card": torch.cuda.get_device_name(self.device), "capability": f"{major}.{minor}"}
            found |= {"memory": f"{self.memory() / 2**30:.0f} GiB", "driver": driver(), "CUDA": torch.version.cuda}
        else:
            found["card"] = "none: a rehearsal on the CPU, whose figures mean nothing"
        return found | {name: version(name) for name in PACKAGES}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def driver() -> str:
    """The driver's version, by nvidia-smi; "unknown" without it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def find(rehearse: bool) -> Machine:
    """The first GPU, or the CPU for a rehearsal. ValueError in one line if there is no GPU that will do."""
    if rehearse:
        return Machine(torch.device("cpu"), True)
    if torch.version.cuda is None:
        raise ValueError(f"torch {torch.__version__} is built without CUDA: install a build with it, or --rehearse")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if not there:
        cause = str(said[0].message).split("\n")[0].split(" (Triggered")[0] if said else "torch sees no CUDA device"
        raise ValueError(f"{cause.rstrip('.')}: run it on a machine with an NVIDIA GPU and its driver, or --rehearse")
    machine = Machine(torch.device("cuda"), False)
    if machine.memory() < LEAST:
        have = machine.memory() / 1e9
        raise ValueError(f"the GPU has {have:.1f} GB of memory and at least {LEAST / 1e9:.0f} GB are needed")
    return machine


@contextmanager
def reported(row: Row, rows: Rows) -> Iterator[Row]:
    """Hands on a row when it is filled in; if the memory is full, the row says so and the part goes on."""
    try:
        yield row
    except torch.OutOfMemoryError:
        row["fault"] = "out of memory"
    rows(row)


def seconds(machine: Machine, work: Callable[[], object], times: int) -> float:
    """Seconds of one call, over so many calls in a row."""
    machine.wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    machine.wait()
    return (time.perf_counter() - start) / times


def timed(machine: Machine, work: Callable[[], object], budget: float, turns: int = 5) -> float:
    """Seconds of one call: the median over turns that last a budget of seconds together, after three calls."""
    seconds(machine, work, 3)
    times = max(1, int(budget / turns / max(seconds(machine, work, 1), 1e-6)))
    return statistics.median(seconds(machine, work, times) for _ in range(turns))


def race(machine: Machine, works: dict[str, Callable[[], object]], budget: float, turns: int = 7) -> dict[str, float]:
    """Seconds of one call of each work, the medians over turns that they take one after the other."""
    longest = 0.0
    for work in works.values():
        seconds(machine, work, 3)
        longest = max(longest, seconds(machine, work, 1))
    times = max(1, int(budget / turns / len(works) / max(longest, 1e-6)))
    taken = [{name: seconds(machine, work, times) for name, work in works.items()} for _ in range(turns)]
    return {name: statistics.median(turn[name] for turn in taken) for name in works}
