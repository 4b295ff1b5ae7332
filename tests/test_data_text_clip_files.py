"""CLIP towers on disk: kept and read back, by transformers too, and refused when damaged."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from towers import CAPTIONS, FOLDER, damage
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from data.text.clip import CLIPText
from data.text.encoder import TextEncoder


def test_index_is_what_diffusers_would_write(text: CLIPText):
    assert isinstance(text, TextEncoder)
    assert text.index() == {
        "text_encoder": ["transformers", type(text.towers[0].encoder).__name__],
        "tokenizer": ["transformers", type(text.towers[0].tokenizer).__name__],
    }


def test_saved_and_loaded_is_the_same(text: CLIPText, tmp_path: Path):
    text.save(tmp_path)
    for new, old in zip(CLIPText(tmp_path).encode(CAPTIONS), text.encode(CAPTIONS), strict=True):
        assert torch.equal(new, old)
    files = {file.relative_to(tmp_path).as_posix(): file for file in tmp_path.rglob("*") if file.is_file()}
    assert set(files) == {file.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("*") if file.is_file()}
    assert all(file.suffix in (".safetensors", ".json", ".txt") for file in files.values())
    modes = {stat.S_IMODE(file.stat().st_mode) for file in files.values()}
    assert len(modes) == 1  # who can read the one can read the others
    name = "text_encoder/model.safetensors"
    ours, theirs = load_file(files[name]), load_file(FOLDER / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_saving_over_the_files_that_are_in_use(tmp_path: Path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    text = CLIPText(tmp_path)
    before = text.encode(CAPTIONS)
    text.save(tmp_path)
    for again in (text, CLIPText(tmp_path)):
        assert torch.equal(again.encode(CAPTIONS).pooled, before.pooled)


def test_transformers_alone_reads_the_folder(text: CLIPText):
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    encoder = CLIPTextModelWithProjection.from_pretrained(FOLDER / "text_encoder")
    ids = tokenizer(["an 8"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(encoder(ids).text_embeds, text.encode(["an 8"]).pooled)


def test_older_tokenizer_files_are_read(text: CLIPText, tmp_path: Path):
    """Released SD3 folders hold `vocab.json` and `merges.txt` instead of `tokenizer.json`."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    file.unlink()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    assert torch.equal(CLIPText(tmp_path).encode(CAPTIONS).pooled, text.encode(CAPTIONS).pooled)


def test_half_precision_files_are_read_as_float32(text: CLIPText, tmp_path: Path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    save_file({name: value.half() for name, value in load(weights.read_bytes()).items()}, weights, {"format": "pt"})
    pooled = CLIPText(tmp_path).encode(["a two"]).pooled
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, text.encode(["a two"]).pooled, rtol=0.02, atol=0.02)


def test_committed_tower_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 2_000_000


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("no folder", FileNotFoundError, "tokenizer_config.json is missing"),
        ("no weights", FileNotFoundError, "no weights at .*model.safetensors"),
        ("no tokenizer", FileNotFoundError, "tokenizer_config.json is missing"),
        ("no vocabulary", FileNotFoundError, "vocab.json is missing"),
        ("truncated", ValueError, "truncated or no safetensors file"),
        ("empty", ValueError, "truncated or no safetensors file"),
        ("pickle", ValueError, "is a pickle, which can run code"),
        ("one weight too few", ValueError, r"1 missing \(text_model.final_layer_norm.bias\)"),
        ("one weight too many", ValueError, r"1 left over \(text_model.extra\)"),
        ("another size", ValueError, r"1 mis-shaped \(text_model.final_layer_norm.bias \(3,\)"),
        ("foreign weights", ValueError, r"do not fit .*53 missing .*, 1 left over \(pos_embed\)"),
        ("broken config", ValueError, "config.json is no JSON"),
        ("foreign config", ValueError, "model_type 't5' instead of 'clip_text_model'"),
        ("broken tokenizer", ValueError, "no readable CLIPTokenizer"),
        ("larger tokenizer", ValueError, "do not fit: 701 entries and 10 tokens a caption, against 700 and 10"),
        ("longer tokenizer", ValueError, "do not fit: 700 entries and 77 tokens a caption, against 700 and 10"),
    ],
)
def test_damaged_folder_is_one_clear_line(tmp_path: Path, fault: str, kind: type[Exception], words: str):
    folder = tmp_path / "text"
    shutil.copytree(FOLDER, folder)
    damage(folder, fault)
    with pytest.raises(kind, match=words) as error:
        CLIPText(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_transformers_prints_nothing(tmp_path: Path):
    """No progress bar, no report of missing weights, no advice on long captions: in a process of its own, since the
    log of transformers keeps the stream that it found at its import."""
    damaged = tmp_path / "text"
    shutil.copytree(FOLDER, damaged)
    damage(damaged, "one weight too few")
    code = f"""
import warnings
from data.text.clip import CLIPText
warnings.simplefilter("ignore")
CLIPText({str(FOLDER)!r}).encode(["please " * 40])
try:
    CLIPText({str(damaged)!r})
except ValueError:
    print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[2], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")
