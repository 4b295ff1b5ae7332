"""The fields of the page, and the flags of `sample.py` that they stand for."""

import hashlib
import shlex
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
from PIL import Image

from cli import Parser, add_drawing_flags
from data.raw.pictures import save_png
from storage.files import commit_path

LONGEST = 2000  # characters of a prompt
FLAGS = (  # named like fields
    "steps", "guidance", "seed", "sampler", "spacing", "shift", "guider", "rescale", "height", "width",
)  # fmt: skip
Value = str | float | None


class Form(NamedTuple):
    """What the fields say, in their order on the page. "" is a field that is left empty."""

    model: str
    prompt: str
    negative: str
    steps: Value
    guidance: Value
    seed: Value
    images: Value
    sampler: Value
    spacing: Value
    shift: Value
    guide_from: Value
    guide_to: Value
    guider: Value
    rescale: Value
    height: Value
    width: Value
    painted: Mapping[str, Any] | None  # a picture to start from, and what was painted over it
    strength: Value
    lora: str
    lora_strength: Value
    control: str
    hint: Image.Image | None
    control_scale: Value

    @classmethod
    def recorded(cls, flags: Mapping[str, Any]) -> Self:
        """The fields that draw a picture again, but for its pictures and ControlNets, from `data.drawn.recorded`."""
        begin, end = flags.get("interval", ("", ""))
        lora, _, strength = str((flags.get("lora") or [""])[0]).rpartition(":")
        own = {name: flags.get(name, "") for name in (*FLAGS, "model", "prompt", "negative", "strength")}
        empty = dict.fromkeys(cls._fields, "") | {"painted": None, "hint": None}
        own |= {name: float(own[name]) for name in ("steps", "guidance") if own[name]}  # these fields are sliders
        return cls(**empty | own | {"images": 1, "guide_from": str(begin), "guide_to": str(end),
                                    "lora": lora or strength, "lora_strength": strength if lora else ""})  # fmt: skip

    def argv(self, inputs: Path) -> list[str]:
        """The flags of `sample.py`, but for `--out`.

        Args:
            inputs: folder for the pictures that the flags name; they are written there.

        Raises:
            ValueError: in one line, what the flags cannot say.
        """
        if len(self.prompt) > LONGEST or len(self.negative) > LONGEST:
            longest = max(len(self.prompt), len(self.negative))
            raise ValueError(f"the prompt has {longest:,} characters: take at most {LONGEST:,}")
        argv = [*flag("model", self.model), *flag("prompt", self.prompt), *flag("num-images", shown(self.images))]
        for name in ("negative", *FLAGS):
            argv += flag(name, value) if (value := shown(getattr(self, name))) else []
        if self.guide_from or self.guide_to:
            argv += ["--interval", number(self.guide_from, "0"), number(self.guide_to, "1")]
        if self.lora_strength and not self.lora:
            raise ValueError("the strength of a LoRA needs a LoRA: give one, or leave it out")
        if self.lora:
            argv += flag("lora", joined(self.lora, self.lora_strength))
        return argv + self._pictures(inputs)

    def _pictures(self, inputs: Path) -> list[str]:
        """The flags that name pictures."""
        argv: list[str] = []
        image, mask = parts(self.painted)
        if image:
            argv += flag("image", str(kept(image, inputs)))
            argv += flag("mask", str(kept(mask, inputs))) if mask else []
        argv += flag("strength", shown(self.strength)) if self.strength else []
        if self.control or self.hint or self.control_scale:
            if not (self.control and self.hint):
                missing = "its picture" if self.control else "the folder"
                raise ValueError(f"a ControlNet needs a folder and a picture, and {missing} is missing")
            steered = f"{self.control}:{kept(self.hint.convert('RGB'), inputs)}"
            argv += flag("control", joined(steered, self.control_scale))
        return argv


def flag(name: str, value: str) -> list[str]:
    """A flag with its value, which may begin with a minus."""
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def shown(value: Value) -> str:
    """A field's value as a flag's: sliders give numbers, the other fields text."""
    return "" if value is None else value.strip() if isinstance(value, str) else f"{value:.10g}"


def number(value: Value, default: str) -> str:
    """A time as a flag's value. ValueError for text that is no number from 0 to 1."""
    text = shown(value) or default
    try:
        inside = 0 <= float(text) <= 1
    except ValueError:
        inside = False
    if not inside:
        raise ValueError(f"the times of the guidance are numbers from 0 to 1, got {text!r}")
    return text


def joined(path: str, strength: Value) -> str:
    """PATH or PATH:STRENGTH."""
    return ":".join(filter(None, (path.strip(), shown(strength))))


def parts(painted: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture under what was painted, and a mask that is white where something was painted; None if nothing was.

    Args:
        painted: the value of Gradio's ImageEditor: `background` and `layers`, all RGBA.
    """
    if not painted or painted["background"] is None:
        return None, None
    image = painted["background"].convert("RGBA")
    if not np.asarray(image)[..., 3].any():
        return None, None
    covered = np.zeros((image.height, image.width), dtype=bool)
    for layer in painted["layers"]:
        covered |= np.asarray(layer.convert("RGBA").resize(image.size))[..., 3] > 127
    mask = Image.fromarray(np.where(covered, 255, 0).astype(np.uint8)) if covered.any() else None
    return image.convert("RGB"), mask


def kept(image: Image.Image, folder: Path) -> Path:
    """The file of a picture in a folder, named by its content; written if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    content = f"{image.mode} {image.size} ".encode() + image.tobytes()
    file = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.png"
    if not file.exists():
        commit_path(file, lambda part: save_png(image, part))
    return file


class FormParser(Parser):
    """Raises ValueError in place of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def parsed(argv: list[str], device: str | None) -> Namespace:
    """The flags, as `sample.py` reads them. ValueError in one line."""
    for text in argv:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the prompt is no text in UTF-8: write it anew") from None
    parser = FormParser(add_help=False)
    add_drawing_flags(parser)
    args = parser.parse_args(argv)
    args.device = args.device or device
    return args


def command(argv: list[str]) -> str:
    """The line of the shell that draws the same."""
    return f"python sample.py {shlex.join(argv)}"
