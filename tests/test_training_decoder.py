"""A decoder of image embeddings, from the stores to the sample: what is shown to it, its training, and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from encoded import config_in, run
from image_towers import SIDE, written
from trials import ROOT, assert_goes_on_to_the_bit, assert_two_learn_as_one, fit, refused

from data.clip import CLIPImage
from data.embeddings import EmbeddedPictures, Embeddings
from data.latents import Pixels
from data.module import Stored
from data.order import Share
from data.sizes import SIZE_FEATURES, size_features
from data.store.mixture import Mixture, Part
from data.text.clip import CLIPText
from flow.guidance import ClassifierFree
from flow.objective import Objective
from mmdit.model import MMDiT
from mmdit.network import Condition
from pipeline import Pipeline
from pipeline.sampling import Sampling

SIZES = {"in_channels": 3, "patch_size": 16, "depth": 1, "width": 32, "heads": 1, "text_dim": 160, "sample_size": SIDE,
         "pos_embed_max_size": 4}  # fmt: skip


@pytest.fixture(scope="module")
def shapes_text() -> CLIPText:
    return CLIPText(ROOT / "assets/shapes/text")


def tower(folder: Path) -> list[str]:
    """The flags that encode pictures into embeddings."""
    return ["--codec", "data.clip.CLIPImage", "--codec.folder", str(folder / "tower")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shapes_text: CLIPText) -> Path:
    """Stores of the same scenes' pixels and embeddings, the latter with further scenes; and a base model."""
    folder = tmp_path_factory.mktemp("decoder")
    config = config_in(folder)
    run(config)
    written(folder / "tower")
    run(config, *tower(folder), "--encode.store", str(folder / "embeddings"), "--encode.source.count", "56")
    network = MMDiT(**SIZES, pooled_dim=128)
    Pipeline(network.eval(), Objective(), Pixels(3), shapes_text, Sampling(steps=2, guidance=2.0)).save(folder / "base")
    return folder


def embeddings(made: Path, **how: float) -> Embeddings:
    return Embeddings(str(made / "embeddings"), made / "tower", **how)


@pytest.fixture
def config(made: Path, tmp_path: Path) -> Path:
    """The shipped overlay on the shapes' config, made small."""
    content = yaml.safe_load((made / "config.yaml").read_text())
    overlay = yaml.safe_load((ROOT / "configs/tokens/decoder.yaml").read_text())
    content["run"] |= overlay["run"] | {"folder": str(tmp_path / "run"), "steps": 6, "validate_every": 3}
    content["run"] |= {"checkpoint_every": 3, "log_every": 2}
    content["data"]["init_args"] |= overlay["data"]["init_args"] | {
        "store": str(made / "store"), "batch_size": 8, "held_out": 8,
        "embeddings": {"store": str(made / "embeddings"), "encoder": str(made / "tower"), "noise": 0.5},
    }  # fmt: skip
    content["network"] = overlay["network"]
    content["network"]["init_args"]["path"] = str(made / "base")
    content["optimization"] |= {"warmup": 1}
    content["ema"] = {"decay": 0.9}
    content["strategy"]["compile"] = False
    content["sampling"]["steps"] = 2
    content["grid"]["columns"] = 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "config.yaml"


def test_each_picture_comes_with_its_own_embedding(made: Path, shapes_text: CLIPText) -> None:
    plain = embeddings(made, dropout=0.0)
    data = Stored(shapes_text, Pixels(3), 1, str(made / "store"), 8, held_out=8, embeddings=plain)
    assert (data.level_embeds, str(made / "embeddings") in data.identity()) == (False, True)
    codec, seen = CLIPImage(made / "tower"), 0
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert batch.level is None
        wanted = codec.encode(Pixels(3).decode(batch.x0))
        torch.testing.assert_close(batch.embedding, wanted, atol=0.05, rtol=0.05)  # a store keeps bfloat16
        assert (batch.embedding - wanted.roll(1, 0)).abs().amax(1).min() > 0.2
        pooled = data.on_after_batch_transfer(batch, 0).pooled
        assert torch.equal(pooled[:, 128:], batch.embedding.flatten(1))
        seen += len(wanted)
    assert seen == 16
    shown = data.examples(3)
    assert shown
    assert torch.equal(shown.pictures, shown.real)


