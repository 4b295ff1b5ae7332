"""The latent store: to the bit, whole after any kill, and never a silent wrong sample."""

import json
import multiprocessing
import os
import pickle
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from data.store import writer as writing
from data.store.reader import Drop, Sample, Store, StoreError, Writer
from data.store.units import near_duplicates

SIZES, SHAPES = [[64, 64], [48, 80], [80, 48]], [(8, 8), (6, 10), (10, 6)]  # of pictures and of latents
PLAN: dict[str, Any] = {
    "version": 1, "codec": {"name": "vae", "scale": 1.5, "files": {"weights": "abc"}}, "latents": "mean",
    "text": {"encoders": ["clip_l", "t5"], "length": 5}, "tokens": True, "source": {"folder": "pictures"},
    "buckets": {"side": 64, "step": 16, "max_aspect": 2.0, "sizes": SIZES}, "factor": 8, "channels": 4,
}  # fmt: skip
UNITS = {(0, 0): range(7), (0, 1): range(0), (1, 0): range(7, 14)}  # shard and part → samples
INPUTS, KEPT = 8, 14  # inputs of each unit, and what all keep of them
UNIT, TOKENS, SIDECAR = (f"units/000000-0000{end}" for end in (".safetensors", ".tokens.safetensors", ".parquet"))
HERE, FIRST = np.array([1]), np.array([0])  # a sample of that unit; the first caption


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


NULL: Any = SimpleNamespace(tokens=drawn(1, 5, 6), pooled=drawn(2, 8))  # data.text.Text would be slow to import


def sample(number: int, **changes: Any) -> Sample:
    """Sample `number`, always the same; with one to three captions."""
    bucket, n = number % 3, 1 + number % 3
    made = Sample(
        f"picture {number}", tuple(f"caption {i} of {number}: ein schöner Tag" for i in range(n)),
        tuple(0.5 + i for i in range(n)), bucket, size=(100 + number, 200 + number), crop=(number, 2 * number),
        phash=int(np.random.Philox(key=number).random_raw()), latents=drawn(3 * number, 4, *SHAPES[bucket]),
        pooled=drawn(3 * number + 1, n, 8), tokens=drawn(3 * number + 2, n, 5, 6).bfloat16(),
    )  # fmt: skip
    return made._replace(**changes)


