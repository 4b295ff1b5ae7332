import hashlib
from string import Formatter

import pytest
import torch

from data import digits


def test_split_covers_each_digit_once():
    train, held_out = digits.load("train"), digits.load("held_out")
    assert train.pixels.shape == (1297, 1, 8, 8)
    assert held_out.pixels.shape == (500, 1, 8, 8)
    assert train.labels.shape == (1297,)
    assert held_out.labels.shape == (500,)
    # All 1,797 pictures of the source differ, so disjoint and complete means that the union has as many.
    assert len(torch.unique(torch.cat([train.pixels, held_out.pixels]), dim=0)) == 1797


def test_split_is_frozen():
    """Every number that the project has published rests on this split; another order makes them incomparable."""
    train, held_out = digits.load("train"), digits.load("held_out")
    content = [part.mul(16).byte() for part in (train.pixels, held_out.pixels)] + [train.labels, held_out.labels]
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in content)).hexdigest()
    assert digest == "ae03b681a9953686d54249586770281c03b612c58ddcaed18949ced257bd216f"


def test_pixels_are_sixteenths_of_one():
    pixels, labels = digits.load("train")
    assert pixels.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(pixels * 16, (pixels * 16).round())
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert labels.unique().tolist() == list(range(10))


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"no split 'test'.*train, held_out"):
        digits.load("test")  # type: ignore[arg-type]


@pytest.mark.parametrize("template", digits.TRAIN_TEMPLATES + digits.HELD_OUT_TEMPLATES)
def test_template_names_the_digit_once(template: str):
    fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    assert fields in (["word"], ["numeral"])
    assert len({digits.captions(label, (template,))[0] for label in range(10)}) == 10


def test_both_sets_of_templates_name_digits_in_both_ways():
    for templates in (digits.TRAIN_TEMPLATES, digits.HELD_OUT_TEMPLATES):
        assert any("{word}" in template for template in templates)
        assert any("{numeral}" in template for template in templates)


def test_captions():
    assert "a handwritten seven" in digits.captions(7, digits.TRAIN_TEMPLATES)
    assert digits.captions(0, ("the digit {numeral}", "a {word}")) == ["the digit 0", "a zero"]


def test_held_out_captions_are_never_trained_on():
    seen = {caption for label in range(10) for caption in digits.captions(label, digits.TRAIN_TEMPLATES)}
    new = {caption for label in range(10) for caption in digits.captions(label, digits.HELD_OUT_TEMPLATES)}
    assert len(seen) == 10 * len(digits.TRAIN_TEMPLATES)
    assert len(new) == 10 * len(digits.HELD_OUT_TEMPLATES)
    assert not seen & new
