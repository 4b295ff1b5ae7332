"""Text through one CLIP tower: its vectors, its tokens, and what captions mean."""

import warnings

import pytest
import torch
from einops import reduce
from torch import Tensor
from towers import CAPTIONS

from data import digits
from data.text.clip import CLIPText


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
def test_free_wording_still_means_the_same_digit(text: CLIPText, centroids: Tensor, caption: str):
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
    with pytest.warns(UserWarning, match="captions are longer than the 10 tokens") as caught:
        tokens, _ = text.encode([long + "seven", "7", long + "two"])
    assert [warning.message.captions for warning in caught] == [[long + "seven", long + "two"]]
    assert torch.equal(tokens[0], tokens[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode(CAPTIONS)


def test_cut_captions_are_told_once_whoever_calls(text: CLIPText):
    long = "please " * 40
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        text.encode([long])
        text.encode(["7", long, long + "two"])
    assert len(caught) == 1


def test_no_captions_and_a_bare_string_are_refused(text: CLIPText):
    with pytest.raises(ValueError, match="no captions"):
        text.encode([])
    with pytest.raises(TypeError, match="not the single string 'seven'"):
        text.encode("seven")
