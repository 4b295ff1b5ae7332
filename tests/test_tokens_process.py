"""The objective and the sampler of codes: the loss by hand, the distribution of what is written, options."""

import math

import pytest
import torch
from torch import Tensor

from flow.objective import Estimate
from flow.path import RectifiedFlow
from mmdit.network import Condition
from pipeline.sampling import Sampling
from tokens.process import NextCode, autoregressive, nucleus, quantile

GRID = torch.linspace(1, 0, 5, dtype=torch.float64)  # four codes


def condition(words: Tensor) -> Condition:
    return Condition(words[..., None].float(), torch.zeros(len(words), 0), torch.ones_like(words).bool())


def test_the_loss_is_an_eighth_text_and_seven_eighths_picture_each_a_mean_over_its_own_tokens() -> None:
    x0 = torch.randint(5, (2, 2, 3, 3)).float()
    words = torch.randint(7, (2, 4))
    picture, text = torch.randn(2, 10, 3, 3), torch.randn(2, 3, 7)
    found = NextCode(5).loss(lambda *_: (picture, text), x0, x0, torch.zeros(2), condition(words))
    for b in range(2):
        spoken = [-text[b, j].log_softmax(0)[words[b, j + 1]] for j in range(3)]
        drawn = [
            -picture[b, 5 * d : 5 * d + 5, i, j].log_softmax(0)[int(x0[b, d, i, j])]
            for d in range(2) for i in range(3) for j in range(3)
        ]  # fmt: skip
        torch.testing.assert_close(found[b], (torch.stack(spoken).mean() + 7 * torch.stack(drawn).mean()) / 8)
    alone = NextCode(5, text_weight=0.0).loss(lambda *_: picture, x0, x0, torch.zeros(2), condition(words))
    torch.testing.assert_close(alone, NextCode(5).nats(picture, x0).flatten(1).mean(1))


def chain(z: Tensor, t: Tensor) -> Estimate:
    """A code of three that depends on the sum of those before it; t says how many there are."""
    number = round(4 * (1 - float(t)))
    before = z.flatten(1)[:, :number].sum(1, keepdim=True)
    logits = torch.cat([0.3 * before, torch.ones_like(before), -0.2 * before], dim=1)
    logits = logits[:, :, None].expand(-1, -1, 4).clone()
    logits[:, :, [n for n in range(4) if n != number]] = math.nan  # no other may be looked at
    return Estimate(logits.reshape(-1, 3, 2, 2), z)


def test_what_is_written_has_the_distribution_of_the_model() -> None:
    count = 40_000
    z = autoregressive(chain, RectifiedFlow(), torch.randn(count, 1, 2, 2), GRID).flatten(1)
    assert set(z.unique().tolist()) == {0.0, 1.0, 2.0}
    for number in range(4):
        sums = z[:, :number].sum(1)
        for before in sums.unique():
            here = sums == before
            share = torch.bincount(z[here, number].long(), minlength=3) / here.sum()
            expected = torch.tensor([0.3 * before, 1.0, -0.2 * before]).softmax(0)
            error = (expected * (1 - expected) / here.sum()).sqrt()
            assert ((share - expected).abs() < 5 * error).all()


def test_a_picture_is_a_function_of_its_own_noise_and_the_steps_only_group_the_codes() -> None:
    noise = torch.randn(6, 1, 2, 2)
    whole = autoregressive(chain, RectifiedFlow(), noise, GRID)
    assert torch.equal(autoregressive(chain, RectifiedFlow(), noise[2:3], GRID), whole[2:3])
    assert torch.equal(autoregressive(chain, RectifiedFlow(), noise, torch.tensor([1.0, 0.3, 0.0])), whole)


def test_the_callback_sees_the_codes_so_far() -> None:
    seen = []
    noise = torch.randn(2, 1, 2, 2)
    z = autoregressive(chain, RectifiedFlow(), noise, GRID, lambda i, z, x0: seen.append((i, x0.flatten(1))))
    assert [i for i, _ in seen] == [1, 2, 3, 4]
    for i, shown in seen:
        assert torch.equal(shown[:, :i], z.flatten(1)[:, :i])
        assert not shown[:, i:].any()


def test_a_low_temperature_takes_the_most_likely_code_and_top_p_leaves_out_the_tail() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).reshape(1, 4, 1, 1)  # probabilities 0.64, 0.24, 0.09, 0.03

    def denoise(z: Tensor, t: Tensor) -> Estimate:
        return Estimate(logits.expand(len(z), -1, 1, 1), z)

    noise, times = torch.randn(20_000, 1, 1, 1), torch.tensor([1.0, 0.0])
    assert not autoregressive(denoise, RectifiedFlow(), noise, times, temperature=0.01).any()
    drawn = autoregressive(denoise, RectifiedFlow(), noise, times, top_p=0.8).flatten()
    share = torch.bincount(drawn.long(), minlength=4) / len(drawn)
    expected = torch.tensor([2.0, 1.0]).softmax(0)
    torch.testing.assert_close(share[:2], expected, atol=0.02, rtol=0)
    assert not share[2:].any()
    assert not autoregressive(denoise, RectifiedFlow(), noise, times, top_p=0.6).any()


def test_the_nucleus_is_the_smallest_set_that_reaches_the_share() -> None:
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    torch.testing.assert_close(nucleus(p, 0.74), torch.tensor([[0.0, 2 / 3, 0.0, 1 / 3]]))
    torch.testing.assert_close(nucleus(p, 0.76), torch.tensor([[0.0, 5 / 9, 1.5 / 9, 2.5 / 9]]))
    assert nucleus(p, 1) is p


def test_quantiles_never_leave_the_vocabulary() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75]], dtype=torch.float64).expand(5, -1)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9999999, 1.0], dtype=torch.float64)
    assert quantile(p, u).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("options", ["top_p=0", "top_p=1.5", "temperature=0", "temperature=-1"])
def test_options_out_of_range_are_refused(options: str) -> None:
    with pytest.raises(ValueError, match="top_p must be above 0 and at most 1, and temperature above 0"):
        Sampling(sampler=f"autoregressive:{options}").walk(NextCode(5))


def test_settings_out_of_range_and_teachers_are_refused() -> None:
    for vocabulary, weight in ((1, 0.125), (5, -0.1), (5, 1.0)):
        with pytest.raises(ValueError, match="needs a vocabulary of at least 2"):
            NextCode(vocabulary, weight)
    with pytest.raises(ValueError, match="learns from no teacher"):
        NextCode(5).loss(chain, GRID, GRID, GRID, None, field=lambda *_: GRID)
