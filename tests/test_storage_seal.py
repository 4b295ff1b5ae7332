"""A file with a seal is found damaged whatever bit of it is flipped; one without a seal is not checked."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from storage.seal import BLANK, check_seal, seal
from storage.weights import open_file, write_tensors

TENSORS = {"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_tensors(TENSORS, tmp_path / "sealed")
    return tmp_path / "sealed"


def test_weights_have_a_seal_and_are_the_same_bytes_each_time(file: Path) -> None:
    check_seal(file)
    assert file.read_bytes()[8:].startswith(b'{"__metadata__":{"format":"pt","seal":"sealed by xxh3 ')
    assert BLANK.encode() not in file.read_bytes()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(file).items())
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
    for number in range(8):  # safetensors' own order of the metadata is random
        write_tensors(TENSORS, file.with_name(str(number)))
        assert file.with_name(str(number)).read_bytes() == file.read_bytes()


def test_every_flipped_bit_is_found_or_is_in_the_words_of_the_seal(file: Path) -> None:
    whole = file.read_bytes()
    words = whole.index(b"sealed by xxh3 ")
    for bit in range(0, 8 * len(whole), 3):  # every byte, all bits alike
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        if words <= bit // 8 < words + 15:
            check_seal(file)  # no seal any more, but all tensors as they were, unless the header cannot be read
            with suppress(ValueError):
                assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in open_file(file).items())
        else:
            with pytest.raises(ValueError, match=r"sealed is damaged: it does not have the hash in its seal$"):
                check_seal(file)


@pytest.mark.parametrize("place", ["start", "end"])
def test_a_seal_is_found_in_the_metadata_at_either_end(tmp_path: Path, place: str) -> None:
    file, filler = tmp_path / "file", bytes(10_000)
    file.write_bytes(b"head" + BLANK.encode() + filler if place == "start" else filler + BLANK.encode() + b"tail")
    size = file.stat().st_size
    seal(file)
    check_seal(file)
    assert file.stat().st_size == size
    file.write_bytes(file.read_bytes().replace(b"\0\0", b"\0\1", 1))
    with pytest.raises(ValueError, match="is damaged"):
        check_seal(file)


def test_a_file_without_a_seal_passes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "plain", {"format": "pt"})
    before = (tmp_path / "plain").read_bytes()
    seal(tmp_path / "plain")
    check_seal(tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == before
    (tmp_path / "empty").touch()
    check_seal(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        check_seal(tmp_path / "missing")
