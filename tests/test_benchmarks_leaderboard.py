"""The plain loops of the leaderboard: their data, times and velocities, and that they learn; and the judgement."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import encode
from benchmarks.leaderboard import TASKS, DiTLoop, Jury, Loop, Quality, SD3Loop, drawn, passing
from data.examined import Digits, Examined, Shapes
from data.shapes import Request, Scene, picture, place
from mmdit import checkpoint
from mmdit.model import Condition
from pipeline import Pipeline
from pipeline.sampling import Sampling

TASK = TASKS["digits"]


@pytest.fixture(scope="module")
def jury() -> Jury:
    return Jury(TASK, 7)


@pytest.mark.parametrize("kind", [SD3Loop, DiTLoop])
def test_a_loop_learns_and_draws(kind: type[Loop]) -> None:
    task = TASK._replace(guidance=(1.3,), steps=10)
    loop, asked = kind(task, 4e-3, seed=1), Digits(7)
    before = loop.draw(asked)
    found = list(passing(loop, [3, 60], Jury(task, 7)))
    assert [row.steps for row in found] == [3, 60]
    assert 0 < found[0].seconds < found[1].seconds
    first, last = (row.quality.fd for row in found)
    assert first
    assert last
    assert last < first
    assert found[1].guidance == 1.3
    pictures = loop.draw(asked)
    assert pictures.shape == (70, 1, 8, 8)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert not torch.equal(pictures, before)
    other = Digits(7)
    other.prompts, other.labels = asked.prompts[::-1], asked.labels.flip(0)
    assert torch.equal(loop.draw(asked, 0.0), loop.draw(other, 0.0))  # nothing of the prompt is left
    assert not torch.equal(pictures, loop.draw(other))
    assert not torch.equal(pictures, loop.draw(asked, 1.5))


def test_the_network_of_diffusers_gets_times_as_ours_does(tmp_path: Path) -> None:
    loop = SD3Loop(TASK, 1e-3, seed=0)
    for parameter in loop.network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    loop.network.save_pretrained(tmp_path)  # type: ignore[operator]
    batch = next(loop.batches)
    z, t = torch.randn(batch.x0.shape), loop.times(len(batch.x0))
    inputs = loop.training_inputs(batch)
    with torch.no_grad():
        ours = checkpoint.load(tmp_path)(z, t, Condition(*inputs))
        torch.testing.assert_close(loop.velocity(z, t, inputs), ours, atol=1e-4, rtol=1e-4)


def test_times_of_the_script_are_thousandths_and_those_of_plain_flow_are_not() -> None:
    script, plain = (1000 * kind(TASK, 1e-3, 0).times(640) for kind in (SD3Loop, DiTLoop))
    assert (script - script.round()).abs().max() < 1e-3
    assert script.min() >= 1
    assert script.max() <= 1000
    assert (plain - plain.round()).abs().max() > 0.1


def test_times_are_shifted_as_our_config_says() -> None:
    """The median of a logit-normal t is 1/2, and a shift of α leads it to α/(α + 1)."""
    loop = DiTLoop(TASK._replace(config=[*TASK.config, "--objective.shift", "3"]), 1e-3, 0)
    assert loop.times(20001).median() == pytest.approx(0.75, abs=0.01)


def test_labels_are_those_of_the_pictures() -> None:
    """A picture's label comes from its caption; the judge, which sees the picture, says the same."""
    loop, jury = DiTLoop(TASK, 1e-3, 0), Jury(TASK, 7)
    batch = next(loop.batches)
    seen = jury.network(loop.codec.decode(batch.x0)).logits
    assert seen is not None
    assert (loop.training_inputs(batch)[0] == seen.argmax(dim=1)).float().mean() > 0.9


def test_a_loop_of_the_shapes_reads_them_from_their_store(tmp_path: Path) -> None:
    """The caption of a batch is to the network what the same caption is in sampling."""
    store, config = str(tmp_path / "store"), ["--config", "configs/shapes.yaml"]
    encode.main([*config, "--encode.source.init_args.count", "32", "--encode.store", store])
    small = ["--data.held_out", "8", "--data.batch_size", "8", "--data.caption_dropout", "0"]
    loop = SD3Loop(TASKS["shapes"]._replace(config=[*config, "--data.store", store, *small], steps=2), 1e-3, 0)
    assert loop.bf16
    loop.data.judged = True
    batch = loop.data.on_after_batch_transfer(next(iter(loop.data.train_dataloader())), 0)
    assert batch.prompts
    of_training, (of_sampling, null) = loop.training_inputs(batch), loop.sampling_inputs(batch.prompts)
    for trained, sampled, without in zip(of_training, of_sampling, null, strict=True):
        assert (trained - sampled).abs().mean() < 0.01 * (trained - without).abs().mean()
    loop.train(2)
    assert loop.draw(Shapes.by_category(1, 0), 2.0).shape == (6, 3, 64, 64)


def true_picture(asked: Request) -> Tensor:
    """A picture (3, 64, 64) of what is asked for."""
    draw = np.random.default_rng(0)
    objects = next(found for found in iter(lambda: place(asked, draw), 0) if found)
    return torch.from_numpy(np.asarray(picture(Scene(asked, objects)))).movedim(-1, 0) / 255


def test_quality_of_the_shapes_is_the_share_of_right_pictures() -> None:
    jury = Jury(TASKS["shapes"], 30)

    def draw(asked: Examined, guidance: float, seed: int) -> Tensor:
        """Right pictures; but for choices with other scales than 2, and where it counts, a sixth shows nothing."""
        assert isinstance(asked, Shapes)
        pictures = torch.stack([true_picture(one) for one in asked.asked])
        if guidance != 2 or seed == 0:
            pictures[: len(pictures) // 6] = 0.5
        return pictures

    scale, quality = jury(draw)
    assert scale == 2
    assert quality == Quality(None, pytest.approx(5 / 6))
    assert jury.good(quality)


def test_our_models_are_judged_too(trained: Path, jury: Jury) -> None:
    pipe = Pipeline.load(trained)
    pictures = drawn(TASK._replace(steps=2), pipe, jury.asked, 1.3, 5)
    seeds, sampling = range(5, 5 + len(pictures)), Sampling(steps=2, guidance=1.3)
    torch.testing.assert_close(pictures, pipe(jury.asked.prompts, seeds, sampling=sampling), atol=1 / 255, rtol=0)
    assert jury.quality(jury.asked, jury.held_out, pictures).right < 0.5  # after six steps of training


@pytest.mark.parametrize(("fd", "right", "good"), [(1.1, 0.98, True), (1.11, 0.99, False), (1.0, 0.979, False)])
def test_quality_needs_both(jury: Jury, fd: float, right: float, good: bool) -> None:
    assert jury.good(Quality(fd, right)) is good


def test_right_pictures_count_only_until_they_are_enough(jury: Jury) -> None:
    ranked = [Quality(2.0, 0.97), Quality(1.0, 0.975), Quality(1.4, 1.0), Quality(1.2, 0.98)]
    assert sorted(set(ranked), key=jury.worth) == ranked
