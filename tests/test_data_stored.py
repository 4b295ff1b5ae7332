"""What a batch from a store holds: its pictures, captions and posteriors, and what is dropped."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from painted import BUCKETS, CODEC, COUNT, HELD_OUT, TEXT, assert_equal, batches, made, vae

from data.batch import complete
from data.latents import VAE
from data.module import Stored
from data.order import GlobalBatches, Share
from data.store.mixture import divided
from data.store.reader import Store
from data.store.samples import TrainingSamples, ValidationSamples, chosen
from data.text.clip import CLIPText


@pytest.fixture(scope="module")
def text() -> CLIPText:
    return CLIPText(TEXT)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> VAE:
    return vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def store(stores: dict[str, str]) -> Store:
    return Store(stores["tokens"])


def whole(store: Store, **how: Any) -> tuple[TrainingSamples, Share]:
    """Many visits to the samples of one bucket, as one batch."""
    samples = np.resize(store.members(1), 2400)
    settings = {"seed": 5, "batch_size": len(samples), "caption_dropout": 0.0, "encoder_dropout": 0.0}
    data = TrainingSamples([store], 2, False, None, **settings | how)
    return data, Share(0, np.arange(len(samples)), samples, bucket=1)


def null_of(store: Store, text: CLIPText) -> Any:
    """The null condition, as `Stored` takes it."""
    data = Stored(text, CODEC, 0, store.source, held_out=1)
    data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    return data.null


def test_the_pictures_fall_into_three_buckets_of_equal_size(store: Store) -> None:
    assert store.buckets == BUCKETS
    assert [len(store.members(bucket)) for bucket in range(3)] == [COUNT // 3] * 3


@pytest.mark.parametrize("name", ["tokens", "captions", "posterior"])
def test_a_share_of_training_data_is_the_slice_of_the_whole(stores: dict[str, str], name: str) -> None:
    store = Store(stores[name])
    data = TrainingSamples([store], 2, True, None, seed=3, batch_size=8, caption_dropout=0.2, encoder_dropout=0.3)
    rows = divided(store, set(), False)
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


def test_a_draw_belongs_to_its_picture_in_whatever_part_of_a_shard(
    text: CLIPText, codec: VAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Store(made(tmp_path / "whole", text, codec, latents="draw", text="captions"))
    monkeypatch.setattr("data.store.encoding.UNIT", 10)
    parts = Store(made(tmp_path / "parts", text, codec, latents="draw", text="captions"))
    assert whole.ids() == parts.ids()
    for bucket in range(3):
        rows = whole.members(bucket)
        torch.testing.assert_close(parts.latents(rows).float(), whole.latents(rows).float(), rtol=0.02, atol=0.02)


def test_validation_takes_the_captions_of_samples_in_turn(stores: dict[str, str]) -> None:
    store = Store(stores["captions"])
    rows = store.members(1)  # of two captions each
    batch = ValidationSamples([store], 2, False, None)[Share(0, rows, rows, bucket=1)]
    assert batch.captions == [store.captions(int(row))[row % 2] for row in rows]
    assert set(rows % 2) == {0, 1}


def test_the_posterior_is_drawn_from_anew_at_each_step_and_its_mean_validates(
    stores: dict[str, str], text: CLIPText, codec: VAE
) -> None:
    store = Store(stores["posterior"])
    rows = store.members(1)[:4]
    mean, logvar = store.latents(rows).float().chunk(2, dim=1)
    data = TrainingSamples([store], 2, False, None, seed=0, batch_size=4, caption_dropout=0, encoder_dropout=0)
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
    validation = ValidationSamples([store], 2, False, None)[Share(0, rows, rows, bucket=1)]
    assert torch.equal(validation.x0, mean)
    direct = Stored(text, codec, 0, stores["posterior"], 4, held_out=HELD_OUT)
    assert {batch.x0.shape[1] for batch in batches(direct, 2)} == {16}
