"""The header of a unit is accepted in the one form in which it is written, and in no other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data.store.units import Unit, header, safetensors


def about(shape: Any, start: Any = 0, end: Any = None, dtype: str = "BF16") -> dict[str, Any]:
    end = 2 * math.prod(shape) if end is None else end
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(folder: Path, head: Any, size: int) -> Path:
    """A file with this header, as JSON or as bytes, and so many bytes of tensors."""
    head = head if isinstance(head, bytes) else json.dumps(head, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    file = folder / "unit.safetensors"
    file.write_bytes(len(head).to_bytes(8, "little") + head + bytes(size))
    return file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with (tmp_path / "unit").open("wb") as file:
        file.writelines(safetensors({"a": [torch.ones(2, 3).bfloat16(), torch.zeros(1, 3).bfloat16()]}))
    assert Unit(tmp_path / "unit").shapes == {"a": (3, 3)}
    two = file_of(tmp_path, {"a": about([1, 4]), "b": about([0, 2], 8, 8)}, 8)
    assert Unit(two).shapes == {"a": (1, 4), "b": (0, 2)}
    assert (tmp_path / "unit").read_bytes().startswith(header({"a": [3, 3]}))


REPEATED = json.dumps({"a": about([1, 4])}, separators=(",", ":"))[:-1]
ODD: dict[str, tuple[Any, int]] = {
    "a boolean length": ({"a": about([True, 4])}, 8),
    "a float length": ({"a": about([1.0, 4])}, 8),
    "negative lengths": ({"a": about([-1, -4])}, 8),
    "no length": ({"a": about([], 0, 2)}, 2),
    "an endless length": (b'{"a":{"dtype":"BF16","shape":[' + b"9" * 9000 + b'],"data_offsets":[0,8]}}', 8),
    "a huge length": ({"a": about([2**80, 2**80])}, 8),
    "no number": (b'{"a":{"dtype":"BF16","shape":[NaN],"data_offsets":[0,8]}}', 8),
    "a text for a shape": ({"a": about("44", 0, 8)}, 8),
    "overlapping offsets": ({"a": about([2, 4]), "b": about([2, 4])}, 16),
    "a gap": ({"a": about([2, 4]), "b": about([2, 4], 32, 48)}, 48),
    "tensors in another order": ({"a": about([2, 4], 16, 32), "b": about([2, 4], 0, 16)}, 32),
    "a float offset": ({"a": about([1, 4], 0, 8.0)}, 8),
    "a boolean offset": ({"a": about([1, 4], False)}, 8),
    "a name twice": (REPEATED.encode() + b"," + REPEATED[1:].encode() + b"}", 8),
    "another type": ({"a": about([1, 4], dtype="F16")}, 8),
    "metadata": ({"__metadata__": {"a": "b"}, "a": about([1, 4])}, 8),
    "another encoding": (json.dumps({"a": about([1, 4])}).encode("utf-16"), 8),
    "deep lists": (b'{"a":' + b"[" * 50_000, 0),
    "deep objects": (b'{"a":' * 50_000, 0),
    "no object": ([1], 0),
    "a number": (b"3", 0),
    "nothing": (b"", 0),
    "more bytes than tensors": ({"a": about([1, 4])}, 9),
    "fewer bytes than tensors": ({"a": about([1, 4])}, 7),
    "two megabytes": ({"a" * 2**21: about([1, 4])}, 8),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_header_is_refused_in_one_line(tmp_path: Path, odd: str) -> None:
    file = file_of(tmp_path, *ODD[odd])
    with pytest.raises(ValueError, match="is damaged or truncated: its header does not describe") as error:
        Unit(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_a_flipped_bit_of_a_header_is_refused_unless_it_is_in_a_name(tmp_path: Path) -> None:
    whole = file_of(tmp_path, {"latents.0": about([2, 4]), "pooled": about([3, 1], 16, 22)}, 22).read_bytes()
    for bit in range(0, 8 * (len(whole) - 22), 5):  # each byte once or twice, all bits alike
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped").write_bytes(content)
        try:
            shapes = Unit(tmp_path / "flipped").shapes
        except ValueError:
            continue
        assert list(shapes.values()) == [(2, 4), (3, 1)]
        assert list(shapes) != ["latents.0", "pooled"]
