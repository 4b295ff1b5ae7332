"""Models of codes through every door: training, model folder, samples, evaluation, likelihood; and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from trials import ROOT, assert_goes_on_to_the_bit, assert_two_learn_as_one, fit, refused, small

import encode
import evaluate
import sample
import train
from data import digits
from data.latents import Pixels
from data.shapes import Shapes
from data.store.encoding import Encoding, StoreEncoder
from data.store.reader import Store
from data.text.encoder import CutCaptions
from data.text.words import Words
from flow.objective import Objective
from mmdit.network import Condition
from pipeline import Pipeline
from pipeline.likelihood import bits
from pipeline.sampling import Sampling
from tokens.codec import VQ, Levels, write_vqvae
from tokens.dalle import DALLE
from tokens.process import NextCode
from tokens.vqvae import VQVAE

OVERLAYS = ("digits", "shapes", "prior", "decoder")  # the last two have tests of their own
DIGITS = ("--config", str(ROOT / "configs/tokens/digits.yaml"), "--text.folder", str(ROOT / "assets/digits/text"))
STEPS = ("--run.steps", "6", "--run.validate_every", "3", "--run.checkpoint_every", "3")
SMALL = (*DIGITS, *STEPS, "--network.depth", "1", "--network.width", "16", "--network.heads", "1")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the digits' codes of six steps; not to be written into."""
    folder = tmp_path_factory.mktemp("writer")
    fit(small(folder), *SMALL)
    return folder / "run/model"


def test_every_overlay_is_tried() -> None:
    assert {file.stem for file in (ROOT / "configs/tokens").glob("*.yaml")} == set(OVERLAYS)


def test_a_stopped_training_ends_as_one_that_nothing_stopped(tmp_path: Path) -> None:
    assert_goes_on_to_the_bit(small(tmp_path), *SMALL, stopped=2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_learn_as_one(tmp_path: Path, kind: str) -> None:
    assert_two_learn_as_one(small(tmp_path), *SMALL, kind=kind)


def test_the_folder_draws_the_same_pictures_whatever_their_batch(writer: Path, tmp_path: Path) -> None:
    pipe = Pipeline.load(writer)
    assert isinstance(pipe.network, DALLE)
    assert (pipe.sampling.steps, pipe.sampling.method) == (64, "autoregressive")
    prompts = ["a handwritten seven", "", "a handwritten two"]
    pictures = pipe(prompts, [0, 1, 2])
    assert torch.equal(16 * pictures, (16 * pictures).round())
    assert torch.equal(pipe(prompts[2:], [2]), pictures[2:])
    pipe.save(tmp_path / "again")
    assert torch.equal(Pipeline.load(tmp_path / "again")(prompts, [0, 1, 2]), pictures)
    sample.main(["--model", str(writer), "--prompt", prompts[0], "--seed", "0", "--out", str(tmp_path / "drawn")])
    assert (tmp_path / "drawn/sheet.png").is_file()


@torch.inference_mode()
def test_guidance_moves_the_logits_away_from_those_of_the_empty_caption(writer: Path) -> None:
    pipe, scale = Pipeline.load(writer), 1000.0  # in six steps it learned little of the captions
    (drawn,) = pipe(["a handwritten seven"], [5], sampling=Sampling(64, scale, "autoregressive"))
    z, u = torch.zeros(1, 1, 8, 8), torch.special.ndtr(torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(5)))
    likely, null = pipe.condition(["a handwritten seven"]), pipe.condition([""])
    for number in range(64):
        place = divmod(number, 8)
        known, without = (pipe.network(z, torch.zeros(1), c)[0, :, *place].double() for c in (likely, null))
        sums = (without + scale * (known - without)).softmax(0).cumsum(0)
        z[0, 0, *place] = torch.searchsorted(sums, u[0, *place].double()[None])[0]
    torch.testing.assert_close(drawn, z[0] / 16)


