"""SD3's three encoders against diffusers' pipeline: what they give, where they come from, what is refused."""

import gc
import json
import os
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load, save_file
from torch import Tensor
from transformers import T5EncoderModel

from data.text import sd3 as sd3_text
from data.text.encoder import Text
from data.text.sd3 import SD3Text
from data.text.tower import Tower

PROMPTS = ["a handwritten seven", "", "a clean digit 3, please!"]
SIZES = {"tokens_dim": tiny.TOKENS, "pooled_dim": tiny.POOLED}
PREFIXES = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
L, G, PADDING = slice(0, 64), slice(64, 192), slice(192, None)  # columns of the first 77 tokens


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableDiffusion3Pipeline, Path]:
    folder = tmp_path_factory.mktemp("released")
    return tiny.pipeline("sd35_large", folder), folder


@pytest.fixture(scope="module")
def pipe(released: tuple[StableDiffusion3Pipeline, Path]) -> StableDiffusion3Pipeline:
    return released[0]


@pytest.fixture
def folder(released: tuple[StableDiffusion3Pipeline, Path], tmp_path: Path) -> Path:
    """A copy that may be damaged, of everything about text."""
    shutil.copytree(released[1], tmp_path / "model", ignore=shutil.ignore_patterns("vae", "transformer", "scheduler"))
    return tmp_path / "model"


