"""SD3's three encoders on disk: folders and single files, eight bits, and damage."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from encoders import PREFIXES, PROMPTS, SIZES, absent, assert_same, copied, original, read, theirs
from safetensors.torch import save_file
from transformers import T5EncoderModel

from data.text.sd3 import SD3Text


@pytest.fixture(scope="module")
def pipe(released: tuple[StableDiffusion3Pipeline, Path]) -> StableDiffusion3Pipeline:
    return released[0]


@pytest.fixture
def folder(released: tuple[StableDiffusion3Pipeline, Path], tmp_path: Path) -> Path:
    """A copy that may be damaged, of everything about text."""
    return copied(released[1], tmp_path)


@pytest.fixture(scope="module")
def single(pipe: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoders in the original's single file, where CLIP-L has no projection and T5's table stands twice."""
    file = tmp_path_factory.mktemp("single") / "sd3.safetensors"
    save_file(original(pipe), file)
    return file


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
    del wanted["model.diffusion_model.pos_embed"]
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
        ("only a pickle", ValueError, "holds only pytorch_model.bin, a pickle"),
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
