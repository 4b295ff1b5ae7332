"""Training of an autoencoder of pictures: by the evidence lower bound, Stable Diffusion's loss, or into codes."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from flow.likelihood import discretised
from storage.files import commit_path
from tokens.vqvae import VQVAE

Batch = Callable[[int], Tensor]  # step → pictures (B, C, H, W) in [−1, 1]
DECAY, CLIP = 0.01, 1.0  # of AdamW, and the largest norm of a gradient
COMMITMENT = 0.25  # β, the weight of the commitment to codes (van den Oord et al. 2017, §3.2)
VGG = "vgg16-397923af.pth"
KEPT = 500  # steps between two states on disk


def config(channels: int, latent: int, widths: Sequence[int], layers: int, groups: int, side: int) -> dict[str, Any]:
    """The config of a diffusers `AutoencoderKL`, each of whose levels but the last halves the picture.

    Args:
        channels: of a picture.
        latent: channels of the latents.
        widths: channels of each level, from the finest.
        layers: residual blocks of a level.
        groups: of group normalisation.
        side: of the pictures, in pixels.
    """
    return {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": list(widths),
        "layers_per_block": layers,
        "latent_channels": latent,
        "norm_num_groups": groups,
        "sample_size": side,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


class Loss(NamedTuple):
    """The two parts of an autoencoder's loss, summed over a picture, for each picture (B,)."""

    error: Tensor
    penalty: Tensor  # divergence of the posterior from N(0, I), in nats; for codes the commitment


def perceptual_network() -> nn.Module:
    """LPIPS on VGG16: pictures (B, 3, H, W) in [−1, 1], twice, to distances (B, 1, 1, 1).

    Raises:
        FileNotFoundError: torchvision's weights of VGG16 are not in torch's cache. Nothing is downloaded.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / VGG
    if not file.is_file():
        raise FileNotFoundError(f"the perceptual loss needs torchvision's weights of VGG16 at {file}: put them there")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.requires_grad_(False)


class Autoencoder(nn.Module):
    """An `AutoencoderKL` with the probability that its decoder gives to pictures.

    Args:
        config: of the network.
        levels: how many values a number of a picture can have. The error of a picture is then −ln P(x | z) under normal
            distributions around the decoded numbers, of one learned variance (`flow.likelihood.discretised`), and with
            the divergence it is the evidence lower bound. None means the sum of |error| of Stable Diffusion's
            autoencoder, without its adversarial part (Rombach et al. 2022, appendix G).
        perceptual: weight of LPIPS (Zhang et al. 2018), which is added to the |error| of every number.

    Raises:
        FileNotFoundError: the weights that LPIPS needs are not on this machine.
    """

    def __init__(self, config: dict[str, Any], levels: int | None = None, perceptual: float = 0.0) -> None:
        super().__init__()
        self.config, self.levels, self.perceptual = config, levels, perceptual
        self.lpips = [perceptual_network()] if perceptual else []  # a list: it is neither trained nor kept
        self.vae: Any = AutoencoderKL(**config)
        self.log_variance = nn.Parameter(torch.tensor(-2.0)) if levels else None

    def forward(self, x: Tensor) -> Loss:
        """The loss of pictures x (B, C, H, W) in [−1, 1], with one draw of the latents."""
        posterior = self.vae.encode(x).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        if self.levels is None or self.log_variance is None:
            error = (decoded - x).abs().flatten(1).sum(1)
            for network in self.lpips:
                error = error + self.perceptual * x[0].numel() * network.to(x.device)(decoded, x).flatten()
            return Loss(error, posterior.kl())
        spread = self.log_variance.expand_as(x)
        return Loss(-discretised(x, decoded, spread, 2 / (self.levels - 1), -1.0, 1.0), posterior.kl())


class CodedAutoencoder(nn.Module):
    """A `VQVAE` with its loss: the square error, and the commitment of its features to their codes.

    Args:
        vqvae: the network.
    """

    def __init__(self, vqvae: VQVAE) -> None:
        super().__init__()
        self.vqvae = vqvae

    def forward(self, x: Tensor) -> Loss:
        """The loss of pictures x (B, C, H, W) in [−1, 1] (van den Oord et al. 2017, eq. 3, without its second term)."""
        made = self.vqvae(x)
        # Both are means over numbers; a `Loss` is summed over a picture.
        return Loss((made.pictures - x).square().flatten(1).sum(1), made.commitment * x[0].numel())


def fit(
    autoencoder: nn.Module,
    batch: Batch,
    steps: int,
    rate: float,
    weight: Callable[[int], float],
    state: Path | None = None,
) -> None:
    """Trains an autoencoder with AdamW and one cycle of the learning rate.

    Args:
        autoencoder: gives the `Loss` of pictures; on its device.
        batch: gives the pictures of a step. If it also seeds torch for the step, a resumed training is the same.
        steps: of the training.
        rate: the highest learning rate.
        weight: of the penalty at a step.
        state: a file that keeps the training every 500 steps and at its end; none keeps nothing.

    Raises:
        ValueError: the state is damaged.
    """
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=rate, weight_decay=DECAY)
    rise = 0.05 if steps >= 100 else 0.3  # torch divides by zero where that share is one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=rise)
    parts: dict[str, Any] = {"autoencoder": autoencoder, "optimizer": optimizer, "schedule": schedule}
    first = 0
    if state and state.exists():
        held = _read(state)
        first = held["step"]
        for name, part in parts.items():
            part.load_state_dict(held[name])
    bar = tqdm(range(first, steps), desc="autoencoder", unit="step", initial=first, total=steps)
    for step in bar:
        x = batch(step)
        error, penalty = (part.mean() for part in autoencoder(x))
        optimizer.zero_grad()
        ((error + weight(step) * penalty) / x[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            bar.set_postfix(error=f"{float(error) / x[0].numel():.4f}", penalty=f"{float(penalty):.1f}")
        if state and ((step + 1) % KEPT == 0 or step + 1 == steps):
            content = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}
            commit_path(state, partial(torch.save, content))


def _read(state: Path) -> dict[str, Any]:
    """What `fit` has kept. ValueError in one line if the file is damaged."""
    try:
        return torch.load(state, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises any class
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{state} is damaged: remove it, and the training begins anew ({reason})") from None
