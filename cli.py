"""What the commands share: a parser, errors in one line, the flags of model and sampling, and the device."""

import json
import os
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

BAD_INPUT, MACHINE_FAULT = 2, 1  # exit statuses
DTYPES = ("float32", "float16", "bfloat16")
MEMORY_CURE = "try --batch-size 1, --dtype bfloat16, --text-device cpu or --vae-tiling"
MOST = 10_000_000  # pictures of one command
NOT_PURPOSE = ("out", "overwrite", "batch_size", "device", "text_device", "text_cache")  # flags
SAMPLING = (
    "sampler", "spacing", "guidance", "guider", "rescale", "interval", "skip_layers", "skip_scale", "skip_interval",
)  # fmt: skip


def fail(message: object, status: int = BAD_INPUT) -> NoReturn:
    """Ends open progress bars, prints one line to standard error and exits."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


class Parser(ArgumentParser):
    """argparse's parser, with errors in one line."""

    def parse_known_args(self, args: Sequence[str] | None = None, *rest: Any, **more: Any) -> Any:  # type: ignore[override]
        return super().parse_known_args(checked(args), *rest, **more)

    def error(self, message: str) -> NoReturn:
        fail(message)


def checked(argv: Sequence[str] | None) -> list[str]:
    """The arguments of a command, which are text in UTF-8; anything else ends the program. None means the program's."""
    given = list(sys.argv[1:] if argv is None else argv)
    for arg in given:
        try:
            arg.encode()
        except UnicodeEncodeError:
            fail(f"the argument {os.fsencode(arg)!r} is no text in UTF-8: write it in UTF-8")
    return given


@contextmanager
def one_line_errors(*bad_input: type[Exception], cure: str = MEMORY_CURE) -> Iterator[None]:
    """Ends the program with one line of error: status 2 for bad input and for a file where none may be.

    Status 1 is for other OSErrors and for full memory.

    Args:
        bad_input: exceptions that mean bad input.
        cure: what to try when the memory is full.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        fail(f"{error.filename}: a file stands where a folder is needed, choose another" if error.filename else error)
    except bad_input as error:
        fail(error)
    except OSError as error:
        fail(error, MACHINE_FAULT)
    except (MemoryError, RuntimeError) as error:
        if not memory_is_full(error):
            raise
        fail(f"the device has not enough memory: {cure}", MACHINE_FAULT)


def memory_is_full(error: Exception) -> bool:
    """Whether an error means that the device has not enough memory."""
    full = type(error).__name__ in ("MemoryError", "OutOfMemoryError")  # the latter is torch's; its import is slow
    return full or "can't allocate memory" in str(error)  # so torch says it on a CPU


def plain_warnings() -> None:
    """Prints a warning as one line, without file name and source line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def natural(text: str, least: int = 0) -> int:
    """A parser's `type`: an integer of at least 0. ArgumentTypeError or ValueError for anything else."""
    number = int(text)
    if not least <= number < 2**62:
        raise ArgumentTypeError(f"must be at least {least} and below 2^62, got {number}")
    return number


def finite(text: str) -> float:
    """A parser's `type`: a number that is neither infinite nor NaN."""
    number = float(text)
    if not isfinite(number):
        raise ArgumentTypeError(f"must be a finite number, got {text}")
    return number


def positive(text: str) -> int:
    """A parser's `type`: an integer of at least 1."""
    return natural(text, 1)


def check_count(flag: str, number: int) -> None:
    """ValueError if a flag asks for more pictures than one command makes; checked before anything is as long."""
    if number > MOST:
        raise ValueError(f"{flag} asks for {number:,} pictures, and one command makes at most {MOST:,}: take fewer")


def output(text: str) -> Path:
    """A parser's `type`: the path of something that is written."""
    if not text:
        raise ArgumentTypeError("must not be empty: give a name, or . for the current folder")
    return Path(text)


def positives(text: str) -> list[int]:
    """A parser's `type`: integers of at least 1, separated by commas, such as 1,2,4."""
    try:
        return [positive(part) for part in text.split(",")]
    except (ValueError, ArgumentTypeError):
        raise ArgumentTypeError(f"takes whole numbers of at least 1 such as 1,2,4; got {text}") from None


