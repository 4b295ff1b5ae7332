"""Files and folders are whole at every moment, and one process holds a folder."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.files import BusyError, commit_bytes, commit_path, hold, is_ours, previous, replace_folder, stage, sweep

ROOT = Path(__file__).parents[1]


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"from pathlib import Path; from storage.files import *\n{code}"]
    return subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def fill_with(content: str, files: int = 3) -> Callable[[Path], None]:
    def fill(new: Path) -> None:
        for number in range(files):
            (new / f"{number}.txt").write_text(content)

    return fill


def contents(folder: Path) -> set[str]:
    return {file.read_text() for file in folder.iterdir()}


def test_a_held_folder_names_its_holder_to_another_process_and_is_free_after_kill_9(tmp_path: Path) -> None:
    code = "import sys, time\nwith hold(Path(sys.argv[1])):\n    print(1, flush=True)\n    time.sleep(60)"
    process = child(code, tmp_path / "run")
    assert process.stdout
    process.stdout.readline()
    with pytest.raises(BusyError, match=f"in use by process {process.pid} on .*: wait"), hold(tmp_path / "run"):
        pass
    kill(process)
    with hold(tmp_path / "run"), hold(tmp_path / "run"):  # as often as it likes
        pass


def test_a_stage_in_use_stays_and_one_of_a_killed_process_goes(tmp_path: Path) -> None:
    process = child(
        "import sys, time\nwith stage(Path(sys.argv[1])) as s:\n    print(s, flush=True)\n    time.sleep(60)", tmp_path
    )
    assert process.stdout
    left = Path(process.stdout.readline().strip())
    with stage(tmp_path) as mine:
        sweep(tmp_path)
        assert mine.is_dir()
        assert left.is_dir()
        kill(process)
        sweep(tmp_path)
        assert mine.is_dir()
        assert not left.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".config.yaml.0a1b2c3d.part", ".model.safetensors.part"])
def test_temporary_files_of_earlier_versions_go_when_the_folder_is_held(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("half")
    (tmp_path / ".film.part").write_text("of another program")
    assert is_ours(tmp_path / name)
    with hold(tmp_path):
        assert not (tmp_path / name).exists()
    assert (tmp_path / ".film.part").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    commit_bytes(tmp_path / "a", b"old")

    def full(part: Path) -> None:
        part.write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"could not write .*/a: No space left on device$"):
        commit_path(tmp_path / "a", full)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]


def test_replacing_a_folder_leaves_its_neighbours_and_its_links(tmp_path: Path) -> None:
    for name in ("exp.old", "exp.new", "real"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "exp").symlink_to("real")
    replace_folder(tmp_path / "exp", fill_with("new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp", "exp.new", "exp.old", "real"]
    assert (tmp_path / "exp").is_symlink()
    assert contents(tmp_path / "real") == {"new"}
    assert contents(tmp_path / "exp.old") == {"exp.old"}


def test_two_writers_leave_one_whole_folder_that_is_there_at_every_moment(tmp_path: Path) -> None:
    code = """import sys
for i in range(60):
    text = f"{sys.argv[2]}{i}"
    replace_folder(Path(sys.argv[1]), lambda new: [(new / f"{n}.txt").write_text(text) for n in range(5)])"""
    replace_folder(tmp_path / "model", fill_with("first", 5))
    writers = [child(code, tmp_path / "model", name) for name in "ab"]
    while any(writer.poll() is None for writer in writers):
        assert (tmp_path / "model" / "4.txt").exists()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(contents(tmp_path / "model")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_replacement_killed_at_any_system_call_leaves_the_old_folder_or_the_new(
    tmp_path: Path, exchange: bool
) -> None:
    code = f"""import os, sys, signal, storage.files as files
count = 0
def deadly(function):
    def call(*arguments, **more):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)
    return call
for name in ("mkdir", "rename", "replace", "open", "fsync", "unlink", "rmdir"):
    setattr(os, name, deadly(getattr(os, name)))
files._exchange = deadly(files._exchange if {exchange} else lambda *_: False)
replace_folder(Path(sys.argv[1]), lambda new: [(new / f"{{n}}.txt").write_text("new") for n in range(2)])
"""
    seen = set()
    for moment in range(1, 60):
        folder = tmp_path / str(moment) / "model"
        folder.mkdir(parents=True)
        fill_with("old", 2)(folder)
        status = child(code, folder, moment).wait()
        place = folder if folder.exists() else previous(folder)[0]
        assert not exchange or place == folder
        seen |= {*contents(place)}
        assert len(contents(place)) == 1
        assert len(list(place.iterdir())) == 2
        sweep(folder.parent)
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        if status == 0:
            break
    assert status == 0
    assert moment > 10
    assert seen == {"old", "new"}
