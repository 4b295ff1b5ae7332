"""Pictures from image embeddings: what the network is shown, variations, a prior's draws, the folder, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from decoders import made
from image_towers import SIDE, SIZE, pictures, tower
from PIL import Image
from torch import Tensor

import sample
from data.clip import CLIPImage, write
from data.latents import Pixels
from mmdit.network import Condition
from pipeline import Pipeline
from pipeline.folder import single_file
from pipeline.prior import draw
from pipeline.sampling import Sampling

PROMPTS = ["a large red circle", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, a prior of its embeddings, one of others, and a picture; all on disk."""
    folder = tmp_path_factory.mktemp("decoder")
    prior = made(folder, Pixels(1), 4, Sampling(steps=2, guidance=2.0))
    write(folder / "other", tower(), pictures(200))
    Pipeline(*prior.parts[:2], CLIPImage(folder / "other"), *prior.parts[3:]).save(folder / "alien")
    Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).save(folder / "picture.png")
    return folder


@pytest.fixture
def decoder(folder: Path) -> Pipeline:
    return Pipeline.load(folder / "decoder")


def shown(pipe: Pipeline) -> list[Condition]:
    """The conditions that the network gets, as they come."""
    found: list[Condition] = []
    pipe.network.register_forward_pre_hook(lambda _, inputs: found.append(inputs[2]))
    return found


def test_the_network_is_shown_the_embedding_and_in_the_null_condition_none(decoder: Pipeline) -> None:
    given, pixels = shown(decoder), pictures(2) / 255
    assert decoder.image_encoder
    latents = decoder.image_encoder.encode(pixels).flatten(1)
    decoder(PROMPTS, [0, 1], picture=pixels)
    for condition in given:  # both halves of the guidance in one pass
        text = decoder.text.encode(["", "", *PROMPTS]).pooled
        torch.testing.assert_close(condition.pooled[:, :128], text)
        torch.testing.assert_close(condition.pooled[:, 128:], torch.cat([torch.zeros(2, SIZE), latents]))
        assert condition.level is not None
        assert not condition.level.any()


def test_an_embedding_takes_the_place_of_its_picture(decoder: Pipeline) -> None:
    assert decoder.image_encoder
    pixels = pictures(2) / 255
    unit = decoder.image_encoder.embedding(decoder.image_encoder.encode(pixels))
    of_pictures = decoder(PROMPTS, [0, 1], picture=pixels)
    torch.testing.assert_close(decoder(PROMPTS, [0, 1], embedding=unit), of_pictures)
    alone = decoder(PROMPTS[1:], [1], picture=pixels[1:])
    torch.testing.assert_close(alone, of_pictures[1:], atol=1e-5, rtol=0)  # whatever its batch
    assert not torch.equal(decoder(PROMPTS, [0, 1], picture=pixels.flip(0)), of_pictures)
    assert not torch.equal(decoder(PROMPTS, [0, 1]), of_pictures)
    one = decoder(PROMPTS, [0, 1], picture=pixels[:1])
    each = decoder(PROMPTS, [0, 1], picture=pixels[:1].expand(2, -1, -1, -1))
    torch.testing.assert_close(one, each, atol=1e-5, rtol=0)
    large = torch.nn.functional.interpolate(pixels, (2 * SIDE, 2 * SIDE), mode="nearest")
    torch.testing.assert_close(decoder(PROMPTS, [0, 1], picture=large), of_pictures, atol=0.05, rtol=0)


def test_the_level_is_that_of_the_embedding_s_noise(decoder: Pipeline) -> None:
    given, level = shown(decoder), 0.25
    assert decoder.image_encoder
    latents = decoder.image_encoder.encode(pictures(1) / 255).flatten(1)
    decoder(["a circle"] * 40, range(40), picture=pictures(1) / 255, level=level)
    own = given[0].pooled[40:, 128:]
    noise = (own - (1 - level) * latents) / level
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert torch.equal(given[0].level, torch.full((80,), level))
    first = torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in range(40)])
    assert not torch.isclose(noise[:, :16], first).any(1).all()  # not the noise that the picture begins at