def add_sampling_flags(parser: Parser, repeatable: bool = False) -> None:
    """Adds the flags of sampler and guidance. The model's own settings are the defaults."""
    p = parser.add_argument_group("sampling")
    p.add_argument(
        "--sampler",
        action="append" if repeatable else "store",
        help="euler, heun, dpmpp_2m, ddim:eta=1, ddpm, edm, …; default: the model's" + "; repeatable" * repeatable,
    )
    p.add_argument(
        "--spacing",
        help="time grid: trailing, flow_match, leading, linspace, karras, given:times=1/0.83/0.4; default: the model's",
    )
    p.add_argument(
        "--guidance",
        type=finite,
        help="classifier-free guidance scale; 1: no guidance; above 1: more of the prompt; between 0 and 1: less; "
        "0: nothing of it, so only for an empty prompt; default: the model's",
    )
    p.add_argument(
        "--guider",
        help="how guidance is applied: cfg, apg:eta=0,threshold=2,momentum=-0.5 or zero-star:zero_steps=1; "
        "default: the model's",
    )
    p.add_argument("--rescale", type=finite, help="guidance rescale φ, 0 to 1; default: the model's")
    p.add_argument("--interval", type=finite, nargs=2, metavar=("FROM", "TO"), help="use guidance only at these t")
    p.add_argument(
        "--skip-layers",
        type=natural,
        nargs="+",
        metavar="BLOCK",
        help="skip-layer guidance: the blocks to skip, such as 7 8 9 for SD3.5 medium",
    )
    p.add_argument("--skip-scale", type=finite, help="scale of skip-layer guidance; default: the model's, 2.8")
    p.add_argument(
        "--skip-interval",
        type=finite,
        nargs=2,
        metavar=("FROM", "TO"),
        help="use skip-layer guidance between these shares of the steps; default: the model's, 0.01 0.2",
    )


def add_autoguidance_flag(parser: Parser) -> None:
    """Adds the flag of the second model that guidance moves away from."""
    help = "moves away from a worse model of the same kind, such as one of a shorter training; SCALE 1 is none"
    parser.add_argument("--autoguidance", metavar="MODEL:SCALE", help=help)


def add_gradient_flags(parser: Parser) -> None:
    """Adds the flags of guidance by the gradient of a model that reads noisy pictures."""
    p = parser.add_argument_group("guidance by gradients")
    p.add_argument(
        "--classifier", metavar="MODEL:SCALE",
        help="classifier guidance toward the class that the prompt names; with --guidance 0 by an unconditional model",
    )  # fmt: skip
    p.add_argument("--clip-guidance", metavar="MODEL:SCALE", help="guidance by a CLIP of noisy pictures")
    p.add_argument("--gradient-interval", type=finite, nargs=2, metavar=("FROM", "TO"),
                   help="use these gradients only at these t; default: up to 98 %% noise")  # fmt: skip


