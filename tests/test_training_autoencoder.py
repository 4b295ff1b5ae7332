"""The autoencoder: its bounds against closed forms, its training, and the command for one's own pictures."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchvision.models import vgg16

import evaluate
from data import digits
from data.latents import CONFIG, LIKELIHOOD, VAE
from data.raw.pictures import save_png, to_image
from flow.likelihood import bits_per_dimension, importance_weighted, log_weights
from pipeline.likelihood import Autoencoder as Judged
from tools import train_vae
from training.autoencoder import VGG, Autoencoder, config, fit, perceptual_network

W, S = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)  # x = W·z + S·noise
TINY = ["--data", "digits", "--widths", "8,8", "--latent", "2", "--groups", "4", "--batch-size", "4"]


def one_line(capsys: pytest.CaptureFixture) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def decoder(x: Tensor, z: Tensor) -> Tensor:
    return Normal(W * z, S).log_prob(x).sum(1)


def draws() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


def test_the_exact_posterior_makes_every_weight_the_evidence() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    variance = 1 / (1 + W**2 / S**2)
    mean = variance * W / S**2 * x
    weights = log_weights(mean, variance.log().expand_as(x), lambda z: decoder(x, z), draws, 4)
    evidence = Normal(0.0, (W**2 + S**2).sqrt()).log_prob(x).sum(1)
    torch.testing.assert_close(weights, evidence.expand(4, 5), atol=1e-10, rtol=1e-10)


def test_elbo_iwae_and_evidence_are_in_order_and_the_divergence_is_torch_s() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    mean, log_variance = 0.5 * x, torch.full_like(x, -1.0)
    weights = log_weights(mean, log_variance, lambda z: decoder(x, z), draws, 4096)
    bounds = torch.stack([importance_weighted(weights, k) for k in (1, 2, 8, 64, 4096)])
    assert (bounds.diff(dim=0) >= 0).all()
    evidence = Normal(0.0, (W**2 + S**2).sqrt()).log_prob(x).sum(1)
    torch.testing.assert_close(bounds[-1], evidence, atol=0.05, rtol=0)
    std = (log_variance / 2).exp()
    divergence = kl_divergence(Normal(mean, std), Normal(torch.zeros_like(mean), 1.0)).sum(1)
    reconstruction = (Normal(W * mean, S).log_prob(x) - (W * std / S) ** 2 / 2).sum(1)  # E ln p(x | z)
    torch.testing.assert_close(bounds[0], reconstruction - divergence, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="4096 draws cannot be divided into groups of 3"):
        importance_weighted(weights, 3)


def test_its_loss_is_the_bound_in_parts() -> None:
    torch.manual_seed(1)
    autoencoder = Autoencoder(config(1, 2, (8, 8), 1, 4, 8), levels=17)
    x = 2 * digits.load("train").pixels[:3] - 1
    error, divergence = autoencoder(x)
    q = autoencoder.vae.encode(x).latent_dist
    expected = kl_divergence(Normal(q.mean, q.std), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(divergence, expected)
    torch.manual_seed(2)
    error = autoencoder(x).error
    torch.manual_seed(2)
    decoded = autoencoder.vae.decode(q.sample()).sample.double()
    normal = Normal(decoded, torch.tensor(-2.0).div(2).exp().double())
    above, below = (normal.cdf(x + sign / 16) for sign in (1, -1))
    above, below = torch.where(x == 1, 1.0, above), torch.where(x == -1, 0.0, below)
    torch.testing.assert_close(error, -(above - below).log().flatten(1).sum(1).float(), rtol=1e-3, atol=1e-2)
    plain = Autoencoder(config(1, 2, (8, 8), 1, 4, 8))
    torch.manual_seed(2)
    error = plain(x).error
    torch.manual_seed(2)
    decoded = plain.vae.decode(plain.vae.encode(x).latent_dist.sample()).sample
    torch.testing.assert_close(error, (decoded - x).abs().flatten(1).sum(1))


def test_lpips_is_added_to_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in the place of torchvision's, which are not here."""
    features = vgg16(weights=None).features
    monkeypatch.setattr("torchmetrics.functional.image.lpips._get_tv_model_features", lambda net, pretrained: features)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"needs torchvision's weights of VGG16 at .*vgg16-397923af.pth"):
        Autoencoder(config(3, 2, (8, 8), 1, 4, 32), perceptual=0.5)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / VGG).touch()
    plain, more = (Autoencoder(config(3, 2, (8, 8), 1, 4, 32), perceptual=weight) for weight in (0.0, 0.5))
    more.vae.load_state_dict(plain.vae.state_dict())
    assert {name for name, _ in more.named_parameters()} == {name for name, _ in plain.named_parameters()}
    x = 2 * torch.rand(2, 3, 32, 32) - 1
    errors = []
    for autoencoder in (plain, more):
        torch.manual_seed(2)
        errors.append(autoencoder(x).error)
    torch.manual_seed(2)
    decoded = plain.vae.decode(plain.vae.encode(x).latent_dist.sample()).sample
    network, inside = perceptual_network(), decoded.clamp(-1, 1)
    known = learned_perceptual_image_patch_similarity(inside, x, net_type="vgg", reduction="none")
    torch.testing.assert_close(network(inside, x).flatten(), known.flatten())
    lpips = network(decoded, x).flatten()
    assert lpips.min() > 1e-4
    torch.testing.assert_close(errors[1] - errors[0], 0.5 * 3 * 32 * 32 * lpips, rtol=1e-3, atol=0)


