"""Vector quantisation: formulas against closed forms and against vector-quantize-pytorch, restarts, ranks."""

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from coded import D, K, batches, begun, one_of_two
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ, VectorQuantize

from engine.ema import EMA, Averages, share_frozen
from engine.strategy import skeleton
from tokens.quantize import Quantizer, usage


def features(count: int = 6) -> Tensor:
    return torch.randn(2, D, count, 3)


def test_the_nearest_vector_by_exhaustion() -> None:
    quantizer = Quantizer(K, D).eval()
    x = features()
    distances = (x.movedim(1, -1)[..., None, :] - quantizer.codebook).square().sum(-1)
    assert torch.equal(quantizer(x).codes[:, 0], distances.argmin(-1))


def test_the_gradient_goes_straight_through_and_the_commitment_moves_only_the_features() -> None:
    quantizer = Quantizer(K, D).eval()
    x, weight = features().requires_grad_(), features()
    vectors, codes, commitment = quantizer(x)
    torch.testing.assert_close(vectors, quantizer.vectors(codes))
    (gradient,) = torch.autograd.grad((weight * vectors).sum(), x, retain_graph=True)
    assert torch.equal(gradient, weight)
    (gradient,) = torch.autograd.grad(commitment.sum(), x)
    torch.testing.assert_close(gradient, 2 * (x - vectors).detach() / x[0].numel())
    assert not any(True for _ in quantizer.parameters())


def test_the_codebook_follows_its_features_by_the_papers_formulas() -> None:
    quantizer = Quantizer(K, D, decay=0.9, epsilon=0.01, restart=0)
    quantizer.counts.uniform_(1, 3)
    old, counts, sums = quantizer.codebook.clone(), quantizer.counts.clone(), quantizer.sums.clone()
    x = features()
    nearest = quantizer.train()(x).codes.flatten()
    rows = x.movedim(1, -1).reshape(-1, D)
    for k in range(K):
        own = rows[nearest == k]
        counts[k] = 0.9 * counts[k] + 0.1 * len(own)
        sums[k] = 0.9 * sums[k] + 0.1 * own.sum(0)
    smooth = (counts + 0.01) / (counts.sum() + K * 0.01) * counts.sum()
    torch.testing.assert_close(quantizer.codebook, sums / smooth[:, None], atol=1e-6, rtol=1e-6)
    assert not torch.equal(quantizer.codebook, old)
    before = quantizer.codebook.clone()
    quantizer.eval()(x)
    assert torch.equal(quantizer.codebook, before)  # an evaluation moves nothing


def library(depth: int = 1) -> torch.nn.Module:
    """The library's quantiser with the papers' settings, which are not its defaults."""
    settings = {"dim": D, "codebook_size": K, "decay": 0.99, "eps": 1e-5, "commitment_weight": 1.0,
                "rotation_trick": False, "channel_last": True}  # fmt: skip
    if depth == 1:
        return VectorQuantize(**settings)
    return ResidualVQ(num_quantizers=depth, shared_codebook=True, **settings)


