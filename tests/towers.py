"""Where the committed CLIP towers lie, the captions of the digits, and towers that are damaged."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load, save_file

from data import digits

FOLDER = Path(__file__).parents[1] / "assets" / "digits" / "text"
TWO = Path(__file__).parents[1] / "assets" / "shapes" / "text"
TEMPLATES = digits.TRAIN_TEMPLATES + digits.HELD_OUT_TEMPLATES
CAPTIONS = [caption for label in range(10) for caption in digits.captions(label, TEMPLATES)]


def damage(folder: Path, fault: str) -> None:
    weights, config = folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "config.json"
    tensors = load(weights.read_bytes())
    name = "text_model.final_layer_norm.bias"
    match fault:
        case "no folder":
            shutil.rmtree(folder)
        case "no weights":
            weights.unlink()
        case "no tokenizer":
            shutil.rmtree(folder / "tokenizer")
        case "no vocabulary":
            (folder / "tokenizer" / "tokenizer.json").unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "empty":
            weights.write_bytes(b"")
        case "pickle":
            torch.save(tensors, weights)
        case "one weight too few":
            save_file({key: value for key, value in tensors.items() if key != name}, weights, {"format": "pt"})
        case "one weight too many":
            save_file(tensors | {"text_model.extra": torch.zeros(1)}, weights, {"format": "pt"})
        case "another size":
            save_file(tensors | {name: torch.zeros(3)}, weights, {"format": "pt"})
        case "foreign weights":
            save_file({"pos_embed": torch.zeros(3)}, weights, {"format": "pt"})
        case "broken config":
            config.write_text("{")
        case "foreign config":
            config.write_text(json.dumps({"model_type": "t5"}))
        case "broken tokenizer":
            file = folder / "tokenizer" / "tokenizer.json"
            file.write_bytes(file.read_bytes()[:500])
        case "larger tokenizer":
            file = folder / "tokenizer" / "tokenizer.json"
            content = json.loads(file.read_text())
            content["model"]["vocab"]["more</w>"] = len(content["model"]["vocab"])
            file.write_text(json.dumps(content))
        case "longer tokenizer":
            file = folder / "tokenizer" / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 77}))
