"""Two CLIP towers side by side, their slots, and fingerprints of encoders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from towers import FOLDER, TWO

from data.text.clip import CLIPText


def one_of_two(folder: Path, suffix: str) -> Path:
    """A folder with one of the two towers alone."""
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(TWO / f"{name}{suffix}", folder / name)
    return folder


def test_two_towers_are_the_single_ones_side_by_side(tmp_path: Path):
    both, first, second = CLIPText(TWO), *(CLIPText(one_of_two(tmp_path / f"one{s}", s)) for s in ("", "_2"))
    assert (both.tokens_dim, both.pooled_dim) == (first.tokens_dim + second.tokens_dim, 2 * first.pooled_dim)
    assert both.length == first.length == second.length == 20
    captions = ["two small red circles", "", "an orange cross above a blue square"]
    for made, one, other in zip(*(text.encode(captions) for text in (both, first, second)), strict=True):
        assert torch.equal(made, torch.cat([one, other], dim=-1))
    assert not torch.equal(first.encode(captions).pooled, second.encode(captions).pooled)
    assert [*both.index()] == ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]


@pytest.mark.parametrize("folder", [FOLDER, TWO], ids=["one", "two"])
def test_slots_cover_everything_once(folder: Path):
    text = CLIPText(folder)
    tokens, pooled = torch.zeros(text.length, text.tokens_dim), torch.zeros(text.pooled_dim)
    for slot in text.slots:
        tokens[slot.rows, slot.columns] += 1
        pooled[slot.pooled] += 1
    assert torch.equal(tokens, torch.ones_like(tokens))
    assert torch.equal(pooled, torch.ones_like(pooled))
    assert [slot.name for slot in text.slots] == ["text_encoder", "text_encoder_2"][: len(text.towers)]


def test_each_slot_holds_its_own_tower_s_results(tmp_path: Path):
    both = CLIPText(TWO)
    whole = both.encode(["a blue cross"])
    for slot, suffix in zip(both.slots, ("", "_2"), strict=True):
        alone = CLIPText(one_of_two(tmp_path / f"one{suffix}", suffix)).encode(["a blue cross"])
        assert torch.equal(whole.tokens[:, slot.rows, slot.columns], alone.tokens)
        assert torch.equal(whole.pooled[:, slot.pooled], alone.pooled)


def test_two_towers_saved_and_loaded_are_the_same(tmp_path: Path):
    text = CLIPText(TWO)
    text.save(tmp_path)
    again = CLIPText(tmp_path)
    for new, old in zip(again.encode(["a red circle", ""]), text.encode(["a red circle", ""]), strict=True):
        assert torch.equal(new, old)
    assert again.fingerprint() == text.fingerprint()
    assert again.slots == text.slots


def test_towers_of_different_lengths_are_refused(tmp_path: Path):
    shutil.copytree(TWO, tmp_path / "text")
    settings = tmp_path / "text/tokenizer_2/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 12}))
    with pytest.raises(ValueError, match=r"give different numbers of tokens: \[12, 20\]") as error:
        CLIPText(tmp_path / "text")
    assert "\n" not in str(error.value)


def changed(folder: Path, what: str) -> None:
    tokenizer = folder / "tokenizer_2"
    match what:
        case "a weight":
            weights = folder / "text_encoder_2" / "model.safetensors"
            tensors = load(weights.read_bytes())
            tensors["text_model.final_layer_norm.bias"][0] += 1e-3
            save_file(tensors, weights, {"format": "pt"})
        case "a setting":
            config = folder / "text_encoder" / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "relu"}))
        case "a merge":
            content = json.loads((tokenizer / "tokenizer.json").read_text())
            content["model"]["merges"].pop()
            (tokenizer / "tokenizer.json").write_text(json.dumps(content))
        case "the length":
            for name in ("tokenizer", "tokenizer_2"):
                file = folder / name / "tokenizer_config.json"
                file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 12}))
        case "the padding":
            file = tokenizer / "tokenizer_config.json"
            content = json.loads(file.read_text())
            content["pad_token"] = "a" if content["pad_token"] != "a" else "b"
            file.write_text(json.dumps(content))


@pytest.mark.parametrize("what", ["a weight", "a setting", "a merge", "the length", "the padding"])
def test_fingerprints_tell_apart_what_encodes_otherwise(tmp_path: Path, what: str):
    shutil.copytree(TWO, tmp_path / "text")
    same = CLIPText(tmp_path / "text").fingerprint()
    assert same == CLIPText(TWO).fingerprint()
    changed(tmp_path / "text", what)
    assert CLIPText(tmp_path / "text").fingerprint() != same


def test_a_fingerprint_does_not_depend_on_what_was_encoded(text: CLIPText):
    fresh = CLIPText(FOLDER)
    before = fresh.fingerprint()
    fresh.encode(["a seven"])
    fresh.encode(["please " * 3, "an 8"])
    assert fresh.fingerprint() == before == text.fingerprint()
    assert json.loads(json.dumps(before)) == before
    assert before != CLIPText(TWO).fingerprint()