def test_it_comes_back_from_its_folder(folder: Path, decoder: Pipeline, tmp_path: Path) -> None:
    index = json.loads((folder / "decoder/model_index.json").read_text())
    assert (index["_class_name"], index["image_encoder"]) == ("Pipeline", ["data.clip", "CLIPImage"])
    decoder.save(tmp_path / "again")
    pixels, again = pictures(2) / 255, Pipeline.load(tmp_path / "again")
    assert torch.equal(again(PROMPTS, [0, 1], picture=pixels), decoder(PROMPTS, [0, 1], picture=pixels))
    with pytest.raises(ValueError, match="holds no image encoder: write a folder"):
        single_file(decoder.parts)


def drawn(out: Path, *flags: str) -> Tensor:
    """The one picture that a command draws."""
    sample.main([*flags, "--out", str(out)])
    (file,) = (file for file in out.glob("*.png") if file.name != "sheet.png")
    return torch.from_numpy(np.asarray(Image.open(file)) / 255)


def test_the_command_draws_variations_and_from_a_prior_and_repeats_them(
    folder: Path, decoder: Pipeline, tmp_path: Path
) -> None:
    flags = ["--model", str(folder / "decoder"), "--prompt", PROMPTS[0], "--seed", "3", "--level", "0.1"]
    varied = drawn(tmp_path / "varied", *flags, "--picture", str(folder / "picture.png"))
    wanted = decoder(PROMPTS[:1], [3], picture=pictures(1) / 255, level=0.1)[0, 0]
    torch.testing.assert_close(varied, wanted.double(), atol=1 / 255, rtol=0)
    from_prior = drawn(tmp_path / "prior", *flags, "--prior", str(folder / "prior"))
    embedding = draw(Pipeline.load(folder / "prior"), PROMPTS[:1], [3])
    wanted = decoder(PROMPTS[:1], [3], embedding=embedding, level=0.1)[0, 0]
    torch.testing.assert_close(from_prior, wanted.double(), atol=1 / 255, rtol=0)
    assert not torch.equal(varied, from_prior)
    for name, picture in (("varied", varied), ("prior", from_prior)):
        (file,) = (file for file in (tmp_path / name).glob("*.png") if file.name != "sheet.png")
        assert torch.equal(drawn(tmp_path / f"{name}-again", "--like", str(file)), picture)


def test_what_does_not_fit_is_refused_in_one_line(
    folder: Path, model: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    own, picture = ["--model", str(folder / "decoder")], ["--picture", str(folder / "picture.png")]
    prior = ["--prior", str(folder / "prior")]
    for flags, message in (
        ([*own, *prior, *picture], "--prior draws the embedding, and --picture has one: leave one of them out"),
        ([*own, "--level", "0.1"], "--level needs a --picture or a --prior"),
        ([*own, *prior, "--level", "2"], "level must be from 0 to 1"),
        ([*own, "--prior", str(folder / "alien")], "alien does not draw the embeddings that"),
        ([*own, "--prior", str(folder / "decoder")], "decoder does not draw the embeddings that"),
        ([*own, "--prior", str(folder / "none")], "none"),
        (["--model", str(model), *prior], "this one takes none: leave it out"),
        (
            ["--model", str(model), *picture],
            "--picture is for a model that works from a picture, and this one does not",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            sample.main([*flags, "--prompt", "a circle", "--out", str(tmp_path / "out")])
        assert end.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1], flags
        assert not list(tmp_path.glob("out/*.png"))


def test_calls_that_do_not_fit_are_refused(decoder: Pipeline, pipe: Pipeline) -> None:
    pixels, unit = pictures(3) / 255, torch.ones(1, SIZE) / SIZE**0.5
    codec = decoder.image_encoder
    for call, message in (
        (lambda: decoder(PROMPTS, [0, 1], picture=pixels), "there must be 1 or 2 pictures to embed, got 3"),
        (lambda: decoder(PROMPTS, [0, 1], picture=pixels[:1], embedding=unit), "give one of them"),
        (lambda: decoder(PROMPTS, [0, 1], embedding=unit[:, 1:]), f"embeddings have {SIZE} numbers"),
        (lambda: decoder(PROMPTS, [0, 1], embedding=unit, level=1.5), "level must be from 0 to 1"),
        (lambda: pipe(["a"], [0], embedding=unit), "this model takes no image embedding"),
        (
            lambda: Pipeline(*pipe.parts[:5], image_encoder=codec),
            "pooled_dim is 64, but codec, text and objective need",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