def encode(folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any] | None:
    """What an encoder does: goes on wherever the store stands."""
    writer = Writer(folder, PLAN, NULL)
    for shard in range(rank, 2, world):
        start, consumed, done = writer.position(shard)
        parts = sum(unit[0] == shard for unit in UNITS)
        assert (consumed, done) == (start * INPUTS, start == parts)
        for part in range(start, parts):
            samples = [sample(i) for i in UNITS[shard, part]]
            reason = "unreadable" if shard else "too small"
            drops = [Drop(f"{shard}-{part}-{i}", reason, "it is 3 × 4") for i in range(INPUTS - len(samples))]
            writer.write(shard, samples, drops, INPUTS, last=part == parts - 1)
    return writer.finish(2, hamming=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(told: str, call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises((ValueError, IndexError, FileNotFoundError), match=told) as error:
        call(*args)
    assert "\n" not in str(error.value)


def forked(target: Callable[..., Any], *args: Any) -> Any:
    """Starts a real process that has everything imported."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args, daemon=True)
    process.start()
    return process


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was written without a break; not to be changed."""
    folder = tmp_path_factory.mktemp("straight") / "store"
    assert encode(folder) is not None
    return folder


@pytest.fixture
def store(straight: Path) -> Store:
    return Store(straight)


@pytest.fixture
def folder(straight: Path, tmp_path: Path) -> Path:  # one to damage
    return shutil.copytree(straight, tmp_path / "store")


def assert_holds(store: Store, row: int, wanted: Sample) -> None:
    """A sample in the store, against the one that was written."""
    rows = np.array([row])
    told = (store.ids()[row].as_py(), store.captions(row), store.weights(row))
    assert told == (wanted.id, [*wanted.captions], [*wanted.weights])
    assert store.sizes(rows).tolist() == [[*wanted.size, *wanted.crop]]
    assert torch.equal(store.latents(rows)[0], wanted.latents.bfloat16())
    for choice in range(len(wanted.captions)):
        text = store.text(rows, np.array([choice]))
        assert torch.equal(text.tokens[0], wanted.tokens[choice])
        assert torch.equal(text.pooled[0], wanted.pooled[choice].bfloat16())


def test_goes_round_to_the_bit_through_plain_safetensors(store: Store) -> None:
    assert (len(store), store.plan, store.buckets) == (KEPT, PLAN, tuple(map(tuple, SIZES)))
    assert (store.has_pooled, store.has_tokens) == (True, True)
    assert torch.equal(store.null.tokens, NULL.tokens.bfloat16())
    assert torch.equal(store.null.pooled, NULL.pooled.bfloat16())
    for row in range(KEPT):
        assert_holds(store, row, sample(row))
    assert sorted(np.concatenate([store.members(bucket) for bucket in range(3)])) == list(range(KEPT))
    assert store.verify(progress=False) == []
    with safe_open(store.folder / UNIT, framework="pt") as file:
        assert sorted(file.keys()) == ["latents.0", "latents.1", "latents.2", "pooled"]
        wanted = [sample(i) for i in UNITS[0, 0]]
        assert torch.equal(file.get_tensor("pooled"), torch.cat([one.pooled for one in wanted]).bfloat16())
        second = torch.stack([one.latents for one in wanted if one.bucket == 1]).bfloat16()
        assert torch.equal(file.get_tensor("latents.1"), second)
    assert not list(store.folder.glob("units/000000-0001*.safetensors"))  # a part that kept nothing


@pytest.mark.parametrize("lack", ["nothing", "preadv", "posix_fadvise"])
def test_a_batch_in_any_order_with_few_files_and_buffers_on_every_system(
    store: Store, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    monkeypatch.setattr("data.store.reader.OPEN_FILES", 1)
    monkeypatch.setattr("data.store.units.IOVECS", 2)
    monkeypatch.delattr(os, lack, raising=False)
    descriptors = lambda: len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0  # noqa: E731
    before = descriptors()
    for bucket in range(3):
        rows = np.random.default_rng(bucket).permutation(np.tile(store.members(bucket), 2))  # some of them twice
        wanted = [sample(row) for row in rows.tolist()]
        choice = np.array([row % len(one.captions) for row, one in zip(rows, wanted, strict=True)])
        assert torch.equal(store.latents(rows), torch.stack([one.latents for one in wanted]).bfloat16())
        text = store.text(rows, choice)
        assert torch.equal(text.tokens, torch.stack([one.tokens[c] for one, c in zip(wanted, choice, strict=True)]))
        assert torch.equal(text.pooled, store.pooled(rows, choice))
    assert store.text(np.arange(KEPT), np.zeros(KEPT, dtype=int)).tokens.shape == (KEPT, 5, 6)
    assert descriptors() <= before + 1


def test_rows_and_captions_that_are_not_there(store: Store) -> None:
    for rows in ([-1], [KEPT], [0.0], [[0]]):
        refused(f"from 0 to {KEPT - 1}", store.latents, np.array(rows))
    for choice in ([-1], [1], [0, 0]):
        refused("caption's number", store.text, FIRST, np.array(choice))
    for rows in ([0, 1], []):
        refused("one bucket at once", store.latents, np.array(rows, dtype=int))


def test_the_report_and_the_list_of_drops_count_every_input(store: Store) -> None:
    report = store.report
    assert (report["inputs"], report["kept"]) == (len(UNITS) * INPUTS, KEPT)
    assert report["dropped"] == {"too small": 9, "unreadable": 1}
    drops = [json.loads(line) for line in (store.folder / "dropped.jsonl").read_text().splitlines()]
    assert report["inputs"] == report["kept"] + len(drops)
    assert drops[-1] == {"id": "1-0-0", "reason": "unreadable", "detail": "it is 3 × 4"}
    assert (report["buckets"], report["captions"]) == ({"64x64": 5, "48x80": 5, "80x48": 4}, 5 * 1 + 5 * 2 + 4 * 3)


def test_a_store_without_samples_without_text_and_without_tokens(tmp_path: Path) -> None:
    for name, samples, plan, null in (
        ("empty", [], {}, NULL),
        ("bare", [sample(0, pooled=None, tokens=None)], {"text": None, "tokens": False}, None),
        ("pooled", [sample(1, tokens=None)], {"tokens": False}, NULL),
    ):
        writer = Writer(tmp_path / name, PLAN | plan, null)
        writer.write(0, samples, [Drop("a", "unreadable", "")], len(samples) + 1, True)
        assert writer.finish(1, 3)["kept"] == len(samples)
        store = Store(tmp_path / name)
        assert store.verify(progress=False) == []
        assert (len(store), store.null is None) == (len(samples), null is None)
        assert (store.has_pooled, store.has_tokens) == (name == "pooled", False)
        for one in samples:
            assert store.captions(0) == list(one.captions)
            refused("holds no tokens", store.text, FIRST, FIRST)
    assert torch.equal(store.pooled(FIRST, np.array([1]))[0], sample(1).pooled[1].bfloat16())


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


def test_two_processes_on_one_shard_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_full_disk_is_told_and_gone_on_from(straight: Path, tmp_path: Path, limit: int) -> None:
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


def test_another_plan_names_the_fields(folder: Path) -> None:
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


@pytest.mark.parametrize("name", [UNIT, TOKENS, SIDECAR, "index.arrow"])
def test_a_flipped_bit_is_found_and_told_with_its_sample(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[{SIDECAR: 60, "index.arrow": content.find(b"caption 0 of 3")}.get(name, -100)] ^= 4
    (folder / name).write_bytes(content)
    store, damaged = Store(folder), []
    (fault,) = store.verify(progress=False)
    assert ("index.arrow is damaged" if name == "index.arrow" else "000000-0000") in fault
    for row in range(KEPT) if name in (UNIT, TOKENS) else ():
        try:
            assert_holds(store, row, sample(row))
        except StoreError as error:
            damaged.append(str(error))
            assert all(told in damaged[0] for told in ("unit 000000-0000", f"sample picture {row}:", "checksum"))
    assert len(damaged) == (name in (UNIT, TOKENS))


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


def test_a_file_cut_while_it_is_open(folder: Path) -> None:
    store = Store(folder)
    store.latents(HERE)
    os.truncate(folder / UNIT, 700)
    with pytest.raises(StoreError, match=r"unit 000000-0000, sample picture \d+: the file ends within latents.0"):
        store.latents(store.members(0))


@pytest.mark.parametrize("name", ["index.arrow", "store.json", "report.json", "null.safetensors"])
@pytest.mark.parametrize("size", [0, -20])
def test_a_damaged_store_does_not_open(folder: Path, name: str, size: int) -> None:
    os.truncate(folder / name, size and size + (folder / name).stat().st_size)
    refused(name, Store, folder)


def test_a_report_that_lacks_something_does_not_open(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    for name in report:
        for change in ({}, {name: None}):
            (folder / "report.json").write_text(json.dumps({k: v for k, v in report.items() if k != name} | change))
            refused(f"is damaged: its report.json lacks {name};", Store, folder)
    (folder / "report.json").write_text(json.dumps({"kept": KEPT}))
    refused("lacks inputs, dropped, buckets, captions, index;", Store, folder)


def test_verify_finds_latents_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose checksums are right, but whose encoder was not."""
    with monkeypatch.context() as blind:
        blind.setattr(Tensor, "isfinite", lambda tensor: torch.ones_like(tensor, dtype=torch.bool))
        writer = Writer(tmp_path, PLAN, NULL)
        writer.write(0, [sample(0), sample(3, latents=torch.full((4, 8, 8), torch.inf)), sample(6)], [], 3, True)
        writer.finish(1, None)
    (fault,) = Store(tmp_path).verify(progress=False)
    assert "picture 3: its latents are not finite" in fault


class Rows(torch.utils.data.Dataset):
    def __init__(self, store: Store) -> None:
        self.store = store

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.store.latents(np.array([row])), self.store.pooled(np.array([row]), FIRST)


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_loader_processes_and_pickles_without_samples(store: Store, method: Any, workers: int) -> None:
    store.text(np.arange(3), np.zeros(3, dtype=int))  # the index is read and files are open here
    assert len(pickle.dumps(store)) < 2500
    assert_holds(pickle.loads(pickle.dumps(store)), 4, sample(4))
    loader = DataLoader(Rows(store), None, sampler=range(12), num_workers=workers, multiprocessing_context=method)
    for row, (latents, pooled) in zip(range(12), loader, strict=True):
        assert torch.equal(latents[0], sample(row).latents.bfloat16())
        assert torch.equal(pooled[0], sample(row).pooled[0].bfloat16())


def test_damage_is_told_as_such_by_loader_processes(folder: Path) -> None:
    store = Store(folder)
    (folder / UNIT).unlink()
    with pytest.raises(StoreError) as error:
        next(iter(DataLoader(Rows(store), None, num_workers=1, sampler=[0], multiprocessing_context="fork")))
    assert str(error.value).splitlines()[-1] == f"data.store.reader.StoreError: {folder / UNIT} is missing"
    again = pickle.loads(pickle.dumps(StoreError("one line")))
    assert (type(again), str(again)) == (StoreError, "one line")


def test_a_remote_store_that_was_made_again_is_fetched_anew(straight: Path, tmp_path: Path) -> None:
    memory, remote = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/again"
    for number in (0, 3):  # of one plan, with other samples in files of the same names
        writer = Writer(tmp_path / str(number), PLAN, NULL)
        writer.write(0, [sample(number)], [], 1, True)
        writer.finish(1, None)
        memory.put(f"{tmp_path / str(number)}/", f"{remote}/", recursive=True)
        assert_holds(Store(remote, tmp_path / "cache"), 0, sample(number))
    memory.pipe(f"{remote}/report.json", b'{"kept": 1}')
    refused("is damaged: its report.json", Store, remote, tmp_path / "cache")


def test_a_remote_store_fetches_only_what_is_read_and_tells_what_is_wrong(straight: Path, tmp_path: Path) -> None:
    memory, remote, cache = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/store", tmp_path / "cache"
    memory.put(str(straight), remote, recursive=True)
    store = Store(remote, cache)
    staged = lambda: {file.name for file in cache.rglob("*") if file.is_file()}  # noqa: E731
    top = {"index.arrow", "null.safetensors", "report.json", "store.json"}
    assert staged() == top
    store.latents(HERE)
    assert staged() == {"000000-0000.safetensors", *top}
    assert_holds(store, 1, sample(1))
    assert staged() == {"000000-0000.safetensors", "000000-0000.tokens.safetensors", *top}
    assert store.size() == Store(straight).size() == sum(map(len, contents(straight).values()))
    memory.rm(f"{remote}/{UNIT}")
    assert_holds(Store(remote, cache), 1, sample(1))
    assert Store(remote, cache).verify(progress=False) == []

    refused("memory://nowhere/store.json", Store, "memory://nowhere", tmp_path)
    refused("cannot be read", Store, "nosuch://bucket/store", tmp_path)
    refused(f"there is no {remote}/{UNIT}", Store(remote, tmp_path).latents, HERE)
    memory.pipe(f"{remote}/{UNIT}", b"short")
    refused(f"{UNIT} is damaged", Store(remote, tmp_path).latents, HERE)
    memory.pipe(f"{remote}/index.arrow", memory.cat(f"{remote}/index.arrow")[:-1])
    refused("index.arrow does not have the checksum", Store, remote, tmp_path / "other")
    memory.rm(f"{remote}/report.json")
    refused("not finished", Store, remote, tmp_path)


@pytest.mark.parametrize("distance", range(9))
def test_near_duplicates_are_those_of_the_plain_definition(distance: int) -> None:
    draw, n = np.random.default_rng(distance), 3000
    values = draw.integers(0, 2**64, 20, dtype=np.uint64)[draw.integers(0, 20, n)]
    for _ in range(6):  # near some, and in chains: near to what is near
        flipped = np.uint64(1) << draw.integers(0, 64, n).astype(np.uint64)
        values ^= np.where(draw.random(n) < 0.5, flipped, np.uint64(0))
    kept, wanted = np.zeros(0, dtype=np.uint64), []
    for value in values:
        wanted.append(bool((np.bitwise_count(kept ^ value) <= distance).any()))
        kept = kept if wanted[-1] else np.append(kept, value)
    assert near_duplicates(values, distance).tolist() == wanted
    assert 0 < sum(wanted) < n


def test_near_duplicates_of_many_in_seconds() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    values[50_000:60_000] = values[:10_000] ^ np.uint64(0b10010001 << 30)
    values[60_000:80_000] = values[7]
    start = time.perf_counter()
    assert np.flatnonzero(near_duplicates(values, 3)).tolist() == list(range(50_000, 80_000))
    assert time.perf_counter() - start < 10


def test_duplicates_stay_out_of_the_index(tmp_path: Path) -> None:
    """An id that came before, even that of a near-duplicate, goes first; then what is near to one that is kept."""
    hashes = [0, 0b111, 0b11111, 0, 0b1111111, 1 << 60]
    ids = ["a", "b", "c", "b", "e", "f"]  # b is near a; c is near b only, which is dropped; e is near c
    samples = [sample(i, id=name, phash=h) for i, (name, h) in enumerate(zip(ids, hashes, strict=True))]
    for hamming, kept, near in ((None, "abcef", {}), (0, "abcef", {}), (3, "ac", {"near-duplicate": 3})):
        folder = tmp_path / str(hamming)
        writer = Writer(folder, PLAN, NULL)
        writer.write(1, samples[3:], [], 3, True)
        assert writer.finish(2, hamming) is None
        writer.write(0, samples[:3], [], 3, True)
        report, store = writer.finish(2, hamming), Store(folder)
        assert "".join(store.ids().to_pylist()) == kept
        assert (report["kept"], report["dropped"]) == (len(kept), {"duplicate id": 1} | near)
        assert store.verify(progress=False) == []
        for row, name in enumerate(kept):
            assert_holds(store, row, samples[ids.index(name)])
    refused("hamming from 0 to 8", writer.finish, 2, 9)


def test_the_commands(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*argv: object) -> str:
        monkeypatch.setattr(sys, "argv", ["data", *map(str, argv)])
        runpy.run_module("data", run_name="__main__")
        return capsys.readouterr().out

    told = run("info", folder)
    for line in (f"{KEPT} of {len(UNITS) * INPUTS} inputs", "  48x80", "  unreadable", '"clip_l"'):
        assert line in told
    assert run("verify", folder) == f"{folder}: {KEPT} samples without a fault\n"
    (folder / UNIT).unlink()
    with pytest.raises(SystemExit, match="1"):
        run("verify", folder)
    told = capsys.readouterr().out
    assert told.startswith(f"{folder / UNIT} is missing\n")
    assert "makes it again and all later parts of its shard" in told
    (folder / "report.json").write_text('{"kept": 14}')
    with pytest.raises(SystemExit, match="2"):
        run("info", folder)
    assert capsys.readouterr().err.startswith(f"error: {folder} is damaged: its report.json lacks inputs")
    with pytest.raises(SystemExit, match="2"):
        run("verify", folder / "units")
    told = capsys.readouterr().err
    assert told == f"error: there is no store at {folder / 'units'}: it has no store.json\n"
