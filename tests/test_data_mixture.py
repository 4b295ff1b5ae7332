"""Several stores in one training: what is read, how often each sample comes, what is held out, and what is refused."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from painted import CODEC, COUNT, HELD_OUT, ROOT, TEXT, assert_equal, batches, by_content, identities
from test_training_stored import config as config_of
from trials import assert_goes_on_to_the_bit, assert_two_learn_as_one, refused

from data.module import Stage, Stored
from data.order import GlobalBatches
from data.store.mixture import Mixture, Part, held_out
from data.store.reader import Store
from data.text.clip import CLIPText
from pipeline.__main__ import main as export
from training.experiment import parser

BATCH = 8


config = config_of  # a fixture


@pytest.fixture(scope="module")
def text() -> CLIPText:
    return CLIPText(TEXT)


def test_samples_are_read_from_their_stores(stores: dict[str, str]) -> None:
    """The small store has two buckets of its own and shares none."""
    one, two = Store(stores["tokens"]), Store(stores["small"])
    both = Mixture([Part(stores["tokens"]), Part(stores["small"]), Part(stores["tokens"])])
    assert both.starts[-1] == 2 * len(one) + len(two)
    assert both.buckets == tuple(dict.fromkeys((*one.buckets, *two.buckets)))
    draw = np.random.default_rng(0)
    for bucket, size in enumerate(both.buckets):
        rows = draw.permutation(both.members(bucket))
        assert len(rows) == sum(
            times * len(store.members(store.buckets.index(size)))
            for store, times in ((one, 2), (two, 1))
            if size in store.buckets
        )
        if not len(rows):
            continue
        choice = np.array([draw.integers(len(both.weights(int(row)))) for row in rows])
        latents, text, sizes = both.latents(rows), both.text(rows, choice), both.sizes(rows)
        for i, row in enumerate(rows):
            store, own = (
                (one, row) if row < COUNT else (two, row - COUNT) if row < 2 * COUNT else (one, row - 2 * COUNT)
            )
            single, which = np.array([own]), choice[i : i + 1]
            assert torch.equal(latents[i], store.latents(single)[0])
            own_text = store.text(single, which)
            assert torch.equal(text.tokens[i], own_text.tokens[0])
            assert torch.equal(text.pooled[i], own_text.pooled[0])
            assert np.array_equal(sizes[i], store.sizes(single)[0])
            assert (both.captions(int(row)), both.weights(int(row))) == (store.captions(own), store.weights(own))


def test_one_store_in_a_list_is_that_store(stores: dict[str, str], text: CLIPText) -> None:
    pair = (
        Stored(text, CODEC, 1, given, BATCH, held_out=HELD_OUT)
        for given in (stores["tokens"], (Part(stores["tokens"]),))
    )
    for one, other in zip(*(batches(data, 30) for data in pair), strict=True):
        assert_equal(one, other)


def test_each_sample_comes_as_often_as_its_store_is_repeated(stores: dict[str, str], text: CLIPText) -> None:
    """Over five epochs, after which every bucket has given whole batches; nothing that is held out ever comes."""
    parts = (Part(stores["tokens"]), Part(stores["small"], 3))
    data = Stored(text, CODEC, 1, parts, BATCH, held_out=HELD_OUT)
    big, small = by_content(stores["tokens"]), by_content(stores["small"])
    epochs = 8
    steps = epochs * sum(map(len, data.pools[0])) // BATCH
    found: Counter[tuple[str, str]] = Counter()
    for batch in batches(data, steps):
        kind = "tokens" if batch.x0[0].view(torch.uint8).numpy().tobytes() in big else "small"
        found.update((kind, name) for name in identities(batch, big | small))
    apart = held_out(Store(stores["tokens"]), HELD_OUT)
    names = set(big.values())
    assert found == Counter({("tokens", name): epochs for name in names - apart}) + Counter(
        {("small", name): 3 * epochs for name in small.values()}
    )
    validated = [name for batch in data.val_dataloader() for name in identities(batch, big)]
    assert Counter(validated) == Counter(apart)


def test_weights_are_shares_of_the_draws_whatever_the_sizes(stores: dict[str, str], text: CLIPText) -> None:
    """Of 10,000 draws, on any number of ranks; a store's samples come equally often, whatever their buckets."""
    weights = (3.0, 1.0, 0.5, 0.0)
    parts = [
        Part(stores[name], weight=w) for name, w in zip(("tokens", "small", "tokens", "small"), weights, strict=True)
    ]
    data = Stored(text, CODEC, 1, tuple(parts), BATCH, held_out=HELD_OUT)
    ends = data.stores[0].starts
    sizes = np.diff(ends) - [HELD_OUT, 0, 0, 0]
    ranks = [GlobalBatches(data.lanes[0], BATCH, 1, 0, rank, 2) for rank in range(2)]
    whole = GlobalBatches(data.lanes[0], BATCH, 1)
    drawn = np.concatenate([whole.share(step).samples for step in range(10_000 // BATCH)])
    for step in (0, 7, 1000):
        halves = [rank.share(step).samples for rank in ranks]
        assert np.array_equal(np.concatenate(halves), drawn[BATCH * step : BATCH * (step + 1)])
    times = np.bincount(drawn, minlength=ends[-1])
    epoch = sizes.sum()  # in which the order is random
    for number, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        own = times[ends[number] : ends[number + 1]]
        share = weight / sum(weights)
        assert abs(own.sum() - share * len(drawn)) <= epoch * share * (1 - share), number
        if weight:
            assert (own > 0).sum() == size
            assert np.ptp(own[own > 0]) <= 2 + share * epoch / size
    both = [
        len({int(part) for part in np.searchsorted(ends, batch, side="right")}) for batch in drawn.reshape(-1, BATCH)
    ]
    assert max(both) == 2  # stores of one bucket are mixed within a batch
    with pytest.raises(ValueError, match="is left to train on"):
        Mixture(parts).lanes([np.zeros(0, dtype=int)], 0)


def test_batches_of_two_stores_go_on_in_the_middle(stores: dict[str, str], text: CLIPText) -> None:
    def data() -> Stored:
        parts = (Part(stores["tokens"], weight=1.5), Part(stores["tokens"], weight=1.0))
        stage = Stage((Part(stores["small"], 2), Part(stores["tokens"])), 3)
        return Stored(text, CODEC, 1, parts, BATCH, held_out=HELD_OUT, encoder_dropout=0.3, before=(stage,))

    straight = batches(data(), 9)
    for start in (2, 3, 7):
        for here, there in zip(batches(data(), 9 - start, start), straight[start:], strict=True):
            assert_equal(here, there)


def test_a_run_goes_on_to_the_bit(config: Path, stores: dict[str, str]) -> None:
    parts = json.dumps([{"store": stores["tokens"], "weight": 3}, {"store": stores["small"], "weight": 0.5}])
    assert_goes_on_to_the_bit(config, "--data.store", parts, stopped=2)
    assert f"store {stores['tokens']} (weight 3) and {stores['small']} (weight 0.5), batch_size 8" in card(config)


def card(config: Path) -> str:
    """What an exported model says of itself."""
    export(["export", str(config.parent / "run")])
    return (config.parent / "run/export/diffusers/README.md").read_text()


def test_two_processes_learn_as_one(config: Path, stores: dict[str, str]) -> None:
    """Also with three buckets, of which one process validates two and the other one, and another not counted."""
    parts = json.dumps([{"store": stores["tokens"]}, {"store": stores["small"], "repeats": 2}])
    assert_two_learn_as_one(config, "--data.store", parts, kind="ddp", relative=1e-5)
    assert f"(Painted, Painted); store {stores['tokens']} and {stores['small']} × 2, batch_size 8" in card(config)


def test_dreambooth_is_a_mixture() -> None:
    files = [f"--config={ROOT}/configs/sd3/{name}.yaml" for name in ("finetune", "lora", "dreambooth")]
    config = parser("").parse_args(files)
    parts = [part.init_args for part in config.data.init_args.store]
    assert [(part.store, part.weight) for part in parts] == [("stores/class", 1), ("stores/thing", 1)]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "data.store is an empty list: name at least one store"),
        ([{"store": "tokens", "repeats": 0}], "must be at least 1, got 0"),
        (
            [{"store": "tokens", "weight": -1}, {"store": "small", "weight": 1}],
            "at least 0, and finite, got -1",
        ),
        ([{"store": "tokens", "weight": 0}, {"store": "small", "weight": 0}], "the weights of data.store are all 0"),
        (
            [{"store": "tokens", "weight": 1}, {"store": "small", "repeats": 2}],
            "none repeats, or none a weight",
        ),
        ([{"store": "tokens", "weight": 1}, {"store": "small"}], "give each store of data.store"),
        ([{"store": "tokens"}, {"store": "captions"}], "cannot be mixed: tokens True and False"),
        ([{"store": "tokens"}, {"store": "nowhere"}], "there is no store at nowhere"),
        ([{"store": "captions"}, {"store": "posterior"}], "cannot be mixed: latents mean and posterior"),
        ([{"stores": "tokens"}], "stores"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(
    config: Path,
    stores: dict[str, str],
    capsys: pytest.CaptureFixture,
    parts: list[dict],
    message: str,
) -> None:
    given = [{key: stores.get(value, value) for key, value in part.items()} for part in parts]
    assert message in refused(capsys, config, "--data.store", json.dumps(given))
    assert not (config.parent / "run").exists()
