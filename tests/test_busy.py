"""Two commands that write one store or one study at once: the second ends in one line that names the first."""

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from encoded import config_in
from store_files import contents

import compare
import encode
import sample
from data.shapes import Shapes
from data.store.encoding import StoreEncoder
from pipeline.pairs import PairMaker
from studies.recipes import Recipes

ROOT = Path(__file__).parents[1]


class Command:
    """A command that writes a folder.

    Args:
        main: the command.
        argv: its arguments.
        folder: what it writes.
        work: class and method of what it does while it holds the folder.
    """

    def __init__(self, main: Callable[[list[str]], None], argv: list[object], folder: Path, *work: Any) -> None:
        self.main, self.argv, self.folder, self.work = main, [*map(str, argv)], folder, work

    def hang(self) -> None:
        """Runs the command, whose work has no end."""
        setattr(*self.work, lambda *_: time.sleep(1000))
        self.main(self.argv)


@pytest.fixture(params=["encode", "pairs", "compare"])
def command(request: pytest.FixtureRequest, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(Shapes, "UNIT", 20)  # two shards
    out = tmp_path / "store"
    if request.param == "encode":
        return Command(encode.main, ["--config", config_in(tmp_path)], out, StoreEncoder, "_encode")
    if request.param == "pairs":
        (tmp_path / "prompts.txt").write_text("zero\n")
        argv = ["pairs", "--model", model, "--num", 4, "--prompts", tmp_path / "prompts.txt", "--out", out]
        return Command(sample.main, argv, out, PairMaker, "block")
    return Command(
        compare.main, [ROOT / "configs/studies/digits.yaml", "--out", out, "--docs", tmp_path], out, Recipes, "run"
    )


@pytest.fixture
def first(command: Command) -> Iterator[multiprocessing.Process]:
    """A process that works, until it is killed."""
    process: Any = multiprocessing.get_context("fork").Process(target=command.hang, daemon=True)
    process.start()
    while not any(lock.read_bytes().endswith(b"\n") for lock in command.folder.glob(".lock*")):
        assert process.is_alive()
        time.sleep(0.001)
    yield process
    process.kill()
    process.join()


def test_the_second_ends_in_one_line_and_goes_on_when_the_first_was_killed(
    command: Command, first: multiprocessing.Process, capsys: pytest.CaptureFixture
) -> None:
    before = contents(command.folder)
    with pytest.raises(SystemExit) as end:
        command.main(command.argv)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    holder = f"process {first.pid} on {socket.gethostname()}"
    assert end.value.code == 1
    assert line == f"error: {command.folder} is in use by {holder}: wait until that ends, or stop it"
    assert contents(command.folder) == before
    first.kill()
    first.join()
    if command.main is not compare.main:
        command.main(command.argv)
        assert (command.folder / "report.json").is_file()
        assert not list(command.folder.glob(".lock*"))


@pytest.mark.parametrize("command", ["encode"], indirect=True)
def test_another_rank_writes_its_own_shards_meanwhile(
    command: Command, first: multiprocessing.Process, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    command.main(command.argv)
    assert "rank 1 is done" in capsys.readouterr().out
    assert [file.stem for file in command.folder.glob("units/*.parquet")] == ["000001-0000"]
    assert first.is_alive()
