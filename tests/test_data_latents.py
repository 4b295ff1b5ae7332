"""The VAE codec: equal to diffusers', whole on disk under either set of names, never a black picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from jsonargparse import ArgumentParser
from networks import stirred
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.latents import VAE, Codec, Pixels, load_codec
from storage import weights

SIZES: dict[str, Any] = {
    "block_out_channels": (32, 64, 32),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "sample_size": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
WEIGHTS, ENCODER = "diffusion_pytorch_model.safetensors", "first_stage_model.encoder"


def tiny(**changes: Any) -> AutoencoderKL:
    """A small VAE, always the same, with every weight random, norms and biases, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return stirred(AutoencoderKL(**(SIZES | changes)), 0.05)


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs() -> AutoencoderKL:
    return tiny()


@pytest.fixture
def folder(theirs: AutoencoderKL, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def single(folder: Path) -> Path:
    file = folder.parent / "single.safetensors"
    weights.write_tensors(VAE(folder).original_state(), file)
    return file


def assert_same(ours: AutoencoderKL, theirs: AutoencoderKL) -> None:
    state, wanted = ours.state_dict(), theirs.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("float16", 1e-2), ("bfloat16", 5e-2)])
def test_equals_diffusers_pipelines(folder: Path, dtype: str, error: float) -> None:
    """To the bit in float32; in the others, the CPU's own kernels do not always repeat themselves."""
    ours, kind = VAE(folder, dtype), getattr(torch, dtype)
    theirs = AutoencoderKL.from_pretrained(folder, torch_dtype=kind)
    config, processor = theirs.config, VaeImageProcessor(vae_scale_factor=4)
    assert (ours.channels, ours.pixel_channels, ours.factor, ours.vae.dtype) == (4, 3, 4, kind)

    pixels, z = drawn(2, 3, 16, 24), 4 * drawn(2, 4, 4, 6) - 2
    with torch.no_grad():
        mean = theirs.encode(processor.preprocess(pixels).to(kind)).latent_dist.mode()
        picture = theirs.decode(z.to(kind) / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    latents, drawing = ours.encode(pixels), ours.decode(z)  # assert_close compares dtypes, too
    wanted = ((mean - config.shift_factor) * config.scaling_factor).float()
    torch.testing.assert_close(latents, wanted, rtol=0, atol=error)
    wanted = processor.postprocess(picture, output_type="pt").float()
    torch.testing.assert_close(drawing, wanted, rtol=0, atol=error)
    assert latents.shape == (2, 4, 4, 6)
    assert 0 <= drawing.min() < drawing.max() <= 1


def test_decode_undoes_the_normalisation_of_encode(folder: Path, theirs: AutoencoderKL) -> None:
    ours, pixels = VAE(folder), drawn(2, 3, 16, 16)
    with torch.no_grad():
        raw = (theirs(2 * pixels - 1).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours.decode(ours.encode(pixels)), raw)
    change(folder / "config.json", shift_factor=None)
    unshifted = VAE(folder)
    torch.testing.assert_close(unshifted.encode(pixels), ours.encode(pixels) + 1.5305 * 0.0609)
    torch.testing.assert_close(unshifted.decode(unshifted.encode(pixels)), raw)


def test_a_draw_from_the_posterior_is_diffusers_draw_normalised(folder: Path, theirs: AutoencoderKL) -> None:
    pixels, noise = drawn(2, 3, 16, 16), drawn(2, 4, 4, 4)
    mean, logvar = VAE(folder).posterior(pixels)
    with torch.no_grad():
        raw = theirs.encode(2 * pixels - 1).latent_dist
    wanted = (raw.mean + raw.std * noise - 0.0609) * 1.5305
    torch.testing.assert_close(mean + (logvar / 2).exp() * noise, wanted)


def test_it_is_frozen_and_ignores_autocast_and_random_numbers(folder: Path) -> None:
    before = torch.get_rng_state()
    ours, z = VAE(folder), drawn(1, 4, 4, 4).requires_grad_()
    alone = ours.decode(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.decode(z), alone)
    assert torch.equal(torch.get_rng_state(), before)
    assert not alone.requires_grad
    assert not ours.vae.training
    assert not any(parameter.requires_grad for parameter in ours.vae.parameters())
    for codec in (ours, Pixels(1)):
        assert codec.to("cpu") is codec


def shapes_seen(codec: Codec) -> list[tuple[int, ...]]:
    """A list that grows by what encoder and decoder are given."""
    assert isinstance(codec, VAE)
    seen: list[tuple[int, ...]] = []
    for part in (codec.vae.encoder, codec.vae.decoder):
        part.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    return seen


def test_slicing_changes_nothing(folder: Path) -> None:
    pixels, plain, sliced = drawn(3, 3, 16, 24), VAE(folder), VAE(folder)
    sliced.save_memory(tiling=False, slicing=True)
    seen, latents = shapes_seen(sliced), plain.encode(pixels)
    torch.testing.assert_close(sliced.encode(pixels), latents)
    torch.testing.assert_close(sliced.decode(latents), plain.decode(latents))
    assert seen == [(1, 3, 16, 24)] * 3 + [(1, 4, 4, 6)] * 3


def test_tiling_stays_close_and_sees_no_more_than_a_tile(tmp_path: Path) -> None:
    tiny(sample_size=64).save_pretrained(tmp_path)
    pixels, plain, tiled = drawn(1, 3, 96, 80), VAE(tmp_path), VAE(tmp_path)
    tiled.save_memory(tiling=True, slicing=False)
    seen, latents = shapes_seen(tiled), plain.encode(pixels)
    ours, drawing = tiled.encode(pixels), tiled.decode(latents)
    assert len(seen) == 8
    assert all(max(shape[2:]) <= (64 if shape[1] == 3 else 16) for shape in seen)
    for result, whole in ((ours, latents), (drawing, plain.decode(latents))):
        assert result.shape == whole.shape
        assert 0.01 < (result - whole).norm() / (whole - whole.mean()).norm() < 0.6  # random weights: far-reaching
    tile, corner = pixels[..., :64, :64], latents[..., :16, :16]
    assert torch.equal(ours[..., :12, :12], plain.encode(tile)[..., :12, :12])  # a quarter overlaps
    assert torch.equal(drawing[..., :48, :48], plain.decode(corner)[..., :48, :48])
    assert torch.equal(tiled.encode(tile), plain.encode(tile))
    assert torch.equal(tiled.decode(corner), plain.decode(corner))


def test_reads_folders_shards_and_model_folders(folder: Path, theirs: AutoencoderKL) -> None:
    theirs.save_pretrained(folder.parent / "shards", max_shard_size="200KB")
    assert len(list((folder.parent / "shards").glob("*.safetensors"))) > 1
    for place in (folder, str(folder.parent), folder.parent / "shards"):
        assert_same(VAE(place).vae, theirs)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_save_is_what_diffusers_reads(folder: Path, theirs: AutoencoderKL, name: Any) -> None:
    dtype = getattr(torch, name)
    again = folder.parent / "again"
    ours = load_codec(folder, name)
    ours.save(again)
    assert {tensor.dtype for tensor in load_file(again / WEIGHTS).values()} == {dtype}
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert_same(ours.vae, AutoencoderKL.from_pretrained(again, torch_dtype=dtype))
    assert_same(VAE(again).vae, tiny().to(dtype).float())
    assert VAE(again, None).vae.dtype == dtype  # as stored


@pytest.mark.parametrize(
    "changes", [{}, {"layers_per_block": 1, "block_out_channels": (64, 32, 32), "latent_channels": 16}]
)
def test_a_single_file_holds_the_same_under_the_original_names(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = tiny(**changes)
    theirs.save_pretrained(tmp_path)
    state = VAE(tmp_path).original_state()
    converted, wanted = convert_ldm_vae_checkpoint(state, theirs.config), theirs.state_dict()
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[name], wanted[name]) for name in wanted)
    rows = theirs.config.block_out_channels[-1]
    assert state["first_stage_model.decoder.mid.attn_1.proj_out.weight"].shape == (rows, rows, 1, 1)

    single = tmp_path / "single.safetensors"
    weights.write_tensors(state | {"model.diffusion_model.pos_embed": torch.ones(1)}, single)
    ours = VAE(single)
    assert_same(ours.vae, theirs)
    assert ours.vae.config.sample_size == 1024
    assert torch.equal(ours.encode(drawn(1, 3, 16, 16)), VAE(tmp_path).encode(drawn(1, 3, 16, 16)))
    back = ours.original_state()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 16}, "norm_num_groups is 16, not 32"),
        ({"scaling_factor": 0.18215, "shift_factor": None}, "scaling_factor is 0.18215, not 1.5305, shift_factor"),
        ({"use_quant_conv": True}, "use_quant_conv"),
        ({"use_post_quant_conv": True}, "use_post_quant_conv"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
    ],
)
def test_a_single_file_is_refused_for_networks_it_cannot_describe(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tiny(**changes).save_pretrained(tmp_path)
    vae = VAE(tmp_path)
    assert vae.decode(vae.encode(drawn(1, 3, 16, 16))).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=message) as caught:
        vae.original_state()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_overflow_in_half_precision_is_an_error(tmp_path: Path, part: str) -> None:
    loud = tiny()
    getattr(loud, part).conv_in.weight.data *= 1e5
    loud.save_pretrained(tmp_path)

    def use(dtype: str) -> Tensor:
        vae = load_codec(tmp_path, dtype)
        return vae.encode(drawn(1, 3, 16, 16)) if part == "encoder" else vae.decode(drawn(1, 4, 4, 4))

    for dtype in ("float32", "bfloat16"):
        assert use(dtype).isfinite().all()
    with pytest.raises(ValueError, match=r"^the VAE overflowed in float16: take bfloat16 or float32$"):
        use("float16")


