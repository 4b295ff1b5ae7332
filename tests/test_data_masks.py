"""Masks of the loss: found beside the pictures, cropped and mirrored with them, stored, and learned with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trials import ROOT, assert_goes_on_to_the_bit, assert_same, fit, lines, refused, small, state

import encode
from data.latents import VAE, Pixels
from data.module import Stored
from data.raw.base import MIRRORED
from data.raw.beside import Masks
from data.raw.sources import Pictures
from data.store.encoding import Encoding, StoreEncoder
from data.store.mixture import Mixture, Part
from data.store.reader import Store
from data.text.clip import CLIPText

TEXT, FACTOR, COUNT = ROOT / "assets/digits/text", 8, 12


@pytest.fixture(scope="module")
def vae() -> VAE:
    return VAE(ROOT / "assets/shapes/vae")


def draw_pictures(folder: Path, *sizes: tuple[int, int]) -> None:
    """Random pictures of these heights and widths, with captions."""
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")


def draw_mask(file: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A random mask, as it is saved, in [0, 1]."""
    levels = np.random.default_rng(100 + seed).integers(0, 256, (height, width), dtype=np.uint8)
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(levels).save(file)
    return levels / 255


def stored(pictures: Path, out: Path, codec: VAE | Pixels, **more: object) -> Store:
    settings = {"side": 64, "step": 64, "text": "captions", "device": "cpu"} | more
    encoding = Encoding(Pictures(str(pictures)), out, **settings)  # type: ignore[arg-type]
    StoreEncoder(encoding, codec, CLIPText(TEXT)).run()
    return Store(out)


