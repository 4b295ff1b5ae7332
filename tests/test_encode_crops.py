"""Pictures that are encoded several times: which parts are cut out, what goes with them, and what is held out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded import ROOT, assert_nothing_lost, config_in, files, refused
from encoded import run as encoded
from PIL import Image

from data.latents import Pixels
from data.raw.base import MIRRORED, Cropped, Fault, Filters, Mirrored, Raw, original
from data.raw.beside import Masks
from data.raw.hints import Files
from data.raw.pictures import cover, room
from data.raw.sources import Pictures
from data.store.encoding import Encoding, StoreEncoder, levels
from data.store.mixture import divided, held_out
from data.store.reader import Store
from data.text.clip import CLIPText

SIDE, CODEC = 16, Pixels(3, 0.0, 1.0)
SIZES = [(16, 40), (50, 16), (16, 33), (24, 90), (16, 16), (32, 32)]  # the last two have no room
CROPS = 4


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (height, width) in enumerate(SIZES):
        levels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    return folder


def stored(pictures: Path, out: Path, rank: int = 0, world: int = 1, **more: Any) -> Path:
    settings = {"side": SIDE, "step": SIDE, "text": "captions", "crops": CROPS, "device": "cpu"} | more
    encoding = Encoding(Pictures(str(pictures)), out, filters=Filters(max_aspect=None), **settings)
    StoreEncoder(encoding, CODEC, CLIPText(ROOT / "assets/digits/text")).run(rank, world)
    return out


def test_the_first_crop_is_the_centre_and_the_others_are_elsewhere_in_the_same_scaled_picture(
    pictures: Path, tmp_path: Path
) -> None:
    """Where the picture is not scaled, a crop is a slice of it, at the place that the store says."""
    store = Store(stored(pictures, tmp_path / "store"))
    ids = store.ids().to_pylist()
    for i, (height, width) in enumerate(SIZES[:3]):
        rows = np.array([row for row, name in enumerate(ids) if original(name) == f"{i}.png"])
        assert len(rows) == CROPS
        pixels = levels(Image.open(pictures / f"{i}.png")).float().div(255)
        offsets = []
        for row, latent in zip(rows, store.latents(rows).float(), strict=True):
            *size, top, left = store.sizes(np.array([row]))[0].tolist()
            assert size == [height, width]
            expected = CODEC.encode(pixels[None, :, top : top + SIDE, left : left + SIDE])[0]
            assert torch.equal(latent, expected.bfloat16().float())
            offsets.append(max(top, left))
        free = max(height, width) - SIDE
        assert offsets[0] == free // 2
        assert len({*offsets}) == CROPS
        for number, offset in enumerate(offsets[1:]):  # one in each third of the room
            assert number / 3 * free - 1 <= offset <= (number + 1) / 3 * free + 1
    assert_nothing_lost(tmp_path / "store", Cropped(Pictures(str(pictures)), CROPS, 0))


def test_pictures_of_the_shape_of_their_bucket_are_encoded_once(pictures: Path, tmp_path: Path) -> None:
    store = Store(stored(pictures, tmp_path / "store"))
    assert len(store) == 4 * CROPS + 2
    assert store.report["dropped"] == {"same crop": 2 * (CROPS - 1)}


def test_places_are_a_function_of_seed_and_picture(pictures: Path, tmp_path: Path) -> None:
    """Not of the other pictures, the ranks, or whether there are twins."""
    straight = stored(pictures, tmp_path / "store")
    for rank in (1, 0):
        stored(pictures, tmp_path / "ranks", rank, 2)
    assert files(tmp_path / "ranks") == files(straight)

    def places(folder: Path) -> dict[str, list[int]]:
        store = Store(folder)
        return dict(zip(store.ids().to_pylist(), store.sizes(np.arange(len(store))).tolist(), strict=True))

    whole = places(straight)
    assert places(stored(pictures, tmp_path / "mirrored", mirror=True)).items() >= whole.items()
    assert places(stored(pictures, tmp_path / "seed", seed=1)) != whole
    for file in pictures.glob("0.*"):
        file.unlink()
    assert whole.items() > places(stored(pictures, tmp_path / "fewer")).items()


def test_masks_hints_and_twins_are_cut_out_with_their_pictures(pictures: Path, tmp_path: Path) -> None:
    """A picture that is its own mask and hint has a latent of three equal parts."""
    (tmp_path / "grey").mkdir()
    for file in pictures.glob("*.png"):
        Image.open(file).convert("L").save(tmp_path / "grey" / file.name)
        Image.open(file).convert("L").convert("RGB").save(file)
    beside = {"masks": Masks(tmp_path / "grey"), "hint": Files(tmp_path / "grey")}
    store = Store(stored(pictures, tmp_path / "store", mirror=True, **beside))
    assert len(store) == 2 * (4 * CROPS + 2)
    latents, masks = store.latents_and_masks(np.arange(len(store)))
    assert latents.shape[1] == 6
    for channel in latents.unbind(1):
        assert torch.equal(channel, masks[:, 0])
    assert len({row.float().numpy().tobytes() for row in masks}) == len(store)


def test_a_part_lies_where_it_should_also_in_a_scaled_picture() -> None:
    ramp = np.tile(np.linspace(0, 255, 600), (100, 1)).astype(np.uint8)
    image = Image.fromarray(ramp)
    assert room((100, 600), 50, 60) == (0, 240)
    for crop, left in ((None, 120), (0.0, 0), (0.25, 60), (1.0, 240)):
        part, *place = cover(image, 50, 60, crop)
        assert place == [0, left]
        middle = np.asarray(part)[25, 30] / 255 * 300
        assert middle == pytest.approx(left + 30, abs=2)


def test_no_other_part_of_a_held_out_picture_is_trained_on(pictures: Path, tmp_path: Path) -> None:
    store = Store(stored(pictures, tmp_path / "store", mirror=True))
    ids = np.array(store.ids().to_pylist())
    apart = held_out(store, 3)
    validated, trained = (ids[np.concatenate(divided(store, apart, within))] for within in (True, False))
    assert set(validated) == apart
    assert all(original(name) == name for name in validated)
    assert len(validated) + len(trained) + sum(original(name) in apart and name not in apart for name in ids) == len(
        ids
    )


def test_positions_and_faults_of_the_source_are_kept(pictures: Path) -> None:
    (pictures / "2.txt").unlink()
    source = Pictures(str(pictures))
    every = Mirrored(Cropped(source, 3, 0))
    assert every.shards == 6 * source.shards
    twins = list(every.read(4 * source.shards))  # the first crop, mirrored
    assert [entry.id for entry in twins] == [f"{entry.id}#crop1{MIRRORED}" for entry in source.read(0)]
    assert sum(isinstance(entry, Fault) for entry in twins) == 1
    assert all(entry.mirrored and 0 <= entry.crop <= 0.5 for entry in twins if isinstance(entry, Raw))
    assert list(every.read(4 * source.shards, 3)) == twins[3:]


def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = config_in(tmp_path)
    for flags, words in (
        (["--encode.crops", "0"], "crops must be from 1 to 1024, got 0"),
        (["--encode.crops", "2", "--encode.duplicates", "3"], "leave encode.duplicates or encode.crops out"),
    ):
        assert words in refused(capsys, config, *flags)
        assert not (tmp_path / "store").exists()
    encoded(config)
    assert "source" in refused(capsys, config, "--encode.crops", "2")
