"""The slots and the fingerprint of SD3's three encoders."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load, save_file

from data.text.encoder import Text
from data.text.sd3 import SD3Text
from data.text.tower import Tower


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "sd3"
    tiny.pipeline("sd3", folder)
    return folder


SIZES = {"tokens_dim": tiny.TOKENS, "pooled_dim": tiny.POOLED, "max_sequence_length": 16}


@pytest.mark.parametrize("absent", [None, "text_encoder", "text_encoder_2", "text_encoder_3"])
def test_sd3_s_slots_are_where_its_results_are(released: Path, tmp_path: Path, absent: str | None):
    shutil.copytree(released, tmp_path / "sd3", ignore=shutil.ignore_patterns("vae", "transformer", "scheduler"))
    if absent:
        index = tmp_path / "sd3/model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {absent: [None, None]}))
    text = SD3Text(tmp_path / "sd3", **SIZES)
    made = text.encode(["a handwritten seven", "an 8"])
    assert [slot.name for slot in text.slots] == [
        name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if name != absent
    ]
    covered = Text(*(torch.zeros_like(part[0]) for part in made))
    for slot in text.slots:
        covered.tokens[slot.rows, slot.columns] += 1
        covered.pooled[slot.pooled] += 1
    for part, ones in zip(made, covered, strict=True):
        assert ones.max() == 1  # no two of them overlap
        assert torch.equal((part != 0).any(0), ones.bool())


def test_sd3_s_slots_hold_each_encoder_alone(released: Path, tmp_path: Path):
    whole = SD3Text(released, **SIZES)
    captions = ["a handwritten seven", ""]
    together = whole.encode(captions)
    for slot in whole.slots:
        shutil.copytree(released, tmp_path / slot.name, ignore=shutil.ignore_patterns("vae", "transformer"))
        index = tmp_path / slot.name / "model_index.json"
        others = {other.name: [None, None] for other in whole.slots if other is not slot}
        index.write_text(json.dumps(json.loads(index.read_text()) | others))
        alone = SD3Text(tmp_path / slot.name, **SIZES)
        (own,) = alone.slots
        for part, ones, here, there in (
            (together.tokens[:, slot.rows, slot.columns], alone.encode(captions).tokens, slot.rows, own.rows),
            (together.pooled[:, slot.pooled], alone.encode(captions).pooled, slot.pooled, own.pooled),
        ):
            assert here == there
            assert torch.equal(part, ones[:, own.rows, own.columns] if ones.ndim == 3 else ones[:, own.pooled])


def test_sd3_s_encoders_that_are_kept_are_read_once_and_give_the_same(released: Path, monkeypatch: pytest.MonkeyPatch):
    reads: list[str] = []
    load_tower = Tower.load

    def counted(self: Tower, *arguments: object):
        reads.append(self.source.name)
        return load_tower(self, *arguments)

    monkeypatch.setattr(Tower, "load", counted)
    let_go, kept = (SD3Text(released, **SIZES) for _ in range(2))
    kept.keep(True)
    assert let_go.fingerprint() == kept.fingerprint()
    for captions in (["a handwritten seven", ""], ["an 8"], ["a handwritten seven", "the digit 3"]):
        for one, other in zip(let_go.encode(captions), kept.encode(captions), strict=True):
            assert torch.equal(one, other)
    assert {name: reads.count(name) for name in reads} == dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3"), 3 + 1
    )
    kept.keep(False)
    kept.encode(["the number 9"])
    assert reads.count("text_encoder") == 3 + 1 + 1


def test_sd3_s_fingerprint_tells_apart_what_encodes_otherwise(released: Path, tmp_path: Path):
    same = SD3Text(released, **SIZES).fingerprint()
    used = SD3Text(released, **SIZES)
    used.encode(["a handwritten seven"])
    assert used.fingerprint() == same
    for other in ({"max_sequence_length": 17}, {"dtype": "bfloat16"}):
        assert SD3Text(released, **SIZES | other).fingerprint() != same
    shutil.copytree(released, tmp_path / "sd3", ignore=shutil.ignore_patterns("vae", "transformer", "scheduler"))
    assert SD3Text(tmp_path / "sd3", **SIZES).fingerprint() == same
    weights = tmp_path / "sd3/text_encoder_3/model.safetensors"
    tensors = load(weights.read_bytes())
    tensors["encoder.final_layer_norm.weight"][0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    assert SD3Text(tmp_path / "sd3", **SIZES).fingerprint() != same