def test_its_likelihood_is_the_exact_code_length(writer: Path) -> None:
    pipe = Pipeline.load(writer)
    pixels, labels = (part[:4] for part in digits.load("held_out"))
    captions = [digits.captions(int(label), digits.TRAIN_TEMPLATES)[0] for label in labels]
    (kind, found), *rest = bits(pipe, pixels, captions, digits.LEVELS, range(4)).items()
    assert kind == "exact"
    assert not rest
    codes = (16 * pixels).long()
    shares = pipe.network(codes.float(), torch.zeros(4), pipe.condition(captions)).log_softmax(1)
    each = -shares.gather(1, codes).flatten(1).sum(1) / torch.tensor(2.0).log() / 64
    torch.testing.assert_close(found.float(), each)
    with pytest.raises(ValueError, match="writes 17 levels, and these pictures have 9"):
        bits(pipe, pixels.round(), captions, 9, range(4))


def test_evaluation_takes_as_many_steps_as_there_are_codes(writer: Path, tmp_path: Path, capsys) -> None:
    argv = ["--data", "digits", "--model", str(writer), "--out", str(tmp_path / "out")]
    evaluate.main([*argv, "--samples", "70"])
    assert "| autoregressive | 64 | 64 |" in capsys.readouterr().out
    evaluate.main([*argv[:-1], str(tmp_path / "bits"), "--likelihood", "--guidance", "1", "--samples", "20"])
    assert "| exact | 20 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "euler"], "this is a model of codes: take autoregressive"),
        (["--steps", "8"], "writes 64 codes, one a step: give 64 steps, not 8"),
        (["--size", "16"], "must be a multiple of 8"),
        (["--sampler", "autoregressive:top_p=2"], "top_p must be above 0 and at most 1"),
        (["--spacing", "karras"], "codes are written from t = 1 to t = 0: take spacing trailing"),
        (["--rescale", "0.5", "--guidance", "2"], "rescale and shift do nothing for codes"),
        (["--guider", "apg", "--guidance", "2"], "guider apg is for a velocity at one time, and not for codes"),
        (["--shift", "3"], "rescale and shift do nothing for codes"),
        (["--image", str(ROOT / "docs/digits.png")], "writes a picture from its beginning: leave the image out"),
    ],
)
def test_settings_that_do_not_fit_end_in_one_line(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    if flags[0] == "--size":
        flags = ["--height", "12", "--width", "8"]
    with pytest.raises(SystemExit) as end:
        sample.main(["--model", str(writer), "--prompt", "a seven", *flags, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 1)
    assert message in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["pairs", "--num", "4", "--out"], "writes codes, and this command walks a path"),
        (["grid", "--steps", "4", "--num", "8", "--out"], "writes codes, and this command walks a path"),
    ],
)
def test_commands_that_walk_a_path_are_refused(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: list[str], message: str
) -> None:
    (tmp_path / "prompts.txt").write_text("zero\none\n")
    with pytest.raises(SystemExit) as end:
        sample.main(
            [*command, str(tmp_path / "out"), "--model", str(writer), "--prompts", str(tmp_path / "prompts.txt")]
        )
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_an_interrupted_drawing_leaves_no_memory(writer: Path) -> None:
    pipe = Pipeline.load(writer)
    assert isinstance(pipe.network, DALLE)

    def stop(done: int, z: torch.Tensor, x0: torch.Tensor) -> None:
        if done == 3:
            assert pipe.network.memory is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(["a seven"], [0], callback=stop)
    assert pipe.network.memory is None


def test_a_picture_to_start_from_is_refused(writer: Path) -> None:
    with pytest.raises(ValueError, match="writes a picture from its beginning: leave the image out"):
        Pipeline.load(writer)(["a seven"], [0], image=torch.zeros(1, 1, 8, 8))


def test_other_models_are_no_models_of_codes(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="sampler autoregressive does not fit: this is no model of codes"):
        pipe(["zero"], [0], sampling=Sampling(64, 1.0, "autoregressive"))


