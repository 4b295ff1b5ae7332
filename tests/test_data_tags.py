"""Tags of captions: shuffled and dropped as asked for, a function of (seed, step, place), only where it can be done."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from painted import CODEC, HELD_OUT, TEXT, assert_equal, batches
from test_training_stored import config as config_of
from trials import assert_goes_on_to_the_bit, refused

from data.module import Stored
from data.order import GlobalBatches, Share
from data.store.reader import Store
from data.store.samples import TrainingSamples
from data.text.clip import CLIPText
from data.text.tags import Tags

CAPTION = "one, two,three ,  four, five"
TIMES = 3000

config = config_of  # a fixture


@pytest.fixture(scope="module")
def text() -> CLIPText:
    return CLIPText(TEXT)


def said(tags: Tags, caption: str = CAPTION) -> list[list[str]]:
    """A caption's tags, many times."""
    draw = np.random.default_rng(0)
    return [tags(caption, draw).split(", ") for _ in range(TIMES)]


def test_the_first_stay_and_the_others_are_in_all_orders_alike() -> None:
    found = said(Tags(keep=2))
    assert all(tags[:2] == ["one", "two"] for tags in found)
    counts = Counter(tuple(tags[2:]) for tags in found)
    assert sum(counts.values()) == TIMES
    assert len(counts) == 6
    assert sum((n - TIMES / 6) ** 2 / (TIMES / 6) for n in counts.values()) < 20.5  # p = 0.001, 5 degrees


def test_each_tag_is_dropped_by_itself_but_not_the_first() -> None:
    found = said(Tags(shuffle=False, keep=1, dropout=0.3))
    assert all(tags[0] == "one" for tags in found)
    assert all(tags == sorted(tags, key=CAPTION.find) for tags in found)  # in their order
    here = np.array([[name in tags for name in ("two", "three", "four", "five")] for tags in found])
    assert np.abs(here.mean(0) - 0.7).max() < 4 * (0.3 * 0.7 / TIMES) ** 0.5
    assert np.abs(np.corrcoef(here.T) - np.eye(4)).max() < 4 / TIMES**0.5
    whole = [tags for tags in said(Tags(keep=0, dropout=0.2)) if len(tags) == 5]
    first = np.bincount([tags.index("two") for tags in whole]) / len(whole)
    assert np.abs(first - 0.2).max() < 4 * (0.16 / len(whole)) ** 0.5  # the order does not depend on what is dropped


def test_other_separators_and_nothing_left() -> None:
    draw = np.random.default_rng(0)
    assert sorted(Tags(keep=0, separator=";")("a, b; c", draw).split("; ")) == ["a, b", "c"]
    assert Tags(keep=0, dropout=1.0)(CAPTION, draw) == ""
    assert Tags(keep=9, separator=" ")("one  two", draw) == "one two"
    assert Tags(keep=9)(CAPTION, draw) == "one, two, three, four, five"
    for wrong in ({"keep": -1}, {"dropout": 1.5}, {"separator": ""}, {"shuffle": False}):
        with pytest.raises(ValueError, match=r"data\.tags ne"):
            Tags(**wrong)  # type: ignore[arg-type]


def training(store: Store, tags: Tags | None, seed: int = 3) -> TrainingSamples:
    return TrainingSamples([store], 2, False, None, seed, 8, 0.0, 0.0, tags=tags)


def test_tags_are_a_function_of_seed_step_and_place(stores: dict[str, str]) -> None:
    """And nothing else of the batch depends on them."""
    store, tags = Store(stores["captions"]), Tags(keep=0, separator=" ")
    one, *two = (GlobalBatches([store.members(1)], 8, 3, 0, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
    data, plain = training(store, tags), training(store, None)
    changed = 0
    for step in (0, 1, 30):
        whole, before = data[one.share(step)], plain[one.share(step)]
        for i, half in enumerate(two):
            assert_equal(data[half.share(step)], whole, slice(4 * i, 4 * i + 4))
        assert_equal(whole._replace(captions=before.captions), before)
        for said, given in zip(whole.captions or (), before.captions or (), strict=True):
            assert Counter(said.split()) == Counter(given.split())
            changed += said != given
    assert changed > 20
    share = Share(0, np.arange(8), np.repeat(store.members(1)[:1], 8), bucket=1)
    places = data[share].captions or []
    assert len(set(places)) > 4  # each place draws for itself
    assert places != data[share._replace(step=1)].captions != training(store, tags, 4)[share].captions


def test_the_encoders_are_given_the_tags_and_validation_the_captions(stores: dict[str, str], text: CLIPText) -> None:
    tags = Tags(dropout=0.5, separator="and")
    data = Stored(text, CODEC, 1, stores["captions"], 8, 0.0, held_out=HELD_OUT, tags=tags)
    seen = batches(data, 5)
    assert any("and" not in caption for batch in seen for caption in batch.captions or ())
    assert seen[0].captions
    assert torch.equal(data.on_after_batch_transfer(seen[0], 0).text, text.encode(seen[0].captions).tokens)
    store = Store(stores["captions"])
    for batch in data.val_dataloader():
        each = [store.captions(int(row)) for row in batch.positions]
        assert batch.captions == [own[row % len(own)] for row, own in zip(batch.positions, each, strict=True)]


def test_a_run_with_tags_goes_on_to_the_bit(config: Path, stores: dict[str, str]) -> None:
    tags = ["--data.tags.keep", "0", "--data.tags.dropout", "0.3", "--data.tags.separator", "a"]
    assert_goes_on_to_the_bit(config, "--data.store", stores["captions"], *tags, stopped=2)


def test_tags_of_encoded_text_are_refused(config: Path, stores: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    for name, more, words in (
        ("tokens", "0.1", f"and {stores['tokens']} holds encoded text: leave it out"),
        ("captions", "2", "dropout from 0 to 1"),
    ):
        assert words in refused(capsys, config, "--data.store", stores[name], "--data.tags.dropout", more)
        assert not (config.parent / "run").exists()
