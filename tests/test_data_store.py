"""The latent store as it is read: to the bit, in any order, by any process, and never a silent wrong sample."""

import json
import os
import pickle
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from store_files import (
    FIRST,
    HERE,
    INPUTS,
    KEPT,
    NULL,
    PLAN,
    SIDECAR,
    SIZES,
    TOKENS,
    UNIT,
    UNITS,
    assert_holds,
    contents,
    encode,
    refused,
    sample,
    written,
)
from torch import Tensor
from torch.utils.data import DataLoader

from data.store.reader import REPORTED, Drop, Store, StoreError, Writer
from data.store.units import read_sidecar


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was written without a break; not to be changed."""
    return written(tmp_path_factory.mktemp("straight"))


@pytest.fixture
def folder(straight: Path, tmp_path: Path) -> Path:  # one to damage
    return shutil.copytree(straight, tmp_path / "store")


@pytest.fixture
def store(straight: Path) -> Store:
    return Store(straight)


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


@pytest.mark.parametrize("name", [UNIT, TOKENS, SIDECAR])
def test_a_flipped_bit_is_reported_with_its_sample(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[{SIDECAR: 60}.get(name, -100)] ^= 4
    (folder / name).write_bytes(content)
    store, damaged = Store(folder), []
    (fault,) = store.verify(progress=False)
    assert "000000-0000" in fault
    for row in range(KEPT) if name != SIDECAR else ():
        try:
            assert_holds(store, row, sample(row))
        except StoreError as error:
            damaged.append(str(error))
            assert all(told in damaged[0] for told in ("unit 000000-0000", f"sample picture {row}:", "checksum"))
    assert len(damaged) == (name != SIDECAR)


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
    for name in REPORTED:
        for change in ({}, {name: None}):
            (folder / "report.json").write_text(json.dumps({k: v for k, v in report.items() if k != name} | change))
            refused(f"is damaged: its report.json lacks {name};", Store, folder)
    (folder / "report.json").write_text(json.dumps({"kept": KEPT}))
    refused("lacks inputs, dropped, buckets, captions, index;", Store, folder)


def test_a_store_of_an_earlier_version_opens_and_only_its_index_is_checked(folder: Path) -> None:
    """Its report has no hashes of files and of itself, its sidecars have no seal."""
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({name: report[name] for name in REPORTED}))
    for file in folder.glob("units/*.parquet"):
        notes = pq.read_schema(file).metadata[b"unit"]
        pq.write_table(read_sidecar(file).replace_schema_metadata({"unit": notes}), file)
    assert Store(folder).verify(progress=False) == []
    again = encode(folder)
    assert again == report
    assert Store(folder).report == report


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


def test_loader_processes_report_damage_as_a_store_error(folder: Path) -> None:
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


def test_a_remote_store_fetches_only_what_is_read_and_reports_damage(straight: Path, tmp_path: Path) -> None:
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
    refused("index.arrow does not have the hash", Store, remote, tmp_path / "other")
    memory.rm(f"{remote}/report.json")
    refused("not finished", Store, remote, tmp_path)


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
