import json
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from einops import reduce
from safetensors.torch import load, save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from data import digits
from data.text.clip import CLIPText
from data.text.encoder import Text, TextEncoder
from data.text.sd3 import SD3Text
from data.text.tower import Tower

FOLDER = Path(__file__).parents[1] / "assets" / "digits" / "text"
TWO = Path(__file__).parents[1] / "assets" / "shapes" / "text"
TEMPLATES = digits.TRAIN_TEMPLATES + digits.HELD_OUT_TEMPLATES
CAPTIONS = [caption for label in range(10) for caption in digits.captions(label, TEMPLATES)]


@pytest.fixture(scope="module")
def text() -> CLIPText:
    return CLIPText(FOLDER)


def test_shapes(text: CLIPText):
    tokens, pooled = text.encode(["a handwritten seven", ""])
    assert tokens.shape == (2, text.length, text.tokens_dim)
    assert pooled.shape == (2, text.pooled_dim)
    assert tokens.dtype == pooled.dtype == torch.float32
    assert not tokens.requires_grad
    assert not pooled.requires_grad


def test_vectors_are_those_that_sd3_takes(text: CLIPText):
    """Tokens: all layers but the last, then no norm. Pooled: all layers, the norm, the end token, the projection."""
    caption = "the digit 7"
    ids = text.towers[0].tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
    model = text.towers[0].encoder.text_model
    causal = torch.full((1, 1, text.length, text.length), -torch.inf).triu(1)
    states = model.embeddings(ids)
    for layer in model.encoder.layers[:-1]:
        states = layer(states, causal)
    encoded = text.encode([caption])
    torch.testing.assert_close(encoded.tokens, states, rtol=1e-5, atol=1e-5)
    end = ids[0].tolist().index(text.towers[0].tokenizer.eos_token_id)
    last = model.final_layer_norm(model.encoder.layers[-1](states, causal))[:, end]
    torch.testing.assert_close(encoded.pooled, text.towers[0].encoder.text_projection(last), rtol=1e-5, atol=1e-5)