def test_three_updates_agree_with_the_library() -> None:
    ours, theirs = Quantizer(K, D, restart=0), library()
    book = theirs._codebook
    book.embed.copy_(ours.codebook[None])
    book.embed_avg.copy_(ours.sums[None])
    book.cluster_size.copy_(ours.counts[None])
    for _ in range(3):
        x = features()
        (rows := x.movedim(1, -1).flatten(1, 2).detach().requires_grad_()).retain_grad()
        x = x.requires_grad_()
        vectors, codes, commitment = ours.train()(x)
        quantised, indices, loss = theirs.train()(rows)
        assert torch.equal(codes.flatten(1), indices)
        torch.testing.assert_close(vectors.movedim(1, -1).flatten(1, 2), quantised, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(commitment.mean(), loss.sum(), atol=1e-6, rtol=1e-6)
        gradients = torch.autograd.grad(vectors.square().sum() + commitment.sum(), x)[0]
        reference = torch.autograd.grad(quantised.square().sum() + 2 * loss.sum(), rows)[0]
        torch.testing.assert_close(gradients.movedim(1, -1).flatten(1, 2), reference, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ours.codebook, book.embed[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ours.counts, book.cluster_size[0], atol=1e-6, rtol=1e-6)


def test_residual_codes_agree_with_the_library_and_come_nearer_at_each_depth() -> None:
    ours, theirs = Quantizer(K, D, depth=3).eval(), library(3).eval()
    for layer in theirs.layers:
        layer._codebook.embed.copy_(ours.codebook[None])
    ours.codebook[0] = 0.0  # a zero vector: no depth can make it worse
    for layer in theirs.layers:
        layer._codebook.embed.copy_(ours.codebook[None])
    x = features()
    vectors, codes, commitment = ours(x)
    quantised, indices, _ = theirs(x.movedim(1, -1).flatten(1, 2))
    assert torch.equal(codes.flatten(2).movedim(1, -1), indices)
    torch.testing.assert_close(vectors.movedim(1, -1).flatten(1, 2), quantised, atol=1e-6, rtol=1e-6)
    errors = [(x - ours.vectors(codes[:, :depth])).square().mean((1, 2, 3)) for depth in (1, 2, 3)]
    torch.testing.assert_close(commitment, torch.stack(errors).mean(0))
    assert (torch.stack(errors).diff(dim=0) <= 0).all()


def test_bfloat16_changes_no_code() -> None:
    quantizer, x = Quantizer(512, D).eval(), features(200)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(x).codes, quantizer(x.float()).codes)
    assert quantizer(x).vectors.dtype == torch.float32


def follow(restart: float) -> float:
    """The share of a codebook in use after features far away from it have been followed for a while."""
    quantizer = Quantizer(64, D, restart=restart).train()
    for _ in range(60):
        quantizer(20 + features(200))
    return usage(quantizer.eval()(20 + features(400)).codes, 64)[1]


def test_restarts_keep_the_codebook_in_use_where_it_collapses_without() -> None:
    assert follow(1.0) >= 0.95
    assert follow(0.0) < 0.2


def test_restarted_vectors_are_features_of_the_batch() -> None:
    quantizer, x = Quantizer(K, D), 20 + features()
    quantizer.counts.fill_(0.5)
    quantizer.train()(x)
    rows = x.movedim(1, -1).reshape(-1, D)
    fresh = quantizer.codebook[quantizer.counts == 1.0]
    assert len(fresh) >= K - 1
    assert torch.cdist(fresh, rows).min(1).values.max() < 1e-5
    assert torch.equal(quantizer.sums[quantizer.counts == 1.0], fresh)


def test_averages_of_the_weights_copy_the_codebook() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(D, D, 1), Quantizer(K, D))
    copied = skeleton(network)
    share_frozen(network, copied)
    ema = EMA(Averages(decay=0.9), [copied], network)
    network.train()(features())
    ema.update(network, 1)
    assert torch.equal(copied[1].codebook, network[1].codebook)


def test_k_means_finds_clusters_and_needs_as_many_features_as_codes() -> None:
    centres = 10 * torch.eye(3)
    quantizer = Quantizer(3, 3)
    quantizer.start((centres[:, None] + 0.1 * torch.randn(3, 50, 3)).flatten(0, 1))
    assert torch.cdist(centres, quantizer.codebook).min(1).values.max() < 0.1
    with pytest.raises(ValueError, match="at least as many features as the 3 codes, got 2"):
        quantizer.start(torch.randn(2, 3))


def test_codes_of_another_codebook_are_refused() -> None:
    for wrong in (-1, K):
        with pytest.raises(ValueError, match=f"codes must be from 0 to {K - 1}"):
            Quantizer(K, D).vectors(torch.tensor([[[[0, wrong]]]]))
    with pytest.raises(ValueError, match="needs codes, dim and depth of at least 1"):
        Quantizer(0, D)


def test_usage_is_the_exponential_of_the_entropy() -> None:
    perplexity, share = usage(torch.tensor([0, 0, 1, 1, 3, 3, 3, 3]), 8)
    assert perplexity == pytest.approx(math.exp(0.5 * math.log(4) + 0.5 * math.log(2)))
    assert share == 3 / 8


def test_two_processes_follow_as_one(tmp_path: Path) -> None:
    whole = begun()
    for x in batches():
        whole(x)
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], tensor, atol=1e-6, rtol=1e-6)
