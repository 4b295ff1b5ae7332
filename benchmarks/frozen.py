"""What a LoRA training loses by a frozen base in fewer bits: its first loss and gradient against those in float32.

    python -m benchmarks.frozen --model runs/digits --prompts configs/digits-prompts.txt

The pictures are the model's own, drawn from the prompts. Loss and gradient are means over eight equally spaced t. At
the start only the matrices B of the updates have a gradient; its error is ‖g − g₀‖/‖g₀‖. All but the first row compute
in bfloat16, as with `run.precision bf16-mixed`; their weights outside of the blocks' linear layers are bfloat16. The
rows of float8 are bases read from files in float8_e4m3fn: values alone, and values with one scale a layer.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cli import Parser, one_line_errors, positive
from data.prompts import read_prompts
from mmdit import lora
from mmdit.model import MMDiT
from mmdit.quantized import quantize
from pipeline import Pipeline
from storage.models import find_model

TIMES = 8
KINDS = ("float32", "bfloat16", "int8", "nf4", "float8", "float8 with scales")


def first_step(pipe: Pipeline, kind: str, prompts: list[str], x0: Tensor, rank: int) -> tuple[float, Tensor]:
    """The loss, and the gradient of all updates in one row."""
    torch.manual_seed(0)  # of the updates
    network = cast(MMDiT, copy.deepcopy(pipe.network))
    if kind.startswith("float8"):
        round_blocks(network, scaled=kind != "float8")
    network = network.to(torch.float32 if kind == "float32" else torch.bfloat16)
    lora.add(network, lora.LoRA(rank=rank))
    if kind in ("int8", "nf4"):
        quantize(network, kind)  # type: ignore[arg-type]
    condition, noise = pipe.condition(prompts), torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for i in range(TIMES):
        t = torch.full((len(x0),), (i + 0.5) / TIMES)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "float32"):
            loss = pipe.objective.loss(network, x0, noise, t, condition, None, None).mean() / TIMES
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@torch.no_grad()
def round_blocks(network: MMDiT, scaled: bool) -> None:
    """Rounds the weights of the blocks' linear layers to float8_e4m3fn, divided by a scale of the layer if `scaled`."""
    for module in network.blocks.modules():
        if isinstance(module, nn.Linear):
            peak = module.weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            scale = peak if scaled else torch.ones(())
            module.weight.copy_((module.weight / scale).to(torch.float8_e4m3fn).float() * scale)


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, required=True, help="a model folder or a run's folder")
    p.add_argument("--prompts", type=Path, required=True, help="a text file with one prompt a line")
    p.add_argument("--num", type=positive, default=64, help="pictures")
    p.add_argument("--rank", type=positive, default=16, help="of the updates")
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        pipe = Pipeline.load(find_model(args.model))
        given = read_prompts([], args.prompts)
        prompts = [given[i % len(given)] for i in range(args.num)]
        pictures = pipe(prompts, range(args.num), sampling=replace(pipe.sampling, guidance=1.0))
        x0 = pipe.codec.encode(pictures)
    print(f"{'base':<20}{'loss':>10}{'gradient off by':>18}")
    exact = None
    for kind in KINDS:
        loss, gradient = first_step(pipe, kind, prompts, x0, args.rank)
        exact = gradient if exact is None else exact
        print(f"{kind:<20}{loss:>10.5f}{float((gradient - exact).norm() / exact.norm()):>18.2%}")


if __name__ == "__main__":
    main()
