"""A prior in a pipeline: draws of embeddings, the best of them, guidance, and a model folder."""

import json
from pathlib import Path

import pytest
import torch
from dits import weighted_by_name
from image_towers import SIDE, SIZE, written
from torch.nn.functional import normalize

from data.clip import CLIPImage
from data.text.clip import CLIPText
from flow.objective import Objective
from flow.path import Cosine
from flow.target import X0
from mmdit.prior import Prior
from pipeline import LoadOptions, Pipeline
from pipeline.prior import best, draw, text_embeddings
from pipeline.sampling import Sampling

ROOT = Path(__file__).parents[1]
PROMPTS = ["a large red circle", "two small blue squares", ""]


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    codec, text = CLIPImage(written(tmp_path_factory.mktemp("tower"))), CLIPText(ROOT / "assets/shapes/text")
    sizes = {"in_channels": SIZE, "depth": 2, "width": 32, "heads": 2, "text_dim": 160, "pooled_dim": 128}
    network = weighted_by_name(Prior(**sizes, text_mask=True))
    assert isinstance(network, Prior)
    return Pipeline(network, Objective(Cosine(), X0()), codec, text, Sampling(steps=3, guidance=2.0))


def test_of_the_candidates_the_nearest_to_the_text_is_kept() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    drawn = torch.tensor([[[0.8, 0.6], [0.0, 1.0], [-0.6, -0.8]], [[0.6, 0.8], [0.6, 0.8], [-1.0, 0.0]]])
    assert torch.equal(best(drawn, text), torch.tensor([[0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]))
    assert torch.equal(best(drawn.flip(0), text), best(drawn, text))
    assert torch.equal(best(drawn[:1], text), drawn[0])
    many = normalize(torch.randn(8, 500, 16), dim=-1)
    texts = normalize(torch.randn(500, 16), dim=-1)
    dots = [float((best(many[:n], texts) * texts).sum(-1).mean()) * 4 for n in (1, 2, 8)]
    # The largest of n normal numbers has the mean 0, 1/√π = 0.564 and 1.424.
    assert dots == pytest.approx([0, 0.564, 1.424], abs=0.15)


def test_it_draws_unit_embeddings_the_first_of_which_is_the_only_one_of_one(prior: Pipeline) -> None:
    seeds = [3, 4, 5]
    two, first = draw(prior, PROMPTS, seeds), draw(prior, PROMPTS, seeds, 1)
    torch.testing.assert_close(two.norm(dim=-1), torch.ones(3))
    text = text_embeddings(prior, PROMPTS)
    assert ((two * text).sum(-1) >= (first * text).sum(-1)).all()
    several = draw(prior, PROMPTS * 8, range(24), 2)
    changed = (several != draw(prior, PROMPTS * 8, range(24), 1)).any(-1)
    assert 0 < changed.sum() < 24  # now one, now the other
    alone = draw(prior, PROMPTS[1:2], seeds[1:2])
    torch.testing.assert_close(alone, two[1:2], atol=1e-5, rtol=1e-4)


def test_a_draw_is_the_walk_of_the_pipeline(prior: Pipeline) -> None:
    noise = torch.stack([torch.randn(SIZE, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    for guidance in (1.0, 3.0):
        sampling = Sampling(steps=4, guidance=guidance)
        assert isinstance(prior.codec, CLIPImage)
        wanted = prior.codec.embedding(prior.integrate(noise, PROMPTS, sampling))
        assert torch.equal(draw(prior, PROMPTS, range(3), 1, sampling), wanted)
    noisy = Sampling(steps=4, guidance=1.0, sampler="ddim:eta=1")
    assert not torch.equal(draw(prior, PROMPTS, range(3), 1, noisy), wanted)


def test_the_text_is_that_of_the_first_tower_of_the_embeddings_length(prior: Pipeline) -> None:
    pooled = prior.text.encode(PROMPTS).pooled
    torch.testing.assert_close(text_embeddings(prior, PROMPTS), normalize(pooled[:, :64], dim=-1))


def test_what_draws_no_embeddings_is_refused_in_one_line(prior: Pipeline, pipe: Pipeline) -> None:
    calls = [
        (lambda: draw(pipe, ["7"], [0]), "draws latents of Pixels, not image embeddings"),
        (lambda: text_embeddings(pipe, ["7"]), "no text tower has embeddings of 1 numbers"),
        (lambda: draw(prior, PROMPTS, range(3), 0), "at least 1 draw"),
        (lambda: prior(PROMPTS, [0, 1, 2]), "draws image embeddings, which have no pixels"),
        (lambda: prior.latent_size(2 * SIDE, None), "height must be at most 64"),
        (lambda: Pipeline(pipe.network, pipe.objective, *prior.parts[2:]), "in_channels is 1, but codec, text"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_it_is_saved_in_a_model_folder(prior: Pipeline, tmp_path: Path) -> None:
    prior.save(tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert (index["_class_name"], index["transformer"], index["vae"]) == (
        "Pipeline", ["mmdit.prior", "Prior"], ["data.clip", "CLIPImage"],
    )  # fmt: skip
    back = Pipeline.load(tmp_path / "model")
    assert type(back.network) is Prior
    assert back.network.text_mask
    assert torch.equal(draw(back, PROMPTS, range(3)), draw(prior, PROMPTS, range(3)))
    half = Pipeline.load(tmp_path / "model", LoadOptions(dtype="bfloat16"))
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    near = (draw(half, PROMPTS, range(3), 1) * draw(prior, PROMPTS, range(3), 1)).sum(-1)
    assert near.min() > 0.98
