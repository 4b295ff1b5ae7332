"""Released models: our pictures against those of diffusers' pipelines, made of the same folders and single files."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline, StableDiffusion3Pipeline
from torch import Tensor

from pipeline import LoadOptions, Pipeline
from pipeline.folder import single_file
from storage.weights import write_tensors

KINDS = ["sd3", "sd35_medium", "sd35_large"]
PROMPT, NEGATIVE = "a handwritten seven", "the digit 3"
LEVEL = 1 / 255


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[StableDiffusion3Pipeline, Path]]:
    """diffusers' pipelines of the three kinds, and their folders."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("released") / kind
        found[kind] = tiny.pipeline(kind, folder), folder
    return found


@pytest.fixture(scope="session")
def ours(released: dict) -> dict[str, Pipeline]:
    return {kind: Pipeline.load(folder) for kind, (_, folder) in released.items()}


def draw(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of two pictures, which must show something."""
    assert a.std() > 0.02
    return (a - b).abs().max().item()


def theirs(pipe: StableDiffusion3Pipeline, steps: int, guidance: float, height: int, width: int, **more) -> Tensor:
    return pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=steps, guidance_scale=guidance, height=height,
        width=width, generator=draw(), output_type="pt", **more,
    ).images  # fmt: skip


def mine(pipe: Pipeline, steps: int, guidance: float, height: int | None, width: int | None, **more) -> Tensor:
    sampling = replace(pipe.sampling, steps=steps, guidance=guidance, **more.pop("sampling", {}))
    return pipe([PROMPT], [5], NEGATIVE, sampling, height=height, width=width, **more)


@pytest.mark.parametrize(
    ("kind", "steps", "guidance", "size"), itertools.product(KINDS, [4, 28], [1.0, 5.0], [(128, 128), (64, 112)])
)
def test_a_released_model_draws_the_same_picture(
    released: dict, ours: dict[str, Pipeline], kind: str, steps: int, guidance: float, size: tuple[int, int]
) -> None:
    expected = theirs(released[kind][0], steps, guidance, *size)
    assert apart(expected, mine(ours[kind], steps, guidance, *size)) < LEVEL


def test_skip_layer_guidance_is_theirs(released: dict, ours: dict[str, Pipeline]) -> None:
    pipe = released["sd35_medium"][0]
    skipped = theirs(pipe, 28, 5.0, 64, 64, skip_guidance_layers=[1], skip_layer_guidance_scale=2.8)
    assert apart(skipped, theirs(pipe, 28, 5.0, 64, 64)) > LEVEL
    assert apart(skipped, mine(ours["sd35_medium"], 28, 5.0, 64, 64, sampling={"skip_layers": (1,)})) < LEVEL
    late = theirs(pipe, 10, 5.0, 64, 64, skip_guidance_layers=[0, 2], skip_layer_guidance_scale=1.5,
                  skip_layer_guidance_start=0.3, skip_layer_guidance_stop=0.8)  # fmt: skip
    way = {"skip_layers": (0, 2), "skip_scale": 1.5, "skip_interval": (0.3, 0.8)}
    assert apart(late, mine(ours["sd35_medium"], 10, 5.0, 64, 64, sampling=way)) < LEVEL
    with pytest.raises(ValueError, match="skip_layers must be blocks"):
        mine(ours["sd35_medium"], 28, 5.0, 64, 64, sampling={"skip_layers": (3,)})


@pytest.mark.parametrize("strength", [0.6, 0.35, 1.0])
def test_image_to_image_equals_diffusers(released: dict, ours: dict[str, Pipeline], strength: float) -> None:
    """Theirs is given the mean latent, since it would draw one from the posterior, and then other noise."""
    pipe = StableDiffusion3Img2ImgPipeline(**released["sd3"][0].components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 96, generator=draw(1))
    latent = ours["sd3"].codec.encode(image)
    expected = pipe(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=10, guidance_scale=5.0, image=latent,
                    strength=strength, generator=draw(), output_type="pt", height=64, width=96).images  # fmt: skip
    assert apart(expected, mine(ours["sd3"], 10, 5.0, None, None, image=image, strength=strength)) < LEVEL


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_equals_diffusers(
    released: dict, ours: dict[str, Pipeline], strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the latents: diffusers 0.42's inpainting pipeline forgets the VAE's shift when it decodes them."""
    pipe = StableDiffusion3InpaintPipeline(**released["sd3"][0].components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 96, generator=draw(1))
    latent = ours["sd3"].codec.encode(image)
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 16:48, 32:80] = 1
    monkeypatch.setattr(pipe, "_encode_vae_image", lambda image, generator: latent)  # the mean, and no noise drawn
    expected = pipe(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=10, guidance_scale=5.0, image=image,
                    mask_image=mask, strength=strength, generator=draw(), output_type="latent", height=64,
                    width=96).images  # fmt: skip
    found = mine(ours["sd3"], 10, 5.0, None, None, image=image, mask=mask, strength=strength)
    assert apart(ours["sd3"].codec.decode(expected), found) < LEVEL
    assert apart(found, mine(ours["sd3"], 10, 5.0, None, None, image=image, strength=strength)) > LEVEL


def test_what_the_mask_keeps_comes_back_as_it_went_in(ours: dict[str, Pipeline]) -> None:
    pipe = ours["sd35_large"]
    image = torch.rand(1, 3, 64, 64, generator=draw(1))
    kept = mine(pipe, 4, 5.0, None, None, image=image, mask=torch.zeros(1, 1, 64, 64), strength=1.0)
    torch.testing.assert_close(kept, pipe.codec.decode(pipe.codec.encode(image)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_the_same_model(released: dict, ours: dict[str, Pipeline], kind: str, tmp_path: Path) -> None:
    write_tensors(single_file(ours[kind].parts), tmp_path / "one.safetensors")
    back = Pipeline.load(tmp_path / "one.safetensors", LoadOptions(parts=released[kind][1]))
    assert torch.equal(mine(back, 4, 5.0, 64, 64), mine(ours[kind], 4, 5.0, 64, 64))


def test_half_precision_is_close_and_overflow_is_an_error(released: dict, ours: dict[str, Pipeline]) -> None:
    folder = released["sd35_medium"][1]
    full = mine(ours["sd35_medium"], 4, 5.0, 64, 64)
    for dtype in ("bfloat16", "float16"):
        half = Pipeline.load(folder, LoadOptions(dtype=dtype))
        assert {p.dtype for p in half.network.parameters()} == {getattr(torch, dtype)}
        assert (mine(half, 4, 5.0, 64, 64) - full).abs().mean() < 0.05
    half.network.final.linear.weight.data *= 1e6
    with pytest.raises(ValueError, match="the network overflowed in float16"):
        mine(half, 4, 5.0, 64, 64)


def test_our_folder_opens_in_diffusers(ours: dict[str, Pipeline], tmp_path: Path) -> None:
    ours["sd35_medium"].save(tmp_path / "model")
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert apart(theirs(pipe, 4, 5.0, 64, 64), mine(ours["sd35_medium"], 4, 5.0, 64, 64)) < LEVEL
    again = Pipeline.load(tmp_path / "model")
    assert torch.equal(mine(again, 4, 5.0, 64, 64), mine(ours["sd35_medium"], 4, 5.0, 64, 64))
    assert again.sampling == ours["sd35_medium"].sampling


def test_without_t5_it_equals_diffusers_too(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd35_large", tmp_path, t5=False)
    assert apart(theirs(pipe, 4, 5.0, 64, 64), mine(Pipeline.load(tmp_path), 4, 5.0, 64, 64)) < LEVEL
