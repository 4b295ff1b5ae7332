"""Networks that keep themselves on disk: a config with the constructor's arguments, and the weights."""

import inspect
from pathlib import Path
from typing import Any, Self

from mmdit.network import Network
from storage.files import commit_json
from storage.text import read_json
from storage.weights import check_tensors, open_folder, shorten, write_tensors

CONFIG, STEM = "config.json", "diffusion_pytorch_model"


class SavedNetwork(Network):
    """A network that is made anew from numbers: its class, the arguments of its constructor and its weights.

    An argument is a bool if its default is one, and otherwise an int.

    Attributes:
        settings: the arguments, with defaults in place of none.
    """

    settings: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes config and weights. OSError on failure."""
        commit_json(folder / CONFIG, {"_class_name": type(self).__name__} | self.settings)
        write_tensors(self.state_dict(), folder / f"{STEM}.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote of a network of this class.

        Returns:
            The network in evaluation mode, float32.

        Raises:
            FileNotFoundError, ValueError: a file is missing, truncated or of another kind, or names or shapes do not
                fit. The network is loaded whole or not at all.
        """
        network = cls(**cls._arguments(folder / CONFIG))
        weights = open_folder(folder, STEM)
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        check_tensors(weights, wanted, f"this {cls.__name__}'s config")
        network.load_state_dict(dict(weights))
        return network.eval()

    @classmethod
    def _arguments(cls, file: Path) -> dict[str, Any]:
        """The constructor's arguments in the file, all of them and nothing else."""
        config = read_json(file)
        kind = config.pop("_class_name", None)
        if kind != cls.__name__:
            raise ValueError(f"{file} describes a {kind}, not a {cls.__name__}")
        known = inspect.signature(cls).parameters
        if wrong := sorted(config.keys() ^ known.keys()):
            raise ValueError(f"{file} must have the keys {', '.join(known)} and no others; fix {shorten(wrong)}")
        wrong = [name for name, value in config.items() if type(value) is not _kind(known[name].default)]
        if wrong:
            raise ValueError(f"{file} has a value of the wrong type: {shorten(wrong)}")
        return config


def _kind(default: object) -> type:
    return bool if isinstance(default, bool) else int