def test_codec_and_objective_must_have_the_same_codes(pipe: Pipeline) -> None:
    text = Words(ROOT / "assets/digits/text")
    network, sampling = DALLE(codes=17, text_length=10, depth=1, width=16, heads=1), Sampling(64, 1.0, "autoregressive")
    Pipeline(network, NextCode(17), Levels(17, 1), text, sampling)
    with pytest.raises(ValueError, match="the codec's latents are 16 codes, and the objective learns 17 codes"):
        Pipeline(network, NextCode(17), Levels(16, 1), text, sampling)
    with pytest.raises(ValueError, match="the codec's latents are numbers, and the objective learns 17 codes"):
        Pipeline(network, NextCode(17), Pixels(1), text, sampling)
    other = DALLE(codes=1 + 1, text_length=10, depth=1, width=16, heads=1)
    other.out_channels = 1
    with pytest.raises(ValueError, match="the codec's latents are 17 codes, and the objective learns numbers"):
        Pipeline(other, Objective(), Levels(17, 1), text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--network.text_length", "8"], "network's text_length is 8, but codec, text and objective need 10"),
        (["--network.words", "600"], "network's words is 600, but codec, text and objective need 700"),
        (["--codec.levels", "16"], "latents are 16 codes, and the objective learns 17 codes"),
        (["--objective.vocabulary", "1"], "needs a vocabulary of at least 2"),
        (["--data.text_mask", "false"], "network.text_mask is True, but the data need False"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert message in refused(capsys, small(tmp_path), *SMALL, *flags)


def test_words_are_token_numbers_with_their_mask_and_long_captions_are_named(tmp_path: Path) -> None:
    text = Words(ROOT / "assets/shapes/text", length=8)
    tokens, pooled = text.encode(["a small red circle", ""])
    assert tokens.shape == (2, 8, 1)
    assert pooled.shape == (2, 0)
    assert text.mask(["a small red circle", ""]).sum(1).tolist() == [6, 2]
    assert tokens.max() < text.vocabulary
    assert torch.equal(tokens, tokens.round())
    with pytest.warns(CutCaptions, match="longer than the 8 tokens that the network reads"):
        text.encode(["a small red circle to the left of two large blue squares"])
    text.save(tmp_path)
    assert Words(tmp_path).fingerprint() == text.fingerprint()
    with pytest.raises(ValueError, match="needs 2 to 4,096 tokens"):
        Words(ROOT / "assets/shapes/text", length=1)
    with pytest.raises(FileNotFoundError, match="is missing"):
        Words(tmp_path / "nowhere")
    assert Condition(tokens, pooled).text is tokens


def test_the_shapes_train_from_a_store_of_codes_that_holds_them_exactly(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "configs/tokens/shapes.yaml").read_text())
    base = yaml.safe_load((ROOT / "configs/shapes.yaml").read_text())
    content["encode"] |= {"store": str(tmp_path / "store"), "device": "cpu"}
    content["encode"]["source"]["init_args"]["count"] = 30
    content["data"]["init_args"] |= {"store": str(tmp_path / "store"), "batch_size": 8, "held_out": 6}
    content["network"]["init_args"] |= {"depth": 1, "width": 16, "heads": 1}
    content["text"]["init_args"]["folder"] = str(ROOT / "assets/shapes/text")
    content["codec"]["init_args"]["path"] = str(ROOT / "assets/shapes/vq")
    content["run"] |= {"folder": str(tmp_path / "run"), "steps": 4, "validate_every": 2, "checkpoint_every": 2}
    base["optimization"]["warmup"], base["grid"], base["ema"] = 2, {"prompts": ["a large red circle"], "columns": 1}, {}
    base["strategy"]["compile"] = False
    for name, part in (("base", base), ("codes", content)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(part))
    flags = ["--config", str(tmp_path / "base.yaml"), "--config", str(tmp_path / "codes.yaml")]
    encode.main(flags)
    store, codec = Store(tmp_path / "store"), VQ(ROOT / "assets/shapes/vq")
    latents = store.latents(list(range(30))).float()
    assert latents.max() > 100
    assert torch.equal(latents, latents.round())
    assert codec.decode(latents[:2]).shape == (2, 3, 64, 64)
    train.main(["fit", *flags])
    assert Pipeline.load(tmp_path / "run")(["a large red circle"], [0]).shape == (1, 3, 64, 64)


def test_what_bfloat16_cannot_hold_is_not_stored(tmp_path: Path) -> None:
    settings = Encoding(Shapes(count=4), tmp_path / "store", side=64, step=64)
    words = Words(ROOT / "assets/shapes/text")
    with pytest.raises(ValueError, match="a store holds no token numbers"):
        StoreEncoder(settings, VQ(ROOT / "assets/shapes/vq"), words)
    write_vqvae(VQVAE(widths=(8,), codes=512), tmp_path / "vq", 0.0, 1.0)
    with pytest.raises(ValueError, match="exact for codes below 257, and this codec has 512"):
        StoreEncoder(replace(settings, text="captions"), VQ(tmp_path / "vq"), words)
