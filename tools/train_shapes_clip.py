"""Trains the CLIP of noisy shapes and writes `assets/shapes/clip/`.

    python -m tools.train_shapes_clip

It learns which caption belongs to which noisy latent of the shapes' VAE, at all noise levels alike, by CLIP's loss
(Radford et al. 2021, figure 3; noised as in GLIDE, Nichol et al. 2022). The captions come through the frozen text
towers of the shapes. At the end it prints how often a full caption leads to its own scene among 256 unseen ones, at
each noise level. It takes about ten minutes on one core. The weights are stored in half precision.
"""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from baselines.classifier import PROBE, NoisyCLIP
from cli import Parser
from data.latents import VAE
from data.text.clip import CLIPText
from tools.train_digits_classifier import BINS, noisy
from tools.train_shapes_text import SCENES, contrastive_loss, scenes

FOLDER = Path(__file__).parents[1] / "assets" / "shapes" / "clip"
STEPS, BATCH, RATE = 3000, 128, 1e-3
SHORT = 0.3  # share of the short captions, which may fit several scenes of a batch


def examples(vae: VAE, text: CLIPText, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Latents (count, 4, 8, 8) of scenes, and the pooled vectors of their long and short captions, (2, count, D)."""
    pixels, captions = scenes(first, count)
    latents = torch.cat([vae.encode(part / 255) for part in tqdm(pixels.split(100), desc="latents", leave=False)])
    with torch.no_grad():
        pooled = [
            torch.cat([text.encode(said[i : i + 200]).pooled for i in range(0, count, 200)])
            for said in zip(*captions, strict=True)
        ]
    return latents, torch.stack(pooled)


@torch.no_grad()
def report(clip: NoisyCLIP, latents: Tensor, pooled: Tensor) -> None:
    """Prints how often a full caption leads to its own scene, by noise level."""
    generator = torch.Generator().manual_seed(1)
    for i in range(BINS):
        tau = (i + torch.rand(len(latents), generator=generator)) / BINS
        found = clip.similarity(noisy(latents, tau, generator), tau, pooled).argmax(1)
        right = (found == torch.arange(len(found))).double().mean()
        print(
            f"τ from {i / BINS:.3f} to {(i + 1) / BINS:.3f}: {right:.1%} of {len(found)} captions lead to their scene"
        )


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae, text = VAE(FOLDER.parent / "vae"), CLIPText(FOLDER.parent / "text")
    latents, pooled = examples(vae, text, 0, SCENES)
    clip = NoisyCLIP(
        outputs=64, pooled_dim=pooled.shape[-1], in_channels=vae.channels,
        sample_size=latents.shape[-1], channels=(64, 128), layers=1, head_channels=64, groups=8,
        codec=vae.fingerprint(),
    )  # fmt: skip
    clip.probe.copy_(text.encode([PROBE]).pooled[0])
    optimizer = torch.optim.AdamW(clip.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    bar = tqdm(range(STEPS), desc="CLIP", unit="step")
    for step in bar:
        rows = torch.randint(SCENES, (BATCH,), generator=generator)
        kind = (torch.rand(BATCH, generator=generator) < SHORT).long()
        tau = torch.rand(BATCH, generator=generator)
        loss = contrastive_loss(clip.similarity(noisy(latents[rows], tau, generator), tau, pooled[kind, rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    clip.half().save(FOLDER)
    unseen, said = examples(vae, text, SCENES, 256)
    report(NoisyCLIP.load(FOLDER), unseen, said[0])


if __name__ == "__main__":
    main()