def test_an_interrupted_training_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.autoencoder.KEPT", 2)
    pixels = 2 * digits.load("train").pixels - 1

    def trained(state: Path, end: int) -> dict[str, Tensor]:
        def batch(step: int) -> Tensor:
            if step == end:
                raise KeyboardInterrupt
            torch.manual_seed(step)
            return pixels[torch.randint(len(pixels), (4,))]

        torch.manual_seed(0)
        autoencoder = Autoencoder(config(1, 2, (8, 8), 1, 4, 8), levels=17)
        fit(autoencoder, batch, 6, 1e-3, lambda step: 1.0, state)
        return autoencoder.state_dict()

    whole = trained(tmp_path / "whole", 9)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "part", 5)
    resumed = trained(tmp_path / "part", 9)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    (tmp_path / "part").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="part is damaged: remove it"):
        trained(tmp_path / "part", 9)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 100])
def test_every_number_of_steps_can_be_trained(steps: int) -> None:
    autoencoder = Autoencoder(config(1, 2, (4,), 1, 2, 8))
    before = autoencoder.vae.decoder.conv_out.bias.clone()
    fit(autoencoder, lambda step: torch.rand(2, 1, 8, 8), steps, 1e-3, lambda step: 1.0)
    assert not torch.equal(before, autoencoder.vae.decoder.conv_out.bias)


def test_the_command_trains_and_evaluate_measures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "vae"
    train_vae.main([*TINY, "--steps", "3", "--seed", str(2**40), "--out", str(out)])
    assert not (out / train_vae.STATE).exists()
    train_vae.main([*TINY, "--steps", "3", "--seed", str(2**40), "--out", str(out)])
    assert "is trained already" in capsys.readouterr().out
    held = json.loads((out / LIKELIHOOD).read_text())
    assert held["levels"] == 17
    vae = VAE(out)
    latents = vae.encode(digits.load("train").pixels[:1000])
    assert abs(latents.mean()) < 1e-3
    assert abs(latents.std() - 1) < 1e-3
    evaluate.main(["--likelihood", "--samples", "4", "--model", str(out), "--out", str(tmp_path / "bits")])
    assert "IWAE-64" in capsys.readouterr().out
    rows = json.loads((tmp_path / "bits" / "results.json").read_text())["rows"][2:]
    assert [row["likelihood"] for row in rows] == ["ELBO", "IWAE-64"]
    assert rows[1]["bits_per_dim"] <= rows[0]["bits_per_dim"]

    model, pixels = Judged.load(out), digits.load("held_out").pixels[:3]
    one = model.bits(pixels, [0, 1, 2], draws=256)["ELBO"]
    network = Autoencoder(json.loads((out / CONFIG).read_text()) | {}, 17)
    network.vae.load_state_dict(vae.vae.state_dict())
    torch.nn.init.constant_(network.log_variance, held["log_variance"])  # type: ignore[arg-type]
    with torch.no_grad():
        nats = torch.stack([sum(network(2 * pixels - 1)) for _ in range(256)]).mean(0)
    torch.testing.assert_close(bits_per_dimension(-nats.double(), 64, 1.0), one, rtol=0.02, atol=0)
    torch.testing.assert_close(
        model.bits(pixels[1:2], [1], 8)["IWAE-8"], model.bits(pixels, [0, 1, 2], 8)["IWAE-8"][1:2]
    )
    with pytest.raises(ValueError, match="so 17 levels are wrong"):
        model.bits(pixels + 0.01, [0, 1, 2])


def test_it_trains_on_a_folder_of_pictures(tmp_path: Path) -> None:
    for i in range(3):
        save_png(to_image(torch.rand(3, 20, 24)), tmp_path / "pictures" / "deep" / f"{i}.png")
    train_vae.main(["--data", str(tmp_path / "pictures"), "--side", "16", "--widths", "8,8,8", "--groups", "4",
                    "--steps", "2", "--batch-size", "2", "--out", str(tmp_path / "vae")])  # fmt: skip
    vae = VAE(tmp_path / "vae")
    assert vae.factor == 4
    assert vae.encode(torch.rand(1, 3, 16, 16)).shape == (1, 4, 4, 4)
    assert not (tmp_path / "vae" / LIKELIHOOD).exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere"], "there is no folder nowhere: give one with pictures, or digits"),
        (["--data", "empty"], "empty holds no pictures"),
        (["--side", "16"], "digits have a side of 8: leave --side out"),
        (["--widths", "8,8,8,8,8"], "a side of 8 cannot be halved 4 times: give fewer --widths"),
        (["--widths", "8,9"], "--widths must be multiples of --groups 4"),
        (["--perceptual", "1"], "does not go with --levels nor with digits"),
        (["--levels", "16"], "so 16 levels are wrong"),
        (["--levels", "1"], "--levels must be at least 2"),
        (["--rate", "0"], "--rate must be above 0"),
        (["--kl", "-1"], "--kl at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train_vae.main([*TINY, *flags, "--out", "vae"])
    assert ended.value.code == 2
    assert words in one_line(capsys)
    assert not (tmp_path / "vae").exists()


def test_an_autoencoder_of_other_pictures_has_no_bits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train_vae.main([*TINY, "--steps", "1", "--out", str(tmp_path / "vae")])
    for held, words in (
        ('{"levels": 16, "log_variance": -1}', "has learned pictures of 16 levels, and these have 17"),
        ("{}", "must hold levels and log_variance"),
    ):
        (tmp_path / "vae" / LIKELIHOOD).write_text(held)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            evaluate.main(["--likelihood", "--model", str(tmp_path / "vae"), "--out", str(tmp_path / "bits")])
        assert ended.value.code == 2
        assert words in one_line(capsys)
