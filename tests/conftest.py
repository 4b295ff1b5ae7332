"""Shared by all tests: one thread, so that parallel workers do not fight over cores; one seed; small models."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from networks import stirred

from data.latents import VAE, Pixels
from data.text.clip import CLIPText
from flow.objective import Objective
from mmdit.model import MMDiT
from pipeline import Pipeline
from pipeline.sampling import Sampling

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Each fixture draws the same numbers, whichever ran before it, those of a whole session, too."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """And so does each test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text() -> CLIPText:
    return CLIPText(ROOT / "assets/digits/text")


@pytest.fixture(scope="session")
def pipe(text: CLIPText) -> Pipeline:
    """A small pipeline with every weight random, so that nothing is hidden behind a zero gate."""
    network = MMDiT(
        in_channels=1, depth=2, width=32, heads=2, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8
    )
    return Pipeline(stirred(network), Objective(shift=1.5), Pixels(1, 0.3, 2.66), text, Sampling(steps=4, guidance=2.0))


@pytest.fixture
def model(pipe: Pipeline, tmp_path: Path) -> Path:
    """The same on disk."""
    pipe.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model on disk that draws pictures of the shapes' size."""
    network = MMDiT(
        in_channels=4, depth=1, width=32, heads=1, text_dim=160, pooled_dim=128, sample_size=8, pos_embed_max_size=4
    )
    text, codec = CLIPText(ROOT / "assets/shapes/text"), VAE(ROOT / "assets/shapes/vae")
    folder = tmp_path_factory.mktemp("drawer") / "model"
    Pipeline(network.eval(), Objective(), codec, text, Sampling(steps=2, guidance=2.0)).save(folder)
    return folder


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small stores of random pictures, by the name of what they hold."""
    import painted  # needs more than most tests do

    return painted.stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> "tuple[StableDiffusion3Pipeline, Path]":
    """Stable Diffusion 3.5 Large in small: diffusers' pipeline, and the folder where it saved itself."""
    import tiny  # needs more than most tests do

    folder = tmp_path_factory.mktemp("released")
    return tiny.pipeline("sd35_large", folder), folder


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of Hugging Face's data sets for this test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a model of the digits of six steps; not to be written into."""
    from trials import fit, small  # slow to import

    folder = tmp_path_factory.mktemp("base")
    fit(small(folder))
    return folder / "run"
