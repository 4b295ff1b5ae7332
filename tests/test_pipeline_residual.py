"""Stochastic refinement: a picture is what a regressor gives and a residual that a model draws."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import stirred
from torch import Tensor

from data.batch import Batch
from data.latents import Pixels
from data.text.clip import CLIPText
from flow.objective import Estimate, Objective
from flow.path import RectifiedFlow
from flow.reference import reference
from mmdit.model import MMDiT
from mmdit.network import Condition, Network
from pipeline import LoadOptions, Pipeline, Pull, Refiner
from pipeline.folder import REGRESSOR, opens_in_diffusers, read_network, single_file
from pipeline.residual import Regressor, Residual
from pipeline.sampling import Sampling
from storage.checksums import FILE as CHECKSUMS
from storage.text import read_json
from training.residual import MEASURED, Residuals

CODEC = Pixels(1, 0.3, 2.66)
STD, NOISE = 0.8, 0.5  # x0 ~ N(0, STD²); the picture that is seen is x0 + NOISE·n
GAIN = STD**2 / (STD**2 + NOISE**2)  # of the posterior's mean
LEFT = ((1 - GAIN) * STD**2) ** 0.5  # the posterior's standard deviation


class Exact(Network):
    """The posterior's mean, if it is shown zeros at t = 1."""

    def forward(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.picture is not None
        return GAIN * condition.picture + z + (1 - t)[:, None, None, None]


def seen(count: int) -> tuple[Tensor, Condition]:
    """Latents (count, 1, 1, 1), and the condition that they are seen under."""
    x0 = STD * torch.randn(count, 1, 1, 1)
    return x0, Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1), picture=x0 + NOISE * torch.randn_like(x0))


def mmdit(**changes: Any) -> MMDiT:
    sizes: dict[str, Any] = {"in_channels": 1, "depth": 1, "width": 32, "heads": 2, "text_dim": 64, "pooled_dim": 64}
    sizes |= {"sample_size": 8, "pos_embed_max_size": 8, "picture_channels": 1}
    torch.manual_seed(0)
    return stirred(MMDiT(**(sizes | changes)))


def pipeline(text: CLIPText, regressor: Regressor | None) -> Pipeline:
    """The same model with and without a regressor."""
    return Pipeline(mmdit(), Objective(), CODEC, text, Sampling(steps=3, guidance=1.0), regressor)


@pytest.fixture
def regressor() -> Regressor:
    return Regressor(mmdit(depth=2), 5.0)


@pytest.fixture
def refined(text: CLIPText, regressor: Regressor) -> Pipeline:
    return pipeline(text, regressor)


