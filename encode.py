"""Encodes captioned pictures into a store: `python encode.py --config configs/shapes.yaml`. The same command goes on.

Under `torchrun` every process encodes its share of the units.
"""

import os

import torch
from jsonargparse import Namespace

from cli import fail, find_device, one_line_errors, plain_warnings
from data.encoding import Encoding, StoreEncoder
from data.latents import Codec
from data.text import TextEncoder
from experiment import Parser, parser, plain


def wanted(argv: list[str] | None) -> tuple[Encoding, Codec, TextEncoder]:
    """What the config's sections `encode`, `codec` and `text` name. The rest of it is checked, but not built."""
    config = parser(__doc__ or "").parse_args(argv)
    if config.encode is None:
        fail("the config has no section encode, which says what to encode: see data.encoding.Encoding")
    part = Parser()
    part.add_subclass_arguments(TextEncoder, "text")
    part.add_subclass_arguments(Codec, "codec")
    part.add_argument("--encode", type=Encoding)
    built = part.instantiate(Namespace(text=config.text, codec=config.codec, encode=config.encode))
    return built.encode, built.codec, built.text


def place() -> tuple[int, int, int]:
    """This process's rank, the number of processes, and its rank on this machine, as torchrun says them in words.

    Raises:
        ValueError: they are no such numbers.
    """
    told = {"RANK": "0", "WORLD_SIZE": "1"}
    told |= {name: os.environ[name] for name in told if name in os.environ}
    told["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", told["RANK"])
    if not all(value.isdecimal() for value in told.values()) or int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        raise ValueError(f"RANK must be from 0 to below WORLD_SIZE, and LOCAL_RANK a number, got {told}")
    return int(told["RANK"]), int(told["WORLD_SIZE"]), int(told["LOCAL_RANK"])


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    with one_line_errors(ValueError, FileNotFoundError, NotADirectoryError):
        rank, world, local = place()
        try:
            how, codec, text = wanted(argv)
        except ValueError as error:
            raise ValueError(plain(str(error))) from None
        device = find_device(how.device)
        if device == "cuda":
            device = f"cuda:{local % torch.cuda.device_count()}"
            torch.cuda.set_device(device)
        encoder = StoreEncoder(how, codec.to(device), text.to(device))
        report = encoder.run(rank, world)
    if report is None:
        print(f"rank {rank} is done; the last one to finish completes {how.store}")
        return
    print(f"{report['kept']} of {report['inputs']} pictures are in {how.store}")
    for name, count in sorted(report["dropped"].items(), key=lambda pair: -pair[1]):
        print(f"{count:8} left out: {name}")
    for name, count in report["buckets"].items():
        print(f"{count:8} of {name} pixels, height x width")
    if report["dropped"]:
        print(f"{how.store / 'dropped.jsonl'} lists what was left out")
    if not report["kept"]:
        fail(f"no picture of the source could be used: {how.store} is empty")


if __name__ == "__main__":
    main()
