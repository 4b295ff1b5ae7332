"""Training from stores: what batches hold, what is dropped and held out, stages, sizes, whole runs."""

import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from diffusers import AutoencoderKL
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from trials import ENV, assert_same, ended, fit, lines, shell, state

from data.batch import Batch, complete
from data.latents import VAE, Codec, Pixels
from data.module import Stage, Stored
from data.order import GlobalBatches, Share
from data.raw.base import Raw, Source
from data.raw.pictures import cover
from data.sizes import SIZE_FEATURES, size_features
from data.store import samples as stored
from data.store.encoding import Encoding, StoreEncoder
from data.store.reader import Store
from data.store.samples import TrainingSamples, ValidationSamples, chosen
from data.text.clip import CLIPText
from flow.objective import Objective
from mmdit.model import MMDiT
from pipeline import Pipeline
from training.generator import Generator

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "assets/shapes/text"
CODEC = Pixels(3)
COUNT, HELD_OUT = 72, 9
SIZES = ((14, 40), (20, 20), (40, 14))  # heights and widths of the pictures; a bucket for each
BUCKETS = ((8, 32), (16, 16), (32, 8))


class Painted(Source):
    """Random pictures of three shapes with one, two or three captions."""

    shards = 2

    def read(self, shard: int, start: int = 0) -> Iterator[Raw]:
        for number in range(shard * COUNT // 2 + start, (shard + 1) * COUNT // 2):
            height, width = SIZES[number % 3]
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            words = ("a red circle", "two large blue squares", "a cross above a small triangle")
            count = 2 if number % 3 == 1 else 1 + number // 3 % 3
            told = tuple(f"{word} and {number} pixels" for word in words[:count])
            yield Raw(f"painted-{number:03d}", Image.fromarray(pixels), told, (1.0, 3.0, 0.5)[:count])

    def describe(self) -> dict[str, Any]:
        return {"kind": "Painted"}


@pytest.fixture(scope="module")
def text() -> CLIPText:
    return CLIPText(TEXT)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> VAE:
    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Groups of several channels, so that a latent of one pixel has a variance.
        network = AutoencoderKL.from_config(dict(tiny.vae().config) | {"norm_num_groups": 8})
        tiny.frozen(network).save_pretrained(folder)
    return VAE(folder)


def made(folder: Path, encoder: CLIPText, codec: Codec = CODEC, **how: Any) -> str:
    settings = {"side": 16, "step": 8, "max_aspect": 4.0, "device": "cpu"} | how
    assert StoreEncoder(Encoding(Painted(), folder, **settings), codec, encoder).run()
    return str(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, text: CLIPText, codec: VAE) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        "tokens": made(folder / "tokens", text),
        "captions": made(folder / "captions", text, text="captions"),
        "small": made(folder / "small", text, side=8),
        "posterior": made(folder / "posterior", text, codec, latents="posterior"),
    }


@pytest.fixture(scope="module")
def store(stores: dict[str, str]) -> Store:
    return Store(stores["tokens"])


def assert_equal(a: Batch, b: Batch, rows: slice = slice(None)) -> None:
    """Equality to the bit of a batch and of rows of another."""
    assert a.step == b.step
    assert np.array_equal(a.positions, b.positions[rows])
    for name in ("x0", "noise", "text", "pooled", "kept", "sizes"):
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs[rows]), name
    assert a.captions == (b.captions and b.captions[rows])


