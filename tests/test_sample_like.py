"""A picture says how it was drawn: `sample.py --like` draws it again, and other programs read the same settings."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk

import sample
from data.drawn import OURS, png_notes, recorded
from data.raw.pictures import save_png

ENTRY = {
    "file": "a.png", "prompt": "a seven", "seed": 3, "negative": "an eight", "steps": 2, "guidance": 2.5, "sampler":
    "ddim:eta=1", "spacing": "trailing", "rescale": 0.25, "interval": [0.1, 0.9], "skip_layers": [], "skip_scale": 2.8,
    "skip_interval": [0.01, 0.2], "shift": 1.5, "dtype": "float32", "model": "runs/digits", "height": 8, "width": 16,
    "lora": ["/loras/ink.safetensors:0.5", "brush.safetensors"],
}  # fmt: skip


def draw(*argv: object) -> dict:
    """The last entry of samples.json after a call of `sample.py`."""
    out = Path(str(argv[argv.index("--out") + 1]))
    sample.main([str(word) for word in argv])
    return json.loads((out / "samples.json").read_text())[-1]


def with_texts(file: Path, **texts: str) -> Path:
    save_png(Image.new("L", (8, 8)), file, texts)
    return file


def test_the_picture_is_drawn_again(model: Path, tmp_path: Path) -> None:
    """Also with flags without a default, and from noise drawn in the sampler; the flags of the command win."""
    flags = ("--steps", 3, "--guidance", 2.5, "--sampler", "ddim:eta=1", "--rescale", 0.3, "--interval", 0.2, 0.8,
             "--shift", 2, "--negative", "ein Ä", "--seed", 9, "--width", 16)  # fmt: skip
    first = draw("--model", model, "--prompt", "a seven", "--prompt", "a ✓ nine", *flags, "--out", tmp_path / "a")
    file = tmp_path / "a" / first["file"]
    again = draw("--like", file, "--out", tmp_path / "b")
    assert again == first
    assert first["seed"] == 10
    pixels = [np.asarray(Image.open(tmp_path / name / first["file"])).astype(int) for name in ("a", "b")]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1  # batches of two and of one are rounded differently
    assert pixels[0].std() > 5
    other = draw("--like", file, "--prompt", "a six", "--steps", "4", "--out", tmp_path / "c")
    assert other == first | {"prompt": "a six", "steps": 4, "file": "a-six_10.png"}


def test_a_picture_without_guidance_is_drawn_again(model: Path, tmp_path: Path) -> None:
    """Flags that have no effect are not passed on: the command refuses them."""
    first = draw("--model", model, "--prompt", "7", "--guidance", 1, "--steps", 1, "--out", tmp_path / "a")
    assert draw("--like", tmp_path / "a" / first["file"], "--out", tmp_path / "b") == first


def test_an_image_and_its_strength_are_used_again(model: Path, tmp_path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3).save(tmp_path / "start.png")
    flags = ("--image", tmp_path / "start.png", "--strength", 0.5, "--steps", 4)
    first = draw("--model", model, "--prompt", "7", *flags, "--out", tmp_path / "a")
    again = draw("--like", tmp_path / "a" / first["file"], "--out", tmp_path / "b")
    assert again == first
    assert again["strength"] == 0.5
    files = [tmp_path / name / first["file"] for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_text_of_other_programs() -> None:
    assert png_notes(ENTRY)["parameters"] == (
        "a seven <lora:ink:0.5> <lora:brush:1>\n"
        "Negative prompt: an eight\n"
        "Steps: 2, Sampler: DDIM, CFG scale: 2.5, Seed: 3, Size: 16x8, Model: digits, Shift: 1.5"
    )


def test_all_flags_come_back(tmp_path: Path) -> None:
    found = recorded(with_texts(tmp_path / "a.png", **png_notes(ENTRY)))
    without = ("file", "skip_layers", "skip_scale", "skip_interval")
    assert found == {k: v if isinstance(v, list) else str(v) for k, v in ENTRY.items() if k not in without}


def test_the_text_behind_the_pixels_is_read(tmp_path: Path) -> None:
    """Some programs write it there."""
    file = with_texts(tmp_path / "a.png", **png_notes(ENTRY))
    info = PngInfo()
    info.add_itxt(OURS, json.dumps(ENTRY), "", "")
    chunk = info.chunks[0]
    save_png(Image.new("L", (8, 8)), file)
    raw = file.read_bytes()
    with file.open("wb") as out:
        out.write(raw[:-12])
        putchunk(out, chunk[0], chunk[1])
        out.write(raw[-12:])
    assert recorded(file)["prompt"] == "a seven"


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({}, "does not say how it was drawn"),
        ({OURS: "[1]"}, "does not say how it was drawn"),
        ({OURS: "{"}, "is no JSON"),
        ({OURS: '{"prompt": "7", "seed": "x", "model": "m"}'}, "--seed"),
        ({OURS: '{"prompt": "7", "seed": 1, "model": "m", "steps": -4}'}, "--steps"),
        ({OURS: '{"prompt": "7", "seed": 1, "model": "nowhere"}'}, "nowhere"),
    ],
)
def test_another_picture_is_refused(
    texts: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        sample.main(["--like", str(with_texts(tmp_path / "a.png", **texts)), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_but_flags_is_taken(tmp_path: Path) -> None:
    """A stranger's picture cannot choose where files are written."""
    text = json.dumps(ENTRY | {"out": "/elsewhere", "device": "cuda"})
    assert not {"out", "device"} & recorded(with_texts(tmp_path / "a.png", **{OURS: text})).keys()


def test_a_model_is_needed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        sample.main(["--prompt", "7"])
    assert end.value.code == 2
    assert "--model" in capsys.readouterr().err