def add_drawing_flags(p: Parser) -> None:
    """Adds the flags that say what is drawn and how: those of `sample.py` and of each picture of `app.py`."""
    p.add_argument("--model", type=Path,
                   help="a model folder (ours or Stable Diffusion 3's), a single file, or a run's folder")  # fmt: skip
    p.add_argument("--like", type=Path, help="a PNG of sample.py: the defaults of all flags are those that drew it")
    p.add_argument("--prompt", type=str, action="append", default=[], help='repeatable; "" is unconditional')
    p.add_argument("--prompts", type=Path, help="a text file with one prompt a line")
    p.add_argument("--negative", type=str, default="", help="negative prompt: guidance moves away from it")
    p.add_argument("--num-images", type=positive, default=1, help="pictures per prompt")
    p.add_argument("--steps", type=positive, help="sampling steps; default: the model's")
    add_sampling_flags(p)
    add_autoguidance_flag(p)
    add_gradient_flags(p)
    p.add_argument("--shift", type=finite, help="shift of the time grid; default: the model's")
    p.add_argument("--height", type=positive, help="in pixels; default: the image's, or without one the model's")
    p.add_argument("--width", type=positive, help="in pixels; default: the image's, or without one the model's")
    p.add_argument("--image", type=Path, help="a picture to start from")
    p.add_argument(
        "--strength", type=finite, help="share of the steps that change --image; default: 0.6, with --mask 1"
    )
    p.add_argument("--mask", type=Path, help="a picture of the shape of --image that is white where --image is drawn "
                   "anew; if it has an alpha channel, transparent where it is drawn anew")  # fmt: skip
    p.add_argument("--picture", type=Path, help="input picture of a network that needs one, such as super-resolution; "
                   "for one that takes image embeddings, a picture of which to draw variations")  # fmt: skip
    p.add_argument("--prior", type=Path, help="a model that draws the image embedding of each prompt, in the place of "
                   "--picture (DALL·E 2)")  # fmt: skip
    p.add_argument("--level", type=finite, default=0.0, help="noise level added to these, 0 to 1; default: 0")
    p.add_argument("--upscale", type=str, action="append", metavar="MODEL[:LEVEL]",
                   help="a cascade: a model that enlarges what was drawn, noised to LEVEL; repeatable")  # fmt: skip
    p.add_argument("--upscale-prompt", type=str, action="append", metavar="TEXT",
                   help="prompt of --upscale, once for all its models or for each; default: --prompt")  # fmt: skip
    p.add_argument("--upscale-steps", type=positive, action="append", metavar="N",
                   help="steps of --upscale, once for all its models or for each; default: the model's")  # fmt: skip
    p.add_argument("--control", type=str, action="append", metavar="MODEL:IMAGE[:SCALE]",
                   help="a ControlNet and the picture that it follows; repeatable")  # fmt: skip
    p.add_argument("--control-interval", type=finite, nargs=2, metavar=("FROM", "TO"),
                   help="use ControlNets only between these shares of the steps")  # fmt: skip
    p.add_argument("--refiner", type=Path, help="a second model in the same latents, which takes over at --handover")
    p.add_argument("--handover", type=finite, help="time below which the refiner takes over; default: 0.2")
    p.add_argument("--seed", type=natural, default=0, help="picture i starts from seed + i")
    p.add_argument("--batch-size", type=positive, help="pictures at a time; default: as many as make 4,096 tokens")
    p.add_argument("--vae-tiling", action="store_true", help="decode large pictures in tiles: less memory")
    p.add_argument("--vae-slicing", action="store_true", help="decode one picture at a time: less memory")
    add_model_flags(p)
    p.add_argument("--out", type=output, default=Path("samples"), help="folder for the pictures; none is replaced")


def add_model_flags(parser: Parser) -> None:
    """Adds the flags that say how a model is loaded."""
    p = parser.add_argument_group("model")
    p.add_argument("--device", help="cpu, cuda, …; default: cuda if there is a GPU")
    p.add_argument("--dtype", choices=DTYPES, help="type of network and VAE; default: float32 on cpu, else as stored")
    p.add_argument("--parts", type=Path, help="model folder with the tokenizers and encoders that a single file lacks")
    p.add_argument(
        "--lora",
        action="append",
        metavar="PATH[:STRENGTH]",
        help="LoRA, LoHa, LoKr or DoRA in the files of diffusers, PEFT, kohya, ComfyUI, OneTrainer or LyCORIS, "
        "to merge into the network and SD3's text encoders; repeatable",
    )
    p.add_argument(
        "--embedding",
        action="append",
        metavar="FILE[:WORD]",
        help="a new word (textual inversion), with vectors for clip_l, clip_g or t5xxl; repeatable",
    )
    p.add_argument("--text-device", help="device of the text encoders; default: as --device")
    p.add_argument("--text-dtype", choices=DTYPES, help="type of SD3's text encoders; default: as --dtype")
    p.add_argument(
        "--max-sequence-length", type=positive,
        help="tokens that T5 reads, up to 512; default: as many as its tokenizer, at most 256",
    )  # fmt: skip
    p.add_argument("--text-cache", type=output, help="folder that keeps encoded prompts for the next time")


