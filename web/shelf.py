"""The models of the page: loaded when they are first asked for, and kept. For one thread (`web.job.WORKER`)."""

from pathlib import Path

from pipeline import LoadOptions, Pipeline
from storage.models import find_model
from storage.updates import Adapter

KEPT = 3  # models in memory


class Shelf:
    """Loads models and keeps the last few. A model that was written anew meanwhile is loaded anew."""

    def __init__(self) -> None:
        self.models: dict[tuple[Path, LoadOptions, int], Pipeline] = {}

    def load(self, path: Path, options: LoadOptions) -> Pipeline:
        """As `Pipeline.load`."""
        files = [path, *(Adapter.parse(text).path for text in options.lora)]
        key = (path, options, max(map(written, files)))
        pipe = self.models.pop(key, None) or Pipeline.load(path, options)
        self.models[key] = pipe
        while len(self.models) > KEPT:
            del self.models[next(iter(self.models))]
        return pipe


def written(path: Path) -> int:
    """When a file was written, or a folder's newest file directly in it; 0 if there is none."""
    files = [path, *path.iterdir()] if path.is_dir() else [path]
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


def models_in(folders: list[Path]) -> list[Path]:
    """The models among folders and in the folders directly below, in order of their names."""
    found = []
    for folder in folders:
        for path in (folder, *sorted(folder.glob("*/"))):
            try:
                find_model(path)
            except (ValueError, OSError):
                continue
            found.append(path)
    return found
