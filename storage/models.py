"""Where a model lies on disk, and what tells it from another."""

from pathlib import Path

from storage.weights import digest, open_file, open_folder


def find_model(path: Path) -> Path:
    """A single file, a model folder or, in a run's folder, its model or LoRA. FileNotFoundError if there is none."""
    if path.is_file() and path.suffix not in (".json", ".yaml"):
        return path
    for folder in (path, path / "model", path / "model.old"):  # the last where a kill came between two renames
        if (folder / "model_index.json").is_file():
            return folder
    for folder in (path, path / "lora", path / "lora.old"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise FileNotFoundError(f"{path} is no model folder: neither it nor {path / 'model'} has a model_index.json")


def fingerprint(model: Path) -> str:
    """A hash of the network's weights in a model folder or single file, as it was read or written.

    Raises:
        FileNotFoundError, ValueError: there is no network, or it is damaged.
    """
    if model.is_file():
        return digest(open_file(model))
    place = next((model / part for part in ("transformer", "unet") if (model / part).is_dir()), None)
    if place is None:
        raise FileNotFoundError(f"{model} is no model folder: it has neither transformer/ nor unet/")
    return digest(open_folder(place, "diffusion_pytorch_model"))
