"""The plane of perception and distortion: its tables and figures, from models that know the answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import refinement
from data import digits
from data.degrade import blurred
from data.latents import Pixels
from data.text.clip import CLIPText
from flow.objective import Objective
from mmdit.model import MMDiT
from pipeline import Pipeline
from pipeline.residual import Regressor


class Known:
    """Gives pictures in place of a pipeline: a mean that is wrong by ¼ everywhere, and so much noise, up or down."""

    def __init__(self, pipe: Pipeline, noise: float) -> None:
        self.pipe, self.noise, self.sampling = pipe, noise, pipe.sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __call__(self, prompts: list[str], seeds: range, picture: Tensor, level: float) -> Tensor:
        real = digits.load("held_out").pixels
        rows = torch.cdist(picture.flatten(1), blurred(real, 1.5).flatten(1)).argmin(1)
        draws = [torch.randint(2, (1, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        mean = real[rows] + torch.where(real[rows] < 0.5, 0.25, -0.25)
        return mean + self.noise * (2 * torch.stack(draws) - 1)


def test_the_tables_hold_the_law_for_samples_of_a_posterior(
    tmp_path: Path, text: CLIPText, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    network = MMDiT(
        1, depth=1, width=16, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8,
        picture_channels=1,
    )  # fmt: skip
    parts = (network.eval(), Objective(), Pixels(1, 0.3, 2.66), text, None)
    pipes = {"plain": Pipeline(*parts), "refined": Pipeline(*parts, Regressor(network, 0.5))}
    noise = {"regressor": 0.0, "plain": 0.25, "refined": 0.125}
    monkeypatch.setattr(Pipeline, "load", lambda path: Known(pipes.get(path.name, pipes["plain"]), noise[path.name]))
    monkeypatch.setattr(refinement, "SAMPLES", (1, 4))
    monkeypatch.setattr(refinement, "STEPS", (1, 2))
    flags = [f"--{name}={name}" for name in noise]
    figures = [f"--{name}={tmp_path / name}.png" for name in ("plot", "sheet")]
    monkeypatch.setattr("sys.argv", ["refinement", *flags, *figures])
    refinement.main()
    out = capsys.readouterr().out
    real = pipes["refined"].codec.encode(digits.load("held_out").pixels)
    assert f"{0.5 * real.square().mean().sqrt():.2f} of the held-out digits" in out  # a new network gives zero
    lines = [line.strip("| ").split(" | ") for line in out.splitlines()]
    law = {line[0]: line for line in lines if line[0] in ("1", "4") and len(line) == 8}
    for count, share in (("1", 1.0), ("4", 0.25)):  # of a sample's own error, in the error of the mean of N
        assert float(law[count][1]) == 1 + share
        assert float(law[count][2]) == pytest.approx(1 + share, abs=0.03)
        assert float(law[count][5]) == pytest.approx(1 + share / 4, abs=0.03)
    psnr = {line[0]: float(line[3].split()[0]) for line in lines if len(line) == 5 and line[3].endswith("dB")}
    assert psnr["regressor"] == pytest.approx(12.04, abs=0.06)
    assert psnr["one sample of whole pictures"] == pytest.approx(12.04 - 3.01, abs=0.1)
    assert psnr["input"] == pytest.approx(10.7, abs=0.1)
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(tmp_path / "plot.png") as plot:
        assert sheet.width > 12 * 64
        assert plot.size == (1200, 750)
    monkeypatch.setattr("sys.argv", ["refinement", "--refined=plain", *flags[:2]])
    with pytest.raises(SystemExit) as end:
        refinement.main()
    assert end.value.code == 2
    assert "--refined must be a model of residuals" in capsys.readouterr().err