def load_options_of(args: Namespace) -> dict[str, Any]:
    """The flags of `add_model_flags` as arguments of `pipeline.LoadOptions`. ValueError for an unknown device."""
    text_device = args.text_device and find_device(args.text_device)
    names = ("dtype", "parts", "text_dtype", "max_sequence_length", "text_cache")
    return {name: getattr(args, name) for name in names} | {
        "lora": tuple(args.lora or ()),
        "embedding": tuple(args.embedding or ()),
        "device": find_device(args.device),
        "text_device": text_device,
    }


def add_overwrite_flag(parser: Parser) -> None:
    """Adds the flag `--overwrite`."""
    parser.add_argument("--overwrite", action="store_true", help="replace what this command wrote with other settings")


def purpose_of(command: str, args: Namespace) -> dict[str, Any]:
    """What a result is for: the command and its flags, but for those that only say where it runs and is written."""
    flags = {name: value for name, value in vars(args).items() if name not in NOT_PURPOSE and value is not None}
    return {"command": command} | json.loads(json.dumps(flags, default=str))


def sampling_of(args: Namespace, default: Any, **chosen: Any) -> Any:
    """A model's `Sampling` with the values of the flags.

    Args:
        args: the flags of `add_sampling_flags`; those that are None keep the default.
        default: the model's own `Sampling`, a dataclass.
        chosen: further values, which win over flags; None keeps the default.

    Raises:
        ValueError: the flags do not fit together.
    """
    given = {key: getattr(args, key) for key in SAMPLING}
    sampling = replace(default, **{key: value for key, value in (given | chosen).items() if value is not None})
    if not sampling.skip_layers and (args.skip_scale is not None or args.skip_interval is not None):
        raise ValueError("--skip-scale and --skip-interval need --skip-layers: give it, or leave them out")
    if 0 < sampling.guidance < 1:
        warnings.warn(f"guidance {sampling.guidance:g} weakens the prompt; 1 is no guidance", stacklevel=2)
    if sampling.guidance == 1 and (args.rescale or args.interval or args.guider not in (None, "cfg")):
        raise ValueError("--rescale, --interval and --guider need guidance, which is 1 (off): give another --guidance")
    return sampling


def find_device(name: str | None) -> str:
    """The named device, or without a name cuda if there is a GPU. ValueError if this machine does not have it."""
    import torch  # slow; wrong flags are reported before

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.zeros(1, device=device).tolist()
    except Exception:  # unknown, without hardware, driver or build, or it holds no numbers; torch raises any class
        raise ValueError(f"this machine has no device {device}; give another, such as cpu") from None
    return device


class Ranks(NamedTuple):
    """The place of a process among those that were started together."""

    rank: int
    world: int  # number of processes
    local: int  # rank on its machine


def srun_used() -> bool:
    """Whether srun started this process as one of several. A batch script or a shell of SLURM is a process alone."""
    shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    several = os.environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in os.environ
    return several and not shell and "TORCHELASTIC_RUN_ID" not in os.environ


def own_ranks(devices: int = 1, machines: int = 1) -> Ranks:
    """This process's place among those that torchrun, srun, train.py or a user started, from the environment.

    Args:
        devices: processes on each machine, if one process there starts the others.
        machines: number of these.

    Raises:
        ValueError: the environment variables do not fit together, as when one was left over.
    """
    if srun_used():
        slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        found = {name: os.environ.get(variable, "") for name, variable in slurm.items()}
    else:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
        found = {name: os.environ[name] for name in names if name in os.environ}
    numbers = {name: int(value) for name, value in found.items() if value.isdecimal()}
    started = numbers.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    local = numbers.get("LOCAL_RANK", numbers.get("RANK", 0))
    world = numbers.get("WORLD_SIZE", 1 if started else devices * machines)
    rank = numbers.get("RANK", numbers.get("NODE_RANK", numbers.get("GROUP_RANK", 0)) * devices + local)
    if len(numbers) < len(found) or rank >= world or (found.keys() == {"WORLD_SIZE"} and world > 1):
        shown = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(
            f"the environment has {shown}, not a RANK below WORLD_SIZE: unset them, or start with torchrun"
        )
    return Ranks(rank, world, local)


def device_of_rank(name: str | None, local_rank: int) -> str:
    """`find_device`; if that is cuda, the GPU of this process, which becomes the current device."""
    import torch

    device = find_device(name)
    if device == "cuda":
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    return device
