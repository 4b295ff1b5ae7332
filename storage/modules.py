"""Small networks of this project on disk: their constructor's arguments as JSON, and their weights."""

import inspect
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from torch import nn

from storage.files import commit_json
from storage.text import read_json
from storage.weights import check_tensors, open_folder, shorten, write_tensors

CONFIG, STEM = "config.json", "diffusion_pytorch_model"
M = TypeVar("M", bound=nn.Module)


def write_module(module: nn.Module, settings: dict[str, Any], folder: Path) -> None:
    """Writes a module's tensors, then its class and arguments. OSError on failure."""
    write_tensors(module.state_dict(), folder / f"{STEM}.safetensors")
    commit_json(folder / CONFIG, {"_class_name": type(module).__name__} | settings)


def read_module(kind: type[M], folder: Path) -> M:
    """A module of this class as `write_module` wrote it, in evaluation mode and float32.

    Raises:
        FileNotFoundError, ValueError: in one line, if a file is missing, truncated or of another kind, or names or
            shapes do not fit. The module is read whole or not at all.
    """
    file = folder / CONFIG
    config = read_json(file)
    if (name := config.pop("_class_name", None)) != kind.__name__:
        other = f"a {name}" if name else "something else"
        raise ValueError(f"{file} describes {other}, not a {kind.__name__}")
    parameters = inspect.signature(kind).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not open_ended and (wrong := sorted(config.keys() ^ parameters.keys())):
        raise ValueError(f"{file} must have the keys {', '.join(parameters)} and no others; fix {shorten(wrong)}")
    hints = get_type_hints(kind.__init__)
    if wrong := [key for key, value in config.items() if not _fits(value, hints.get(key))]:
        raise ValueError(f"{file} has a value of the wrong type: {shorten(wrong)}")
    try:
        module = kind(**config)
    except (TypeError, ValueError, RuntimeError) as error:  # the last for sizes beyond all memory
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is no whole config of a {kind.__name__}: {reason}") from None
    weights = open_folder(folder, STEM)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_tensors(weights, wanted, f"this {kind.__name__}'s config")
    module.load_state_dict(dict(weights))
    return module.eval()


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is of an argument's type: a number, a truth value or a list of whole numbers."""
    if NoneType in (choices := get_args(kind)) and len(choices) == 2:  # the value is what none stands for
        kind = choices[0]
    if kind in (int, bool):
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(type(one) is int for one in value)
    return True
