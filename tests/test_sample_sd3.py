"""sample.py on released models: what its flags do, and that what cannot be ends in one line."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import to_tensor

import sample
from mmdit import checkpoint, lora
from pipeline import LoadOptions, Pipeline
from pipeline.folder import single_file
from storage.weights import write_tensors

SIZE = ["--height", "64", "--width", "64", "--steps", "2"]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released model's folder, as `base/`, and beside it its single file, a LoRA, a picture and a mask."""
    place = tmp_path_factory.mktemp("released")
    tiny.pipeline("sd35_medium", place / "base")
    pipe = Pipeline.load(place / "base")
    write_tensors(single_file(pipe.parts), place / "one.safetensors")
    lora.add(pipe.network, lora.LoRA(2))
    for name, parameter in pipe.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    lora.save(lora.export(pipe.network), place / "run/lora", str(place / "base"))
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (80, 72, 3), generator=draw, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(place / "picture.png")
    mask = Image.new("L", (72, 80))
    mask.paste(255, (0, 0, 72, 40))
    mask.save(place / "mask.png")
    return place


def drawn(out: Path) -> torch.Tensor:
    file = json.loads((out / "samples.json").read_text())[0]["file"]
    return to_tensor(Image.open(out / file))


def run(place: Path, out: Path, *argv: str) -> torch.Tensor:
    sample.main(["--prompt", "a seven", *(str(place / arg) if (place / arg).exists() else arg for arg in argv),
                 "--out", str(out)])  # fmt: skip
    return drawn(out)


def test_every_way_to_name_the_model_draws_the_same(released: Path, tmp_path: Path) -> None:
    first = run(released, tmp_path / "a", "--model", "base", *SIZE)
    assert first.shape == (3, 64, 64)
    second = run(released, tmp_path / "b", "--model", "one.safetensors", "--parts", "base", *SIZE)
    assert torch.equal(first, second)
    entry = json.loads((tmp_path / "a/samples.json").read_text())[0]
    assert entry.items() >= {"spacing": "flow_match", "shift": 3.0, "dtype": "float32", "steps": 2}.items()
    changed = run(released, tmp_path / "c", "--model", "base", "--lora", "run", *SIZE)
    assert torch.equal(changed, run(released, tmp_path / "d", "--model", "run", *SIZE))
    assert (changed - first).abs().max() > 0.02


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--dtype", "bfloat16"], True),
        (["--skip-layers", "0", "1", "--steps", "12"], True),
        (["--max-sequence-length", "77"], True),
        (["--negative", "the digit 3"], True),
        (["--text-dtype", "float16"], True),
        (["--vae-slicing"], False),
        (["--vae-tiling"], False),  # the picture is smaller than a tile
        (["--text-device", "cpu"], False),
        (["--batch-size", "1"], False),
    ],
)
def test_each_flag_does_what_it_says(released: Path, tmp_path: Path, flags: list[str], changes: bool) -> None:
    steps = ["--steps", "12"] if "12" in flags else []
    plain = run(released, tmp_path / "a", "--model", "base", *SIZE, *steps)
    other = run(released, tmp_path / "b", "--model", "base", *SIZE, *flags)
    assert torch.equal(plain, other) != changes


def test_encoded_prompts_are_kept_for_the_next_time(released: Path, tmp_path: Path) -> None:
    shutil.copytree(released / "base", tmp_path / "model")
    argv = ("--model", str(tmp_path / "model"), "--text-cache", str(tmp_path / "cache"), *SIZE)
    first = run(released, tmp_path / "a", *argv)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert len(kept) == 2  # the prompt and the negative one
    assert torch.equal(first, run(released, tmp_path / "b", *argv))
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}


def test_a_picture_is_changed_and_what_the_mask_keeps_stays(released: Path, tmp_path: Path) -> None:
    weak, strong = (
        run(released, tmp_path / s, "--model", "base", "--image", "picture.png", "--steps", "10", "--strength", s)
        for s in ("0.2", "0.9")
    )
    assert weak.shape == (3, 80, 64)  # cropped to multiples of 16
    pipe = Pipeline.load(released / "base")
    start = to_tensor(Image.open(released / "picture.png").crop((4, 0, 68, 80)))
    through = pipe.codec.decode(pipe.codec.encode(start[None]))[0]
    assert (weak - through).abs().mean() < (strong - through).abs().mean()
    painted = run(
        released, tmp_path / "m", "--model", "base", "--image", "picture.png", "--mask", "mask.png", "--steps", "4"
    )
    change = (painted - through).abs().mean((0, 2))  # by row
    assert change[:40].mean() > 2 * change[56:].mean()
    assert json.loads((tmp_path / "m/samples.json").read_text())[0]["strength"] == 1.0
    sized = run(released, tmp_path / "s", "--model", "base", "--image", "picture.png", *SIZE)
    assert sized.shape == (3, 64, 64)


