"""Which samples of stores train: what is held out, stages that follow each other, and what is refused."""

from typing import Any

import numpy as np
import pytest
from painted import CODEC, COUNT, HELD_OUT, ROOT, TEXT, assert_equal, batches, by_content, identities

from data.latents import Pixels
from data.module import Stage, Stored
from data.store.mixture import divided, held_out
from data.store.reader import Store
from data.text.clip import CLIPText


@pytest.fixture(scope="module")
def text() -> CLIPText:
    return CLIPText(TEXT)


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
    more = held_out(Store(stores["tokens"]), HELD_OUT + 5)
    assert set(validated) < more


def test_a_store_is_divided_into_what_is_held_out_and_the_rest(stores: dict[str, str]) -> None:
    store = Store(stores["tokens"])
    apart = held_out(store, HELD_OUT)
    for within in (True, False):
        rows = np.concatenate(divided(store, apart, within))
        assert {store.ids()[int(row)].as_py() in apart for row in rows} == {within}


def test_validation_data_are_fixed(stores: dict[str, str], text: CLIPText) -> None:
    runs = [
        list(Stored(text, CODEC, seed, stores["tokens"], size, held_out=HELD_OUT).val_dataloader())
        for seed, size in ((0, 8), (7, 4))
    ]
    for here, there in zip(*runs, strict=True):
        assert_equal(here, there)
        assert here.kept is None


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
        ({"batch_size": 0}, "batch_size from 1 to"),
        ({"store": "nowhere"}, "there is no store at nowhere"),
    ],
)
def test_impossible_arguments_of_the_data_are_refused(
    stores: dict[str, str], text: CLIPText, how: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Stored(text, CODEC, 0, **{"store": stores["tokens"], "held_out": HELD_OUT} | how)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        Stage(stores["small"], 0)
