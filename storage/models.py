"""Finds a model on disk, and identifies it by a hash."""

from pathlib import Path

from storage.files import previous
from storage.weights import digest, open_file, open_folder


def find_model(path: Path) -> Path:
    """The single file, the model folder, or a run folder's model or LoRA. FileNotFoundError if there is none."""
    if path.is_file() and path.suffix not in (".json", ".yaml"):
        return path
    for folder in (path, path / "model", *previous(path / "model")):
        if (folder / "model_index.json").is_file():
            return folder
    for folder in (path, path / "lora", *previous(path / "lora")):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise FileNotFoundError(f"{path} is no model folder: neither it nor {path / 'model'} has a model_index.json")


def fingerprint(model: Path) -> str:
    """A hash of the network's weights in a model folder or single file.

    Raises:
        FileNotFoundError, ValueError: there is no network, or it is damaged.
    """
    if model.is_file():
        return digest(open_file(model))
    folder = next((model / part for part in ("transformer", "unet") if (model / part).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{model} is no model folder: it has neither transformer/ nor unet/")
    return digest(open_folder(folder, "diffusion_pytorch_model"))