def spoil_flux(base: Path) -> None:
    (base / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')


def spoil_text(base: Path) -> None:
    file = base / "text_encoder_3/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def spoil_vae(base: Path) -> None:
    (base / "vae/diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, base / "vae/diffusion_pytorch_model.bin")


def spoil_shift(base: Path, shift: object = 0) -> None:
    file = base / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": shift}))


def spoil_shift_word(base: Path) -> None:
    spoil_shift(base, "three")


def spoil_schedule(base: Path) -> None:
    file = base / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True}))


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda base: (base / "model_index.json").unlink(), [], "is no model folder"),
        (spoil_flux, [], "is a FluxPipeline; this project reads StableDiffusion3Pipeline"),
        (spoil_text, [], "truncated or no safetensors"),
        (spoil_vae, [], "holds only diffusion_pytorch_model.bin, a pickle"),
        (spoil_schedule, [], "sets use_dynamic_shifting, which no Stable Diffusion 3 uses"),
        (lambda base: shutil.rmtree(base / "tokenizer_2"), [], "tokenizer_2"),
        (None, ["--height", "65"], "height must be a multiple of 16"),
        (None, ["--height", "528"], "height must be at most 512, the size of the positional table"),
        (None, ["--max-sequence-length", "513"], "from 1 to 512"),
        (None, ["--skip-layers", "7"], "skip_layers must be blocks of an MMDiT"),
        (None, ["--skip-layers", "1", "--guidance", "1"], "need classifier-free guidance"),
        (None, ["--skip-layers", "1"], "where none of 2 lies: take more steps"),
        (None, ["--skip-scale", "2"], "need --skip-layers"),
        (None, ["--guidance", "1", "--rescale", "0.5"], "need guidance, which is 1"),
        (None, ["--guidance", "1", "--negative", "the digit 3"], "--negative needs guidance"),
        (None, ["--lora", "x:abc"], "x:abc is neither a file nor PATH:STRENGTH"),
        (None, ["--device", "meta"], "no device meta"),
        (spoil_shift, [], "scheduler_config.json: shift must be > 0, got 0"),
        (spoil_shift_word, [], "scheduler_config.json"),
        (None, ["--image", "nowhere.png"], "there is no picture nowhere.png"),
        (None, ["--image", "TEXT"], "is no picture that can be read"),
        (None, ["--mask", "MASK"], "--mask needs an --image"),
        (None, ["--strength", "0.5"], "--strength needs an --image"),
        (None, ["--image", "PICTURE", "--strength", "1.5"], "strength must be above 0"),
        (None, ["--image", "PICTURE", "--mask", "SMALL"], "must have the same shape"),
        (None, ["--lora", "nowhere"], "nowhere is not a LoRA"),
        (None, ["--dtype", "float8"], "invalid choice"),
        (None, ["--text-device", "abacus"], "no device abacus"),
        (None, ["--parts", "BASE"], "--parts is for single files"),
        (None, ["--model", "FLUX"], "holds no SD3 transformer; it seems to be Flux"),
        (None, ["--model", "XL"], "1, 2 or XL UNet"),
        (None, ["--model", "HALF"], "truncated or no safetensors"),
        (None, ["--model", "PICKLE"], "is a pickle"),
        (None, ["--model", "ONE"], "give --parts FOLDER"),
    ],
)
def test_bad_input_ends_in_one_line(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture, spoil, flags: list[str], message: str
) -> None:
    base = released / "base"
    if spoil:
        base = tmp_path / "base"
        shutil.copytree(released / "base", base)
        spoil(base)
    (tmp_path / "text.png").write_text("a picture, honestly")
    Image.new("L", (16, 16)).save(tmp_path / "small.png")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}, tmp_path / "xl.safetensors")
    whole = (released / "one.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({}, tmp_path / "sd3.ckpt")
    places = {
        "TEXT": tmp_path / "text.png", "SMALL": tmp_path / "small.png", "FLUX": tmp_path / "flux.safetensors",
        "XL": tmp_path / "xl.safetensors", "HALF": tmp_path / "half.safetensors", "PICKLE": tmp_path / "sd3.ckpt",
        "PICTURE": released / "picture.png", "MASK": released / "mask.png", "ONE": released / "one.safetensors",
        "BASE": base, "RUN": released / "run",
    }  # fmt: skip
    argv = ["--model", str(base), "--prompt", "a seven", *SIZE[-2:], *(str(places.get(f, f)) for f in flags)]
    with pytest.raises(SystemExit) as end:
        sample.main([*argv, "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not list(tmp_path.glob("out/*.png"))


def test_overflow_is_an_error_instead_of_a_black_picture(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for part, name, told in (
        ("vae/diffusion_pytorch_model", "decoder.conv_in.weight", "the VAE overflowed in float16"),
        ("text_encoder_3/model", "shared.weight", "the T5 encoder overflowed in float16"),
        ("transformer/diffusion_pytorch_model", "proj_out.weight", "the network overflowed in float16"),
    ):
        shutil.copytree(released / "base", tmp_path / "base")
        file = tmp_path / "base" / f"{part}.safetensors"
        from storage.weights import open_file

        state = {key: tensor.clone() for key, tensor in open_file(file).items()}
        write_tensors(state | {name: state[name] * 1e7}, file)
        with pytest.raises(SystemExit) as end:
            run(released, tmp_path / "out", "--model", str(tmp_path / "base"), *SIZE, "--dtype", "float16")
        assert end.value.code == 2
        assert told in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*.png"))
        shutil.rmtree(tmp_path / "base")


def test_long_prompts_are_cut_and_it_is_said_once(released: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="longer than the 77 tokens that CLIP") as said:
        sample.main(["--model", str(released / "base"), "--prompt", "a seven " * 60, *SIZE, "--out", str(tmp_path)])
    told = [str(warning.message) for warning in said if "longer than" in str(warning.message)]
    assert [name for name in ("CLIP-L", "CLIP-G", "T5") for line in told if name in line] == ["CLIP-L", "CLIP-G"]


def test_a_missing_positional_table_row_is_never_read(released: Path) -> None:
    """The largest picture that the table holds can be drawn, one patch more cannot."""
    pipe = Pipeline.load(released / "base", LoadOptions())
    assert pipe.latent_size(512, 16) == (64, 2)
    with pytest.raises(ValueError, match="at most 512"):
        pipe.latent_size(528, 16)
    assert checkpoint.load(released / "base").largest == 64
