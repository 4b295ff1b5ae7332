"""Hints beside pictures: what each kind shows, what the store holds, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn.functional import avg_pool2d
from trials import ROOT

import encode
from data import digits
from data.latents import Pixels
from data.module import Stored
from data.raw.base import Raw
from data.raw.hints import Blur, Edges, Files, Hint, Hole, Smaller
from data.raw.pictures import save_png, to_image
from data.raw.sources import Pictures
from data.store.encoding import Encoding, StoreEncoder, levels
from data.store.reader import Store
from data.text.clip import CLIPText

TEXT, CODEC, COUNT = ROOT / "assets/digits/text", Pixels(1, 0.3, 2.66), 24
RAW = Raw("a/b.png", b"", ("x",), (1.0,))


def image_of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint8))


def test_edges_lie_where_grey_values_change() -> None:
    step = np.zeros((16, 16))
    step[:, 8:] = 200
    edges = np.asarray(Edges()(RAW, image_of(step)))
    assert set(np.unique(edges)) == {0, 255}
    lit = np.flatnonzero(edges.any(axis=0))
    assert set(lit) <= {7, 8}
    assert (edges[2:-2, lit] == 255).any(axis=1).all()
    assert not np.asarray(Edges()(RAW, image_of(np.full((16, 16), 90)))).any()
    faint = np.zeros((16, 16))
    faint[:, 8:] = 20
    assert not np.asarray(Edges()(RAW, image_of(faint))).any()
    assert np.asarray(Edges(low=10, high=20)(RAW, image_of(faint))).any()


def test_edges_of_equally_bright_colours_are_seen() -> None:
    colours = np.full((16, 16, 3), 240)
    colours[4:12, 4:12, 2] = 20  # yellow is nearly as bright as white
    edges = np.asarray(Edges()(RAW, image_of(colours)))
    assert edges.shape == (16, 16, 3)
    assert (edges == edges[..., :1]).all()
    assert 20 < (edges[..., 0] == 255).sum() < 40


def test_a_blur_has_the_standard_deviation_that_was_asked_for() -> None:
    point = np.zeros((65, 65))
    point[32] = 255
    rows = np.asarray(Blur(5.0)(RAW, image_of(point)), dtype=float)[:, 32]
    places = np.arange(65) - 32
    assert np.sqrt((rows * places**2).sum() / rows.sum()) == pytest.approx(5.0, rel=0.05)


def test_a_smaller_picture_keeps_the_means_of_its_squares_only() -> None:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 1, 16, 16), generator=draw).float()
    coarse = avg_pool2d(pixels, 4)
    squares = coarse.round().repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = [image_of(p[0, 0].numpy()) for p in (pixels, squares)]
    first, second = (np.asarray(Smaller(4)(RAW, image), dtype=float) for image in images)
    assert np.abs(first - second).max() <= 2  # rounded on the way
    assert first.shape == (16, 16)
    slope = image_of(np.tile(np.arange(64) * 3, (64, 1)))
    moved = np.asarray(Smaller(7)(RAW, slope), dtype=float) - np.asarray(slope)
    assert np.abs(moved[:, 8:-8]).mean() < 3  # no shift, which would be 3 grey levels a pixel


def test_a_hole_is_a_rectangle_of_its_picture_and_grey() -> None:
    hole, white = Hole(0.3, 0.7), image_of(np.full((40, 20), 255))
    boxes = [hole.box(str(i), white.size) for i in range(200)]
    widths, heights = ([box[i + 2] - box[i] for box in boxes] for i in (0, 1))
    assert (min(widths), max(widths)) == (6, 14)
    assert min(heights) >= 12
    assert max(heights) <= 28
    assert {box[0] for box in boxes} >= {0, 5, 10}
    assert all(box[2] <= 20 and box[3] <= 40 for box in boxes)
    assert hole.box("7", white.size) == boxes[7] != Hole(0.3, 0.7, seed=1).box("7", white.size)
    left, top, right, bottom = hole.box(RAW.id, white.size)
    expected = np.full((40, 20), 255)
    expected[top:bottom, left:right] = 128
    assert np.array_equal(np.asarray(hole(RAW, white)), expected)
    assert np.array_equal(np.asarray(hole(RAW, white.convert("RGB")))[..., 1], expected)


def test_two_hints_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("b.png", "b.jpg"):
        image_of(np.zeros((8, 8))).save(tmp_path / name)
    with pytest.raises(ValueError, match="has the name of another hint"):
        Files(tmp_path)


def test_files_are_found_by_name_and_scaled_and_mirrored_with_their_picture(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pixels = np.zeros((20, 20))
    pixels[:, :10] = 255
    image_of(pixels).save(tmp_path / "a/b.jpg", quality=100)
    given = image_of(np.zeros((10, 10)))
    found = Files(tmp_path)(RAW, given)
    assert (found.size, found.mode) == ((10, 10), "L")
    assert np.asarray(found)[5, 1] > 240
    other = Files(tmp_path)(RAW._replace(id="a/b.png#mirrored", mirrored=True), given.convert("RGB"))
    assert other.mode == "RGB"
    assert np.array_equal(np.asarray(ImageOps.mirror(other))[..., 0], np.asarray(found))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    pixels, _ = digits.load("train")
    rows = []
    for i in range(COUNT):
        save_png(to_image(pixels[i]), folder / f"{i}.png", {})
        rows.append({"file_name": f"{i}.png", "text": f"digit number {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def stored(pictures: Path, out: Path, hint: Hint, **more: object) -> Path:
    settings = Encoding(Pictures(str(pictures)), out, 8, 8, hint=hint, device="cpu", **more)  # type: ignore[arg-type]
    StoreEncoder(settings, CODEC, CLIPText(TEXT)).run()
    return out


def test_a_store_holds_each_picture_and_its_hint(pictures: Path, tmp_path: Path, text: CLIPText) -> None:
    opened = Store(stored(pictures, tmp_path / "store", Blur(1.0)))
    assert (opened.plan["latents"], opened.plan["channels"], opened.plan["hint"]) == (
        "hint", 2, {"kind": "Blur", "radius": 1.0},
    )  # fmt: skip
    latents = opened.latents(np.arange(COUNT)).float()
    for latent, name in zip(latents, opened.ids().to_pylist(), strict=True):
        image = Image.open(pictures / name)
        for part, shown in zip(latent, (image, Blur(1.0)(RAW, image)), strict=True):
            expected = CODEC.encode(levels(shown)[None].float() / 255)[0, 0].bfloat16().float()
            assert torch.equal(part, expected)
    data = Stored(text, CODEC, 0, str(tmp_path / "store"), 8, held_out=8, caption_dropout=0.0)
    assert data.picture_channels == 1
    assert not data.choices
    batch = next(iter(data.train_dataloader()))
    assert batch.picture is not None
    rows = {row.numpy().tobytes(): latents[i, 1] for i, row in enumerate(latents[:, 0])}
    for x0, hint in zip(batch.x0, batch.picture, strict=True):
        assert torch.equal(hint[0], rows[x0[0].numpy().tobytes()])
    shown = data.examples(3)
    assert shown is not None
    assert shown.pictures.shape == shown.real.shape == (3, 1, 8, 8)
    assert (shown.real.flatten(1).std(1) > shown.pictures.flatten(1).std(1)).all()  # the hints are blurred


def test_a_picture_without_hint_is_left_out_and_named(pictures: Path, tmp_path: Path) -> None:
    hints = tmp_path / "hints"
    hints.mkdir()
    for i in range(COUNT - 1):
        save_png(Image.open(pictures / f"{i}.png"), hints / f"{i}.png", {})
    opened = Store(stored(pictures, tmp_path / "store", Files(hints)))
    assert len(opened) == COUNT - 1
    assert opened.report["dropped"] == {"no hint": 1}


def test_the_hint_of_one_picture_is_that_of_the_store(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ["hint", "--hint", "Edges", "--hint.low", "20", "--hint.high", "40", "--picture"]
    encode.main([*given, str(pictures / "3.png"), "--out", str(tmp_path / "new/edges.png")])
    image = Image.open(pictures / "3.png").convert("RGB")
    made = np.asarray(Image.open(tmp_path / "new/edges.png"))
    assert np.array_equal(made, np.asarray(Edges(low=20, high=40)(RAW, image)))
    assert made.any()
    for more, words in (
        ([str(pictures / "none.png"), "--out", str(tmp_path / "x.png")], "none.png"),
        ([str(pictures / "3.png"), "--out", str(tmp_path / "new/edges.png")], "exists already"),
        ([str(pictures / "3.png"), "--out", str(tmp_path / "x.png"), "--hint.low", "50"], "0 < low <= high"),
        ([str(pictures / "3.png"), "--out", str(tmp_path / "x.png"), "--hint", "Lines"], "Lines"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            encode.main([*given, *more])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2
        assert words in line
        assert not (tmp_path / "x.png").exists()


def test_impossible_hints_are_refused(pictures: Path, tmp_path: Path, text: CLIPText) -> None:
    with pytest.raises(ValueError, match="edges need sigma > 0"):
        Edges(low=30, high=20)
    with pytest.raises(ValueError, match="radius > 0"):
        Blur(0.0)
    with pytest.raises(ValueError, match="factor of at least 2"):
        Smaller(1)
    with pytest.raises(ValueError, match="a hole needs 0 < smallest <= largest <= 1"):
        Hole(0.8, 0.7)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Files(tmp_path / "none")
    with pytest.raises(ValueError, match="latents must be mean for two pictures each, got posterior"):
        stored(pictures, tmp_path / "x", Blur(), latents="posterior")
    plain = Encoding(Pictures(str(pictures)), tmp_path / "plain", 8, 8, device="cpu")
    StoreEncoder(plain, CODEC, CLIPText(TEXT)).run()
    hinted = stored(pictures, tmp_path / "hinted", Blur())
    from data.module import Stage

    with pytest.raises(ValueError, match="some of the stores hold choices or hints and others not"):
        Stored(text, CODEC, 0, str(hinted), 8, held_out=8, before=(Stage(str(tmp_path / "plain"), 3),))