def test_embeddings_are_left_out_and_noised_by_seed_and_step(made: Path) -> None:
    count, stores = 4000, [Mixture([Part(str(made / "store"))])]
    pictures = EmbeddedPictures(embeddings(made, dropout=0.25, noise=0.5), stores)
    share = Share(3, np.arange(count), np.arange(count) % 40, 0, 0)
    latents, level = pictures.drawn(share, 7, count)
    left_out = (latents == 0).all(1).flatten()
    assert float(left_out.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert float(level.mean()) == pytest.approx(0.25, abs=0.01)
    for part in (level[left_out], level[~left_out]):  # whether it is left out says nothing of the level
        assert 0 <= float(part.min()) < 0.01
        assert 0.49 < float(part.max()) < 0.5
    kept = (latents - (1 - level[:, None, None, None]) * pictures.of(share))[~left_out & (level > 0.01)]
    noise = kept / level[~left_out & (level > 0.01), None, None, None]
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    half = share._replace(positions=share.positions[1::2], samples=share.samples[1::2])  # as of one of two processes
    for whole, own in zip((latents, level), pictures.drawn(half, 7, count), strict=True):
        assert torch.equal(whole[1::2], own)
    assert not torch.equal(pictures.drawn(share._replace(step=4), 7, count)[0], latents)


def test_training_starts_at_the_base_s_pictures(made: Path, config: Path) -> None:
    fit(config, "--optimization.lr", "1e-12")
    base, decoder = Pipeline.load(made / "base"), Pipeline.load(config.parent / "run")
    prompts, picture = ["a large red circle", ""], torch.rand(1, 3, 32, 48)
    wanted = base(prompts, [0, 1])
    for more in ({}, {"picture": picture}, {"picture": picture, "level": 0.3}):
        torch.testing.assert_close(decoder(prompts, [0, 1], **more), wanted, atol=1e-5, rtol=0)
    assert (config.parent / "run/samples/step-0000006.png").is_file()  # variations of held-out pictures


def test_a_stopped_run_goes_on_to_the_bit(config: Path) -> None:
    assert_goes_on_to_the_bit(config, stopped=4)


def test_two_processes_learn_as_one(config: Path) -> None:
    assert_two_learn_as_one(config, "--run.precision", "32-true", kind="ddp")


def test_a_student_learns_the_guidance_away_from_neither_caption_nor_embedding(config: Path, tmp_path: Path) -> None:
    fit(config, "--data.size_conditioning", "true", "--network.grown_pooled_dim", str(192 + SIZE_FEATURES))
    (tmp_path / "run").rename(tmp_path / "teacher")
    taught = ["--teacher.model", str(tmp_path / "teacher"), "--teacher.guidance", "3"]
    sizes = ["--data.size_conditioning", "true", "--network.path", str(tmp_path / "teacher")]
    found: list[Condition] = []
    with pytest.MonkeyPatch.context() as patch:
        own = ClassifierFree.__init__
        patch.setattr(ClassifierFree, "__init__", lambda self, *args: (found.append(args[1]), own(self, *args))[1])
        fit(config, *taught, *sizes, "--network.grown_pooled_dim", str(192 + SIZE_FEATURES))
    null = next(condition for condition in found if len(condition.pooled) == 8)
    assert null.pooled.shape == (8, 192 + SIZE_FEATURES)
    assert not null.pooled[:, 128:192].any()
    side = size_features(torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]]))
    torch.testing.assert_close(null.pooled[:, 192:], side.expand(8, -1))


def test_it_learns_from_the_embedding(config: Path) -> None:
    """Of a network whose weights for the embedding begin at zero they are the only way to know it."""
    fit(config, "--optimization.lr", "0.01")
    weight = Pipeline.load(config.parent / "run").network.pooled.fc1.weight
    assert float(weight[:, 128:].detach().abs().max()) > 1e-3


def test_what_does_not_fit_is_refused_in_one_line(made: Path, config: Path, capsys: pytest.CaptureFixture) -> None:
    run(made / "config.yaml", *tower(made), "--encode.store", str(made / "few"), "--encode.source.count", "24")

    def other(**how: object) -> list[str]:
        given = {"store": str(made / "embeddings"), "encoder": str(made / "tower")} | how
        return ["--data.embeddings", yaml.safe_dump(given, default_flow_style=True)]

    for flags, message in (
        (other(store=str(made / "few")), "few lacks 16 pictures of"),
        (other(store=str(made / "store")), "was encoded otherwise: codec"),
        (other(store=str(made / "none")), "there is no store at"),
        (other(encoder=str(made / "none")), "config.json"),
        (other(dropout=1.5), "data.embeddings needs dropout and noise from 0 to 1, got 1.5 and 0.5"),
        (other(noise=-1), "data.embeddings needs dropout and noise from 0 to 1, got 0.1 and -1"),
        (other(noise=0), "network.level_embeds is True, but the data need False"),
        (["--network.grown_pooled_dim", "128"], "network's pooled_dim is 128, but codec, text and objective need 192"),
        (["--network.grown_pooled_dim", "100"], "this network has pooled_dim 128 and cannot have 100"),
    ):
        assert message in refused(capsys, config, *flags), flags