@pytest.fixture
def blurred() -> Tensor:
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_latents_are_the_mean_and_the_residual() -> None:
    x0, residual = torch.randn(3, 1, 4, 4), Residual(torch.randn(3, 1, 4, 4), 5.0)
    torch.testing.assert_close(residual.whole(residual.of(x0)), x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(residual.of(residual.mean + 1.0), torch.full_like(x0, 5.0))
    assert torch.equal(Residual().of(x0), x0)
    assert torch.equal(Residual().whole(x0), x0)


def test_the_residual_of_an_exact_regressor_has_zero_mean_whatever_is_seen() -> None:
    x0, condition = seen(40_000)
    residual = Regressor(Exact(), 1 / LEFT).residual(condition, x0.shape)
    r = residual.of(x0).flatten()
    assert condition.picture is not None
    assert r.mean().item() == pytest.approx(0, abs=0.02)
    assert r.std().item() == pytest.approx(1, abs=0.02)
    assert (r * condition.picture.flatten()).mean().item() == pytest.approx(0, abs=0.02)


def test_drawn_residuals_with_the_mean_are_samples_of_the_posterior() -> None:
    x0, condition = seen(20_000)
    residual = Regressor(Exact(), 1 / LEFT).residual(condition, x0.shape)
    path, times = RectifiedFlow(), torch.tensor([1.0, 0.0], dtype=torch.float64)

    def denoise(z: Tensor, t: Tensor) -> Estimate:  # of a residual of unit variance
        a, b = path(t)
        return Estimate(a * z / (a**2 + b**2), b * z / (a**2 + b**2))

    draws = [residual.whole(reference(denoise, path, torch.randn(x0.shape, dtype=torch.float64), times)) for _ in "ab"]
    base = (residual.mean - x0).square().mean()
    for count in (1, 2):
        ratio = (torch.stack(draws[:count]).mean(0) - x0).square().mean() / base
        assert ratio.item() == pytest.approx(1 + 1 / count, abs=0.05)


def test_a_picture_is_the_regressor_s_and_what_the_model_draws(
    text: CLIPText, refined: Pipeline, regressor: Regressor, blurred: Tensor
) -> None:
    prompts, ends = ["a one", "a two"], list[Tensor]()
    pipeline(text, None)(prompts, [0, 1], picture=blurred, callback=lambda done, z, x0: ends.append(z))
    with torch.no_grad():
        condition = refined.condition(prompts)._replace(picture=CODEC.encode(blurred))
        mean = regressor.network(torch.zeros(2, 1, 8, 8), torch.ones(2), condition)
    estimates: list[Tensor] = []
    drawn = refined(prompts, [0, 1], picture=blurred, callback=lambda done, z, x0: estimates.append(x0))
    torch.testing.assert_close(drawn, CODEC.decode(mean + ends[-1] / 5.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(CODEC.decode(estimates[-1]), drawn, rtol=0, atol=1e-6)  # what a page shows
    torch.testing.assert_close(estimates[0], mean + ends[0] / 5.0, rtol=0, atol=1e-6)


def test_a_picture_that_is_kept_by_a_mask_stays(refined: Pipeline, blurred: Tensor) -> None:
    image, kept = torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    drawn = refined(["a"], [0], image=image, mask=kept, picture=blurred[:1])
    torch.testing.assert_close(drawn, image, rtol=0, atol=1e-6)


def test_the_folder_draws_by_itself(refined: Pipeline, blurred: Tensor, tmp_path: Path) -> None:
    refined.save(tmp_path / "model")
    loaded = Pipeline.load(tmp_path / "model")
    assert loaded.regressor
    assert loaded.regressor.scale == 5.0
    prompts = ["a one", "a two"]
    assert torch.equal(loaded(prompts, [0, 1], picture=blurred), refined(prompts, [0, 1], picture=blurred))
    assert read_json(tmp_path / "model/model_index.json")["regressor"] == ["pipeline.residual", "Regressor"]
    assert not opens_in_diffusers(refined.parts)
    with pytest.raises(ValueError, match="holds no regressor: write a folder"):
        single_file(refined.parts)
    with pytest.raises(ValueError, match="draws the residual of its regressor, and a model of whole pictures"):
        read_network(tmp_path / "model", LoadOptions())


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"scale": "5"}', "lacks a number scale"), ("{}", "lacks a number"), ('{"scale": 0}', "positive number, got 0")],
)
def test_a_damaged_scale_is_refused(refined: Pipeline, tmp_path: Path, content: str, message: str) -> None:
    refined.save(tmp_path)
    (tmp_path / REGRESSOR / "config.json").write_text(content)
    (tmp_path / CHECKSUMS).unlink()  # as a person who edits it has to
    with pytest.raises(ValueError, match=message):
        Pipeline.load(tmp_path)
    shutil.rmtree(tmp_path / REGRESSOR)
    with pytest.raises(FileNotFoundError, match="regressor"):  # it would draw residuals as if they were pictures
        Pipeline.load(tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"sample_size": 4}, "the regressor's sample_size is 4, and the network's 8: make them equal"),
        ({"in_channels": 4, "picture_channels": 4}, "the regressor's in_channels is 4"),
        ({"picture_channels": 0}, "the regressor's picture_channels is 0, and the network's 1"),
        ({"level_embeds": True}, "the regressor's level_embeds is True, and the network's False"),
        ({"pos_embed_max_size": 4}, "does not give all sizes that the network draws"),
        ({"out_channels": 2}, "the regressor has learned a variance or codes"),
        ({"two_times": True}, "the regressor takes two times or a guidance"),
    ],
)
def test_a_regressor_that_does_not_fit_is_refused(text: CLIPText, other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(text, Regressor(mmdit(**other)))


def test_a_regressor_needs_a_picture(text: CLIPText) -> None:
    with pytest.raises(ValueError, match="a regressor works from a picture, and this network from none"):
        Pipeline(mmdit(picture_channels=0), Objective(), CODEC, text, None, Regressor(mmdit(picture_channels=0)))


def test_what_would_mix_two_means_or_read_a_residual_is_refused(
    text: CLIPText, refined: Pipeline, regressor: Regressor, blurred: Tensor
) -> None:
    with pytest.raises(ValueError, match="works from a picture: give one"):
        refined(["a"], [0])
    with pytest.raises(ValueError, match=r"guidance would mix two prompts.*give guidance 1, not 2"):
        refined(["a"], [0], picture=blurred[:1], sampling=replace(refined.sampling, guidance=2.0))
    with pytest.raises(ValueError, match="draws the residual of a regressor: leave the gradient out"):
        refined.pulled([Pull(lambda prompts, denoise: lambda z, t: z.sum((1, 2, 3)), 1.0)])
    whole = pipeline(text, None)
    other = pipeline(text, Regressor(regressor.network, 4.0))
    for weak in (whole, other):
        with pytest.raises(ValueError, match="the weak model has another regressor than the model"):
            refined.away_from(weak, 2.0)
    assert refined.away_from(pipeline(text, regressor), 2.0).guides.weak
    late = Pipeline(mmdit(picture_channels=0), Objective(), CODEC, text)
    with pytest.raises(ValueError, match="the refiner has another regressor than the model"):
        refined(["a"], [0], picture=blurred[:1], refiner=Refiner(late, 0.5))


class Known(SimpleNamespace):
    """Data whose first pictures are known."""

    batches: list[Batch]

    def setup(self, stage: str) -> None:
        self.ready = stage

    def train_dataloader(self) -> list[Batch]:
        assert self.ready
        return self.batches

    def on_after_batch_transfer(self, batch: Batch, _: int) -> Batch:
        return batch


def known(*sizes: int) -> Any:
    found = []
    for size in sizes:
        x0, condition = seen(size)
        found.append(Batch(0, None, x0, x0, condition.text, condition.pooled, picture=condition.picture))  # type: ignore[arg-type]
    return Known(batches=found)


def test_the_scale_is_one_over_the_standard_deviation_of_the_first_pictures() -> None:
    data = known(MEASURED - 1, 1, 1000)
    regressor = Regressor(Exact())
    Residuals(Path("x")).measure(regressor, data, torch.device("cpu"))
    first = torch.cat([batch.x0 - GAIN * batch.picture for batch in data.batches[:2]])
    assert regressor.scale == pytest.approx(1 / first.square().mean().sqrt().item(), rel=1e-6)
    assert regressor.scale == pytest.approx(1 / LEFT, rel=0.15)
    Residuals(Path("x"), scale=3.0).measure(regressor, data, torch.device("cpu"))
    assert regressor.scale != 3.0  # a given scale is the regressor's from the beginning
    perfect = known(4)
    perfect.batches[0] = perfect.batches[0]._replace(picture=perfect.batches[0].x0 / GAIN)
    perfect.batches[0] = perfect.batches[0]._replace(x0=GAIN * perfect.batches[0].picture)
    with pytest.raises(ValueError, match="leaves nothing of the pictures to be learned"):
        Residuals(Path("x")).measure(Regressor(Exact()), perfect, torch.device("cpu"))


def test_the_regressor_computes_in_float32_whatever_the_training_does(
    refined: Pipeline, regressor: Regressor, blurred: Tensor
) -> None:
    condition = refined.condition(["a", "b"])._replace(picture=CODEC.encode(blurred))
    plain = regressor.residual(condition, blurred.shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(regressor.residual(condition, blurred.shape).mean, plain.mean)  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in regressor.network.parameters())
