"""encode.py as a user calls it: counts that add up, any number of ranks, kills and refusals."""

import multiprocessing
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from encoded import CODEC, COUNT, ROOT, assert_nothing_lost, config_in, files, refused, run
from PIL import Image

import encode
from data.latents import VAE
from data.order import Use, normal
from data.shapes import Shapes
from data.store import encoding
from data.store.reader import Store
from data.text.clip import CLIPText


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return config_in(tmp_path)


@pytest.fixture
def units_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, each of several units, of few pictures."""
    monkeypatch.setattr(encoding, "UNIT", 4)
    monkeypatch.setattr(Shapes, "UNIT", 10)


def test_a_run_fills_a_store_and_the_next_one_finds_nothing_to_do(config: Path, capsys: pytest.CaptureFixture) -> None:
    run(config)
    folder = config.parent / "store"
    told = capsys.readouterr().out
    assert f"{COUNT} of {COUNT} pictures are in {folder}" in told
    assert f"{COUNT} of 64x64 pixels" in told
    store = assert_nothing_lost(folder, Shapes(COUNT))
    text = CLIPText(ROOT / "assets/shapes/text")
    null = text.encode([""])
    assert store.null is not None
    assert torch.equal(store.null.tokens, null.tokens[0].bfloat16())
    assert torch.equal(store.null.pooled, null.pooled[0].bfloat16())
    for number, raw in enumerate(Shapes(COUNT).read(0)):
        rows = np.array([number])
        assert isinstance(raw.picture, Image.Image)
        pixels = torch.from_numpy(np.array(raw.picture)).permute(2, 0, 1) / 255
        assert torch.equal(store.latents(rows)[0], CODEC.encode(pixels).bfloat16())
        assert (store.ids()[number].as_py(), tuple(store.captions(number))) == (raw.id, raw.captions)
        for choice, caption in enumerate(raw.captions):
            here = store.text(rows, np.array([choice]))
            for made, kept in zip(text.encode([caption]), here, strict=True):
                torch.testing.assert_close(kept.float(), made, rtol=2**-8, atol=1e-5)
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder) if name.startswith("units/")}
    content = files(folder)
    run(config, "--encode.threads", "1")
    assert files(folder) == content
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.usefixtures("units_of_four")
def test_ranks_together_write_what_one_writes(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run(config)
    whole = files(config.parent / "store")
    assert len([name for name in whole if name.endswith(".parquet")]) == 4 * 3
    shared = config.parent / "shared"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (shared / "report.json").exists()
        monkeypatch.setenv("RANK", rank)
        run(config, "--encode.store", str(shared))
    told = capsys.readouterr().out
    assert "rank 1 is done; the last one to finish completes" in told
    assert files(shared) == whole
    assert_nothing_lost(shared, Shapes(COUNT))


@pytest.mark.usefixtures("units_of_four")
def test_killed_and_resumed_is_the_straight_run_to_the_byte(config: Path) -> None:
    kills, killed, count = 10, config.parent / "killed", ("--encode.source.count", "100")
    run(config, *count)
    straight = files(config.parent / "store")
    argv = ["--config", str(config), *count, "--encode.store", str(killed)]
    draw, ends = random.Random(0), []

    def units() -> int:
        return len(list(killed.glob("units/*.parquet")))

    for kill in [True] * kills + [False]:
        before = units()
        process = multiprocessing.get_context("fork").Process(target=encode.main, args=(argv,))  # has all imported
        process.start()
        while kill and units() == before and process.is_alive():
            time.sleep(0.001)
        if kill:
            time.sleep(draw.uniform(0, 0.02))
            process.kill()
        process.join(100)
        ends.append((units(), process.exitcode))
    assert [status for _, status in ends] == [-signal.SIGKILL] * kills + [0]
    assert [units for units, _ in ends] == sorted({units for units, _ in ends})  # each went on
    assert ends[-2][0] < ends[-1][0] == 10 * 3
    assert files(killed) == straight


def test_the_shipped_vae_makes_a_store(config: Path) -> None:
    if not (ROOT / "assets/shapes/vae/config.json").is_file():
        pytest.skip("the VAE is not trained yet")
    vae = ["--codec", "VAE", "--codec.path", str(ROOT / "assets/shapes/vae")]
    stores = {kind: config.parent / kind for kind in ("mean", "draw", "posterior")}
    for kind, folder in stores.items():
        run(config, *vae, "--encode.latents", kind, "--encode.store", str(folder), "--encode.source.count", "24")
    codec = VAE(ROOT / "assets/shapes/vae")
    rows = np.arange(24)
    mean, draw, posterior = (Store(folder).latents(rows).float() for folder in stores.values())
    assert torch.equal(posterior[:, : codec.channels], mean)
    std = (posterior[:, codec.channels :] / 2).exp()
    assert 0.8 < ((draw - mean) / std).std() < 1.2
    pixels = torch.stack([torch.from_numpy(np.array(raw.picture)) for raw in Shapes(24).read(0)]).permute(0, 3, 1, 2)
    torch.testing.assert_close(codec.encode(pixels / 255), mean, rtol=2**-7, atol=1e-4)


@pytest.mark.usefixtures("units_of_four")
def test_each_picture_has_its_own_draw_of_the_latent(config: Path) -> None:
    """A function of seed, shard and place in it, in whatever unit it is written."""
    argv = ["--codec", "VAE", "--codec.path", str(ROOT / "assets/shapes/vae"), "--encode.source.count", "10"]
    run(config, *argv, "--encode.latents", "draw", "--encode.seed", "3", "--encode.text", "captions")
    store, codec = Store(config.parent / "store"), VAE(ROOT / "assets/shapes/vae")
    for number, raw in enumerate(Shapes(10).read(0)):
        pixels = torch.from_numpy(np.array(raw.picture)).permute(2, 0, 1)[None] / 255
        mean, logvar = codec.posterior(pixels)
        noise = normal(3, Use.POSTERIOR, 0, np.array([number]), tuple(mean.shape[1:]))
        expected = mean + (logvar / 2).exp() * noise
        torch.testing.assert_close(store.latents(np.array([number])).float(), expected, rtol=2**-7, atol=1e-2)


def test_a_store_of_another_config_is_refused_and_left_alone(config: Path, capsys: pytest.CaptureFixture) -> None:
    run(config)
    before = files(config.parent / "store")
    for flags, told in (
        (["--encode.side", "128"], "buckets.side: there 64, now 128"),
        (["--codec.shift", "0.25"], "codec.shift_factor: there 0.5, now 0.25"),
        (["--encode.source.count", "41"], "source.count: there 40, now 41"),
        (["--encode.source.seed", "1"], "source.seed: there 0, now 1"),
        (["--encode.text", "captions"], "tokens: there true, now false"),
        (["--encode.filters.min_side", "70"], "filters.min_side: there 0, now 70"),
        (["--text.folder", str(ROOT / "assets/digits/text")], "text.length: there 20, now 10"),
    ):
        assert told in refused(capsys, config, *flags), flags
    assert files(config.parent / "store") == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--encode.step", "48"], "side must be a multiple of step"),
        (["--encode.side", "1000000000"], "side must be at most 8192"),
        (["--encode.batch_size", "0"], "batch_size and threads must be at least 1"),
        (["--encode.duplicates", "9"], "duplicates must be from 0 to 8 bits"),
        (["--encode.latents", "posterior"], "Pixels has no posterior to draw latents from"),
        (["--encode.max_aspect", "0.5"], "max_aspect must be at least 1"),
        (["--encode.source.count", "0"], "the number of scenes must be at least 1"),
        (["--encode.sorce", "x"], "Option 'sorce' is not accepted"),
        (["--encode.hint", "Nope"], "there is no Hint Nope: take one of Blur, Edges, Files"),
        (["--encode.hint", "Files"], "data.raw.hints.Files': the following arguments are required: folder"),
        (["--text.folder", "nowhere"], "nowhere"),
        (["--encode.source", "Pictures", "--encode.source.path", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    config: Path, capsys: pytest.CaptureFixture, flags: list[str], told: str
) -> None:
    assert told in refused(capsys, config, *flags)
    assert not (config.parent / "store").exists()


def test_a_config_without_the_section_is_refused(config: Path, capsys: pytest.CaptureFixture) -> None:
    content = yaml.safe_load(config.read_text())
    del content["encode"]
    config.write_text(yaml.safe_dump(content))
    assert "the config has no section encode" in refused(capsys, config)
