"""Training step of our network against diffusers' `SD3Transformer2DModel`: same weights, batch and optimizer, one run.

    python benchmarks/step.py

The two take turns, a few steps each, so that a noisy machine slows both. Prints milliseconds per step (median) and the
median over turns of the ratio.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from tqdm import trange

from mmdit import checkpoint
from mmdit.model import Condition, MMDiT

ROOT = Path(__file__).parents[1]


def stepper(network: nn.Module, predict: Callable[[], Tensor], goal: Tensor, half: bool) -> Callable[[], None]:
    """One step of AdamW toward a goal; with `half` under bfloat16 autocast."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(goal.device.type, torch.bfloat16, enabled=half):
            y = predict()
        (y.float() - goal).square().mean().backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], times: int) -> float:
    """Seconds per step."""
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", type=Path, default=ROOT / "configs/digits.yaml", help="config of network and batch")
    p.add_argument("--width", type=int, help="another width than the config's")
    p.add_argument("--depth", type=int, help="another depth than the config's")
    p.add_argument("--batch", type=int, help="another batch than the config's")
    p.add_argument("--text-tokens", type=int, default=10, help="tokens of a caption")
    p.add_argument("--turns", type=int, default=30, help="turns of each network")
    p.add_argument("--bfloat16", action="store_true", help="run both under bfloat16 autocast")
    p.add_argument("--compile", action="store_true", help="compile both networks")
    args = p.parse_args()

    config = yaml.safe_load(args.config.read_text())
    sizes = {name: size for name in ("width", "depth") if (size := getattr(args, name))}
    ours = MMDiT(**config["network"]["init_args"] | sizes)
    batch = args.batch or config["data"]["init_args"]["batch_size"]
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.05)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(ours, Path(folder))
        theirs: nn.Module = SD3Transformer2DModel.from_pretrained(folder)
    theirs.train()
    if args.compile:
        ours.compile()
        theirs.compile()

    z = torch.randn(batch, ours.in_channels, ours.sample_size, ours.sample_size)
    text, pooled = torch.randn(batch, args.text_tokens, ours.text_dim), torch.randn(batch, ours.pooled_dim)
    t, condition = torch.rand(batch), Condition(text, pooled)
    steps = (
        stepper(ours, lambda: ours(z, t, condition), z, args.bfloat16),
        stepper(theirs, lambda: theirs(z, text, pooled, 1000 * t, return_dict=False)[0], z, args.bfloat16),
    )
    for step in steps:
        seconds(step, 10)
    turns = [tuple(seconds(step, 5) for step in steps) for _ in trange(args.turns, desc="timing", unit="turn")]
    mine, other = (1000 * statistics.median(turn[i] for turn in turns) for i in (0, 1))
    ratio = statistics.median(b / a for a, b in turns)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, batch {batch}")
    print(f"ours {mine:.1f} ms, diffusers {other:.1f} ms a step: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
