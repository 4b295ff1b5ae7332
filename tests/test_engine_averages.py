"""Averages of the weights: their recursions in float32, and the network's buffers."""

import torch
from torch import nn

from baselines.dit import DiT
from engine.ema import EMA, Averages, share_frozen
from engine.posthoc import decay, exponent
from engine.strategy import skeleton


def test_averages_are_their_recursions_in_float32() -> None:
    averages = Averages(0.999, (0.5, 0.9, 0.5), (0.05, 0.2), 10)
    assert [*averages.decays()] == ["decay-0.999", "decay-0.5", "decay-0.9", "width-0.05", "width-0.2"]
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    copies = [skeleton(model).to_empty(device="cpu") for _ in averages.decays()]
    ema = EMA(averages, copies, model)
    assert all(torch.equal(copied.weight, model.weight) for copied in copies)
    expected = [model.weight.detach().double() for _ in copies]
    for step in range(1, 41):
        model.weight.data = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        ema.pairs.clear()  # since the weights are another tensor
        ema.update(model, step)
        keeps = [min(d, (1 + step) / (10 + step)) for d in (0.999, 0.5, 0.9)]
        keeps += [decay(step, exponent(width)) for width in (0.05, 0.2)]
        expected = [d * old + (1 - d) * model.weight.double() for d, old in zip(keeps, expected, strict=True)]
    for copied, wanted in zip(copies, expected, strict=True):
        torch.testing.assert_close(copied.weight, wanted.float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(copied.bias, model.bias)
    assert {name: t.dtype for name, t in ema.named().items()} == dict.fromkeys(
        [f"{name}.weight" for name in averages.decays()], torch.float32
    )
    assert ema.main is copies[0]


def test_averages_have_all_buffers_of_the_network() -> None:
    """Those that are no part of its state, too, such as DiT's positions."""
    network = DiT(
        in_channels=4, depth=1, width=16, heads=2, text_dim=8, pooled_dim=8, sample_size=8, pos_embed_max_size=4
    )
    copied = skeleton(network).to_empty(device="cpu")
    averaged = EMA(Averages(), [copied], network).main
    assert dict(averaged.named_buffers()).keys() == {"positions"}
    assert torch.equal(averaged.positions, network.positions)


def test_averages_of_a_network_that_learns_in_part_share_the_rest() -> None:
    """Also parts of another class than in the skeleton, and parameters and buffers beside parts that learn."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), nn.BatchNorm1d(2)
    )
    model.requires_grad_(False)
    model[1][2].weight.requires_grad_(True)
    copied = skeleton(model)
    model[0] = nn.Conv1d(3, 4, 1).requires_grad_(False)
    share_frozen(model, copied)
    ema = EMA(Averages(0.5), [copied], model)
    assert copied[0] is model[0]
    assert copied[1][0] is model[1][0]
    assert copied[2] is model[2]
    assert copied[1][2].bias is model[1][2].bias
    assert copied[1][2].weight is not model[1][2].weight
    assert torch.equal(copied[1][2].weight, model[1][2].weight)
    assert not any(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers()))
    start = model[1][2].weight.detach().clone()
    with torch.no_grad():
        model[1][2].weight += 1.0
    ema.update(model, 9)
    torch.testing.assert_close(copied[1][2].weight, start + 0.5)
    assert [*ema.named()] == ["decay-0.5.1.2.weight"]