@pytest.fixture(scope="module")
def single(pipe: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoders in the original's single file, where CLIP-L has no projection and T5's table stands twice."""
    file = tmp_path_factory.mktemp("single") / "sd3.safetensors"
    save_file(original(pipe), file)
    return file


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


@pytest.mark.parametrize("length", [77, 256, 512])
def test_diffusers_gives_the_same(pipe: StableDiffusion3Pipeline, folder: Path, length: int):
    text = SD3Text(folder, **SIZES, max_sequence_length=length)
    ours = text.encode(PROMPTS)
    assert ours.tokens.shape == (3, 77 + length, text.tokens_dim)
    assert ours.pooled.shape == (3, text.pooled_dim)
    assert_same(ours, theirs(pipe, PROMPTS, length))
    with torch.no_grad():
        tokens, negative, pooled, negative_pooled = pipe.encode_prompt(
            PROMPTS[0], None, None, negative_prompt="", max_sequence_length=length
        )
    for caption, row in ((PROMPTS[0], (tokens, pooled)), ("", (negative, negative_pooled))):
        for one, other in zip(text.encode([caption]), row, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # alone instead of in a batch


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_diffusers_gives_the_same_in_half_precision(folder: Path, released: tuple, dtype: str):
    pipe = StableDiffusion3Pipeline.from_pretrained(released[1], torch_dtype=getattr(torch, dtype))
    kept = {str(value.dtype) for name, value in pipe.text_encoder_3.named_parameters() if "wo" in name}
    assert kept == {"torch.float32" if dtype == "float16" else "torch.bfloat16"}
    assert_same(SD3Text(folder, **SIZES, dtype=dtype).encode(PROMPTS), theirs(pipe, PROMPTS))


def test_a_caption_does_not_depend_on_its_batch(folder: Path):
    many = [f"the digit {i}" for i in range(40)] + ["", "the digit 3"]
    text = SD3Text(folder, **SIZES, max_sequence_length=16)
    together = text.encode(many)
    assert torch.equal(together.tokens[3], together.tokens[-1])
    for i in (0, 31, 32, 40):
        alone = SD3Text(folder, **SIZES, max_sequence_length=16).encode([many[i]])
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.pooled[0], together.pooled[i], rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("how", ["index", "folder"])
@pytest.mark.parametrize(
    "names",
    [
        ["text_encoder"],
        ["text_encoder_2"],
        ["text_encoder_3"],
        ["text_encoder", "text_encoder_2"],
        ["text_encoder", "text_encoder_3"],
    ],
    ids="+".join,
)
def test_an_absent_encoder_leaves_zeros(folder: Path, names: list[str], how: str):
    tokens, pooled = (part.clone() for part in SD3Text(folder, **SIZES).encode(PROMPTS))
    assert (tokens[:, :77, PADDING] == 0).all()
    for rows, columns in ((slice(77), L), (slice(77), G), (slice(77, None), slice(None))):
        assert (tokens[:, rows, columns] != 0).any(dim=-1).all()
    absent(folder, names, how)
    for name in names:
        match name:
            case "text_encoder":
                tokens[:, :77, L], pooled[:, :64] = 0, 0
            case "text_encoder_2":
                tokens[:, :77, G], pooled[:, 64:] = 0, 0
            case "text_encoder_3":
                tokens[:, 77:] = 0
    text = SD3Text(folder, **SIZES)
    assert_same(text.encode(PROMPTS), Text(tokens, pooled))
    assert [name for name in PREFIXES if text.index()[name] == [None, None]] == names
    assert {name for name in PREFIXES if any(key.startswith(PREFIXES[name]) for key in text.original_state())} == (
        PREFIXES.keys() - names
    )


def test_without_t5_it_is_as_diffusers_has_it(tmp_path: Path):
    pipe = tiny.pipeline("sd35_large", tmp_path, t5=False)
    text = SD3Text(tmp_path, **SIZES)
    assert_same(text.encode(PROMPTS), theirs(pipe, PROMPTS))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert text.index() == {name: entry for name, entry in index.items() if name in text.index()}


def test_index_is_what_diffusers_writes(folder: Path):
    index = json.loads((folder / "model_index.json").read_text())
    ours = SD3Text(folder, **SIZES).index()
    assert len(ours) == 6
    assert ours == {name: entry for name, entry in index.items() if name in ours}


@pytest.mark.parametrize("configs", [True, False])
def test_single_file(pipe: StableDiffusion3Pipeline, folder: Path, single: Path, configs: bool):
    """The tokenizers come from the folder, and the settings, if they are there."""
    for name in PREFIXES:
        (folder / name / "model.safetensors").unlink()
        if not configs:
            shutil.rmtree(folder / name)
    text = SD3Text(folder, **SIZES, single_file=single)
    assert_same(text.encode(PROMPTS), theirs(pipe, PROMPTS))


def test_single_file_takes_what_it_lacks_from_the_folder(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path):
    clips = {name: value for name, value in original(pipe).items() if "t5xxl" not in name}
    changed = {name: value + 0.1 if name.endswith("fc1.bias") else value for name, value in clips.items()}
    save_file(changed, tmp_path / "clips.safetensors")
    ours = SD3Text(folder, **SIZES, single_file=tmp_path / "clips.safetensors").encode(PROMPTS)
    wanted = theirs(pipe, PROMPTS)
    assert torch.equal(ours.tokens[:, 77:], wanted.tokens[:, 77:])
    assert not torch.allclose(ours.tokens[:, :77], wanted.tokens[:, :77], atol=1e-2)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_single_file_with_the_table_under_one_name(
    pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path, name: str
):
    """And with the positions' numbers, which old CLIP files hold."""
    tensors = original(pipe)
    del tensors[PREFIXES["text_encoder_3"] + name]
    tensors[PREFIXES["text_encoder"] + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "one.safetensors")
    for part in PREFIXES:
        shutil.rmtree(folder / part)
    assert_same(
        SD3Text(folder, **SIZES, single_file=tmp_path / "one.safetensors").encode(PROMPTS), theirs(pipe, PROMPTS)
    )


def test_single_file_with_t5_in_eight_bits(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path):
    tensors = original(pipe)
    narrow = {
        name: value.to(torch.float8_e4m3fn) if "t5xxl" in name else value.half() for name, value in tensors.items()
    }
    save_file(narrow, tmp_path / "narrow.safetensors")
    save_file({name: value.float() for name, value in narrow.items()}, tmp_path / "wide.safetensors")
    narrow_text, wide_text = (
        SD3Text(folder, **SIZES, single_file=tmp_path / f"{name}.safetensors") for name in ("narrow", "wide")
    )
    assert_same(narrow_text.encode(PROMPTS), wide_text.encode(PROMPTS))


def test_original_state_is_the_single_file(pipe: StableDiffusion3Pipeline, folder: Path, single: Path, tmp_path: Path):
    wanted = original(pipe)
    del wanted["model.diffusion_model.pos_embed"], wanted[PREFIXES["text_encoder_3"] + "encoder.embed_tokens.weight"]
    for text in (SD3Text(folder, **SIZES), SD3Text(folder, **SIZES, single_file=single)):
        state = text.original_state()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    file = folder / "text_encoder" / "model.safetensors"
    save_file(read(file) | {"text_projection.weight": 2 * torch.eye(64)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="cannot hold CLIP-L's projection"):
        SD3Text(folder, **SIZES).original_state()
    odd = read(single) | {PREFIXES["text_encoder"] + "text_projection.weight": 2 * torch.eye(64)}
    save_file(odd, tmp_path / "odd.safetensors")  # read as the identity, as every reader of this format does
    plain = SD3Text(folder, **SIZES, single_file=single).encode([""])
    assert_same(SD3Text(folder, **SIZES, single_file=tmp_path / "odd.safetensors").encode([""]), plain)


def test_an_encoder_in_eight_bits_is_read_and_given_on_in_sixteen(folder: Path, single: Path, tmp_path: Path):
    t5 = PREFIXES["text_encoder_3"]
    tensors = {k: v.to(torch.float8_e4m3fn) if k.startswith(t5) else v for k, v in read(single).items()}
    save_file(tensors, tmp_path / "eight.safetensors")
    shutil.rmtree(folder / "text_encoder_3")
    text = SD3Text(folder, **SIZES, single_file=tmp_path / "eight.safetensors")
    text.save(tmp_path / "out")
    theirs = T5EncoderModel.from_pretrained(tmp_path / "out/text_encoder_3")
    assert theirs.dtype == torch.bfloat16
    wanted = tensors[t5 + "shared.weight"].to(torch.bfloat16)
    assert torch.equal(theirs.state_dict()["shared.weight"], wanted)
    assert text.encode(PROMPTS).tokens.isfinite().all()


def shard(folder: Path) -> None:
    """T5 in two files, as the released ones are."""
    tensors = read(folder / "model.safetensors")
    table = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(table.values()):
        save_file(
            {name: value for name, value in tensors.items() if table[name] == file}, folder / file, {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("layout", ["whole", "sharded", "fp16", "single file"])
def test_saved_it_is_the_same_here_and_for_diffusers(
    released: tuple, folder: Path, single: Path, tmp_path: Path, layout: str
):
    match layout:
        case "sharded":
            shard(folder / "text_encoder_3")
        case "fp16":
            for name in PREFIXES:
                file = folder / name / "model.safetensors"
                save_file({key: value.half() for key, value in read(file).items()}, file, {"format": "pt"})
                file.rename(folder / name / "model.fp16.safetensors")
        case "single file":
            for name in PREFIXES:
                shutil.rmtree(folder / name)
    text = SD3Text(folder, **SIZES, single_file=single if layout == "single file" else None)
    wanted = text.encode(PROMPTS)
    new = tmp_path / "new"
    text.save(new)
    assert_same(SD3Text(new, **SIZES).encode(PROMPTS), wanted)
    files = [file for file in new.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    old = {file.stat().st_ino for file in folder.rglob("*.safetensors")}
    for file in files:
        linked = file.suffix == ".safetensors" and layout != "single file"
        assert (file.stat().st_ino in old) == linked
    for name in ("vae", "transformer", "scheduler", "model_index.json"):
        (new / name).symlink_to(released[1] / name)
    for one, other in zip(theirs(StableDiffusion3Pipeline.from_pretrained(new), PROMPTS), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_saving_over_itself_and_without_links(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = SD3Text(folder, **SIZES)
    wanted = text.encode(PROMPTS)
    text.save(folder)
    assert_same(SD3Text(folder, **SIZES).encode(PROMPTS), wanted)

    def refuse(*_: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    text.save(tmp_path / "new")
    assert (tmp_path / "new/text_encoder/model.safetensors").stat().st_nlink == 1
    shutil.rmtree(folder)
    assert_same(SD3Text(tmp_path / "new", **SIZES).encode(PROMPTS), wanted)


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


def test_memory_keeps_the_latest(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sd3_text, "KEPT", 2)
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


def test_one_encoder_at_a_time_is_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: list[weakref.ref] = []
    load = Tower.load

    def watched(self: Tower, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
        assert not any(encoder() for encoder in loaded)
        encoder = load(self, dtype, device)
        assert not encoder.training
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        loaded.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(Tower, "load", watched)
    gc.disable()
    try:
        text = SD3Text(folder, **SIZES)
        assert not loaded
        text.encode(PROMPTS)
        assert len(loaded) == 3
        assert not any(encoder() for encoder in loaded)
    finally:
        gc.enable()


def test_what_was_encoded_while_sampling_does_for_training(folder: Path, tmp_path: Path):
    text = SD3Text(folder, **SIZES, max_sequence_length=32, cache=tmp_path / "cache")
    again = SD3Text(folder, **SIZES, max_sequence_length=32, cache=tmp_path / "cache")
    for encoder in (text, again):
        with torch.inference_mode():
            encoder.encode(PROMPTS)
        tokens, _ = encoder.encode(PROMPTS)
        scale = torch.ones((), requires_grad=True)
        (scale * tokens).sum().backward()
        assert scale.grad is not None


def test_the_random_state_stays(folder: Path):
    before = torch.get_rng_state()
    SD3Text(folder, **SIZES).encode(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_changes_nothing(folder: Path):
    with torch.autocast("cpu", torch.bfloat16):
        ours = SD3Text(folder, **SIZES).encode(PROMPTS)
    assert_same(ours, SD3Text(folder, **SIZES).encode(PROMPTS))


def test_overflow_is_told(folder: Path):
    file = folder / "text_encoder_3" / "model.safetensors"
    tensors = read(file)
    save_file(tensors | {"shared.weight": tensors["shared.weight"] * 1e5}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"^the T5 encoder overflowed in float16: take bfloat16 or float32$"):
        SD3Text(folder, **SIZES, dtype="float16").encode(PROMPTS)
    for dtype in ("bfloat16", "float32"):
        assert SD3Text(folder, **SIZES, dtype=dtype).encode(PROMPTS).tokens.isfinite().all()
    file = folder / "text_encoder" / "model.safetensors"
    tensors = read(file)
    save_file(tensors | {"text_projection.weight": torch.full((64, 64), torch.nan)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"^the CLIP-L encoder overflowed in float32: its weights are damaged$"):
        SD3Text(folder, **SIZES).encode(PROMPTS)


def test_long_captions_are_cut_with_a_warning_each(pipe: StableDiffusion3Pipeline, folder: Path):
    text = SD3Text(folder, **SIZES, max_sequence_length=8)
    long = "a handwritten seven " * 40
    with pytest.warns(UserWarning, match="captions are longer") as caught:
        ours = text.encode([long, "7"])
    told = [str(warning.message) for warning in caught]
    assert [line.split(" start")[0] for line in told] == [
        f"1 of 2 captions are longer than the {length} tokens that {title} reads,"
        for length, title in ((77, "CLIP-L"), (77, "CLIP-G"), (8, "T5"))
    ]
    assert {warning.filename for warning in caught} == {__file__}
    assert_same(ours, theirs(pipe, [long, "7"], 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode(["7", long])  # told already


def test_no_captions_and_a_bare_string_are_refused(folder: Path):
    text = SD3Text(folder, **SIZES)
    with pytest.raises(ValueError, match="no captions"):
        text.encode([])
    with pytest.raises(TypeError, match="not the single string 'seven'"):
        text.encode("seven")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_sequence_length": 0}, "max_sequence_length must be from 1 to 512, got 0"),
        ({"max_sequence_length": 513}, "max_sequence_length must be from 1 to 512, got 513"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, got float64"),
        ({"device": "abacus"}, "abacus"),
        ({"tokens_dim": 4096}, "T5 in .* is 224 wide, but tokens_dim is 4096"),
        ({"pooled_dim": 2048}, "CLIP-L 64 and CLIP-G 128, do not fit pooled_dim 2048"),
        ({"pooled_dim": 100}, "CLIP-L 64 and CLIP-G 128, do not fit pooled_dim 100"),
        ({"cache": __file__}, "the cache .* is no folder"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_clear_line(folder: Path, options: dict, words: str):
    with pytest.raises(ValueError, match=words) as error:
        SD3Text(folder, **SIZES | options)
    assert "\n" not in str(error.value)


def test_too_wide_clips_are_refused(folder: Path):
    absent(folder, ["text_encoder_3"], "index")
    with pytest.raises(ValueError, match="are 192 wide, which is more than tokens_dim 100"):
        SD3Text(folder, tokens_dim=100, pooled_dim=tiny.POOLED)


def damage(folder: Path, single: Path, fault: str) -> None:
    encoder, tokenizer = folder / "text_encoder_3", folder / "tokenizer_3"
    weights = encoder / "model.safetensors"
    match fault:
        case "no folder":
            shutil.rmtree(folder)
        case "no encoders":
            absent(folder, [*PREFIXES], "index")
        case "named, not there":
            shutil.rmtree(encoder)
        case "no tokenizer":
            shutil.rmtree(tokenizer)
        case "no vocabulary":
            (tokenizer / "tokenizer.json").unlink()
        case "broken tokenizer":
            (tokenizer / "tokenizer.json").write_text("{")
        case "larger tokenizer":
            edit(
                tokenizer / "tokenizer.json",
                lambda all: all["model"]["vocab"].extend([[f"▁{i}", -9] for i in range(256)]),
            )
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "pickle":
            torch.save(read(weights), weights)
        case "only a pickle":
            torch.save(read(weights), encoder / "pytorch_model.bin")
            weights.unlink()
        case "no weights":
            weights.unlink()
        case "too few":
            tensors = read(weights)
            del tensors["encoder.final_layer_norm.weight"]
            save_file(tensors, weights)
        case "another size":
            save_file(read(weights) | {"encoder.final_layer_norm.weight": torch.zeros(3)}, weights)
        case "too many":
            save_file(read(weights) | {"extra": torch.zeros(3)}, weights)
        case "a shard too few":
            shard(encoder)
            (encoder / "model-00002-of-00002.safetensors").unlink()
        case "broken index":
            (folder / "model_index.json").write_text("{")
        case "broken settings":
            (encoder / "config.json").write_text("{")
        case "foreign settings":
            shutil.copy(folder / "text_encoder" / "config.json", encoder)
        case "senseless settings":
            edit(folder / "text_encoder" / "config.json", lambda all: all.update(num_attention_heads=0))
        case "no single file":
            single.unlink()
        case "truncated single file":
            single.write_bytes(single.read_bytes()[:-1000])
        case "single file without a projection":
            tensors = read(single)
            del tensors[PREFIXES["text_encoder_2"] + "text_projection.weight"]
            save_file(tensors, single)
        case "single file with a flat table":
            flat = {name: value[0] if "relative_attention" in name else value for name, value in read(single).items()}
            save_file(flat, single)
            shutil.rmtree(encoder)
        case "single file without a table":
            tensors = {name: value for name, value in read(single).items() if "relative_attention" not in name}
            save_file(tensors, single)
            shutil.rmtree(encoder)


def edit(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("no folder", FileNotFoundError, "there is no folder"),
        ("no encoders", ValueError, "there is no text encoder in"),
        ("named, not there", FileNotFoundError, "there is no .*text_encoder_3/config.json"),
        ("no tokenizer", FileNotFoundError, "tokenizer_3/tokenizer_config.json is missing"),
        ("no vocabulary", FileNotFoundError, "tokenizer_3/spiece.model is missing"),
        ("broken tokenizer", ValueError, "tokenizer_3 holds no readable T5Tokenizer"),
        ("larger tokenizer", ValueError, "do not fit: .* entries and 256 tokens a caption, against 256 and 256"),
        ("truncated", ValueError, "is truncated or no safetensors file"),
        ("pickle", ValueError, "is a pickle, which can run code"),
        ("only a pickle", ValueError, "holds only a pickle"),
        ("no weights", FileNotFoundError, "no weights at .*text_encoder_3/model.safetensors"),
        ("too few", ValueError, r"do not fit T5EncoderModel: 1 missing \(encoder.final_layer_norm.weight\)"),
        ("another size", ValueError, r"1 mis-shaped \(encoder.final_layer_norm.weight \(3,\) instead of \(224,\)\)"),
        ("too many", ValueError, r"1 left over \(extra\)"),
        ("a shard too few", FileNotFoundError, "model-00002-of-00002.safetensors"),
        ("broken index", ValueError, "model_index.json is no JSON"),
        ("broken settings", ValueError, "config.json is no JSON"),
        (
            "foreign settings",
            ValueError,
            "no T5EncoderModel: they have the model_type 'clip_text_model' instead of 't5'",
        ),
        ("senseless settings", ValueError, "text_encoder describe no CLIPTextModelWithProjection"),
        ("no single file", FileNotFoundError, "sd3.safetensors"),
        ("truncated single file", ValueError, "is truncated or no safetensors file"),
        ("single file without a projection", ValueError, r"1 missing \(text_projection.weight\)"),
        ("single file with a flat table", ValueError, "sd3.safetensors holds no T5: not enough values"),
        ("single file without a table", ValueError, "lacks text_encoders.t5xxl.*relative_attention_bias.weight"),
    ],
)
def test_damage_is_one_clear_line(
    folder: Path, single: Path, tmp_path: Path, fault: str, kind: type[Exception], words: str
):
    copy = shutil.copy(single, tmp_path)
    damage(folder, Path(copy), fault)
    with pytest.raises(kind, match=words) as error:
        SD3Text(folder, **SIZES, single_file=copy if "single file" in fault else None)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_t5_reads_alone(pipe: StableDiffusion3Pipeline, folder: Path):
    """T5's part is its final state, of every position: nothing is masked."""
    ids = pipe.tokenizer_3(PROMPTS, padding="max_length", max_length=32, return_tensors="pt").input_ids
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_3").eval()
    with torch.no_grad():
        wanted = encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    ours = SD3Text(folder, **SIZES, max_sequence_length=32).encode(PROMPTS).tokens[:, 77:]
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
