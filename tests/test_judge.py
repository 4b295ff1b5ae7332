"""judge.py as a user calls it, on a small random model that draws shapes' size."""

import json
from pathlib import Path

import pytest
from PIL import Image

import judge
from data import shapes
from data.latents import VAE

ROOT = Path(__file__).parents[1]


def test_every_picture_is_read_back_and_counted(drawer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    judge.main(["--model", str(drawer), "--steps", "1", "--per-category", "3", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    pictures = json.loads((tmp_path / "pictures-0.json").read_text())["pictures"]
    assert len(pictures) == 3 * len(shapes.CATEGORIES)
    for number, category in enumerate(shapes.CATEGORIES):
        some = pictures[3 * number : 3 * number + 3]
        assert [one["caption"] for one in some] == [r.caption() for r in shapes.requests(category, 3)]
        assert row[category] == pytest.approx(sum(one["right"] for one in some) / 3)
    assert row["overall"] == pytest.approx(sum(row[c] for c in shapes.CATEGORIES) / len(shapes.CATEGORIES))
    assert Image.open(tmp_path / "sheet-0.png").size[0] > 3 * shapes.SIDE
    assert "binding" in capsys.readouterr().out


def test_the_codec_brings_scenes_back_as_the_judge_reads_them() -> None:
    import numpy as np
    import torch

    codec = VAE(ROOT / "assets/shapes/vae")
    scenes = [shapes.scene(77, i) for i in range(100)]
    pixels = torch.from_numpy(np.stack([np.asarray(shapes.picture(scene)) for scene in scenes])).movedim(-1, 1) / 255
    back = codec.decode(codec.encode(pixels)).movedim(1, -1).double().numpy()
    right = [shapes.fulfils(shapes.read(picture), scene.request) for picture, scene in zip(back, scenes, strict=True)]
    assert np.mean(right) >= 0.94
    latents = codec.encode(pixels)
    assert abs(latents.mean().item()) < 0.1
    assert abs(latents.std().item() - 1) < 0.1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "nowhere is no model folder"),
        (["--per-category", "0"], "must be at least 1"),
        (["--sampler", "none"], "there is no sampler"),
    ],
)
def test_bad_input_ends_in_one_line(
    drawer: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        judge.main(["--model", str(drawer), "--out", str(tmp_path / "out"), *flags])
    lines = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, len(lines)) == (2, 1)
    assert message in lines[0]


def test_a_model_of_other_pictures_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        judge.main(["--model", str(model), "--out", str(tmp_path / "out")])
    assert "does not draw pictures of 64×64 in colour" in capsys.readouterr().err