def test_what_cannot_be_computed_is_refused(folder: Path) -> None:
    vae = VAE(folder)
    for use, given in ((vae.encode, drawn(1, 3, 16, 16)), (vae.decode, drawn(1, 4, 4, 4))):
        given[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="given numbers that are not finite"):
            use(given)
    with pytest.raises(ValueError, match=r"multiples of 4, got \(16, 18\)"):
        vae.encode(drawn(1, 3, 16, 18))
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got float64"):
        load_codec(folder, "float64")


def test_a_yaml_file_can_name_it(folder: Path) -> None:
    p = ArgumentParser(exit_on_error=False)
    p.add_subclass_arguments(Codec, "codec", required=True)
    content = f"{{codec: {{class_path: VAE, init_args: {{path: {folder}, dtype: bfloat16}}}}}}"
    codec = p.instantiate_classes(p.parse_string(content)).codec
    assert isinstance(codec, VAE)
    assert codec.vae.dtype == torch.bfloat16


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite(file: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(file)
    edit(state)
    save_file(state, file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda vae: truncate(vae / WEIGHTS), "truncated or no safetensors"),
        (
            lambda vae: (vae / WEIGHTS).rename(vae / "diffusion_pytorch_model.bin"),
            "only diffusion_pytorch_model.bin, a pickle",
        ),
        (lambda vae: (vae / WEIGHTS).unlink(), "no weights at"),
        (lambda vae: rewrite(vae / WEIGHTS, lambda s: s.pop("decoder.conv_in.bias")), r"1 missing \(decoder.conv_in"),
        (lambda vae: rewrite(vae / WEIGHTS, lambda s: s.update(x=torch.ones(1))), r"1 left over \(x\)"),
        (lambda vae: change(vae / "config.json", latent_channels=8), "3 mis-shaped"),
        (lambda vae: change(vae / "config.json", _class_name="AutoencoderTiny"), "describes a AutoencoderTiny"),
        (lambda vae: change(vae / "config.json", norm_num_groups=7), "describes no AutoencoderKL that could be built"),
        (lambda vae: change(vae / "config.json", scaling_factor="1.5"), "scaling_factor is '1.5'"),
        (lambda vae: change(vae / "config.json", latents_mean=[0.0] * 4), "asks for latents_mean"),
        (lambda vae: change(vae / "config.json", in_channels=1), "unequal in_channels"),
        (lambda vae: (vae / "config.json").write_text("[]"), "no JSON object"),
        (lambda vae: (vae / "config.json").unlink(), "config.json"),
    ],
)
def test_damaged_folders_are_named_in_one_line(folder: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(folder)
    for read in (VAE, load_codec):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "truncated or no safetensors"),
        (lambda file: torch.save({}, file), "is a pickle"),
        (lambda file: file.unlink(), "no weights at"),
        (lambda file: save_file({"model.diffusion_model.x": torch.ones(1)}, file), "no whole VAE .*conv_in.weight"),
        (lambda file: rewrite(file, lambda s: s.pop(f"{ENCODER}.mid.attn_1.q.bias")), "1 missing .*mid.attn_1.q.bias"),
        (lambda file: rewrite(file, lambda s: s.pop(f"{ENCODER}.down.1.block.0.conv1.weight")), "no whole VAE"),
        (lambda file: rewrite(file, lambda s: s.update({f"{ENCODER}.conv_in.weight": torch.ones(1)})), "no whole VAE"),
        (lambda file: rewrite(file, lambda s: s.update({"first_stage_model.quant_conv.bias": torch.ones(8)})),
         r"1 left over \(quant_conv.bias\)"),
    ],
)  # fmt: skip
def test_damaged_single_files_are_named_in_one_line(single: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(single)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        VAE(single)
    assert "\n" not in str(caught.value)
