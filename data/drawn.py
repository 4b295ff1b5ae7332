"""What a drawn picture says of itself, as text in its PNG: read again by `sample.py --like`, and by other programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.raw.pictures import PictureError, png_texts
from storage.text import parse_json

OURS = "mmdit"  # a JSON object: an entry of samples.json
OTHERS = "parameters"  # the text that the programs around Stable Diffusion show
SAMPLERS = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M", "ddim": "DDIM"}  # their names there
FLAGS = (
    *("model", "parts", "lora", "embedding", "dtype", "text_dtype", "max_sequence_length", "prompt", "negative"),
    *("seed", "steps", "sampler", "spacing", "guidance", "guider", "rescale", "interval", "skip_layers", "skip_scale"),
    *("skip_interval", "shift", "height", "width", "image", "mask", "strength", "picture", "prior", "level"),
    *("control", "control_interval", "autoguidance", "refiner", "handover", "classifier", "clip_guidance"),
    *("gradient_interval", "upscale", "upscale_prompt", "upscale_steps"),
)


def png_notes(entry: Mapping[str, Any]) -> dict[str, str]:
    """The texts to write into a picture's PNG.

    Args:
        entry: how it was drawn: the flags of `sample.py` by name, with the prompt and the seed of this picture.
    """
    adapters = (lora.rpartition(":") if ":" in lora else (lora, "", "1") for lora in entry.get("lora", ()))
    words = [entry["prompt"], *(f"<lora:{Path(path).stem}:{strength}>" for path, _, strength in adapters)]
    sampler = str(entry["sampler"]).partition(":")[0]
    settings = {
        "Steps": entry["steps"],
        "Sampler": SAMPLERS.get(sampler, sampler),
        "CFG scale": entry["guidance"],
        "Seed": entry["seed"],
        "Size": f"{entry['width']}x{entry['height']}",
        "Model": Path(entry["model"]).name,
        "Shift": entry["shift"],
    }
    if "strength" in entry:
        settings["Denoising strength"] = entry["strength"]
    lines = [" ".join(words)]
    if entry["negative"]:
        lines.append(f"Negative prompt: {entry['negative']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return {OURS: json.dumps(entry, ensure_ascii=False), OTHERS: "\n".join(lines)}


def recorded(file: Path) -> dict[str, Any]:
    """The flags of `sample.py` that draw a picture again, by name, from its PNG.

    Numbers come as text, so that a parser checks them like those of a command line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture that `sample.py` wrote.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no picture {file}: give a PNG that sample.py wrote")
    try:
        found = parse_json(png_texts(file).get(OURS, "null"), file)
    except PictureError as error:
        raise ValueError(f"{file} can't be read ({error}): give a PNG that sample.py wrote") from None
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str) or "seed" not in found:
        raise ValueError(f"{file} does not say how it was drawn: give a PNG that sample.py wrote, unchanged")
    # The command refuses flags without effect.
    idle = {"guider", "rescale", "interval"} if found.get("guidance") == 1 else set()
    idle |= set() if found.get("skip_layers") else {"skip_layers", "skip_scale", "skip_interval"}
    flags = {name: found[name] for name in FLAGS if name not in idle and found.get(name) is not None}
    return {name: value if isinstance(value, list) else str(value) for name, value in flags.items()}
