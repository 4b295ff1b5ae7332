"""What the entry points share: a parser, faults that end in one clear line, and where the model is."""

import os
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

BAD_INPUT, MACHINE_FAULT = 2, 1  # exit statuses
DTYPES = ("float32", "float16", "bfloat16")
ROOM = "try --batch-size 1, --dtype bfloat16, --text-device cpu or --vae-tiling"
SAMPLING = ("spacing", "guidance", "rescale", "interval", "skip_layers", "skip_scale", "skip_interval")


def fail(message: object, status: int = BAD_INPUT) -> NoReturn:
    """Prints one line to standard error and exits."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


class Parser(ArgumentParser):
    """argparse's parser, with errors in one line."""

    def error(self, message: str) -> NoReturn:
        fail(message)


@contextmanager
def one_line_errors(*bad_input: type[Exception], cure: str = ROOM) -> Iterator[None]:
    """Ends the program in one line: on the named exceptions with status 2, on other OSErrors and full memory with 1.

    Args:
        bad_input: exceptions that are the user's.
        cure: of full memory.
    """
    try:
        yield
    except bad_input as error:
        fail(error)
    except OSError as error:
        fail(error, MACHINE_FAULT)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is slow to import
            raise
        fail(f"the device has not enough memory: {cure}", MACHINE_FAULT)


def plain_warnings() -> None:
    """Lets a warning be one line that says what it is about, not where in the code it arose."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def natural(text: str, least: int = 0) -> int:
    """A whole number of at least 0, as a parser's `type`; ArgumentTypeError or ValueError otherwise."""
    number = int(text)
    if not least <= number < 2**62:
        raise ArgumentTypeError(f"must be at least {least} and below 2^62, got {number}")
    return number


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN, likewise."""
    number = float(text)
    if not isfinite(number):
        raise ArgumentTypeError(f"must be a finite number, got {text}")
    return number


def positive(text: str) -> int:
    """A whole number of at least 1, likewise."""
    return natural(text, 1)


def positives(text: str) -> list[int]:
    """Whole numbers of at least 1 with commas between them, such as 1,2,4, likewise."""
    try:
        return [positive(part) for part in text.split(",")]
    except (ValueError, ArgumentTypeError):
        raise ArgumentTypeError(f"takes whole numbers of at least 1 such as 1,2,4; got {text}") from None


def add_sampling(parser: Parser, repeatable: bool = False) -> None:
    """The flags of how to sample, but for the number of steps; what is left out comes from the model."""
    p = parser.add_argument_group("sampling")
    p.add_argument(
        "--sampler",
        action="append" if repeatable else "store",
        help="euler, heun, dpmpp_2m, ddim:eta=1, ddpm, edm, …; default: the model's" + "; repeatable" * repeatable,
    )
    p.add_argument(
        "--spacing",
        help="of the times: trailing, flow_match, leading, linspace, karras, given:times=1/0.83/0.4; "
        "default: the model's",
    )
    p.add_argument("--guidance", type=finite, help="classifier-free guidance scale, 1 is none; default: the model's")
    p.add_argument("--rescale", type=finite, help="share of the guidance's rescaling, 0 to 1; default: the model's")
    p.add_argument("--interval", type=finite, nargs=2, metavar=("FROM", "TO"), help="times in which guidance works")
    p.add_argument(
        "--skip-layers",
        type=natural,
        nargs="+",
        metavar="BLOCK",
        help="skip-layer guidance away from the network without these blocks: 7 8 9 for SD3.5 medium",
    )
    p.add_argument("--skip-scale", type=finite, help="its scale; default: the model's, 2.8")
    p.add_argument(
        "--skip-interval",
        type=finite,
        nargs=2,
        metavar=("FROM", "TO"),
        help="the shares of the steps in which it works; default: the model's, 0.01 0.2",
    )


def add_reading(parser: Parser) -> None:
    """The flags of how a model is read."""
    p = parser.add_argument_group("model")
    p.add_argument("--device", help="cpu, cuda, …; default: cuda where there is one")
    p.add_argument("--dtype", choices=DTYPES, help="of network and VAE; default: float32 on the cpu, else as stored")
    p.add_argument("--parts", type=Path, help="a model folder with what a single file lacks: tokenizers, text encoders")
    p.add_argument("--lora", type=Path, help="a LoRA in diffusers' layout, file or folder, to merge into the network")
    p.add_argument("--text-device", help="where the text encoders compute; default: as --device")
    p.add_argument("--text-dtype", choices=DTYPES, help="of SD3's text encoders; default: as --dtype")
    p.add_argument("--max-sequence-length", type=positive, default=256, help="tokens that T5 reads, up to 512")
    p.add_argument("--text-cache", type=Path, help="a folder where encoded prompts are kept for the next time")


def reading_of(args: Namespace) -> dict[str, Any]:
    """What these flags say, as the arguments of `pipeline.folder.Reading`. ValueError for an unknown device."""
    text_device = args.text_device and find_device(args.text_device)
    names = ("dtype", "parts", "lora", "text_dtype", "max_sequence_length", "text_cache")
    return {name: getattr(args, name) for name in names} | {
        "device": find_device(args.device),
        "text_device": text_device,
    }


def sampling_of(args: Namespace, own: Any, **chosen: Any) -> Any:
    """A model's own way of sampling, a dataclass, with what the flags and `chosen` say instead, where they do."""
    given = {key: getattr(args, key) for key in SAMPLING}
    sampling = replace(own, **{key: value for key, value in (given | chosen).items() if value is not None})
    if not sampling.skip_layers and (args.skip_scale is not None or args.skip_interval is not None):
        raise ValueError("--skip-scale and --skip-interval need --skip-layers")
    if sampling.guidance == 1 and (args.rescale or args.interval):
        raise ValueError("--rescale and --interval need guidance, which is 1: none; give another --guidance")
    return sampling


def find_device(name: str | None) -> str:
    """The device, or if none is given cuda where there is one; ValueError if the machine does not have it."""
    import torch  # slow, and not needed to refuse a flag

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if device == "meta":
            raise RuntimeError("holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # unknown, or without hardware, driver or build
        raise ValueError(f"this machine has no device {device}; give another, such as cpu") from None
    return device


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


def own_device(name: str | None, local: int) -> str:
    """`find_device`, but of several GPUs this process's own, which becomes the current one."""
    import torch

    device = find_device(name)
    if device == "cuda":
        device = f"cuda:{local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    return device
