"""The codec of image embeddings: transformers' numbers, standardised; whole on disk; bad input in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_towers import SIDE, SIZE, pictures, tower, written
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from data.clip import CONFIG, STATISTICS, CLIPImage
from data.latents import load_codec

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tower"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "tower")


def test_embeddings_are_those_of_transformers(made: Path) -> None:
    codec, pixels = CLIPImage(made), pictures(5)
    images = [Image.fromarray(part.permute(1, 2, 0).numpy()) for part in pixels]
    prepared = CLIPImageProcessor(do_resize=False, do_center_crop=False)(images, return_tensors="pt")
    theirs = CLIPVisionModelWithProjection.from_pretrained(made)
    with torch.no_grad():
        wanted = normalize(theirs(**prepared).image_embeds, dim=-1)
    latents = codec.encode(pixels / 255)
    assert latents.shape == (5, SIZE, 1, 1)
    torch.testing.assert_close(latents.flatten(1), (wanted - codec.mean) / codec.std, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(codec.embedding(latents), wanted, atol=1e-5, rtol=1e-4)


def test_latents_of_the_measured_pictures_have_mean_0_and_deviation_1(made: Path) -> None:
    latents = CLIPImage(made).encode(pictures(300) / 255).double()
    assert latents.mean(0).abs().max() < 1e-3
    assert (latents.std(0) - 1).abs().max() < 1e-3
    raw = CLIPImage(made).embedding(latents)
    assert raw.std(0).max() < 0.2  # unit vectors have small numbers


def test_generated_latents_become_unit_vectors(made: Path) -> None:
    codec = CLIPImage(made)
    z = torch.randn(4, SIZE, 1, 1)
    e = codec.embedding(z)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(4))
    raw = z.flatten(1) * codec.std + codec.mean
    torch.testing.assert_close(e * raw.norm(dim=-1, keepdim=True), raw)


def test_save_and_load_keep_every_bit(made: Path, tmp_path: Path) -> None:
    codec = CLIPImage(made)
    codec.save(tmp_path)
    again, before = load_codec(tmp_path), torch.get_rng_state()
    assert isinstance(again, CLIPImage)
    assert again.fingerprint() == codec.fingerprint()
    assert (again.channels, again.factor, again.pixel_channels) == (SIZE, SIDE, 3)
    pixels = pictures(2) / 255
    assert torch.equal(again.encode(pixels), codec.encode(pixels))
    assert again.index() == ["data.clip", "CLIPImage"]
    CLIPImage(made)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_weights_are_kept_and_computed_in_float32(tmp_path: Path) -> None:
    from data.clip import write

    write(tmp_path, tower().half(), pictures(20))
    assert {x.dtype for x in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    codec = CLIPImage(tmp_path)
    latents = codec.encode(pictures(20) / 255)
    assert latents.dtype == torch.float32
    assert latents.mean(0).abs().max() < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(pictures(20) / 255), latents)


def test_the_fingerprint_knows_the_statistics(folder: Path) -> None:
    before = CLIPImage(folder).fingerprint()
    state = load_file(folder / STATISTICS)
    save_file(state | {"std": state["std"] * 2}, folder / STATISTICS)
    assert CLIPImage(folder).fingerprint() != before


def test_bad_pictures_and_latents_are_named_in_one_line(made: Path) -> None:
    codec = CLIPImage(made)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: codec.encode(torch.zeros(1, 3, 32, 32)), r"reads pictures \(3, 64, 64\), got \(3, 32, 32\)"),
        (lambda: codec.encode(torch.full((1, 3, SIDE, SIDE), torch.nan)), "numbers that are not finite"),
        (lambda: codec.embedding(torch.zeros(1, SIZE)), r"embeddings are latents \(64, 1, 1\), got \(64,\)"),
        (lambda: codec.decode(torch.zeros(1, SIZE, 1, 1)), "an image embedding has no pixels"),
        (lambda: codec.posterior(torch.zeros(1, 3, SIDE, SIDE)), "CLIPImage has no posterior"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def change(folder: Path, **changes: object) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def spoil(folder: Path, number: float) -> None:
    state = load_file(folder / STATISTICS)
    state["std"][3] = number
    save_file(state, folder / STATISTICS)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "there is no .*config.json"),
        (lambda folder: change(folder, model_type="clip_text_model"), "no image tower of a CLIP: its model_type"),
        (lambda folder: change(folder, num_attention_heads=3), "no image tower of a CLIP"),
        (lambda folder: change(folder, image_size="large"), "no image tower of a CLIP"),
        (lambda folder: change(folder, num_channels=1), "no image tower of a CLIP"),
        (lambda folder: change(folder, projection_dim=32), "do not fit this image tower's config"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no weights at"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "truncated"),
        (lambda folder: (folder / STATISTICS).unlink(), "statistics.safetensors"),
        (lambda folder: spoil(folder, 0.0), "a std that is not above 0"),
        (lambda folder: spoil(folder, torch.nan), "a std that is not above 0"),
        (lambda folder: save_file({"mean": torch.zeros(SIZE)}, folder / STATISTICS), r"missing \(std\)"),
    ],
)
def test_damaged_folders_are_named_in_one_line(folder: Path, fault: Callable[[Path], None], message: str) -> None:
    fault(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        CLIPImage(folder)
    assert "\n" not in str(caught.value)
