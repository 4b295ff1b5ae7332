"""Networks that keep themselves on disk."""

from pathlib import Path
from typing import Any, Self

from mmdit.network import Network
from storage.modules import read_module, write_module


class SavedNetwork(Network):
    """A network that is made anew from its class, the arguments of its constructor and its weights.

    Attributes:
        settings: the arguments, with what they stand for in place of none.
    """

    settings: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes config and weights. OSError on failure."""
        write_module(self, self.settings, folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote of a network of this class; errors as `storage.modules.read_module`."""
        return read_module(cls, folder)
