"""DALL·E 1: which logit predicts what, the memory of the codes before, and sizes that do not fit."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.strategy import Strategy
from mmdit.network import Condition
from tokens.dalle import DALLE, rotary
from tokens.process import NextCode

SIZES = {"stack": 2, "codes": 5, "sample_size": 2, "words": 7, "text_length": 4, "depth": 2, "width": 16, "heads": 2}
COUNT = 8  # codes of a picture


def network(**changes: int) -> DALLE:
    return DALLE(**(SIZES | changes)).eval()


def caption(count: int = 2) -> Condition:
    mask = torch.tensor([True, True, True, False]).expand(count, 4)
    return Condition(torch.randint(7, (count, 4, 1)).float(), torch.zeros(count, 0), mask)


def codes(count: int = 2) -> Tensor:
    return torch.randint(5, (count, 2, 2, 2)).float()


def in_order(by_place: Tensor, channels: int) -> Tensor:
    """(B, 2·channels, 2, 2) as (B, 8, channels), in the order in which codes are written."""
    return by_place.unflatten(1, (2, channels)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def table(model: DALLE, z: Tensor, condition: Condition, change: Tensor) -> Tensor:
    """Which of the logits (8) change with each of the eight codes, (8, 8) bool."""
    plain = in_order(model(z, torch.zeros(len(z)), condition), 5)
    rows = []
    for number in range(COUNT):
        place, depth = divmod(number, 2)
        other = z.clone()
        other[:, depth, place // 2, place % 2] = change[:, depth, place // 2, place % 2]
        moved = in_order(model(other, torch.zeros(len(z)), condition), 5)
        rows.append((moved != plain).any(-1).any(0))
    return torch.stack(rows)


@torch.no_grad()
def test_each_logit_sees_all_codes_before_its_own_and_no_other() -> None:
    z = codes(4)
    seen = table(network(), z, caption(4), (z + 1) % 5)
    assert torch.equal(seen, torch.ones(COUNT, COUNT, dtype=torch.bool).triu(1))


@torch.no_grad()
def test_the_first_code_is_predicted_from_the_whole_caption_and_a_token_from_those_before_it() -> None:
    model, condition, z = network(), caption(), codes()
    picture, text = model(z, torch.zeros(2), condition, True)
    assert picture.shape == (2, 10, 2, 2)
    assert text.shape == (2, 3, 7)
    for place in range(3):  # the padding has no number
        changed = condition.text.clone()
        changed[:, place] = (changed[:, place] + 1) % 7
        moved_picture, moved_text = model(z, torch.zeros(2), condition._replace(text=changed), True)
        assert (in_order(moved_picture, 5)[:, 0] != in_order(picture, 5)[:, 0]).any()
        assert (moved_text != text).any(-1).any(0).tolist() == [number >= place for number in range(3)]
    assert torch.equal(model((z + 1) % 5, torch.zeros(2), condition, True)[1], text)


@torch.no_grad()
def test_padding_is_learned_and_its_number_has_no_effect() -> None:
    model, condition, z = network(), caption(), codes()
    plain = model(z, torch.zeros(2), condition)
    other = condition.text.clone()
    other[:, 3] = (other[:, 3] + 1) % 7
    assert torch.equal(model(z, torch.zeros(2), condition._replace(text=other)), plain)
    assert not torch.equal(model(z, torch.zeros(2), condition._replace(mask=torch.ones(2, 4).bool())), plain)
    model.padding[3] += 1.0
    assert not torch.equal(model(z, torch.zeros(2), condition), plain)


@torch.no_grad()
def test_codes_and_words_have_embeddings_of_their_own() -> None:
    model, z = network(), codes()
    condition = caption()._replace(mask=torch.zeros(2, 4).bool())  # no word is read
    plain = model(z, torch.zeros(2), condition)
    model.transformer.embed_tokens.weight[:7] += 1.0
    assert torch.equal(model(z, torch.zeros(2), condition), plain)
    model.transformer.embed_tokens.weight[7:] += torch.randn(5, 16)
    assert not torch.equal(model(z, torch.zeros(2), condition), plain)


@torch.no_grad()
def test_step_by_step_the_logits_are_those_of_one_pass() -> None:
    model, condition, z = network(), caption(), codes()
    whole = in_order(model(z, torch.zeros(2), condition), 5)
    noise = torch.randn_like(z)
    for number in range(COUNT):
        known = in_order(torch.zeros_like(z), 1)[..., 0]
        known[:, :number] = 1
        known = known.unflatten(1, (2, 2, 2)).permute(0, 3, 1, 2)
        found = in_order(model(torch.where(known > 0, z, noise), torch.full((2,), 1 - number / COUNT), condition), 5)
        torch.testing.assert_close(found[:, number], whole[:, number], atol=1e-5, rtol=1e-5)
        assert not found[:, [n for n in range(COUNT) if n != number]].any()
        assert (model.memory is not None) == (number < COUNT - 1)


@torch.no_grad()
def test_the_memory_is_used_and_only_for_the_same_beginning_and_weights() -> None:
    model, condition, z, runs = network(), caption(), codes(), []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: runs.append(inputs[0].shape[1]))

    def ask(number: int, z: Tensor, condition: Condition) -> Tensor:
        return in_order(model(z, torch.full((2,), 1 - number / COUNT), condition), 5)[:, number]

    ask(0, z, condition)
    ask(1, z, condition)
    ask(2, z, condition)
    assert runs == [4, 1, 1]
    other = (z + 1) % 5
    fresh = in_order(model(other, torch.zeros(2), condition), 5)
    torch.testing.assert_close(ask(3, other, condition), fresh[:, 3], atol=1e-5, rtol=1e-5)
    assert runs[-1] == 4 + 3
    ask(4, other, caption())
    assert runs[-1] == 4 + 4
    condition = caption()
    ask(4, other, condition)
    model.blocks[0].mlp.up_proj.weight.mul_(2)
    found = ask(5, other, condition)
    assert runs[-1] == 4 + 5
    torch.testing.assert_close(found, in_order(model(other, torch.zeros(2), condition), 5)[:, 5], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_probabilities_of_all_pictures_add_up_to_one() -> None:
    model, objective = network(stack=1, codes=2), NextCode(2)
    pictures = torch.tensor(list(product((0.0, 1.0), repeat=4))).reshape(16, 1, 2, 2)
    condition = Condition(*(part.expand(16, *part.shape[1:]) for part in caption(1)[:3]))
    nats = objective.nats(model(pictures, torch.zeros(16), condition), pictures).flatten(1).sum(1)
    torch.testing.assert_close((-nats).exp().sum(), torch.tensor(1.0))
    assert nats.std() > 0


def test_positions_turn_as_llama_s_and_in_float32_whatever_the_weights() -> None:
    model, positions = network(), torch.arange(500)[None]
    for ours, theirs in zip(rotary(positions, 8, torch.float32), model.transformer.rotary_emb(torch.ones(1), positions),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)
    for half, whole in zip(rotary(positions, 8, torch.bfloat16), rotary(positions, 8, torch.float32), strict=True):
        assert torch.equal(half, whole.bfloat16())


def test_checkpointing_recomputes_the_same_gradient() -> None:
    model, condition, z = network().train(), caption(), codes()
    found = []
    for kind in ("none", "full"):
        Strategy(activation_checkpointing=kind).prepare(model)
        model.zero_grad()
        NextCode(5).loss(model, z, z, torch.zeros(2), condition).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 1, 2, 2)}, "writes 2 × 2 × 2 codes, got"),
        ({"z": torch.zeros(2, 2, 4, 4)}, "writes 2 × 2 × 2 codes, got"),
        ({"text": torch.zeros(2, 5, 1)}, "reads captions of 4 tokens, got"),
        ({"mask": None}, "needs a condition with mask"),
    ],
)
def test_other_sizes_are_refused_in_one_line(change: dict, message: str) -> None:
    given = {"z": codes()} | change
    condition = caption()._replace(**{name: value for name, value in given.items() if name != "z"})
    with pytest.raises(ValueError, match=message) as caught:
        network()(given["z"], torch.zeros(2), condition)
    assert "\n" not in str(caught.value)


def test_impossible_sizes_are_refused() -> None:
    for wrong in ({"stack": 0}, {"codes": 1}, {"width": 18}):
        with pytest.raises(ValueError, match="sizes of at least 1, two codes"):
            network(**wrong)


@torch.no_grad()
def test_it_is_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    model, condition, z = network(), caption(), codes()
    model.save(tmp_path)
    loaded = DALLE.load(tmp_path)
    assert loaded.settings == model.settings == SIZES
    assert torch.equal(loaded(z, torch.zeros(2), condition), model(z, torch.zeros(2), condition))
