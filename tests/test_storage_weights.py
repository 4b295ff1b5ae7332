"""Weights on disk: files of other kinds, variants of a folder, and wrappers before the names."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from storage.weights import HEADER_LIMIT, open_file, open_folder

TENSORS = {"a.weight": torch.arange(3.0), "b.bias": torch.ones(2)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "is a GGUF file, .* get the model as safetensors"),
        (LFS, "is a pointer of Git LFS .* run `git lfs pull`"),
        (b"\n<!DOCTYPE html>\n<html lang=en>", "is a web page, .* download the file itself"),
        (b"\xef\xbb\xbf<html><head>", "is a web page"),
        (b'<?xml version="1.0"?><Error>AccessDenied', "is a web page"),
        (gzip.compress(b"weights" * 9, mtime=0), "is compressed by gzip: unpack it"),
        (pickle.dumps({"a": 1}), "is a pickle, which can run code"),
        (b"PK\x03\x04" + bytes(100), "is a pickle"),
        (b"", "is truncated or no safetensors file"),
        (b"\x00" * 100, "is truncated or no safetensors file"),
    ],
)
def test_the_first_bytes_tell_what_a_file_is(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    for act in (lambda: open_file(file), lambda: open_folder(tmp_path, "model")):
        with pytest.raises(ValueError, match=message) as caught:
            act()
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(LFS, "a pointer of Git LFS"), (b"weights", "a pickle")])
def test_a_folder_with_other_files_alone_says_what_they_are(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"holds only model.bin, {message}"):
        open_folder(tmp_path, "model")


def test_a_header_is_limited_before_it_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for length, refused in ((HEADER_LIMIT, False), (HEADER_LIMIT + 8, True)):
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
        if refused:
            with pytest.raises(ValueError, match="its header would have 33,554,440 bytes"):
                open_file(tmp_path / "a.safetensors")
        else:
            assert open_file(tmp_path / "a.safetensors")["a"].tolist() == [0.0]


def whole(folder: Path, variant: str) -> None:
    save_file(TENSORS, folder / f"model{variant}.safetensors")


def sharded(folder: Path, variant: str) -> None:
    table = {name: f"model{variant}-0000{i}-of-00002.safetensors" for i, name in enumerate(TENSORS, 1)}
    for name, shard in table.items():
        save_file({name: TENSORS[name]}, folder / shard)
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps({"weight_map": table}))


@pytest.mark.parametrize("layout", [whole, sharded])
@pytest.mark.parametrize("variant", ["", ".fp16", ".bf16", ".non_ema"])
def test_any_variant_is_read_if_it_is_alone(layout: Callable, variant: str, tmp_path: Path) -> None:
    layout(tmp_path, variant)
    found = open_folder(tmp_path, "model")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("variants", "best"), [(["", ".fp16", ".bf16", ".x"], ""), ([".bf16", ".fp16", ".x"], ".fp16"), ([".a", ".b"], "")]
)
def test_of_several_variants_the_plain_one_is_best(variants: list[str], best: str, tmp_path: Path) -> None:
    for variant in variants:
        whole(tmp_path, variant)
    if variants == [".a", ".b"]:
        with pytest.raises(ValueError, match=r"several variants of model, \.a, \.b: leave one"):
            open_folder(tmp_path, "model")
    else:
        assert open_folder(tmp_path, "model").source.name == f"model{best}.safetensors"


@pytest.mark.parametrize(
    "wrapper", ["module.", "ema.", "_orig_mod.", "diffusion_model.", "net.", "module._orig_mod.", "_orig_mod.net.ema."]
)
@pytest.mark.parametrize("shards", [False, True])
def test_a_wrapper_of_all_names_is_taken_off(wrapper: str, shards: bool, tmp_path: Path) -> None:
    tensors = {wrapper + name: tensor for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "one.safetensors")
    if shards:
        table = dict.fromkeys(tensors, "one.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    found = open_folder(tmp_path, "model") if shards else open_file(tmp_path / "one.safetensors")
    assert found.keys() == TENSORS.keys()
    assert torch.equal(found["a.weight"], TENSORS["a.weight"])


def test_a_prefix_of_some_names_is_kept(tmp_path: Path) -> None:
    save_file({"net.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "one.safetensors")
    assert open_file(tmp_path / "one.safetensors").keys() == {"net.a", "b"}
