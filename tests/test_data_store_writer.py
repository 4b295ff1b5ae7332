"""The latent store as it is written: whole after any kill, the same by any number of processes, and made again."""

import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from store_files import FIRST, HERE, NULL, PLAN, SIDECAR, TOKENS, UNIT, contents, encode, refused, sample, written

from data.store import writer as writing
from data.store.reader import Store, StoreError, Writer


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was written without a break; not to be changed."""
    return written(tmp_path_factory.mktemp("straight"))


@pytest.fixture
def folder(straight: Path, tmp_path: Path) -> Path:  # one to damage
    return shutil.copytree(straight, tmp_path / "store")


def forked(target: Callable[..., Any], *args: Any) -> Any:
    """Starts a real process that has everything imported."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args, daemon=True)
    process.start()
    return process


def test_a_writer_killed_at_any_sync_leaves_no_trace(straight: Path, tmp_path: Path) -> None:
    """Each process gets one sync further than the one before, until there is something new to go on from."""
    folder, stage, moment, kills = tmp_path / "store", 0, 0, 0

    def killed() -> None:
        sync, left = os.fsync, iter(range(moment))

        def fsync(descriptor: int) -> None:  # now a file is whole but has not its name yet, or just has got it
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)

        os.fsync = fsync
        encode(folder)

    while (process := forked(killed)).join() or process.exitcode:
        assert process.exitcode == -signal.SIGKILL
        if (folder / "report.json").exists():
            assert Store(folder).verify(progress=False) == []
        else:
            refused("not finished: run encode.py again|there is no store at", Store, folder)
        found = sum(name.endswith((".json", ".parquet", "null.safetensors")) for name in contents(folder))
        stage, moment, kills = found, moment + 1 if found == stage else 0, kills + 1
        assert moment < 20
    assert kills >= 2 * len(contents(folder))  # before and after each file got its name
    assert contents(folder) == contents(straight)


def test_two_processes_make_the_same_store(straight: Path, tmp_path: Path) -> None:
    processes = [forked(encode, tmp_path / "store", rank, 2) for rank in range(2)]
    assert [process.join() or process.exitcode for process in processes] == [0, 0]
    assert contents(tmp_path / "store") == contents(straight)


def test_two_processes_on_one_shard_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = f"another process writes {tmp_path}"
    late, early = (Writer(tmp_path, PLAN, NULL) for _ in range(2))
    assert late.position(0) == early.position(0) == (0, 0, False)
    early.write(0, [sample(0)], [], 1, False)
    with pytest.raises(OSError, match=told):  # else the same inputs would be a second part
        late.write(0, [sample(0)], [], 1, False)
    assert late.position(0) == (1, 1, False)
    commit = writing.commit

    def between(file: Path, write: Callable[..., Any]) -> int:
        size = commit(file, write)
        if file.name == "000001-0000.safetensors":  # now another one begins the shard, and clears it
            monkeypatch.setattr(writing, "commit", commit)
            early.write(1, [], [], 1, False)
        return size

    monkeypatch.setattr(writing, "commit", between)
    with pytest.raises(OSError, match=told):
        late.write(1, [sample(0)], [], 1, False)
    assert Writer(tmp_path, PLAN, NULL).position(1) == (1, 1, False)
    early.write(0, [], [], 1, True)
    early.write(1, [], [], 1, True)
    assert early.finish(2, None)["kept"] == 1


@pytest.mark.parametrize("limit", [100, 3000, 4500])  # the plan, a unit's latents, and its sidecar are larger
def test_a_full_disk_is_reported_and_writing_resumes(straight: Path, tmp_path: Path, limit: int) -> None:
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # no file may be larger
        try:
            encode(tmp_path)
        except OSError as error:
            os._exit(3 if str(error).startswith(f"could not write {tmp_path}") and "\n" not in str(error) else 4)

    process = forked(full)
    assert (process.join(), process.exitcode) == (None, 3)
    assert not [name for name in contents(tmp_path) if name.endswith(".part")]
    encode(tmp_path)
    assert contents(tmp_path) == contents(straight)


def test_another_plan_is_refused_with_the_names_of_its_fields(folder: Path) -> None:
    codec = {"name": "vae", "scale": 1.25, "files": {"weights": "abd"}}
    told = r"plan \(codec.files.weights: there \"abc\", now \"abd\"; codec.scale: there 1.5"
    refused(told, Writer, folder, PLAN | {"codec": codec}, NULL)
    refused("extra: there nothing, now 1", Writer, folder, PLAN | {"extra": 1}, NULL)
    store = Store(folder)
    store.expect(codec=PLAN["codec"], latents="mean", text={"encoders": ("clip_l", "t5"), "length": 5})
    refused("codec.scale: there 1.5, here 1.25$", lambda: store.expect(codec=codec, text=PLAN["text"]))
    (folder / "store.json").unlink()
    refused("units but no store.json", Writer, folder, PLAN | {"extra": 1}, NULL)


def test_samples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path, PLAN, NULL)
    for changes, told in (
        ({"bucket": 3}, "bucket 3 of 3"), ({"phash": 2**64}, "perceptual hash"),
        ({"weights": (1.0, 1.0)}, "1 captions with the weights"), ({"weights": (0.0,)}, "1 captions with the weights"),
        ({"captions": (), "weights": ()}, "0 captions"), ({"pooled": None}, r"pooled None instead of \(1, 8\)"),
        ({"latents": torch.zeros(4, 8, 9)}, r"latents \(4, 8, 9\) instead of \(4, 8, 8\)"),
        ({"latents": torch.full((4, 8, 8), torch.nan)}, "not finite"),
        ({"tokens": torch.zeros(1, 4, 6)}, r"tokens \(1, 4, 6\) instead of \(1, 5, 6\)"),
    ):  # fmt: skip
        refused(f"picture 0.*{told}", writer.write, 0, [sample(0, **changes)], [], 1, True)
        assert writer.position(0) == (0, 0, False)
    writer.write(0, [sample(0)], [], 1, False)
    writer.write(0, [sample(1, tokens=None)], [], 1, True)
    refused("only 1 of 3 captions", writer.finish, 1, None)
    refused("shard 0 .* is finished", writer.write, 0, [], [], 1, True)


@pytest.mark.parametrize("name", [UNIT, TOKENS, SIDECAR])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_unit_is_found_and_made_again(folder: Path, straight: Path, name: str, damage: str) -> None:
    file = folder / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1 if damage == "truncated" else 0)
    (fault,) = Store(folder).verify(progress=False)
    assert name in fault
    assert "\n" not in fault
    if name != SIDECAR:
        with pytest.raises(StoreError, match=name):
            Store(folder).text(HERE, FIRST)
    if (name, damage) != (SIDECAR, "missing"):  # which is but a unit that is not there yet
        refused(name, encode, folder)
    (folder / SIDECAR).unlink(missing_ok=True)
    encode(folder)
    assert contents(folder) == contents(straight)
