"""Peak memory and time of loading a network of a released size with random weights, ours against diffusers'.

    python benchmarks/loading.py --network configs/network/sd3-medium.yaml --dtype float16

It first writes the weights to a temporary folder, twice 4 GB for SD3 medium in half precision, so that the files are in
the page cache. Each loader runs in its own process until every page of the weights is in memory, a few times in turn.
Printed are the shortest time, and the largest peak of resident memory minus that before loading. Linux only.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from mmdit import checkpoint
from mmdit.model import MMDiT
from storage.weights import write_tensors

ROOT = Path(__file__).parents[1]
READ = """
import json, sys, time
from pathlib import Path
import torch
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
reader, source, dtype = sys.argv[1:]
torch.ones(8, 8) @ torch.ones(8, 8)
if reader == "ours":
    from mmdit import checkpoint
    read = lambda: checkpoint.load(source, dtype)
else:
    from diffusers import SD3Transformer2DModel
    read = lambda: SD3Transformer2DModel.from_pretrained(source, torch_dtype=getattr(torch, dtype))
before, start = memory("VmRSS"), time.perf_counter()
Path("/proc/self/clear_refs").write_text("5")
network = read()
for tensor in network.state_dict().values():
    tensor.flatten()[:: 4096 // tensor.element_size()].clone()  # reads a file that is only mapped
seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
print(json.dumps({"seconds": seconds, "ratio": peak / size, "GB": size / 1e9}))
"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--network", type=Path, default=ROOT / "configs/network/sd3-medium.yaml", help="config of the sizes")
    p.add_argument("--stored", choices=["float32", "float16", "bfloat16"], default="float16", help="on disk")
    p.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float16", help="in memory")
    p.add_argument("--turns", type=int, default=3, help="of each reader")
    args = p.parse_args()

    arguments = yaml.safe_load(args.network.read_text())["network"]["init_args"]
    with torch.device("meta"):
        network = MMDiT(**arguments).to(getattr(torch, args.stored))
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    with tempfile.TemporaryDirectory() as place:
        folder, file = Path(place) / "folder", Path(place) / "one.safetensors"
        checkpoint.save(network, folder)
        write_tensors(checkpoint.single_file(network), file)
        del network
        os.sync()
        cases = {
            "ours, folder": ("ours", folder),
            "ours, single file": ("ours", file),
            "diffusers, folder": ("diffusers", folder),
        }
        found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        for _, (case, (reader, source)) in tqdm([*itertools.product(range(args.turns), cases.items())], desc="reading"):
            command = [sys.executable, "-c", READ, reader, str(source), args.dtype]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            found[case].append(json.loads(done.stdout))
        for case, turns in found.items():
            seconds, peak = min(turn["seconds"] for turn in turns), max(turn["ratio"] for turn in turns)
            print(f"{case}: {turns[0]['GB']:.2f} GB in {seconds:.1f} s, peak {peak:.2f} × the weights")


if __name__ == "__main__":
    main()
