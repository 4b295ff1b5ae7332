"""Pictures from image embeddings, measured: what is drawn for the table, and the command with small random models."""

from pathlib import Path

import pytest
import torch
from decoders import made
from PIL import Image

from benchmarks import decoder as benchmark
from data.examined import scenes
from data.latents import VAE
from pipeline import Pipeline
from pipeline.sampling import Sampling

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of the shapes and a prior of its embeddings."""
    folder = tmp_path_factory.mktemp("models")
    made(folder, VAE(ROOT / "assets/shapes/vae"), 8, Sampling(steps=1, guidance=2.0))
    return folder


def test_each_picture_is_drawn_from_its_own_embedding_and_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "BATCH", 2)
    pipe, real = Pipeline.load(folder / "decoder"), scenes(benchmark.SCENES, 3)
    assert pipe.image_encoder
    shown = benchmark.embedded(pipe.image_encoder, real)
    torch.testing.assert_close(shown, pipe.image_encoder.embedding(pipe.image_encoder.encode(real)))
    found = benchmark.drawn(pipe, ["", "a circle", ""], pipe.sampling, shown, level=0.2, first=5)
    wanted = pipe([""], [7], sampling=pipe.sampling, picture=real[2:], level=0.2)
    torch.testing.assert_close(found[2:], wanted, atol=1e-4, rtol=0)


def test_the_command_prints_both_tables_and_a_sheet(
    folder: Path, drawer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    models = ["--model", str(drawer), "--decoder", str(folder / "decoder"), "--prior", str(folder / "prior")]
    small = ["--per-category", "1", "--scenes", "3", "--steps", "1", "--levels", "0", "0.5"]
    benchmark.main([*models, *small, "--sheet", str(tmp_path / "sheet.png")])
    printed = capsys.readouterr().out
    for row in ("model without embeddings: caption", "decoder: prior's embedding", "decoder: both", "level 0.5"):
        assert f"| {row} |" in printed
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.height / image.width == pytest.approx(5 / 3, rel=0.05)  # scenes, and two rows for each level
    for wrong, message in (
        (["--decoder", str(drawer)], "takes no image embeddings"),
        (["--prior", str(drawer)], "own prior"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main([*models, *wrong])
        assert message in capsys.readouterr().err