def batches(data: Stored, steps: int, start: int = 0) -> list[Batch]:
    """The first global batches of a training, as they leave the loader."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=start, global_rank=0, world_size=1, accumulate_grad_batches=1
    )
    return list(islice(data.train_dataloader(), steps))


def whole(store: Store, **how: Any) -> tuple[TrainingSamples, Share]:
    """Many visits to the samples of one bucket, as one batch."""
    samples = np.resize(store.members(1), 2400)
    settings = {"seed": 5, "batch_size": len(samples), "caption_dropout": 0.0, "encoder_dropout": 0.0}
    data = TrainingSamples([store], 2, False, **settings | how)
    return data, Share(0, np.arange(len(samples)), samples, bucket=1)


def null_of(store: Store, text: CLIPText) -> Any:
    """The null condition, as `Stored` takes it."""
    data = Stored(text, CODEC, 0, store.source, held_out=1)
    data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    return data.null


# What is in a batch


def test_the_pictures_fall_into_three_buckets_of_equal_size(store: Store) -> None:
    assert store.buckets == BUCKETS
    assert [len(store.members(bucket)) for bucket in range(3)] == [COUNT // 3] * 3


@pytest.mark.parametrize("name", ["tokens", "captions", "posterior"])
def test_a_share_of_training_data_is_the_slice_of_the_whole(stores: dict[str, str], name: str) -> None:
    store = Store(stores[name])
    data = TrainingSamples([store], 2, True, seed=3, batch_size=8, caption_dropout=0.2, encoder_dropout=0.3)
    rows = stored.divided(store, set(), False)
    one, *two = (GlobalBatches(rows, 8, 3, 0, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
    for step in (0, 1, 30):
        for i, half in enumerate(two):
            assert_equal(data[half.share(step)], data[one.share(step)], slice(4 * i, 4 * i + 4))
    assert not torch.equal(data[one.share(1)].noise[0, 0, 0], data[one.share(0)].noise[0, 0, 0])


@pytest.mark.parametrize("name", ["tokens", "captions"])
def test_loader_workers_change_nothing(stores: dict[str, str], text: CLIPText, name: str) -> None:
    runs = [
        batches(Stored(text, CODEC, 1, stores[name], 8, held_out=HELD_OUT, encoder_dropout=0.4, workers=workers), 6)
        for workers in (0, 2)
    ]
    assert len({batch.x0.shape for batch in runs[0]}) > 1
    for here, there in zip(*runs, strict=True):
        assert_equal(here, there)


def test_captions_are_chosen_by_their_weights(stores: dict[str, str]) -> None:
    store = Store(stores["captions"])
    data, share = whole(store)
    counts = Counter(
        store.captions(int(row)).index(caption)
        for row, caption in zip(share.samples, data[share].captions or (), strict=True)
    )
    share_of_second = counts[1] / len(share.samples)
    assert counts.keys() == {0, 1}
    assert abs(share_of_second - 0.75) < 4 * (0.75 * 0.25 / len(share.samples)) ** 0.5
    ends = [chosen((1.0, 3.0, 0.5), u) for u in (0.0, 0.2222, 0.2223, 0.8888, 0.8889, 1 - 2**-53)]
    assert ends == [0, 0, 1, 1, 2, 2]


def test_each_caption_goes_with_its_picture(stores: dict[str, str], text: CLIPText) -> None:
    for name in ("tokens", "captions"):
        store = Store(stores[name])
        data, share = whole(store)
        share = share._replace(positions=share.positions[:20], samples=share.samples[:20])
        batch = complete(data[share], text, null_of(store, text))
        for i, row in enumerate(share.samples.tolist()):
            own = text.encode(store.captions(row))
            distances = (own.tokens - batch.text[i].float()).flatten(1).norm(dim=1)
            assert distances.min() < 0.01 * own.tokens.norm()
            assert torch.equal(batch.x0[i], store.latents(np.array([row]))[0])


# Dropout


def test_each_encoder_is_dropped_by_itself_and_its_tokens_with_its_pooled_part(store: Store, text: CLIPText) -> None:
    caption, encoder = 0.1, 0.4
    data, share = whole(store, caption_dropout=caption, encoder_dropout=encoder)
    null = store.null
    assert null is not None
    kept_all, _ = whole(store)
    batch, full = complete(data[share], text, null), kept_all[share]
    dropped = np.zeros((len(share.samples), 2), dtype=bool)
    for i, slot in enumerate(text.slots):
        for part, undropped, nothing in (
            (batch.text[:, :, slot.columns], full.text[:, :, slot.columns], null.tokens[:, slot.columns]),
            (batch.pooled[:, slot.pooled], full.pooled[:, slot.pooled], null.pooled[slot.pooled]),
        ):
            as_null = (part == nothing).flatten(1).all(1).numpy()
            as_caption = (part == undropped).flatten(1).all(1).numpy()
            assert np.array_equal(as_caption, ~as_null)  # the one or the other, as a whole
            assert not as_null.all()
            dropped[:, i] |= as_null
            assert np.array_equal(dropped[:, i], as_null)  # tokens and pooled part alike
    alone = (1 - caption) * encoder * (1 - encoder)
    expected = {(False, False): (1 - caption) * (1 - encoder) ** 2, (True, False): alone, (False, True): alone}
    expected[True, True] = 1 - sum(expected.values())
    counts = Counter(map(tuple, dropped.tolist()))
    n = len(dropped)
    assert sum((counts[key] - n * p) ** 2 / (n * p) for key, p in expected.items()) < 16.3  # p = 0.001, 3 degrees
    # Which caption it is has no part in it.
    choice = (full.text == store.text(share.samples, np.ones(n, int)).tokens).flatten(1).all(1).numpy()
    assert abs(np.corrcoef(choice, dropped[:, 0])[0, 1]) < 4 / n**0.5


def test_a_caption_without_encoders_is_the_null_condition(stores: dict[str, str], text: CLIPText) -> None:
    tokens, pooled = text.encode([""])
    for name, dtype in (("tokens", torch.bfloat16), ("captions", torch.float32)):
        for dropouts in ((1.0, 0.0), (0.0, 1.0)):
            data = Stored(text, CODEC, 1, stores[name], 8, *dropouts, held_out=HELD_OUT)
            for batch in batches(data, 3):
                given = data.on_after_batch_transfer(batch, 0)
                assert torch.equal(given.text, tokens.to(dtype).expand_as(given.text))
                assert torch.equal(given.pooled, pooled.to(dtype).expand_as(given.pooled))
        data = Stored(text, CODEC, 1, stores[name], 8, 0.0, 0.0, held_out=HELD_OUT)
        given = data.on_after_batch_transfer(batches(data, 1)[0], 0)
        assert not any(torch.equal(row, tokens[0].to(dtype)) for row in given.text)


def test_captions_alone_give_the_condition_that_tokens_give(stores: dict[str, str], text: CLIPText) -> None:
    both = [
        Stored(text, CODEC, 1, stores[name], 8, 0.1, 0.3, held_out=HELD_OUT, size_conditioning=True)
        for name in ("tokens", "captions")
    ]
    for encoded, told in zip(*(batches(data, 4) for data in both), strict=True):
        assert told.captions
        assert encoded.captions is None
        encoded, told = (data.on_after_batch_transfer(b, 0) for data, b in zip(both, (encoded, told), strict=True))
        assert torch.equal(encoded.x0, told.x0)
        assert torch.equal(encoded.noise, told.noise)
        torch.testing.assert_close(encoded.text.float(), told.text, rtol=2**-8, atol=1e-5)
        torch.testing.assert_close(encoded.pooled, told.pooled, rtol=2**-8, atol=1e-5)
        assert told.captions is told.kept is told.sizes is None


# Posterior


def test_the_posterior_is_drawn_from_anew_at_each_step_and_its_mean_validates(
    stores: dict[str, str], text: CLIPText, codec: VAE
) -> None:
    store = Store(stores["posterior"])
    rows = store.members(1)[:4]
    mean, logvar = store.latents(rows).float().chunk(2, dim=1)
    data = TrainingSamples([store], 2, False, seed=0, batch_size=4, caption_dropout=0, encoder_dropout=0)
    visits = [data[Share(step, np.arange(4), rows, bucket=1)] for step in range(200)]
    scores = torch.stack([(batch.x0 - mean) / (logvar / 2).exp() for batch in visits])
    n = scores[:, 0].numel()
    for sample in scores.unbind(1):
        assert abs(sample.mean()) < 4 / n**0.5
        assert abs(sample.var() - 1) < 4 * (2 / n) ** 0.5
    flat = scores.flatten(1)
    assert abs((flat[1:] * flat[:-1]).mean()) < 4 / flat.numel() ** 0.5  # no step repeats another
    noise = torch.stack([batch.noise for batch in visits])
    assert abs((scores * noise).mean()) < 4 / scores.numel() ** 0.5  # nor is it the noise of the process
    validation = ValidationSamples([store], 2, False)[Share(0, rows, rows, bucket=1)]
    assert torch.equal(validation.x0, mean)
    direct = Stored(text, codec, 0, stores["posterior"], 4, held_out=HELD_OUT)
    assert {batch.x0.shape[1] for batch in batches(direct, 2)} == {16}


# Which samples


def identities(batch: Batch, known: dict[bytes, str]) -> list[str]:
    return [known[row.view(torch.uint8).numpy().tobytes()] for row in batch.x0]


def by_content(path: str) -> dict[bytes, str]:
    """Latents → id."""
    store = Store(path)
    members = [rows for rows in map(store.members, range(len(store.buckets))) if len(rows)]
    return {
        latents.view(torch.uint8).numpy().tobytes(): store.ids()[int(row)].as_py()
        for rows in members
        for row, latents in zip(rows, store.latents(np.array(rows)), strict=True)
    }


def test_held_out_samples_never_train_in_any_stage_and_all_others_do(stores: dict[str, str], text: CLIPText) -> None:
    known = by_content(stores["tokens"]) | by_content(stores["small"])
    every = set(known.values())
    assert len(every) == COUNT
    stage = Stage(stores["small"], 20)
    data = Stored(text, CODEC, 1, stores["tokens"], 8, held_out=HELD_OUT, before=(stage,))
    steps = [set(identities(batch, known)) for batch in batches(data, 60)]
    first, last = set().union(*steps[:20]), set().union(*steps[20:])
    validated = [name for batch in data.val_dataloader() for name in identities(batch, known)]
    assert len(validated) == len(set(validated)) == HELD_OUT
    assert first == last == every - set(validated)
    again = Stored(text, CODEC, 9, stores["tokens"], 4, held_out=HELD_OUT)
    assert sorted(name for batch in again.val_dataloader() for name in identities(batch, known)) == sorted(validated)
    more = stored.held_out(Store(stores["tokens"]), HELD_OUT + 5)
    assert set(validated) < more


def test_a_store_is_divided_into_what_is_held_out_and_the_rest(stores: dict[str, str]) -> None:
    store = Store(stores["tokens"])
    apart = stored.held_out(store, HELD_OUT)
    for within in (True, False):
        rows = np.concatenate(stored.divided(store, apart, within))
        assert {store.ids()[int(row)].as_py() in apart for row in rows} == {within}


def test_validation_data_are_fixed(stores: dict[str, str], text: CLIPText) -> None:
    runs = [
        list(Stored(text, CODEC, seed, stores["tokens"], size, held_out=HELD_OUT).val_dataloader())
        for seed, size in ((0, 8), (7, 4))
    ]
    for here, there in zip(*runs, strict=True):
        assert_equal(here, there)
        assert here.kept is None


# Stages


def test_stages_follow_each_other_and_go_on_in_the_middle(stores: dict[str, str], text: CLIPText) -> None:
    def data() -> Stored:
        stages = (Stage(stores["small"], 3), Stage(stores["captions"], 2))
        return Stored(text, CODEC, 1, stores["tokens"], 8, held_out=HELD_OUT, encoder_dropout=0.3, before=stages)

    straight = batches(data(), 9)
    assert [batch.step for batch in straight] == list(range(9))
    assert [batch.x0.shape[2:] == (8, 8) for batch in straight] == [True] * 3 + [False] * 6
    assert [batch.captions is not None for batch in straight] == [False] * 3 + [True] * 2 + [False] * 4
    for start in (2, 3, 4, 5, 7):
        for here, there in zip(batches(data(), 9 - start, start), straight[start:], strict=True):
            assert_equal(here, there)


# Refusals


def test_a_store_of_another_codec_or_text_is_refused_by_name(stores: dict[str, str], text: CLIPText) -> None:
    other = CLIPText(ROOT / "assets/digits/text")
    for codec, encoder, told in (
        (Pixels(3, shift=0.4), text, ["codec.shift_factor: there 0.5, here 0.4"]),
        (Pixels(1), text, ["codec.channels: there 3, here 1"]),
        (CODEC, other, ["text.length: there 20, here 10", "text.text_encoder_2"]),
    ):
        with pytest.raises(ValueError, match="encoded otherwise") as error:
            Stored(encoder, codec, 0, stores["tokens"], held_out=HELD_OUT)
        assert all(part in str(error.value) for part in told), str(error.value)
        assert "\n" not in str(error.value)
    assert Stored(other, CODEC, 0, stores["captions"], held_out=HELD_OUT)  # which holds nothing encoded
    stage = Stage(stores["posterior"], 2)
    with pytest.raises(ValueError, match=r'codec\.class: there "VAE", here "Pixels"'):
        Stored(text, CODEC, 0, stores["tokens"], held_out=HELD_OUT, before=(stage,))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"caption_dropout": 1.5}, "dropouts must be from 0 to 1, got 1.5 and 0.0"),
        ({"encoder_dropout": -0.1}, "dropouts must be from 0 to 1, got 0.1 and -0.1"),
        ({"held_out": 0}, "held_out must be from 1 to below the store's 72 samples, got 0"),
        ({"held_out": COUNT}, "held_out must be from 1 to below the store's 72 samples, got 72"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"store": "nowhere"}, "there is no store at nowhere"),
    ],
)
def test_what_cannot_be_is_refused(stores: dict[str, str], text: CLIPText, how: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Stored(text, CODEC, 0, **{"store": stores["tokens"], "held_out": HELD_OUT} | how)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        Stage(stores["small"], 0)


# Sizes


def test_size_features_are_sdxl_s() -> None:
    sizes = torch.tensor([[20, 20, 0, 3, 16, 16], [1024, 768, 12, 0, 512, 384]])
    features = size_features(sizes)
    assert features.shape == (2, SIZE_FEATURES)
    assert features.dtype == torch.float32
    by_hand = [
        function(value * 10000 ** (-i / 128))
        for value in sizes[1].tolist()
        for function in (np.cos, np.sin)
        for i in range(128)
    ]
    np.testing.assert_allclose(features[1], by_hand, atol=2e-4)
    theirs = get_timestep_embedding(sizes.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(features, theirs.reshape(2, -1), atol=2e-4, rtol=0)


def test_the_pooled_vector_tells_original_size_crop_and_size(stores: dict[str, str], text: CLIPText) -> None:
    known = by_content(stores["tokens"])
    data = Stored(text, CODEC, 1, stores["tokens"], 8, held_out=HELD_OUT, size_conditioning=True)
    given = {batch.x0.shape[2:]: batch for batch in batches(data, 12)}
    assert given.keys() == set(BUCKETS)
    for size, batch in given.items():
        number = int(identities(batch, known)[0].removeprefix("painted-"))
        height, width = SIZES[number % 3]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        _, top, left = cover(Image.fromarray(pixels), *size)
        pooled = data.on_after_batch_transfer(batch, 0).pooled
        assert pooled.shape == (8, text.pooled_dim + SIZE_FEATURES)
        told = size_features(torch.tensor([[height, width, top, left, *size]]))
        assert torch.equal(pooled[0, text.pooled_dim :], told[0])
        assert (top > 0, left > 0) == (size == (8, 32), size == (32, 8))
    plain = Stored(text, CODEC, 1, stores["tokens"], 8, held_out=HELD_OUT)
    assert batches(plain, 1)[0].sizes is None


def test_the_pipeline_tells_whole_pictures(text: CLIPText, tmp_path: Path) -> None:
    network = MMDiT(
        in_channels=3, depth=1, width=16, heads=1, text_dim=160, pooled_dim=128 + SIZE_FEATURES, sample_size=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipe = Pipeline(network.eval(), Objective(), CODEC, text)
    pipe.save(tmp_path / "model")
    for some in (pipe, Pipeline.load(tmp_path / "model")):
        assert some.sized
        for sides, told in (((8, 32), [8, 32, 0, 0, 8, 32]), ((None, None), [16, 16, 0, 0, 16, 16])):
            pooled = some.condition(["a red circle", ""], *sides).pooled
            assert torch.equal(pooled[:, :128], text.encode(["a red circle", ""]).pooled)
            assert torch.equal(pooled[:, 128:], size_features(torch.tensor([told])).expand(2, -1))
    assert pipe(["a red circle"], [0], height=8, width=32).shape == (1, 3, 8, 32)


# Whole runs


@pytest.fixture
def config(tmp_path: Path, stores: dict[str, str]) -> Path:
    content = yaml.safe_load((ROOT / "configs/shapes.yaml").read_text())
    del content["encode"]
    content["run"] = {"folder": str(tmp_path / "run"), "steps": 6, "validate_every": 3, "checkpoint_every": 3,
                      "log_every": 1, "accelerator": "cpu"}  # fmt: skip
    content["text"]["init_args"]["folder"] = str(TEXT)
    content["codec"] = {"class_path": "Pixels", "init_args": {"channels": 3}}
    content["data"]["init_args"] |= {"store": stores["tokens"], "batch_size": 8, "held_out": HELD_OUT}
    content["network"]["init_args"] |= {
        "in_channels": 3, "depth": 1, "width": 16, "heads": 1, "sample_size": 16, "pos_embed_max_size": 16,
    }  # fmt: skip
    content["optimization"]["warmup"] = 2
    content["sampling"]["steps"] = 2
    content["grid"] = {"prompts": ["a large red circle"], "columns": 1}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_bucketed_run_with_stages_goes_on_to_the_bit(
    config: Path, stores: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = json.dumps([{"store": stores["small"], "steps": 2}, {"store": stores["captions"], "steps": 2}])
    flags = ["--data.before", stages, "--data.size_conditioning", "true", "--network.pooled_dim", str(128 + 1536)]
    straight, faulty = config.parent / "straight", config.parent / "faulty"
    fit(config, *flags, "--run.folder", str(straight))
    draw = Generator.draw_samples

    def fault(self: Generator) -> None:
        if self.global_step == 6:
            raise OSError("the disk fell off")
        draw(self)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "draw_samples", fault)
        with pytest.raises(SystemExit):
            fit(config, *flags, "--run.folder", str(faulty))
    assert state(faulty)["step"] == 3  # in the middle of the second stage
    fit(config, *flags, "--run.folder", str(faulty), "--data.workers", "1")
    assert_same(state(straight), state(faulty))
    model = Pipeline.load(straight / "model")
    assert model.sized
    log = lines(straight)
    assert all(line["val/loss"] > 0 for line in log if "val/loss" in line)
    assert [line["step"] for line in log if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    fit(config, *flags, "--run.folder", str(straight), command="validate")
    assert lines(straight)[-1]["val/loss"] == pytest.approx(
        [line["val/loss"] for line in log if "val/loss" in line][-1], rel=1e-6
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.size_conditioning", "true"], "network.pooled_dim must be 1664 with data.size_conditioning, got 128"),
        (["--network.pooled_dim", "1664"], "network.pooled_dim must be 128 without data.size_conditioning, got 1664"),
        (["--network.pooled_dim", "99"], "pooled_dim is 99, but codec, text and objective need 128"),
        (["--codec.shift", "0.3"], "codec.shift_factor: there 0.5, here 0.3"),
        (["--text.folder", str(ROOT / "assets/digits/text")], "text.length: there 20, here 10"),
        (["--data.store", "nowhere"], "there is no store at nowhere"),
        (["--data.encoder_dropout", "2"], "dropouts must be from 0 to 1"),
        (["--data.before", '[{"store": "nowhere", "steps": 0}]'], "at least 1 step, got 0"),
        (["--network.pos_embed_max_size", "8"], "must be at most 16, the size of the positional table"),
        (["--data.held_out", "1", "--run.devices", "2"], "data.held_out must be at least the 2 processes, got 1"),
        (["--data.held_out", "72"], "held_out must be from 1 to below the store's 72 samples"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    config: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(config, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (config.parent / "run").exists()


@pytest.fixture
def damaged(stores: dict[str, str], tmp_path: Path) -> str:
    """A store whose tokens are not what they were."""
    folder = tmp_path / "damaged"
    shutil.copytree(stores["tokens"], folder)
    for file in (folder / "units").glob("*.tokens.safetensors"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :: 7] = bytes(len(content[len(content) // 2 :: 7]))
        file.write_bytes(content)
    return str(folder)


def test_a_store_that_is_damaged_under_a_run_is_told_in_one_line(
    config: Path, damaged: str, capsys: pytest.CaptureFixture
) -> None:
    told = ended(capsys, config, "--data.store", damaged, status=1)
    assert "checksum" in told
    assert len(told) < 400


def test_a_loader_process_that_finds_a_store_damaged_ends_the_run(config: Path, damaged: str) -> None:
    """With the same line. The command must not wait for its loader processes."""
    command = shell(config, "--data.store", damaged, "--data.workers", "1")
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said = process.communicate(timeout=120)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    (told,) = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert process.returncode == 1
    assert "checksum" in told
    assert len(told) < 400


def test_a_run_does_not_go_on_with_another_store_in_its_place(
    config: Path, stores: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = tmp_path / "place"
    shutil.copytree(stores["tokens"], place)
    fit(config, "--data.store", str(place))
    shutil.rmtree(place)
    shutil.copytree(stores["captions"], place)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(config, "--data.store", str(place))
    assert end.value.code == 2
    assert "holds a run on other data than now lie in" in capsys.readouterr().err


def test_a_store_of_another_version_is_refused(
    config: Path, stores: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(stores["tokens"], newer)
    plan = json.loads((newer / "store.json").read_text())
    (newer / "store.json").write_text(json.dumps(plan | {"version": plan["version"] + 1}))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(config, "--data.store", str(newer))
    assert end.value.code == 2
    assert "version: there 2, here 1" in capsys.readouterr().err