def test_a_caption_does_not_depend_on_its_batch(text: CLIPText):
    together = text.encode(CAPTIONS)
    for i in (0, 7, 50, len(CAPTIONS) - 1):
        alone = text.encode([CAPTIONS[i]])
        torch.testing.assert_close(together.tokens[i], alone.tokens[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.pooled[i], alone.pooled[0], rtol=1e-4, atol=1e-5)


def test_mixed_precision_does_not_reach_the_text(text: CLIPText):
    plain = text.encode(["a five"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = text.encode(["a five"])
    assert torch.equal(plain.pooled, mixed.pooled)
    assert torch.equal(plain.tokens, mixed.tokens)


@pytest.fixture(scope="module")
def centroids(text: CLIPText) -> Tensor:
    """Mean pooled vector `(10, P)` of each digit's captions to train on."""
    captions = [caption for d in range(10) for caption in digits.captions(d, digits.TRAIN_TEMPLATES)]
    return reduce(text.encode(captions).pooled, "(digit template) p -> digit p", "mean", digit=10)


@pytest.mark.parametrize("template", digits.HELD_OUT_TEMPLATES)
def test_captions_never_trained_on_mean_the_same_digit(text: CLIPText, centroids: Tensor, template: str):
    pooled = text.encode([digits.captions(d, (template,))[0] for d in range(10)]).pooled
    gaps = torch.cdist(pooled, centroids)  # (10, 10)
    own = gaps.diagonal().max().item()
    assert own < 0.2 * gaps.fill_diagonal_(torch.inf).min()


@pytest.mark.parametrize("caption", ["draw me a SEVEN", "Seven!", "7", "  seven ", "big bold 7", "zyx 7"])
def test_what_a_user_may_type(text: CLIPText, centroids: Tensor, caption: str):
    assert torch.cdist(text.encode([caption]).pooled, centroids).argmin() == 7


def test_null_caption_is_apart_from_every_digit(text: CLIPText, centroids: Tensor):
    null = text.encode([""]).pooled
    assert torch.cdist(null, centroids).min() > 0.5 * torch.pdist(centroids).min()


def test_each_word_of_the_templates_is_one_token(text: CLIPText):
    for caption in CAPTIONS:
        pieces = caption.replace(",", " ,").split()
        assert text.towers[0].tokenizer.tokenize(caption) == [piece + "</w>" for piece in pieces]


def test_every_caption_fits_with_room_for_a_longer_prompt(text: CLIPText):
    longest = "a photo of a handwritten digit seven"
    assert max(map(len, text.towers[0].tokenizer([*CAPTIONS, longest]).input_ids)) < text.length == 10


def test_numerals_never_merge(text: CLIPText):
    assert text.towers[0].tokenizer.tokenize("77 a7b") == ["7</w>", "7</w>", "a</w>", "7</w>", "b</w>"]


@pytest.mark.parametrize("caption", [*CAPTIONS[:12], "", "xylophone", "über 7 日本 🙂", "a\ttab", "'s"])
def test_tokenizer_gives_every_text_back(text: CLIPText, caption: str):
    ids = text.towers[0].tokenizer(caption, add_special_tokens=False).input_ids
    back = str(text.towers[0].tokenizer.decode(ids))
    assert "".join(back.split()) == "".join(caption.split())
    assert text.towers[0].tokenizer.unk_token_id not in ids


def test_long_captions_are_cut_with_a_warning(text: CLIPText):
    long = "please " * 40
    with pytest.warns(UserWarning, match="2 of 3 captions are longer than the 10 tokens") as caught:
        tokens, _ = text.encode([long + "seven", "7", long + "two"])
    assert caught[0].filename == __file__
    assert torch.equal(tokens[0], tokens[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode(CAPTIONS)


def test_index_is_what_diffusers_would_write(text: CLIPText):
    assert isinstance(text, TextEncoder)
    assert text.index() == {
        "text_encoder": ["transformers", type(text.towers[0].encoder).__name__],
        "tokenizer": ["transformers", type(text.towers[0].tokenizer).__name__],
    }


def test_no_captions_and_a_bare_string_are_refused(text: CLIPText):
    with pytest.raises(ValueError, match="no captions"):
        text.encode([])
    with pytest.raises(TypeError, match="not the single string 'seven'"):
        text.encode("seven")


def test_saved_and_loaded_is_the_same(text: CLIPText, tmp_path: Path):
    text.save(tmp_path)
    for new, old in zip(CLIPText(tmp_path).encode(CAPTIONS), text.encode(CAPTIONS), strict=True):
        assert torch.equal(new, old)
    files = {file.relative_to(tmp_path).as_posix(): file for file in tmp_path.rglob("*") if file.is_file()}
    assert set(files) == {file.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("*") if file.is_file()}
    assert all(file.suffix in (".safetensors", ".json", ".txt") for file in files.values())
    modes = {stat.S_IMODE(file.stat().st_mode) for file in files.values()}
    assert len(modes) == 1  # who can read the one can read the others
    name = "text_encoder/model.safetensors"
    assert files[name].read_bytes() == (FOLDER / name).read_bytes()


def test_saving_over_the_files_that_are_in_use(tmp_path: Path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    text = CLIPText(tmp_path)
    before = text.encode(CAPTIONS)
    text.save(tmp_path)
    for again in (text, CLIPText(tmp_path)):
        assert torch.equal(again.encode(CAPTIONS).pooled, before.pooled)


def test_transformers_alone_reads_the_folder(text: CLIPText):
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    encoder = CLIPTextModelWithProjection.from_pretrained(FOLDER / "text_encoder")
    ids = tokenizer(["an 8"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(encoder(ids).text_embeds, text.encode(["an 8"]).pooled)


def test_older_tokenizer_files_are_read(text: CLIPText, tmp_path: Path):
    """Released SD3 folders hold `vocab.json` and `merges.txt` instead of `tokenizer.json`."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    file.unlink()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    assert torch.equal(CLIPText(tmp_path).encode(CAPTIONS).pooled, text.encode(CAPTIONS).pooled)


def test_half_precision_files_are_read_as_float32(text: CLIPText, tmp_path: Path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    save_file({name: value.half() for name, value in load(weights.read_bytes()).items()}, weights, {"format": "pt"})
    pooled = CLIPText(tmp_path).encode(["a two"]).pooled
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, text.encode(["a two"]).pooled, rtol=0.02, atol=0.02)


def test_committed_tower_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 2_000_000


def damage(folder: Path, fault: str) -> None:
    weights, config = folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "config.json"
    tensors = load(weights.read_bytes())
    name = "text_model.final_layer_norm.bias"
    match fault:
        case "no folder":
            shutil.rmtree(folder)
        case "no weights":
            weights.unlink()
        case "no tokenizer":
            shutil.rmtree(folder / "tokenizer")
        case "no vocabulary":
            (folder / "tokenizer" / "tokenizer.json").unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "empty":
            weights.write_bytes(b"")
        case "pickle":
            torch.save(tensors, weights)
        case "one weight too few":
            save_file({key: value for key, value in tensors.items() if key != name}, weights, {"format": "pt"})
        case "one weight too many":
            save_file(tensors | {"text_model.extra": torch.zeros(1)}, weights, {"format": "pt"})
        case "another size":
            save_file(tensors | {name: torch.zeros(3)}, weights, {"format": "pt"})
        case "foreign weights":
            save_file({"pos_embed": torch.zeros(3)}, weights, {"format": "pt"})
        case "broken config":
            config.write_text("{")
        case "foreign config":
            config.write_text(json.dumps({"model_type": "t5"}))
        case "broken tokenizer":
            file = folder / "tokenizer" / "tokenizer.json"
            file.write_bytes(file.read_bytes()[:500])
        case "larger tokenizer":
            file = folder / "tokenizer" / "tokenizer.json"
            content = json.loads(file.read_text())
            content["model"]["vocab"]["more</w>"] = len(content["model"]["vocab"])
            file.write_text(json.dumps(content))
        case "longer tokenizer":
            file = folder / "tokenizer" / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 77}))


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("no folder", FileNotFoundError, "tokenizer_config.json is missing"),
        ("no weights", FileNotFoundError, "no weights at .*model.safetensors"),
        ("no tokenizer", FileNotFoundError, "tokenizer_config.json is missing"),
        ("no vocabulary", FileNotFoundError, "vocab.json is missing"),
        ("truncated", ValueError, "truncated or no safetensors file"),
        ("empty", ValueError, "truncated or no safetensors file"),
        ("pickle", ValueError, "is a pickle, which can run code"),
        ("one weight too few", ValueError, r"1 missing \(text_model.final_layer_norm.bias\)"),
        ("one weight too many", ValueError, r"1 left over \(text_model.extra\)"),
        ("another size", ValueError, r"1 mis-shaped \(text_model.final_layer_norm.bias \(3,\)"),
        ("foreign weights", ValueError, r"do not fit .*53 missing .*, 1 left over \(pos_embed\)"),
        ("broken config", ValueError, "config.json is no JSON"),
        ("foreign config", ValueError, "model_type 't5' instead of 'clip_text_model'"),
        ("broken tokenizer", ValueError, "no readable CLIPTokenizer"),
        ("larger tokenizer", ValueError, "do not fit: 701 entries and 10 tokens a caption, against 700 and 10"),
        ("longer tokenizer", ValueError, "do not fit: 700 entries and 77 tokens a caption, against 700 and 10"),
    ],
)
def test_damaged_folder_is_one_clear_line(tmp_path: Path, fault: str, kind: type[Exception], words: str):
    folder = tmp_path / "text"
    shutil.copytree(FOLDER, folder)
    damage(folder, fault)
    with pytest.raises(kind, match=words) as error:
        CLIPText(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


# Two towers


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


# Fingerprints


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


# SD3's


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


def test_transformers_stays_silent(tmp_path: Path):
    """No progress bar, no report of missing weights, no advice on long captions: in a process of its own, since the
    log of transformers keeps the stream that it found at its import."""
    damaged = tmp_path / "text"
    shutil.copytree(FOLDER, damaged)
    damage(damaged, "one weight too few")
    code = f"""
import warnings
from data.text.clip import CLIPText
warnings.simplefilter("ignore")
CLIPText({str(FOLDER)!r}).encode(["please " * 40])
try:
    CLIPText({str(damaged)!r})
except ValueError:
    print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[2], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")
