"""Whole commands on the device: the trainer against a bare loop, and the demo."""

import tempfile
import time
from pathlib import Path

from benchmarks.gpu.machine import Machine, Row, Rows, installed

ROOT = Path(__file__).parents[2]


def missing(rows: Rows) -> bool:
    """Whether a package that `train.py` needs is not installed; then a row says so."""
    if installed("jsonargparse"):
        return False
    rows({"fault": "jsonargparse is not installed"})
    return True


def trainer(machine: Machine, rows: Rows) -> None:
    """The trainer of `train.py fit` against a bare loop, in turns: the digits, and a wider network."""
    if missing(rows):
        return
    from benchmarks.overhead import measure

    wide = {"network.width": 768, "network.heads": 12, "network.depth": 12, "data.side": 32, "data.batch_size": 64}
    cases: dict[str, tuple[dict[str, int], int, int]] = {"digits": ({}, 10, 20), "depth 12, width 768": (wide, 5, 8)}
    if machine.tiny:
        cases = {"digits": ({"data.batch_size": 4}, 2, 2)}
    where = "gpu" if machine.device.type == "cuda" else "cpu"
    for name, (changes, turn, turns) in cases.items():
        flags = [f"--config={ROOT / 'configs/digits.yaml'}", f"--run.accelerator={where}"]
        if not machine.tiny:
            flags.append("--run.precision=bf16-mixed")
        found = measure([*flags, *(f"--{key}={value}" for key, value in changes.items())], turn, turns)
        row: Row = {"training": name, "train.py, ms": 1e3 * found.ours, "bare loop, ms": 1e3 * found.bare}
        row |= {"times the bare loop": found.ratio, "waiting for data": found.waits}
        rows(row)


def demo(machine: Machine, rows: Rows) -> None:
    """`make demo`'s training, from its first line to its last, without imports."""
    if missing(rows):
        return
    import train

    with tempfile.TemporaryDirectory() as place:
        where = "gpu" if machine.device.type == "cuda" else "cpu"
        argv = ["fit", "--config", str(ROOT / "configs/digits.yaml"), "--run.accelerator", where]
        argv += ["--run.folder", f"{place}/run", "--text.folder", str(ROOT / "assets/digits/text")]
        if machine.tiny:
            argv += ["--run.steps=2", "--run.validate_every=2", "--optimization.warmup=1", "--grid.columns=1"]
        start = time.perf_counter()
        train.main(argv)
        rows({"command": "train.py fit --config configs/digits.yaml", "s": time.perf_counter() - start})
