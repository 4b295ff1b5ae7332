"""SD3's three encoders give what diffusers' pipeline gives, alone or together, and refuse what they cannot encode."""

import gc
import json
import warnings
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from encoders import PREFIXES, PROMPTS, SIZES, absent, assert_same, copied, read, theirs
from safetensors.torch import save_file
from transformers import T5EncoderModel

from data.text.encoder import Text
from data.text.sd3 import SD3Text
from data.text.tower import Tower

L, G, PADDING = slice(0, 64), slice(64, 192), slice(192, None)  # columns of the first 77 tokens


@pytest.fixture(scope="module")
def pipe(released: tuple[StableDiffusion3Pipeline, Path]) -> StableDiffusion3Pipeline:
    return released[0]


@pytest.fixture
def folder(released: tuple[StableDiffusion3Pipeline, Path], tmp_path: Path) -> Path:
    """A copy that may be damaged, of everything about text."""
    return copied(released[1], tmp_path)


@pytest.mark.parametrize("length", [77, 256, 512])
def test_diffusers_gives_the_same(pipe: StableDiffusion3Pipeline, folder: Path, length: int):
    text = SD3Text(folder, **SIZES, max_sequence_length=length)
    ours = text.encode(PROMPTS)
    assert ours.tokens.shape == (3, 77 + length, text.tokens_dim)
    assert ours.pooled.shape == (3, text.pooled_dim)
    assert_same(ours, theirs(pipe, PROMPTS, length))
    with torch.no_grad():
        tokens, negative, pooled, negative_pooled = pipe.encode_prompt(
            PROMPTS[0], None, None, negative_prompt="", max_sequence_length=length
        )
    for caption, row in ((PROMPTS[0], (tokens, pooled)), ("", (negative, negative_pooled))):
        for one, other in zip(text.encode([caption]), row, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # alone instead of in a batch


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_diffusers_gives_the_same_in_half_precision(folder: Path, released: tuple, dtype: str):
    pipe = StableDiffusion3Pipeline.from_pretrained(released[1], torch_dtype=getattr(torch, dtype))
    kept = {str(value.dtype) for name, value in pipe.text_encoder_3.named_parameters() if "wo" in name}
    assert kept == {"torch.float32" if dtype == "float16" else "torch.bfloat16"}
    assert_same(SD3Text(folder, **SIZES, dtype=dtype).encode(PROMPTS), theirs(pipe, PROMPTS))


def test_a_caption_does_not_depend_on_its_batch(folder: Path):
    many = [f"the digit {i}" for i in range(40)] + ["", "the digit 3"]
    text = SD3Text(folder, **SIZES, max_sequence_length=16)
    together = text.encode(many)
    assert torch.equal(together.tokens[3], together.tokens[-1])
    for i in (0, 31, 32, 40):
        alone = SD3Text(folder, **SIZES, max_sequence_length=16).encode([many[i]])
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.pooled[0], together.pooled[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["index", "folder"])
@pytest.mark.parametrize(
    "names",
    [
        ["text_encoder"],
        ["text_encoder_2"],
        ["text_encoder_3"],
        ["text_encoder", "text_encoder_2"],
        ["text_encoder", "text_encoder_3"],
    ],
    ids="+".join,
)
def test_an_absent_encoder_leaves_zeros(folder: Path, names: list[str], how: str):
    tokens, pooled = (part.clone() for part in SD3Text(folder, **SIZES).encode(PROMPTS))
    assert (tokens[:, :77, PADDING] == 0).all()
    for rows, columns in ((slice(77), L), (slice(77), G), (slice(77, None), slice(None))):
        assert (tokens[:, rows, columns] != 0).any(dim=-1).all()
    absent(folder, names, how)
    for name in names:
        match name:
            case "text_encoder":
                tokens[:, :77, L], pooled[:, :64] = 0, 0
            case "text_encoder_2":
                tokens[:, :77, G], pooled[:, 64:] = 0, 0
            case "text_encoder_3":
                tokens[:, 77:] = 0
    text = SD3Text(folder, **SIZES)
    assert_same(text.encode(PROMPTS), Text(tokens, pooled))
    assert [name for name in PREFIXES if text.index()[name] == [None, None]] == names
    assert {name for name in PREFIXES if any(key.startswith(PREFIXES[name]) for key in text.original_state())} == (
        PREFIXES.keys() - names
    )


def test_without_t5_it_is_as_diffusers_has_it(tmp_path: Path):
    pipe = tiny.pipeline("sd35_large", tmp_path, t5=False)
    text = SD3Text(tmp_path, **SIZES)
    assert_same(text.encode(PROMPTS), theirs(pipe, PROMPTS))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert text.index() == {name: entry for name, entry in index.items() if name in text.index()}


def test_one_encoder_at_a_time_is_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: list[weakref.ref] = []
    load = Tower.load

    def watched(self: Tower, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
        assert not any(encoder() for encoder in loaded)
        encoder = load(self, dtype, device)
        assert not encoder.training
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        loaded.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(Tower, "load", watched)
    gc.disable()
    try:
        text = SD3Text(folder, **SIZES)
        assert not loaded
        text.encode(PROMPTS)
        assert len(loaded) == 3
        assert not any(encoder() for encoder in loaded)
    finally:
        gc.enable()


def test_the_random_state_stays(folder: Path):
    before = torch.get_rng_state()
    SD3Text(folder, **SIZES).encode(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_changes_nothing(folder: Path):
    with torch.autocast("cpu", torch.bfloat16):
        ours = SD3Text(folder, **SIZES).encode(PROMPTS)
    assert_same(ours, SD3Text(folder, **SIZES).encode(PROMPTS))


def test_overflow_in_half_precision_is_an_error(folder: Path):
    file = folder / "text_encoder_3" / "model.safetensors"
    tensors = read(file)
    save_file(tensors | {"shared.weight": tensors["shared.weight"] * 1e5}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"^the T5 encoder overflowed in float16: take bfloat16 or float32$"):
        SD3Text(folder, **SIZES, dtype="float16").encode(PROMPTS)
    for dtype in ("bfloat16", "float32"):
        assert SD3Text(folder, **SIZES, dtype=dtype).encode(PROMPTS).tokens.isfinite().all()
    file = folder / "text_encoder" / "model.safetensors"
    tensors = read(file)
    save_file(tensors | {"text_projection.weight": torch.full((64, 64), torch.nan)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"^the CLIP-L encoder overflowed in float32: its weights are damaged$"):
        SD3Text(folder, **SIZES).encode(PROMPTS)


def test_long_captions_are_cut_with_a_warning_each(pipe: StableDiffusion3Pipeline, folder: Path):
    text = SD3Text(folder, **SIZES, max_sequence_length=8)
    long = "a handwritten seven " * 40
    with pytest.warns(UserWarning, match="captions are longer") as caught:
        ours = text.encode([long, "7"])
    told = [str(warning.message) for warning in caught]
    assert [line.split(" start")[0] for line in told] == [
        f"captions are longer than the {length} tokens that {title} reads,"
        for length, title in ((77, "CLIP-L"), (77, "CLIP-G"), (8, "T5"))
    ]
    assert_same(ours, theirs(pipe, [long, "7"], 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode(["7", long])  # told already


def test_no_captions_and_a_bare_string_are_refused(folder: Path):
    text = SD3Text(folder, **SIZES)
    with pytest.raises(ValueError, match="no captions"):
        text.encode([])
    with pytest.raises(TypeError, match="not the single string 'seven'"):
        text.encode("seven")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_sequence_length": 0}, "max_sequence_length must be from 1 to 512, got 0"),
        ({"max_sequence_length": 513}, "max_sequence_length must be from 1 to 512, got 513"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, got float64"),
        ({"device": "abacus"}, "abacus"),
        ({"tokens_dim": 4096}, "T5 in .* is 224 wide, but tokens_dim is 4096"),
        ({"pooled_dim": 2048}, "CLIP-L 64 and CLIP-G 128, do not fit pooled_dim 2048"),
        ({"pooled_dim": 100}, "CLIP-L 64 and CLIP-G 128, do not fit pooled_dim 100"),
        ({"cache": __file__}, "the cache .* is no folder"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_clear_line(folder: Path, options: dict, words: str):
    with pytest.raises(ValueError, match=words) as error:
        SD3Text(folder, **SIZES | options)
    assert "\n" not in str(error.value)


def set_length(folder: Path, length: int, *suffixes: str) -> None:
    for suffix in suffixes:
        file = folder / f"tokenizer{suffix}/tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ({}, (77, 256)),
        ({"": 20, "_2": 20}, (20, 256)),
        ({"_3": 20}, (77, 20)),
        ({"": 1000, "_2": 1000, "_3": 1000}, (77, 256)),  # never more than the towers have positions for
    ],
)
def test_encoders_read_as_many_tokens_as_their_tokenizers(folder: Path, lengths: dict, shape: tuple[int, int]):
    for suffix, length in lengths.items():
        set_length(folder, length, suffix)
    text = SD3Text(folder, **SIZES)
    assert (text.length, text.max_sequence_length) == shape
    assert text.encode(["seven"]).tokens.shape == (1, sum(shape), tiny.TOKENS)
    assert text.mask(["seven"]).shape == (1, sum(shape))
    clips, t5 = slice(0, shape[0]), slice(shape[0], None)
    assert [slot.rows for slot in text.slots] == [slice(None, shape[0]), slice(None, shape[0]), t5]
    tokens = text.encode(["seven"]).tokens[0]
    assert (tokens[clips, PADDING] == 0).all()
    assert (tokens[t5, PADDING] != 0).any(1).all()


def test_clips_of_two_lengths_are_refused(folder: Path):
    set_length(folder, 20, "_2")
    with pytest.raises(ValueError, match=r"^the CLIP towers in .* read different numbers of tokens: \[20, 77\]$"):
        SD3Text(folder, **SIZES)


def test_too_wide_clips_are_refused(folder: Path):
    absent(folder, ["text_encoder_3"], "index")
    with pytest.raises(ValueError, match="are 192 wide, which is more than tokens_dim 100"):
        SD3Text(folder, tokens_dim=100, pooled_dim=tiny.POOLED)


def test_t5_s_part_is_its_final_state_at_every_position(pipe: StableDiffusion3Pipeline, folder: Path):
    """T5's part is its final state, of every position: nothing is masked."""
    ids = pipe.tokenizer_3(PROMPTS, padding="max_length", max_length=32, return_tensors="pt").input_ids
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_3").eval()
    with torch.no_grad():
        wanted = encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    ours = SD3Text(folder, **SIZES, max_sequence_length=32).encode(PROMPTS).tokens[:, 77:]
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
