"""A quantiser that two processes train; apart from the tests, so that these processes import little."""

import torch
from torch import Tensor, distributed

from tokens.quantize import Quantizer

K, D = 8, 4


def one_of_two(rank: int, place: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    quantizer = begun()
    for x in batches():
        quantizer(x.chunk(2)[rank])
    torch.save(quantizer.state_dict(), f"{place}/{rank}.pt")
    distributed.destroy_process_group()


def begun() -> Quantizer:
    torch.manual_seed(1)
    return Quantizer(K, D, depth=2).train()


def batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [5 + torch.randn(4, D, 3, 3, generator=draw) for _ in range(3)]
