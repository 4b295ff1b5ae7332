"""Time that a checkpoint delays training, against a bare copy of the same tensors and against writing them.

python -m benchmarks.saving --parameters 100
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint import Checkpoints


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parameters", type=float, default=100, help="millions; each has weight, average and two moments")
    p.add_argument("--turns", type=int, default=5, help="saves and copies")
    args = p.parse_args()
    rows = max(1, int(args.parameters * 1e6 / 100 / 1024))
    state = {f"{kind}.{i}": torch.randn(rows, 1024) for kind in ("w", "average", "m", "v") for i in range(100)}
    size = sum(tensor.nbytes for tensor in state.values())
    copied, held, written, read = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        for step in range(args.turns + 1):
            copied.append(seconds(lambda: {name: tensor.clone() for name, tensor in state.items()}))
            held.append(seconds(lambda step=step: checkpoints.save(step, state, {})))  # type: ignore[misc]
            written.append(seconds(checkpoints.wait))
        found = checkpoints.newest()
        assert found
        read.append(seconds(lambda: found.restore(state)))
    names = {"a bare copy": copied, "training waits": held, "then the writing takes": written}
    print(f"{size / 1e9:.2f} GB, {torch.get_num_threads()} threads, medians of {args.turns}")
    for name, times in names.items():
        print(f"{name:24}{statistics.median(times[1:]):8.2f} s")
    print(f"{'to read it':24}{read[0]:8.2f} s")


if __name__ == "__main__":
    main()
