"""What a GPU does with this project, in one command and within minutes, without a network.

    python -m benchmarks.gpu --out runs/gpu
    python -m benchmarks.gpu --out runs/gpu --only correctness sampling --minutes 5
    python -m benchmarks.gpu --out runs/gpu --rehearse

The parts go from the most to the least valuable, as far as the minutes reach, each in a process of its own: one that
fails or runs out of memory costs only its line. `gpu.json` is written after each part, and `gpu.md` with its pictures
at the end. A part that is done in `gpu.json` is not done again, so the same command goes on. `--rehearse` runs every
part with tiny shapes on the CPU, to see that the command works. Exit status 1 means that a part failed or a check did
not hold.
"""

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

from tqdm import tqdm

from benchmarks.gpu.machine import Machine, Row, find
from benchmarks.gpu.parts import GROUPS, PARTS
from benchmarks.gpu.report import shown, write
from cli import MACHINE_FAULT, Parser, fail, one_line_errors, output
from storage.files import commit_json
from storage.text import read_json

SHORTEST = min(part.seconds for part in PARTS.values())
SPARE = 3.0  # times a part's usual time, after which it is ended


def arguments() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--out", type=output, required=True, help="folder of gpu.json, gpu.md and the pictures")
    p.add_argument("--minutes", type=float, default=9.0, help="that all parts may take together")
    p.add_argument("--only", nargs="+", choices=GROUPS, help="groups of parts; all by default")
    p.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; the figures mean nothing")
    p.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    p.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return p


def run_part(machine: Machine, name: str, into: Path) -> None:
    """Measures one part in this process. Each row is appended to a file when it is there."""

    def rows(row: Row) -> None:
        finite = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        with into.open("a") as file:
            print(json.dumps(finite), file=file, flush=True)

    PARTS[name].run(machine, rows)


def start_part(name: str, rehearse: bool, limit: float) -> dict[str, Any]:
    """Runs one part in a process of its own: its status, seconds and rows. After `limit` seconds it is ended."""
    with tempfile.TemporaryDirectory() as place:
        into, log = Path(place) / "rows.jsonl", Path(place) / "log"
        into.touch()
        argv = [sys.executable, "-m", "benchmarks.gpu", "--out", place, "--part", name, "--into", str(into)]
        start = time.perf_counter()
        with log.open("wb") as said:
            process = Popen([*argv, *["--rehearse"] * rehearse], stdout=said, stderr=said, start_new_session=True)
            try:
                code = process.wait(limit)
                status = "done" if code == 0 else last_line(log.read_text(errors="replace")) or f"status {code}"
            except TimeoutExpired:
                status = f"ended after {limit:.0f} s"
            finally:  # also on Ctrl-C: with its loaders
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = [json.loads(line) for line in into.read_text().splitlines()]
    return {"status": status, "seconds": round(time.perf_counter() - start, 1), "rows": found}


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    with one_line_errors(ValueError):
        machine = find(args.rehearse)
        if args.part:
            run_part(machine, args.part, args.into)
            return
        if not args.minutes * 60 >= SHORTEST:
            raise ValueError(
                f"--minutes must be at least {SHORTEST / 60:.2f}, the time of one part, got {args.minutes:g}"
            )
        asked = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
        file = args.out / "gpu.json"
        about = machine.describe()
        report: dict[str, Any] = read_json(file) if file.exists() else {"machine": about, "parts": {}}
        if report["machine"] != about:
            raise ValueError(f"{file} is of another machine or other versions: choose another --out")
    report["command"] = asked
    chosen = {name: part for name, part in PARTS.items() if not args.only or part.group in args.only}
    end = time.monotonic() + 60 * args.minutes
    left: list[str] = []
    with tqdm(chosen.items(), unit="part") as bar:
        for name, part in bar:
            bar.set_description(name)
            if report["parts"].get(name, {}).get("status") == "done":
                continue
            room = end - time.monotonic()
            if room < part.seconds:
                left.append(name)
                continue
            report["parts"][name] = start_part(name, args.rehearse, min(room, SPARE * part.seconds))
            commit_json(file, report)
    report["left out"] = left
    commit_json(file, report)
    write(report, args.out)
    print(f"wrote {args.out / 'gpu.md'}; {len(left)} parts left out for lack of time")
    done = [name for name in chosen if name in report["parts"]]
    if failed := [fault for name in done for fault in faults(name, report["parts"][name])]:
        fail(f"{len(failed)} parts or checks failed: {'; '.join(failed)}", MACHINE_FAULT)


def faults(name: str, part: dict[str, Any]) -> list[str]:
    """What did not go well in a part: its status, and the checks that do not hold."""
    ended = [] if part["status"] == "done" else [f"{name} ({part['status']})"]
    return ended + [f"{row['check']} ({shown(row['found'])})" for row in part["rows"] if not row.get("held", True)]


if __name__ == "__main__":
    main()
