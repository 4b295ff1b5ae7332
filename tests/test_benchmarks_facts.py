"""benchmarks/facts.py: the best denoiser in closed form, and what the vaguer captions allow."""

import pytest
import torch
from torch import Tensor

from benchmarks import facts
from benchmarks.following import related
from data.latents import VAE
from mmdit.model import MMDiT
from pipeline import Pipeline


def test_the_best_denoiser_of_two_points_is_a_hyperbolic_tangent() -> None:
    """For x = ±1 with p(+1) = p, x̂ = tanh((1 − t)·z/t² + atanh(2p − 1))."""
    draw = torch.Generator().manual_seed(0)
    x0, noise, t = torch.ones(2000, 1), torch.randn(2000, 1, generator=draw), 0.6
    z = (1 - t) * x0 + t * noise
    for share in (0.5, 0.2):
        parts = [facts.Part(torch.ones(3, 1), share), facts.Part(-torch.ones(5, 1), 1 - share)]
        best = torch.tanh((1 - t) * z / t**2 + torch.atanh(torch.tensor(2 * share - 1)))
        wanted = (best - x0).square().mean() / t**2
        assert facts.least_loss(x0, noise, t, parts) == pytest.approx(float(wanted), rel=1e-4)
    assert facts.least_loss(x0, noise, t, [facts.Part(torch.ones(1, 1), 1.0)]) == 0


def test_a_vaguer_caption_allows_the_full_one_and_others_with_shares_of_one() -> None:
    asked = related(1, 1)[0].request
    for name, ways in facts.vaguer(asked).items():
        assert sum(share for _, share in ways) == pytest.approx(1), name
        captions = [way.caption() for way, _ in ways]
        assert asked.caption() in captions, name
        assert len(set(captions)) == len(captions), name
        assert (len(captions) == 1) == (name == "nothing")


def test_what_is_not_told_costs() -> None:
    found = facts.measured(VAE("assets/shapes/vae"), 1, 24)
    assert all(loss > 0 for losses in found.values() for loss in losses)
    assert found["the relation"][1] > found["nothing"][1]


def test_the_loss_of_a_model_stands_beside_the_least_one() -> None:
    """It is that of its objective."""
    pipe = Pipeline.load("assets/shapes/model")
    found = facts.measured(pipe.codec, 1, 24, pipe)
    told, untold = (found[name] for name in facts.MODEL)
    assert found["nothing"][1] / 2 < told[1] < untold[1] < 2
    x0, noise = torch.randn(4, 256), torch.randn(3, 4, 256)

    class Perfect(MMDiT):
        def forward(self, z: Tensor, *given: object) -> Tensor:
            return (noise[1] - x0).view(z.shape)

    pipe.network.__class__ = Perfect
    losses = facts.model_losses(pipe, x0, noise, "a circle")
    assert losses[1] == pytest.approx(0, abs=1e-6)
    assert losses[0] > 0.1
    assert losses[2] > 0.1
