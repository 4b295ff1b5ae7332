"""Autoencoders of codes, their codecs, and the command that trains them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.raw.pictures import save_png, to_image
from pipeline.folder import load_codec
from storage.modules import CONFIG, STEM
from tokens.codec import LATENTS, VQ, Levels, write_vqvae
from tokens.vqvae import VQVAE
from tools import train_vae
from training.autoencoder import CodedAutoencoder, fit

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "assets/shapes/vq"
KINDS = {"one": {}, "residual": {"depth": 3}, "two": {"levels": 2}}
SMALL = {"channels": 1, "widths": (8, 16), "codes": 12, "dim": 4}
every = pytest.mark.parametrize("kind", KINDS)


def vqvae(kind: str) -> VQVAE:
    return VQVAE(**(SMALL | KINDS[kind])).eval()


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, 1, 8, 8)


@every
@torch.no_grad()
def test_the_codes_alone_give_the_reconstruction(kind: str) -> None:
    model, x = vqvae(kind), pictures()
    made = model(x)
    assert made.codes.shape == (3, {"one": 1, "residual": 3, "two": 5}[kind], 2, 2)
    assert made.pictures.shape == x.shape
    assert made.commitment.shape == (3,)
    torch.testing.assert_close(model.decode(made.codes), made.pictures, atol=1e-5, rtol=1e-5)
    wrong = made.codes.clone()
    wrong[0, 0, 0, 0] = 12
    with pytest.raises(ValueError, match="codes must be from 0 to 11, the size of this codebook"):
        model.decode(wrong)
    with pytest.raises(ValueError, match="codes have 6 for each place, and this autoencoder has"):
        model.decode(torch.zeros(1, 6, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="sides must be multiples of 4"):
        model(torch.rand(1, 1, 8, 6))


@torch.no_grad()
def test_fine_codes_lie_beside_their_coarse_one() -> None:
    model, seen = vqvae("two"), []
    model.quantizer_fine.register_forward_hook(lambda module, inputs, made: seen.append(made.codes))
    packed = model(pictures(2)).codes
    (fine,) = seen
    assert fine.shape == (2, 1, 4, 4)
    for row, column in ((0, 3), (1, 2), (3, 0)):
        stack = packed[:, 1 + 2 * (row % 2) + column % 2, row // 2, column // 2]
        assert torch.equal(stack, fine[:, 0, row, column])


@every
def test_training_moves_encoder_decoder_and_codebook(kind: str) -> None:
    model = CodedAutoencoder(vqvae(kind)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, lambda step: 2 * pictures(16) - 1, 3, 1e-2, lambda step: 0.25)
    same = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert not same


def test_the_loss_is_the_square_error_and_the_commitment_of_the_paper_for_each_number() -> None:
    model = CodedAutoencoder(vqvae("one")).eval()
    x = 2 * pictures() - 1
    made, loss = model.vqvae(x), model(x)
    torch.testing.assert_close(loss.error / x[0].numel(), (made.pictures - x).square().mean((1, 2, 3)))
    torch.testing.assert_close(loss.penalty / x[0].numel(), made.commitment)


def written(kind: str, folder: Path, vectors: bool = False) -> Path:
    write_vqvae(vqvae(kind), folder, 0.1, 2.0, vectors)
    return folder


@every
def test_a_codec_gives_codes_as_whole_numbers_and_takes_nothing_else(kind: str, tmp_path: Path) -> None:
    codec = VQ(written(kind, tmp_path / "vae"))
    codes = codec.encode(pictures())
    assert codes.shape == (3, codec.channels, 2, 2)
    assert codec.vocabulary == 12
    assert torch.equal(codes, codes.round())
    decoded = codec.decode(codes)
    assert decoded.shape == (3, 1, 8, 8)
    assert 0 <= decoded.min() <= decoded.max() <= 1
    for wrong in (codes + 0.5, codes + 12, codes - 13, codes * torch.nan):
        with pytest.raises(ValueError, match="codes must be whole numbers from 0 to 11"):
            codec.decode(wrong)
    codec.save(tmp_path / "again")
    again = load_codec(tmp_path / "again")
    assert again.fingerprint() == codec.fingerprint()
    assert torch.equal(again.encode(pictures(1) * 0 + 0.5), codec.encode(pictures(1) * 0 + 0.5))


def test_a_flow_gets_normalised_vectors_and_decoding_moves_them_to_codes(tmp_path: Path) -> None:
    codec = VQ(written("residual", tmp_path), vectors=True)
    assert (codec.channels, codec.vocabulary) == (4, 0)
    x = pictures()
    latents = codec.encode(x)
    torch.testing.assert_close(latents, (codec.vqvae.vectors(2 * x - 1) - 0.1) * 2.0)
    one = VQ(written("one", tmp_path / "one"), vectors=True)
    latents = one.encode(x)
    torch.testing.assert_close(one.decode(latents), (one.vqvae(2 * x - 1).pictures / 2 + 0.5).clamp(0, 1))
    torch.testing.assert_close(one.decode(latents + 1e-4 * torch.randn_like(latents)), one.decode(latents))
    codec.save(tmp_path / "again")
    assert load_codec(tmp_path / "again").channels == 4
    assert load_codec(tmp_path / "again").fingerprint() != VQ(tmp_path).fingerprint()
    write_vqvae(codec.vqvae, tmp_path / "other", 0.1, 3.0, True)
    assert load_codec(tmp_path / "other").fingerprint() != codec.fingerprint()
    with pytest.raises(ValueError, match="sides must be multiples of 4"):
        codec.encode(torch.rand(1, 1, 9, 8))
    with pytest.raises(ValueError, match="has two levels, whose vectors have two sizes"):
        VQ(written("two", tmp_path / "two"), vectors=True)


def change(folder: Path, **settings: int) -> None:
    held = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(held | settings))


def test_the_config_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.modules.write_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written("one", tmp_path)
    assert not (tmp_path / CONFIG).exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / LATENTS).unlink(), "there is no .*latents.json"),
        (lambda folder: (folder / LATENTS).write_text('{"vectors": false}'), "must hold shift_factor, scaling_factor"),
        (
            lambda folder: (folder / LATENTS).write_text(
                json.dumps({"vectors": "false", "shift_factor": 0, "scaling_factor": 1})
            ),
            "must hold shift_factor",
        ),
        (lambda folder: change(folder, codes=10**13), "no whole config of a VQVAE"),
        (lambda folder: change(folder, codes=1), "a codebook needs at least 2 codes, got 1"),
        (lambda folder: (folder / CONFIG).unlink(), "no codec config at"),
        (lambda folder: (folder / CONFIG).write_text('{"_class_name": "VQGAN"}'), "describes a VQGAN, no codec"),
        (lambda folder: (folder / f"{STEM}.safetensors").write_bytes(b"short"), "truncated or no safetensors"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(spoil, message: str, tmp_path: Path) -> None:
    spoil(written("one", tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_codec(tmp_path)
    assert "\n" not in str(caught.value)


def test_levels_are_pixels_and_back(tmp_path: Path) -> None:
    codec = Levels(17, 1)
    x = torch.arange(17).reshape(1, 1, 1, 17) / 16
    assert codec.encode(x).flatten().tolist() == list(range(17))
    assert torch.equal(codec.decode(codec.encode(x)), x)
    codec.save(tmp_path)
    assert load_codec(tmp_path).fingerprint() == codec.fingerprint()
    with pytest.raises(ValueError, match="whole numbers from 0 to 16"):
        codec.decode(torch.full((1, 1, 1, 1), 17.0))
    with pytest.raises(ValueError, match="1 or 3 channels and 2 to 256 levels"):
        Levels(1000, 1)


def test_the_codes_of_the_shapes_keep_what_a_judge_reads() -> None:
    from data import shapes
    from tools.train_shapes_vae import pictures as scenes

    codec, drawn = VQ(SHAPES), scenes(50_000, 40)
    codes = codec.encode(drawn / 255)
    assert codes.shape == (40, 1, 8, 8)
    back = codec.decode(codes)
    error = (back - drawn / 255).square().mean((1, 2, 3))
    assert -10 * error.log10().mean() > 30
    right = [
        shapes.fulfils(shapes.read(one.movedim(0, -1).double().numpy()), shapes.scene(1, 50_000 + i).request)
        for i, one in enumerate(back)
    ]
    assert sum(right) >= 38


# The command.

TINY = ["--codes", "8", "--widths", "8,8", "--latent", "4", "--batch-size", "4"]


def folder_of_pictures(folder: Path) -> str:
    folder.mkdir()
    for i in range(6):
        save_png(to_image(torch.rand(3, 8, 8)), folder / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize("more", [[], ["--code-depth", "2"], ["--two-levels"]])
def test_the_command_trains_one_that_the_codec_reads_and_an_interrupted_one_ends_the_same(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data", folder_of_pictures(tmp_path / "pictures"), "--side", "8", *TINY, *more]
    train_vae.main([*data, "--steps", "4", "--out", str(tmp_path / "straight")])
    monkeypatch.setattr("training.autoencoder.KEPT", 1)

    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    step = torch.optim.lr_scheduler.OneCycleLR.step
    steps = iter([step] * 4 + [stop])  # the constructor takes one
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.lr_scheduler.OneCycleLR, "step", lambda *given: next(steps)(*given))
        with pytest.raises(Stopped):
            train_vae.main([*data, "--steps", "4", "--out", str(tmp_path / "stopped")])
    assert (tmp_path / "stopped" / train_vae.STATE).exists()
    train_vae.main([*data, "--steps", "4", "--out", str(tmp_path / "stopped")])
    straight, stopped = VQ(tmp_path / "straight"), VQ(tmp_path / "stopped")
    assert straight.fingerprint() == stopped.fingerprint()
    assert (straight.shift, straight.scale) == (stopped.shift, stopped.scale)
    assert not (tmp_path / "stopped" / train_vae.STATE).exists()
    assert json.loads((tmp_path / "straight" / LATENTS).read_text())["vectors"] is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--codes", "8", "--levels", "17"], "--codes goes without --levels"),
        (["--codes", "8", "--perceptual", "1"], "--codes goes without --levels"),
        (["--code-depth", "2"], "--code-depth and --two-levels need --codes"),
        (["--two-levels"], "--code-depth and --two-levels need --codes"),
        (["--codes", "8", "--two-levels", "--code-depth", "2"], "levels must be 1, or 2 with depth 1"),
        (["--codes", "8", "--widths", "8,8,8,8"], "cannot be halved 4 times"),
        (["--codes", "8", "--widths", "9,9"], "multiples of"),
    ],
)
def test_flags_that_do_not_fit_end_in_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        train_vae.main(["--data", "digits", *flags, "--steps", "1", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()
