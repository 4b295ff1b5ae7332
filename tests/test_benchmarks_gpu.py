"""The report on a GPU: its command in a rehearsal on the CPU, and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import machine, parts
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.speed import kind_of

ROOT = Path(__file__).parents[1]


class Forked:
    """What the command uses of `subprocess.Popen`, without the time to import everything."""

    def __init__(self, argv: list[str], stdout: IO, **_: Any) -> None:
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            sys.stdout = sys.stderr = os.fdopen(os.dup(stdout.fileno()), "w")
            status = 1
            try:
                command.main(argv[3:])
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        self.code: int | None = None

    def wait(self, limit: float = math.inf) -> int:
        end = time.monotonic() + limit
        while self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
            if not ended and time.monotonic() > end:
                raise subprocess.TimeoutExpired("", limit)
            time.sleep(0.01)
        return self.code


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Popen", Forked)


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return content


def test_a_rehearsal_runs_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SPARE", 1000.0)
    # in a rehearsal these are the same as others
    again = ("d12", "d18", "d24, 256", "d24, 512², eager, checkpointing n", "SD3.5", "SD3 medium, 512", "profile, e")
    some = {name: part for name, part in PARTS.items() if not name.startswith(again)}
    monkeypatch.setattr(command, "PARTS", some)
    command.main(["--out", str(tmp_path), "--rehearse", "--minutes", "60"])
    found = report(tmp_path)
    assert found["left out"] == []
    assert found["parts"].keys() == some.keys()
    for name, part in found["parts"].items():
        assert part["status"] == "done", (name, part)
        assert part["rows"], name
        assert not [row for row in part["rows"] if "fault" in row], name
    text = (tmp_path / "gpu.md").read_text()
    assert "whose figures mean nothing" in text
    for words in ("MFU, measured peak", "| diffusers |", "times as fast", "Calibrated by the median", "every gradient"):
        assert words in text, words
    assert (tmp_path / "gpu-profile.png").stat().st_size > 5000


def fails(_: machine.Machine, rows: parts.Rows) -> None:
    rows({"check": "one", "found": 1.0, "at most": 2.0, "held": True, "note": ""})
    raise RuntimeError("the cause")


def is_killed(_: machine.Machine, rows: parts.Rows) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(_: machine.Machine, rows: parts.Rows) -> None:
    time.sleep(60)


def is_full(_: machine.Machine, rows: parts.Rows) -> None:
    for size in (1, 2):
        with machine.reported({"check": f"size {size}"}, rows) as row:
            if size == 1:
                raise torch.OutOfMemoryError("no room")
            row["found"] = 0.5


def test_a_part_that_fails_costs_only_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    some = {run.__name__: Part("correctness", run, 0.2) for run in (fails, is_killed, hangs, is_full)}
    some |= {"too long": Part("correctness", fails, 1e6), "averages": PARTS["averages"]._replace(seconds=0.2)}
    monkeypatch.setattr(command, "SPARE", 10.0)
    for place in (command, parts):
        monkeypatch.setattr(place, "PARTS", some)
    monkeypatch.setattr("benchmarks.gpu.report.PARTS", some)
    argv = ["--out", str(tmp_path), "--rehearse", "--minutes", "1"]
    for _ in range(2):  # the same command goes on: what is done is not done again
        with pytest.raises(SystemExit) as end:
            command.main(argv)
        assert end.value.code == 1
        assert (
            "3 parts or checks failed: fails (RuntimeError: the cause); is_killed (status -9)"
            in capsys.readouterr().err
        )
    found = report(tmp_path)
    assert found["left out"] == ["too long"]
    statuses = {name: part["status"] for name, part in found["parts"].items()}
    assert statuses == {
        "fails": "RuntimeError: the cause", "is_killed": "status -9", "hangs": "ended after 2 s", "is_full": "done",
        "averages": "done",
    }  # fmt: skip
    assert [row.get("fault") for row in found["parts"]["is_full"]["rows"]] == ["out of memory", None]
    assert len(found["parts"]["fails"]["rows"]) == 1


def test_a_check_that_does_not_hold_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("engine.guard.Guard.check", lambda self, norm: torch.zeros(()))
    monkeypatch.setattr(command, "PARTS", {"skipped step": PARTS["skipped step"]})
    with pytest.raises(SystemExit) as end:
        command.main(["--out", str(tmp_path), "--rehearse"])
    assert end.value.code == 1
    assert "a step with a NaN gradient: largest change of a weight (nan)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rehearse", "--minutes", "0.01"], "--minutes must be at least 0.13"),
        (["--rehearse", "--minutes", "nan"], "--minutes must be at least"),
        (["--rehearse", "--only", "speed"], "invalid choice: 'speed'"),
        ([], "or --rehearse"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, argv: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        command.main(["--out", str(tmp_path / "gpu"), *argv])
    told = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "gpu").exists()


def test_a_machine_that_will_not_do_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def old() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old (found version 11040). Please update", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", old)
    with pytest.raises(ValueError, match=r"driver on your system is too old .*: run it on a machine"):
        machine.find(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.Machine, "memory", lambda self: 4e9)
    with pytest.raises(ValueError, match=r"has 4\.0 GB of memory and at least 8 GB are needed"):
        machine.find(False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="is built without CUDA"):
        machine.find(False)


def test_a_report_of_another_machine_is_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "gpu.json").write_text('{"machine": {"card": "another"}, "parts": {}}')
    with pytest.raises(SystemExit) as end:
        command.main(["--out", str(tmp_path), "--rehearse"])
    assert end.value.code == 2
    assert "is of another machine or other versions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer, averages and clipping"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("triton_red_fused_native_layer_norm_3", "element by element"),
        ("void at::native::elementwise_kernel<128, 4>", "element by element"),
    ],
)
def test_kernels_are_told_apart(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


BARE = """
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find(name, *place):
    return None if name in ("jsonargparse", "diffusers", "wandb", "datasets") else found(name, *place)
PathFinder.find_spec = find
import torch
import benchmarks.store
from benchmarks.gpu import machine, parts
here = machine.Machine(torch.device("cpu"), True)
for name in ("averages", "against diffusers, d18, 512², eager", "card", "the demo"):
    parts.PARTS[name].run(here, print)
"""


def test_it_runs_without_packages_that_a_gpu_machine_may_lack() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("after three updates", "diffusers is not installed", "TFLOP/s", "jsonargparse is not installed"):
        assert words in done.stdout
