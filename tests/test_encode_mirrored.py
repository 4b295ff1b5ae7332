"""Pictures that are encoded twice, as they are and mirrored: what is written, and what is held out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import ROOT, assert_nothing_lost, config_in, files, run
from PIL import Image

from data.latents import VAE, Pixels
from data.raw.base import MIRRORED, Fault, Mirrored, Raw, original
from data.raw.sources import Pictures
from data.shapes import Shapes
from data.store.encoding import Encoding, Filters, StoreEncoder
from data.store.mixture import divided, held_out
from data.store.reader import Store
from data.text.clip import CLIPText


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return config_in(tmp_path)


def pixels(raw: Raw) -> torch.Tensor:
    assert isinstance(raw.picture, Image.Image)
    return torch.from_numpy(np.array(raw.picture)).permute(2, 0, 1)[None] / 255


def test_the_mirrored_picture_is_encoded_and_not_its_latents_flipped(config: Path) -> None:
    argv = ["--codec", "VAE", "--codec.path", str(ROOT / "assets/shapes/vae"), "--encode.source.count", "6"]
    run(config, *argv, "--encode.mirror", "true", "--encode.text", "captions")
    store, codec = Store(config.parent / "store"), VAE(ROOT / "assets/shapes/vae")
    ids = store.ids().to_pylist()
    assert len(ids) == 12
    for raw in Shapes(6).read(0):
        plain, twin = (ids.index(name) for name in (raw.id, raw.id + MIRRORED))
        assert store.captions(plain) == store.captions(twin) == list(raw.captions)
        found = store.latents(np.array([plain, twin])).float()
        expected = torch.cat([codec.encode(pixels(raw)), codec.encode(pixels(raw).flip(-1))])
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2e-2)
        assert (found[1] - found[0].flip(-1)).abs().max() > 0.2


def test_every_input_is_counted_twice_and_ranks_write_the_same(config: Path) -> None:
    run(config, "--encode.mirror", "true")
    straight = config.parent / "store"
    assert_nothing_lost(straight, Mirrored(Shapes(40)))
    other = config.parent / "other"
    settings = Encoding(Shapes(40), other, 64, 64, batch_size=8, threads=2, device="cpu", mirror=True)
    for rank in (1, 0):
        StoreEncoder(settings, Pixels(3), CLIPText(ROOT / "assets/shapes/text")).run(rank, 2)
    assert files(other) == files(straight)


def test_no_twin_of_a_held_out_picture_is_trained_on(config: Path) -> None:
    run(config, "--encode.mirror", "true")
    store = Store(config.parent / "store")
    ids = np.array(store.ids().to_pylist())
    apart = held_out(store, 10)
    validated, trained = (ids[np.concatenate(divided(store, apart, within))] for within in (True, False))
    assert set(validated) == apart
    assert all(original(name) == name for name in validated)
    assert len(trained) == 2 * (40 - 10)
    assert not {original(name) for name in trained} & apart


def test_a_store_that_was_not_mirrored_is_another(config: Path, capsys: pytest.CaptureFixture) -> None:
    run(config)
    with pytest.raises(SystemExit) as end:
        run(config, "--encode.mirror", "true")
    assert end.value.code == 2
    assert "source" in capsys.readouterr().err


def test_positions_and_faults_of_the_source_are_kept(tmp_path: Path) -> None:
    """So that an interrupted encoding goes on at the right input."""
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        if i != 2:
            (tmp_path / f"{i}.txt").write_text("a square")
    source = Pictures(str(tmp_path))
    both = Mirrored(source)
    assert both.shards == 2 * source.shards
    twins = list(both.read(source.shards))
    assert [entry.id for entry in twins] == [entry.id + MIRRORED for entry in source.read(0)]
    assert sum(isinstance(entry, Fault) for entry in twins) == 1
    assert [entry.id for entry in both.read(source.shards, 3)] == [entry.id for entry in twins[3:]]
    with pytest.raises(ValueError, match="there are shards 0 to"):
        list(both.read(both.shards))
    assert Filters().trimmed(next(e for e in twins if isinstance(e, Raw))).mirrored
