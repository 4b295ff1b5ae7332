"""Prompts from files: one a line, whatever else the line holds."""

import os
import threading
from pathlib import Path

import pytest

from data.prompts import read_prompts


def test_only_lf_and_crlf_end_a_prompt_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    told = "one\u2028still\x85one\x0band\x0cone"
    (tmp_path / "a.txt").write_bytes(f"\ufeff{told}\r\n\n  two \n".encode())
    assert read_prompts(["zero"], tmp_path / "a.txt") == ["zero", told, "two"]


def test_prompts_come_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("one\ntwo\n",), daemon=True)
    writer.start()
    assert read_prompts([], tmp_path / "pipe") == ["one", "two"]
    writer.join()


def test_a_folder_and_a_missing_file_are_no_prompts(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="there is no prompt file"):
            read_prompts([], place)
