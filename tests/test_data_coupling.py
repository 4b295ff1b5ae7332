"""Which noise a picture is paired with: independent draws, or the nearest of several."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from painted import CODEC, TEXT
from trials import ROOT, fit, lines, refused, small

from data.coupling import nearest_noise
from data.module import Digits
from data.order import Share, Use, normal
from data.store.reader import Store
from data.store.samples import TrainingSamples
from data.text.clip import CLIPText

SHAPE = (2, 4, 4)


def test_one_draw_is_independent_noise_and_more_add_to_it() -> None:
    positions = np.arange(64)
    x0 = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    one, four = (nearest_noise(x0, 3, 7, positions, draws) for draws in (1, 4))
    assert torch.equal(one, normal(3, Use.NOISE, 7, positions, SHAPE))
    kept = (one == four).flatten(1).all(1).float().mean()
    assert 0.1 < kept < 0.45  # the first draw is the nearest of four in a quarter of the samples


def test_it_is_the_nearest_of_the_samples_own_draws() -> None:
    positions = np.array([5, 2, 9])
    x0 = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = nearest_noise(x0, 3, 7, positions, 6)
    for position, picture, noise in zip(positions, x0, found, strict=True):
        draws = normal(3, Use.NOISE, 7, np.array([position]), (6, *SHAPE))[0]
        lengths = [float((draw - picture).norm()) for draw in draws]
        assert torch.equal(noise, draws[int(np.argmin(lengths))])
    assert torch.equal(nearest_noise(x0[1:2], 3, 7, positions[1:2], 6), found[1:2])  # whatever the batch


def test_the_shortening_is_that_of_the_least_of_several_normal_numbers() -> None:
    """‖ε − x0‖² depends on the draw by ‖ε‖² − 2 ε·x0; for a long x0 the greatest ε·x0 counts."""
    x0 = torch.zeros(4000, *SHAPE)
    x0[:, 0, 0, 0] = 1000.0
    along = nearest_noise(x0, 0, 0, np.arange(4000), 2)[:, 0, 0, 0]
    assert abs(along.mean() - np.pi**-0.5) < 0.05  # E max of two standard normal numbers
    assert abs(nearest_noise(x0, 0, 0, np.arange(4000), 1)[:, 0, 0, 0].mean()) < 0.05


def test_digits_and_stores_pair_with_the_nearest(stores: dict[str, str]) -> None:
    ids = np.arange(8)
    text = CLIPText(TEXT)

    def digits(**how: Any) -> Any:
        return next(iter(Digits(text, CODEC, 0, 8, **how).train_dataloader()))

    plain, near = digits(), digits(noise_draws=8)
    assert torch.equal(plain.x0, near.x0)
    assert ((near.noise - near.x0).square().sum() < (plain.noise - plain.x0).square().sum()).item()
    assert torch.equal(near.noise, nearest_noise(near.x0, 0, 0, ids, 8))
    store = Store(stores["tokens"])
    rows = store.members(1)[:4]
    data = TrainingSamples([store], 2, False, None, 5, 4, 0.0, 0.0, noise_draws=3)
    batch = data[Share(2, ids[:4], rows, bucket=1)]
    assert torch.equal(batch.noise, nearest_noise(batch.x0, 5, 2, ids[:4], 3))


def test_a_training_takes_the_overlay_and_refuses_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = small(tmp_path)
    fit(config, "--config", str(ROOT / "configs/coupling/nearest.yaml"))
    assert lines(tmp_path / "run")
    assert "data.noise_draws must be from 1 to 1,024, got 0" in refused(capsys, config, "--data.noise_draws", "0")