def pooled(mask: np.ndarray) -> np.ndarray:
    height, width = (side // FACTOR for side in mask.shape)
    return mask.reshape(height, FACTOR, width, FACTOR).mean((1, 3))


def test_a_mask_is_cropped_and_mirrored_with_its_picture_and_pooled(vae: VAE, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", (64, 100), (80, 64))
    wide, tall = (draw_mask(tmp_path / f"pictures/{i}.mask.png", *size) for i, size in enumerate([(64, 100), (80, 64)]))
    masks = Masks(tmp_path / "pictures", ".mask")
    store = stored(tmp_path / "pictures", tmp_path / "store", vae, masks=masks, mirror=True)
    expected = {
        "0.png": wide[:, 18:82], "1.png": tall[8:72],
        "0.png" + MIRRORED: wide[:, ::-1][:, 18:82], "1.png" + MIRRORED: tall[8:72, ::-1],
    }  # fmt: skip
    assert set(store.ids().to_pylist()) == set(expected)
    latents, found = store.latents_and_masks(np.arange(4))
    for name, mask in zip(store.ids().to_pylist(), found, strict=True):
        np.testing.assert_allclose(mask[0].float(), pooled(expected[name]), atol=2**-9 + 1e-6)  # bfloat16
    plain = stored(tmp_path / "pictures", tmp_path / "plain", vae, mirror=True)
    assert torch.equal(latents, plain.latents(np.arange(4)))
    assert torch.equal(latents, store.latents(np.arange(4)))
    assert plain.latents_and_masks(np.arange(4))[1].eq(1).all()
    assert store.verify(progress=False) == []
    assert store.report["dropped"] == {"mask": 4}  # not counted as pictures without captions
    assert plain.report["dropped"] == {"no caption": 4}


def test_a_mask_is_scaled_with_its_picture(tmp_path: Path) -> None:
    """A picture that is its own mask has a latent that is its own mask, but for roundings."""
    (tmp_path / "pictures").mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (7, 9), dtype=np.uint8)
    Image.fromarray(coarse).resize((150, 113)).save(tmp_path / "pictures/a.png")
    (tmp_path / "pictures/a.txt").write_text("a picture")
    codec = Pixels(1, 0.0, 1.0)
    store = stored(tmp_path / "pictures", tmp_path / "store", codec, masks=Masks(tmp_path / "pictures"))
    latent, mask = store.latents_and_masks(np.array([0]))
    assert torch.equal(latent, mask)
    assert mask.float().std() > 0.1


def test_white_is_one_to_the_bit_and_black_is_zero(vae: VAE, tmp_path: Path) -> None:
    """However the mask is scaled: so that a white mask is no mask."""
    sizes = [(64, 64), (70, 101), (640, 413), (50, 33)]
    draw_pictures(tmp_path / "pictures", *sizes)
    for level, name in ((255, "white"), (0, "black")):
        for i, size in enumerate(sizes):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(np.full(size, level, np.uint8)).save(tmp_path / name / f"{i}.png")
        store = stored(tmp_path / "pictures", tmp_path / f"store-{name}", vae, masks=Masks(tmp_path / name))
        assert store.latents_and_masks(np.arange(4))[1].eq(level / 255).all()


def test_pictures_whose_masks_are_missing_or_of_another_size_are_left_out_and_named(vae: VAE, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", (64, 64), (64, 64), (64, 80))
    draw_mask(tmp_path / "masks/0.png", 64, 64)
    draw_mask(tmp_path / "masks/2.png", 80, 64)
    store = stored(tmp_path / "pictures", tmp_path / "store", vae, masks=Masks(tmp_path / "masks"))
    assert store.ids().to_pylist() == ["0.png"]
    dropped = [json.loads(line) for line in (tmp_path / "store/dropped.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in dropped] == [("1.png", "no mask"), ("2.png", "mask size")]
    assert dropped[1]["detail"] == "its mask has 80×64 pixels and the picture 64×80"


def test_other_masks_are_another_store(vae: VAE, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", (64, 64))
    draw_mask(tmp_path / "masks/0.png", 64, 64)
    (tmp_path / "others").mkdir()
    Image.new("L", (64, 64), "white").save(tmp_path / "others/0.png")
    stored(tmp_path / "pictures", tmp_path / "store", vae, masks=Masks(tmp_path / "masks"))
    for other in ({}, {"masks": Masks(tmp_path / "others")}):
        with pytest.raises(ValueError, match="is a store of another plan"):
            stored(tmp_path / "pictures", tmp_path / "store", vae, **other)
    for wrong, words in (("none", "there is no folder"), ("store", "has no masks: give the folder")):
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            Masks(tmp_path / wrong)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures of 8 × 8 pixels, and stores of these with masks of all kinds."""
    folder = tmp_path_factory.mktemp("digits")
    draw_pictures(folder / "pictures", *[(8, 8)] * COUNT)
    for i in range(COUNT):
        draw_mask(folder / f"random/{i}.png", 8, 8, i)
        (folder / "white").mkdir(exist_ok=True)
        Image.new("L", (8, 8), "white").save(folder / f"white/{i}.png")
    given = ["--config", str(small(folder)), "--encode.source", "Pictures"]
    given += ["--encode.source.path", str(folder / "pictures"), "--encode.side", "8", "--encode.step", "8"]
    for name in ("plain", "random", "white"):
        more = [] if name == "plain" else ["--encode.masks.folder", str(folder / name)]
        encode.main([*given, "--encode.store", str(folder / f"store-{name}"), "--encode.device", "cpu", *more])
    return folder


def flags(digits: Path, name: str, *more: str) -> list[str]:
    store = str(digits / f"store-{name}")
    return ["--data", "Stored", "--data.store", store, "--data.held_out", "4", "--data.batch_size", "4", *more]


def test_a_place_counts_as_its_mask_and_the_floor_say(digits: Path, text: CLIPText) -> None:
    codec = Pixels(1, 0.3, 2.66)
    store = Store(digits / "store-random")
    by_content = {
        latent.numpy(force=True).tobytes(): mask
        for latent, mask in zip(*(part.float() for part in store.latents_and_masks(np.arange(COUNT))), strict=True)
    }
    for floor in (0.0, 0.25):
        data = Stored(text, codec, 0, str(digits / "store-random"), 4, held_out=4, mask_floor=floor)
        assert data.masked
        for loader in (data.train_dataloader(), data.val_dataloader()):
            batch = next(iter(loader))
            assert batch.loss_mask is not None
            for x0, found in zip(batch.x0.float(), batch.loss_mask, strict=True):
                mask = by_content[x0.numpy().tobytes()]
                assert torch.equal(found, mask + floor * (1 - mask))
    assert (
        next(iter(Stored(text, codec, 0, str(digits / "store-plain"), 4, held_out=4).train_dataloader())).loss_mask
        is None
    )


def test_pictures_without_masks_count_whole_beside_others(digits: Path) -> None:
    both = Mixture([Part(str(digits / "store-random")), Part(str(digits / "store-plain"))])
    assert both.has_masks
    latents, masks = both.latents_and_masks(np.array([COUNT, 0, COUNT + 1]))
    assert masks[[0, 2]].eq(1).all()
    assert torch.equal(masks[1], Store(digits / "store-random").latents_and_masks(np.array([0]))[1][0])
    assert torch.equal(latents[0], latents[1])


def test_white_masks_train_as_no_masks_to_the_bit_and_others_do_not(digits: Path, tmp_path: Path) -> None:
    config = small(tmp_path)
    for name in ("plain", "white", "random"):
        fit(config, *flags(digits, name), "--run.folder", str(tmp_path / name))
    plain, white = (state(tmp_path / name) for name in ("plain", "white"))
    assert_same(plain, white)
    losses = [
        [line["val/loss"] for line in lines(tmp_path / name) if "val/loss" in line] for name in ("plain", "random")
    ]
    assert losses[1][0] < 0.8 * losses[0][0]  # half of the places count: the validation has masks, too


def test_a_run_with_masks_goes_on_to_the_bit(digits: Path, tmp_path: Path) -> None:
    assert_goes_on_to_the_bit(small(tmp_path), *flags(digits, "random", "--data.mask_floor", "0.1"), stopped=4)


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        (
            "plain",
            ["--data.mask_floor", "0.1"],
            "data.mask_floor needs a store with masks (encode.masks): leave it out",
        ),
        ("random", ["--data.mask_floor", "1.5"], "data.mask_floor must be from 0 to 1, got 1.5"),
        ("random", ["--teacher.model", "x", "--teacher.pairs.steps", "4"], "take a store without masks"),
    ],
)
def test_masks_that_cannot_be_used_are_one_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, more: list[str], words: str
) -> None:
    assert words in refused(capsys, small(tmp_path), *flags(digits, name, *more))
    assert not (tmp_path / "run").exists()
