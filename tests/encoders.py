"""SD3's text encoders in small, in a folder and in a single file, and what diffusers computes with them."""

import json
import shutil
from pathlib import Path

import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load
from torch import Tensor

from data.text.encoder import Text

PROMPTS = ["a handwritten seven", "", "a clean digit 3, please!"]
SIZES = {"tokens_dim": tiny.TOKENS, "pooled_dim": tiny.POOLED}
PREFIXES = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}


def original(pipe: StableDiffusion3Pipeline) -> dict[str, Tensor]:
    tensors = {
        prefix + name: value.clone()
        for part, prefix in PREFIXES.items()
        for name, value in getattr(pipe, part).state_dict().items()
    }
    projection = tensors.pop("text_encoders.clip_l.transformer.text_projection.weight")
    assert torch.equal(projection, torch.eye(64))
    assert torch.equal(
        tensors["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"],
        tensors["text_encoders.t5xxl.transformer.shared.weight"],
    )
    return tensors | {"model.diffusion_model.pos_embed": torch.zeros(3)}


def read(file: Path) -> dict[str, Tensor]:
    """A file's tensors, not mapped, so that it can be written again."""
    return load(file.read_bytes())


def theirs(pipe: StableDiffusion3Pipeline, prompts: list[str], length: int = 256) -> Text:
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return Text(tokens, pooled)


def assert_same(ours: Text, wanted: Text) -> None:
    for one, other in zip(ours, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def absent(folder: Path, names: list[str], how: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    for name in names:
        for part in (name, name.replace("text_encoder", "tokenizer")):
            index[part] = [None, None]
            if how == "folder":
                shutil.rmtree(folder / part)
    (folder / "model_index.json").write_text(json.dumps(index))
    if how == "folder":
        (folder / "model_index.json").unlink()


def copied(released: Path, folder: Path) -> Path:
    """A copy of everything about text."""
    rest = shutil.ignore_patterns("vae", "transformer", "scheduler")
    return Path(shutil.copytree(released, folder / "model", ignore=rest))
