"""The cache of encoded captions: nothing is encoded twice, and nothing is read that another encoder wrote."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from encoders import PREFIXES, PROMPTS, SIZES, absent, assert_same, copied, read
from safetensors.torch import save_file
from torch import Tensor

from data.text.sd3 import SD3Text


@pytest.fixture
def folder(released: tuple[StableDiffusion3Pipeline, Path], tmp_path: Path) -> Path:
    """A copy that may be damaged, of everything about text."""
    return copied(released[1], tmp_path)


def forget_weights(folder: Path) -> None:
    for name in PREFIXES:
        (folder / name / "model.safetensors").unlink()


def test_what_was_encoded_is_not_encoded_again(folder: Path, tmp_path: Path):
    """In memory, and by another process through the folder: both without reading the encoders."""
    first, second = (SD3Text(folder, **SIZES, cache=tmp_path / "cache") for _ in range(2))
    plain = SD3Text(folder, **SIZES)
    wanted = first.encode(PROMPTS)
    plain.encode(PROMPTS)
    forget_weights(folder)
    for text in (first, second, plain):
        assert_same(text.encode(PROMPTS), wanted)
        assert torch.equal(text.encode(PROMPTS[::-1]).tokens, wanted.tokens.flip(0))
        with pytest.raises(FileNotFoundError):
            text.encode(["something new"])
    assert len([*(tmp_path / "cache").iterdir()]) == 3
    first.encode(PROMPTS).tokens.zero_()  # what a caller does with it changes nothing
    assert_same(first.encode(PROMPTS), wanted)


def test_the_memory_of_captions_keeps_the_latest(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.text.cache.KEPT", 2)
    text = SD3Text(folder, **SIZES, max_sequence_length=8)
    text.encode(["1", ""])
    text.encode(["2"])
    text.encode([""])
    text.encode(["3"])
    forget_weights(folder)
    text.encode(["3", ""])
    for forgotten in "12":
        with pytest.raises(FileNotFoundError):
            text.encode([forgotten])


def test_a_damaged_cache_is_written_again(folder: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    wanted = SD3Text(folder, **SIZES, cache=cache).encode(PROMPTS)
    files = sorted(cache.iterdir())
    sizes = [file.stat().st_size for file in files]
    files[0].write_bytes(files[0].read_bytes()[:1000])
    files[1].write_bytes(b"")
    save_file({"tokens": torch.zeros(3)}, files[2])
    assert_same(SD3Text(folder, **SIZES, cache=cache).encode(PROMPTS), wanted)
    assert sorted(cache.iterdir()) == files
    assert [file.stat().st_size for file in files] == sizes


def change(file: Path, edit: Callable[[Tensor], object]) -> None:
    """One tensor among many."""
    tensors = read(file)
    edit(tensors["text_model.encoder.layers.0.mlp.fc1.weight"])
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    "what",
    ["weights", "last number", "another type", "settings", "vocabulary", "length", "dtype", "fewer encoders"],
)
def test_the_cache_is_not_for_another_encoder(folder: Path, tmp_path: Path, what: str):
    wanted = SD3Text(folder, **SIZES, cache=tmp_path / "cache").encode(PROMPTS)
    weights = folder / "text_encoder_2" / "model.safetensors"
    options = {}
    match what:
        case "weights":
            change(weights, lambda value: value.mul_(1.5))
        case "last number":
            change(weights, lambda value: value.view(-1)[-1:].add_(1.0))
        case "another type":
            save_file({name: value.half() for name, value in read(weights).items()}, weights, {"format": "pt"})
        case "settings":
            file = folder / "text_encoder_2" / "config.json"
            file.write_text(file.read_text().replace('"gelu"', '"quick_gelu"'))
        case "vocabulary":
            file = folder / "tokenizer_2" / "tokenizer_config.json"
            file.write_text(file.read_text().replace('"pad_token": "!"', '"pad_token": "<|endoftext|>"'))
        case "length":
            options["max_sequence_length"] = 128
        case "dtype":
            options["dtype"] = "bfloat16"
        case "fewer encoders":
            absent(folder, ["text_encoder_2"], "index")
    again = SD3Text(folder, **SIZES, **options, cache=tmp_path / "cache").encode(PROMPTS)
    assert_same(again, SD3Text(folder, **SIZES, **options).encode(PROMPTS))
    assert not torch.equal(again.tokens, wanted.tokens)
    assert len([*(tmp_path / "cache").iterdir()]) == 6


def test_the_cache_of_sampling_serves_training(folder: Path, tmp_path: Path):
    text = SD3Text(folder, **SIZES, max_sequence_length=32, cache=tmp_path / "cache")
    again = SD3Text(folder, **SIZES, max_sequence_length=32, cache=tmp_path / "cache")
    for encoder in (text, again):
        with torch.inference_mode():
            encoder.encode(PROMPTS)
        tokens, _ = encoder.encode(PROMPTS)
        scale = torch.ones((), requires_grad=True)
        (scale * tokens).sum().backward()
        assert scale.grad is not None
