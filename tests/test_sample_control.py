"""Pictures steered by ControlNets: the same as diffusers' pipeline draws, by files and flags, and what does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline, StableDiffusion3Pipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from networks import stirred
from PIL import Image
from test_sample import refused
from torch import Tensor

import sample
from mmdit import control
from mmdit.control import Control, Controlled, JointControlNet
from pipeline import Pipeline
from pipeline.steering import Steering, interval_of, steer

PROMPT, NEGATIVE, SIZE, LEVEL = "a handwritten seven", "the digit 3", 64, 1 / 255
KINDS = {"joint": "sd3", "single": "sd35_large"}  # kind of ControlNet → its base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, for each two ControlNets, and two pictures."""
    place = tmp_path_factory.mktemp("controls")
    draw = torch.Generator().manual_seed(0)
    for name in ("a.png", "b.png"):
        pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / name)
    for kind, base in KINDS.items():
        theirs = tiny.pipeline(base, place / base)
        own = dict(theirs.transformer.config) | {"num_layers": 2, "dual_attention_layers": ()}
        if kind == "single":
            own |= {"joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None}
        for zeros in (True, False):
            torch.manual_seed(int(zeros))
            net = SD3ControlNetModel.from_config(own, force_zeros_for_pooled_projection=zeros)
            stirred(net, 0.05).save_pretrained(place / f"{kind}-{zeros}")
    return place


def theirs(
    place: Path, kind: str, nets: list[str], monkeypatch: pytest.MonkeyPatch, scales: list[float], **more: float
) -> Tensor:
    """What diffusers draws. It draws the hint's latents from the posterior; here it takes the mean, as we do."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    base = StableDiffusion3Pipeline.from_pretrained(place / KINDS[kind])
    loaded = [SD3ControlNetModel.from_pretrained(place / net) for net in nets]
    pipe = StableDiffusion3ControlNetPipeline(**base.components, controlnet=loaded[0] if len(nets) == 1 else loaded)
    pipe.set_progress_bar_config(disable=True)
    images = [Image.open(place / name) for name in ("a.png", "b.png")[: len(nets)]]
    return pipe(
        PROMPT, negative_prompt=NEGATIVE, control_image=images[0] if len(nets) == 1 else images,
        controlnet_conditioning_scale=scales[0] if len(nets) == 1 else scales, num_inference_steps=6,
        guidance_scale=4.0, height=SIZE, width=SIZE, generator=torch.Generator().manual_seed(5), output_type="pt",
        **more,
    ).images  # fmt: skip


def mine(
    place: Path, kind: str, nets: list[str], scales: list[float], shares: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    pipe = Pipeline.load(place / KINDS[kind])
    sampling = replace(pipe.sampling, steps=6, guidance=4.0)
    _, _, times = pipe.plan(sampling, None, SIZE, SIZE)
    images = ("a.png", "b.png")
    steerings = [Steering(place / n, place / i, s) for n, i, s in zip(nets, images, scales, strict=False)]
    steered, picture = steer(pipe, steerings, interval_of(shares, times), SIZE, SIZE)
    return steered([PROMPT], [5], NEGATIVE, sampling, height=SIZE, width=SIZE, picture=picture)


def apart(a: Tensor, b: Tensor) -> float:
    assert a.std() > 0.02
    return (a - b).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.35])
def test_draws_what_diffusers_draws(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: str, zeros: bool, scale: float
) -> None:
    expected = theirs(place, kind, [f"{kind}-{zeros}"], monkeypatch, [scale])
    assert apart(expected, mine(place, kind, [f"{kind}-{zeros}"], [scale])) < LEVEL
    assert apart(expected, mine(place, kind, [f"{kind}-{zeros}"], [0.0])) > LEVEL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shares", [(0.0, 0.5), (0.4, 1.0), (0.2, 0.8)])
def test_an_interval_is_theirs(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: str, shares: tuple[float, float]
) -> None:
    ends = {"control_guidance_start": shares[0], "control_guidance_end": shares[1]}
    expected = theirs(place, kind, [f"{kind}-False"], monkeypatch, [1.0], **ends)
    assert apart(expected, mine(place, kind, [f"{kind}-False"], [1.0], shares)) < LEVEL
    assert apart(expected, mine(place, kind, [f"{kind}-False"], [1.0])) > LEVEL


@pytest.mark.parametrize("kind", KINDS)
def test_several_are_theirs(place: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    nets, scales = [f"{kind}-False", f"{kind}-False"], [0.8, 0.5]
    expected = theirs(place, kind, nets, monkeypatch, scales)
    assert apart(expected, mine(place, kind, nets, scales)) < LEVEL


def test_the_second_evaluation_of_a_step_within_the_interval_is_steered() -> None:
    """Midpoint asks between the times of the grid; what is asked at the end of a step counts to the next."""
    times = torch.tensor([1.0, 0.8, 0.6, 0.3, 0.0], dtype=torch.float64)
    low, high = interval_of((0.25, 0.75), times)
    assert [low <= float(torch.tensor(t)) <= high for t in (1.0, 0.9, 0.8, 0.7, 0.6, 0.45, 0.3, 0.1)] == [
        False, False, True, True, True, True, False, False,
    ]  # fmt: skip


def test_the_command_draws_it_and_draws_it_again(place: Path, tmp_path: Path) -> None:
    flags = ["--model", str(place / "sd3"), "--prompt", PROMPT, "--negative", NEGATIVE, "--steps", "6",
             "--guidance", "4", "--seed", "5", "--height", str(SIZE), "--width", str(SIZE), "--control",
             f"{place / 'joint-False'}:{place / 'a.png'}:0.35", "--control-interval", "0", "0.5"]  # fmt: skip
    sample.main([*flags, "--out", str(tmp_path / "first")])
    (entry,) = json.loads((tmp_path / "first/samples.json").read_text())
    drawn = np.asarray(Image.open(tmp_path / "first" / entry["file"])).astype(int)
    expected = mine(place, "joint", ["joint-False"], [0.35], (0.0, 0.5))[0].permute(1, 2, 0).mul(255).round().int()
    assert np.abs(drawn - expected.numpy()).max() <= 1
    sample.main(["--like", str(tmp_path / "first" / entry["file"]), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / entry["file"]).read_bytes() == (tmp_path / "first" / entry["file"]).read_bytes()


def test_a_model_folder_holds_base_and_control_net(place: Path, tmp_path: Path) -> None:
    """diffusers opens it as its ControlNet pipeline, and it steers any base from there."""
    pipe = Pipeline.load(place / "sd3")
    new = stirred(JointControlNet.of(pipe.network, 1), 0.05)  # type: ignore[arg-type]
    steered = pipe.steered([Control(new)])
    steered.save(tmp_path / "model")
    opened = StableDiffusion3ControlNetPipeline.from_pretrained(tmp_path / "model")
    assert type(opened.controlnet) is SD3ControlNetModel
    again = Pipeline.load(tmp_path / "model")
    assert isinstance(again.network, Controlled)
    picture = torch.rand(1, 3, SIZE, SIZE)
    way = {"sampling": replace(pipe.sampling, steps=2), "height": SIZE, "width": SIZE, "picture": picture}
    first = steered([PROMPT], [1], **way)
    assert torch.equal(first, again([PROMPT], [1], **way))
    assert control.find(tmp_path / "model") == tmp_path / "model/controlnet"
    other = pipe.steered([Control(control.load(tmp_path / "model"))])
    assert torch.equal(first, other([PROMPT], [1], **way))
    with pytest.raises(ValueError, match="works from a picture, and this command has none"):
        again.refuse_picture()
    file = tmp_path / "model/controlnet/diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        control.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("canny", "is not MODEL:IMAGE or MODEL:IMAGE:SCALE"),
        ("a:b:c:d", "is not MODEL:IMAGE or MODEL:IMAGE:SCALE"),
        ("a::1", "is not MODEL:IMAGE"),
        ("a:b:much", "has the scale 'much': give a number"),
        ("a:b:nan", "has the scale 'nan': give a number"),
    ],
)
def test_a_control_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Steering.parse(text)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--control", "{}/none:{}/a.png"], "there is no ControlNet"),
        (["--control", "{}/joint-True:{}/none.png"], "none.png"),
        (["--control", "{}/single-True:{}/a.png"], "the ControlNet is one of another base: it has width"),
        (["--control", "{}/sd3/transformer:{}/a.png"], "not an SD3ControlNetModel"),
        (["--control-interval", "0", "0.5"], "--control-interval needs a --control"),
        (["--control", "{}/joint-True:{}/a.png", "--control-interval", "0.6", "0.5"], "0 <= from < to <= 1"),
        (["--control", "{}/joint-True:{}/a.png", "--control-interval", "0.1", "0.2"], "none of 2 steps lies between"),
        (["--control", "{}/sd3:{}/a.png"], "holds no ControlNet"),
        (["--control", "{}/joint-True:{}/a.png", "--autoguidance", "{}/sd3:2"], "autoguidance exclude each other"),
        (
            ["--control", "{}/joint-True:{}/a.png", "--picture", "{}/a.png"],
            "--picture is for a model that works from a picture",
        ),
    ],
)
def test_flags_that_do_not_fit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], words: str
) -> None:
    filled = [flag.replace("{}", str(place)) for flag in flags]
    argv = ["--model", str(place / "sd3"), "--prompt", "x", "--steps", "2", *filled, "--out", str(tmp_path / "out")]
    assert words in refused(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_only_an_mmdit_is_steered(place: Path) -> None:
    pipe = Pipeline.load(place / "sd3")
    new = Control(control.load(place / "joint-True"))
    with pytest.raises(ValueError, match="this model has one already"):
        pipe.steered([new]).steered([new])
