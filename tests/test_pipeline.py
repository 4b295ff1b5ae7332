"""Prompts to pictures, and the model folder: what is written, who reads it, what is refused."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel
from networks import stirred

from baselines.unet import UNet
from flow.density import Uniform
from flow.grid import trailing
from flow.objective import Objective
from flow.path import EDM, Cosine, DDPMLinear, ImprovedCosine, LDMLinear, RectifiedFlow, ZeroTerminalSNR
from flow.target import Epsilon, Preconditioned, V
from flow.variance import LearnedVariance
from mmdit.model import Condition, MMDiT
from pipeline import Pipeline
from pipeline.folder import SCHEDULER
from pipeline.sampling import Sampling
from storage.checksums import FILE as CHECKSUMS

PROMPTS = ["a handwritten seven", "the digit 3", ""]


def way(pipe: Pipeline, **changes: object) -> Sampling:
    return replace(pipe.sampling, **changes)


def test_a_picture_depends_on_its_prompt_and_seed_alone(pipe: Pipeline) -> None:
    together = pipe(PROMPTS, [4, 5, 6])
    assert together.shape == (3, 1, 8, 8)
    assert together.min() >= 0
    assert together.max() <= 1
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(pipe([prompt], [4 + i])[0], together[i], atol=1e-5, rtol=0)
    assert not torch.allclose(pipe(PROMPTS[:1], [9])[0], together[0], atol=1e-2)
    assert not torch.allclose(pipe(PROMPTS[1:2], [4])[0], together[0], atol=1e-2)


def test_it_is_the_plain_loop_over_the_network(pipe: Pipeline) -> None:
    """The sampler written out: grid, guidance and decoding, for one prompt."""
    prompt, seed, steps, guidance, alpha = "the digit 3", 11, 5, 3.0, 1.5
    text, null = pipe.text.encode([prompt]), pipe.text.encode([""])
    z = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(seed))[None]
    times = [1 - i / steps for i in range(steps + 1)]
    times = [alpha * t / (1 + (alpha - 1) * t) for t in times]
    with torch.no_grad():
        for t, s in pairwise(times):
            yes, no = (pipe.network(z, torch.tensor([t]), Condition(*told)) for told in (text, null))
            z = z + (s - t) * (no + guidance * (yes - no))
    expected = (z / 2.66 + 0.3).clamp(0, 1)
    torch.testing.assert_close(
        pipe([prompt], [seed], sampling=way(pipe, steps=steps, guidance=guidance)), expected, atol=1e-4, rtol=0
    )


def test_every_setting_changes_the_picture(pipe: Pipeline) -> None:
    base = pipe(PROMPTS[:1], [0])
    for setting in ({"shift": 3.0}, {"negative": "the digit 4"}):
        assert not torch.allclose(pipe(PROMPTS[:1], [0], **setting), base, atol=1e-3), setting
    ways = ({"steps": 5}, {"guidance": 3.0}, {"guidance": 1.0}, {"sampler": "heun"}, {"sampler": "ddim:eta=1"},
            {"spacing": "karras", "steps": 8}, {"rescale": 1.0}, {"interval": (0.5, 1.0)})  # fmt: skip
    for changes in ways:
        other = pipe(PROMPTS[:1], [0], sampling=way(pipe, **changes), shift=1.0 if "spacing" in changes else None)
        assert not torch.allclose(other, base, atol=1e-3), changes
    torch.testing.assert_close(pipe(PROMPTS[:1], [0], sampling=way(pipe), shift=1.5, negative=""), base)


def test_the_empty_prompt_is_the_unconditional_model(pipe: Pipeline) -> None:
    guided, plain = (pipe([""], [0], sampling=way(pipe, guidance=scale)) for scale in (7.0, 1.0))
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=0)


def test_a_stochastic_sampler_gives_each_picture_its_own_noise(pipe: Pipeline) -> None:
    sampling = way(pipe, sampler="ddim:eta=1")
    together = pipe(PROMPTS, [4, 5, 6], sampling=sampling)
    torch.testing.assert_close(pipe(PROMPTS[1:2], [5], sampling=sampling)[0], together[1], atol=1e-5, rtol=0)


def test_the_callback_sees_the_start_and_each_step(pipe: Pipeline) -> None:
    told: list[int] = []
    starts = []

    def callback(done: int, z: torch.Tensor, x0: torch.Tensor) -> None:
        told.append(done)
        starts.append(z)

    pipe(PROMPTS[:1], [0], sampling=way(pipe, steps=3), callback=callback)
    assert told == [0, 1, 2, 3]
    torch.testing.assert_close(starts[0][0], torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(0)))


def test_a_start_below_pure_noise_has_the_path_s_own_variance(pipe: Pipeline) -> None:
    starts = []
    sampling = way(pipe, spacing="karras:sigma_max=3", sampler="edm")
    pipe(PROMPTS[:1], [0], sampling=sampling, shift=1.0, callback=lambda done, z, x0: starts.append(z))
    noise = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(starts[0][0], noise * (0.25**2 + 0.75**2) ** 0.5)  # σ = 3 at t = ¾


def test_other_sizes_up_to_the_table(pipe: Pipeline) -> None:
    assert pipe(PROMPTS[:1], [0], height=16, width=6).shape == (1, 1, 16, 6)
    with pytest.raises(ValueError, match="height must be a multiple of 2"):
        pipe(PROMPTS[:1], [0], height=7)
    with pytest.raises(ValueError, match="width must be at most 16"):
        pipe(PROMPTS[:1], [0], width=18)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        pipe(PROMPTS[:1], [0], sampling=way(pipe, steps=0))


def test_the_folder_gives_the_same_pictures(pipe: Pipeline, model: Path) -> None:
    assert torch.equal(Pipeline.load(model)(PROMPTS, [0, 1, 2]), pipe(PROMPTS, [0, 1, 2]))
    assert {file.suffix for file in model.rglob("*") if file.is_file()} == {".json", ".safetensors"}


OBJECTIVES = [
    Objective(Cosine(), V()),
    Objective(EDM(-0.5, 1.1, 0.9), Preconditioned(0.9)),
    Objective(DDPMLinear(), Epsilon()),
    Objective(ZeroTerminalSNR(LDMLinear()), V(), shift=2.0),
    LearnedVariance(ImprovedCosine(), Epsilon(), vlb_weight=0.002),
]


@pytest.mark.parametrize(("sides", "alpha"), [((8, 8), 1.5), ((16, 16), 3.0), ((16, 4), 1.5), ((None, None), 1.5)])
def test_the_shift_of_a_size_is_the_same_in_training_and_sampling(
    pipe: Pipeline, tmp_path: Path, sides: tuple[int | None, int | None], alpha: float
) -> None:
    objective = Objective(density=Uniform(), shift=3.0, shift_area=256)
    ours = Pipeline(pipe.network, objective, pipe.codec, pipe.text, Sampling(steps=8))
    ours.save(tmp_path / "model")
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    for some in (ours, Pipeline.load(tmp_path / "model")):
        assert (some.objective.shift, some.objective.shift_area) == (3.0, 256)
        latent, _, times = some.plan(some.sampling, None, *sides)
        torch.testing.assert_close(times, trailing(RectifiedFlow(), 8, alpha))
        trained = objective.training_time(u, latent[0] * latent[1])
        torch.testing.assert_close(times.float(), trained.flip(0))
        given = some.plan(some.sampling, 2.0, *sides)[2]  # which is told wins
        torch.testing.assert_close(given, trailing(RectifiedFlow(), 8, 2.0))


def test_without_an_area_one_shift_is_for_all_sizes(pipe: Pipeline, model: Path) -> None:
    assert Pipeline.load(model).objective.shift_area is None
    times = [pipe.plan(pipe.sampling, None, side, side)[2] for side in (4, 8, 16)]
    assert torch.equal(times[0], times[1])
    assert torch.equal(times[0], times[2])
    (model / CHECKSUMS).unlink()
    content = json.loads((model / SCHEDULER).read_text())
    del content["shift_area"]  # as older folders have it
    (model / SCHEDULER).write_text(json.dumps(content))
    assert torch.equal(Pipeline.load(model).plan(pipe.sampling, None, 16, 16)[2], times[0])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o.path).__name__)
def test_every_process_comes_back_from_its_folder(pipe: Pipeline, tmp_path: Path, objective: Objective) -> None:
    sizes = {"in_channels": 1, "depth": 1, "width": 16, "heads": 1, "text_dim": 64, "pooled_dim": 64}
    network = MMDiT(**sizes, sample_size=8, pos_embed_max_size=8, out_channels=2 if objective.outputs == 2 else 1)
    torch.nn.init.normal_(network.final.linear.weight, std=0.1)
    sampler = "ddpm:variance=learned" if objective.outputs == 2 else "dpmpp_2m"
    ours = Pipeline(network, objective, pipe.codec, pipe.text, Sampling(steps=3, guidance=1.0, sampler=sampler))
    ours.save(tmp_path / "model")
    back = Pipeline.load(tmp_path / "model")
    ends = []
    pictures = ours(PROMPTS, [0, 1, 2], callback=lambda done, z, x0: ends.append(x0))
    assert torch.equal(back(PROMPTS, [0, 1, 2]), pictures)
    torch.testing.assert_close(pictures, ours.codec.decode(ends[-1]))  # whatever the path's scale at the data
    assert back.sampling == ours.sampling
    t = torch.linspace(0.1, 1, 7, dtype=torch.float64)
    assert torch.equal(torch.stack(back.objective.path(t)), torch.stack(objective.path(t)))


def test_a_unet_has_a_folder_too(pipe: Pipeline, tmp_path: Path) -> None:
    network = UNet(1, channels=(8, 16), layers_per_block=1, heads=2, text_dim=64, pooled_dim=64, sample_size=8,
                   norm_num_groups=4)  # fmt: skip
    torch.nn.init.normal_(network.net.conv_out.weight, std=0.1)
    ours = Pipeline(network.eval(), Objective(DDPMLinear(), Epsilon()), pipe.codec, pipe.text, Sampling(3, 1.0))
    ours.save(tmp_path / "model")
    assert torch.equal(Pipeline.load(tmp_path / "model")(PROMPTS, [0, 1, 2]), ours(PROMPTS, [0, 1, 2]))
    UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet")
    with pytest.raises(ValueError, match="height must be a multiple of 2"):
        ours(PROMPTS[:1], [0], height=9)


def test_channels_must_fit_a_learned_variance(pipe: Pipeline) -> None:
    objective = LearnedVariance(ImprovedCosine(), Epsilon())
    with pytest.raises(ValueError, match="out_channels is 1, but codec, text and objective need 2"):
        Pipeline(pipe.network, objective, pipe.codec, pipe.text)


@torch.no_grad()
def test_guidance_leaves_a_learned_variance_as_it_is(pipe: Pipeline) -> None:
    sizes = {"in_channels": 1, "out_channels": 2, "depth": 1, "width": 16, "heads": 1, "text_dim": 64, "pooled_dim": 64}
    network = stirred(MMDiT(**sizes, sample_size=8, pos_embed_max_size=8))
    ours = Pipeline(network, LearnedVariance(ImprovedCosine(), Epsilon()), pipe.codec, pipe.text, Sampling(3, 1.0))
    times = ours.plan(ours.sampling)[2]
    plain, guided = (
        ours.denoiser(PROMPTS, "", way(ours, guidance=scale), times)(torch.ones(3, 1, 8, 8), torch.tensor(0.5))
        for scale in (1.0, 5.0)
    )
    torch.testing.assert_close(guided.variance, plain.variance)
    assert not torch.allclose(guided.x0[:2], plain.x0[:2], atol=1e-3)  # the third prompt is empty


def test_diffusers_reads_transformer_and_scheduler(pipe: Pipeline, model: Path) -> None:
    theirs = SD3Transformer2DModel.from_pretrained(model, subfolder="transformer").eval()
    z, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.9])
    condition = pipe.condition(PROMPTS[:2])
    with torch.no_grad():
        expected = theirs(z, condition.text, condition.pooled, 1000 * t).sample
        torch.testing.assert_close(pipe.network(z, t, condition), expected, atol=1e-5, rtol=1e-4)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
    assert scheduler.config.shift == 1.5
    assert json.loads((model / "model_index.json").read_text())["transformer"] == ["diffusers", "SD3Transformer2DModel"]


def test_saving_again_replaces_the_whole_folder(pipe: Pipeline, model: Path) -> None:
    (model / "transformer" / "stale.safetensors").touch()
    pipe.save(model)
    assert not (model / "transformer" / "stale.safetensors").exists()
    assert sorted(file.name for file in model.parent.iterdir()) == ["model"]


def spoil_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def spoil_grid(folder: Path) -> None:
    content = json.loads((folder / SCHEDULER).read_text())
    content["path"] = {"class": "Spiral"}
    (folder / SCHEDULER).write_text(json.dumps(content))


def spoil_sampling(folder: Path) -> None:
    content = json.loads((folder / SCHEDULER).read_text())
    content["sampling"]["sampler"] = None
    (folder / SCHEDULER).write_text(json.dumps(content))


def spoil_chain(folder: Path) -> None:
    content = json.loads((folder / SCHEDULER).read_text())
    content["path"] = {"class": "Discrete", "alphas_cumprod": [0.5]}
    (folder / SCHEDULER).write_text(json.dumps(content))


def spoil_channels(folder: Path) -> None:
    file = folder / "vae/config.json"
    file.write_text(file.read_text().replace('"channels": 1', '"channels": 3'))


def spoil_weights(folder: Path) -> None:
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_index, "no model folder: neither it nor"),
        (spoil_grid, "there is no Path"),
        (spoil_sampling, "sampler, spacing and guider must be text"),
        (spoil_chain, "scheduler_config.json"),
        (spoil_channels, "in_channels is 1, but codec, text and objective need 3"),
        (spoil_weights, "truncated or no safetensors"),
        (lambda folder: (folder / "vae/config.json").unlink(), "no codec config"),
        (lambda folder: (folder / SCHEDULER).unlink(), "there is no .*scheduler_config"),
        (lambda folder: (folder / SCHEDULER).write_text("{"), "no JSON"),
        (lambda folder: (folder / SCHEDULER).write_text("[]"), "holds no JSON object"),
        (lambda folder: (folder / "vae/config.json").write_text('{"_class_name": "Pixels"}'), "no whole config"),
        (lambda folder: (folder / "text_encoder/model.safetensors").unlink(), "no weights at"),
    ],
)
def test_damaged_folders_are_named_in_one_line(model: Path, spoil, message: str) -> None:
    (model / CHECKSUMS).unlink()  # as in folders of other programs
    spoil(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Pipeline.load(model)
    assert "\n" not in str(caught.value)
