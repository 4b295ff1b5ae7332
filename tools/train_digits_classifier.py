"""Trains the classifier of noisy digits and writes `assets/digits/classifier/`.

    python -m tools.train_digits_classifier

It learns the training split, shifted, rotated, scaled and sheared a little at random, at all noise levels alike
(Dhariwal & Nichol 2021, §4). At the end it prints how many held-out digits it recognises at each noise level; much
noise leaves little to recognise. It takes about four minutes on one core. The weights are stored in half precision.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from baselines.classifier import Classifier
from cli import Parser
from data import digits
from data.latents import Pixels
from tools.train_digits_judge import jitter

FOLDER = Path(__file__).parents[1] / "assets" / "digits" / "classifier"
STEPS, BATCH, RATE = 3000, 128, 1e-3
BINS = 8  # of τ


def noisy(x0: Tensor, tau: Tensor, generator: torch.Generator) -> Tensor:
    """(1 − τ)·x0 + τ·ε for x0 (B, C, H, W) and τ (B,)."""
    tau = tau[:, None, None, None]
    return (1 - tau) * x0 + tau * torch.randn(x0.shape, generator=generator)


@torch.no_grad()
def report(classifier: Classifier, codec: Pixels) -> None:
    """Prints the accuracy on held-out digits by noise level."""
    pixels, labels = digits.load("held_out")
    generator = torch.Generator().manual_seed(1)
    for i in range(BINS):
        tau = (i + torch.rand(len(labels), generator=generator)) / BINS
        right = classifier(noisy(codec.encode(pixels), tau, generator), tau).argmax(1) == labels
        print(f"τ from {i / BINS:.3f} to {(i + 1) / BINS:.3f}: {right.double().mean():.1%} of held-out digits right")


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train, codec = digits.load("train"), Pixels(1, 0.3, 2.66)  # as in configs/digits.yaml
    classes = [[digits.WORDS[label], str(label)] for label in range(10)]
    classifier = Classifier(
        classes, in_channels=1, sample_size=digits.SIDE, channels=(32, 64), layers=1, head_channels=32, groups=8,
        codec=codec.fingerprint(),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in tqdm(range(STEPS), desc="classifier", unit="step"):
        rows = torch.randint(len(train.labels), (BATCH,), generator=generator)
        tau = torch.rand(BATCH, generator=generator)
        x0 = codec.encode(jitter(train.pixels[rows], generator))
        loss = cross_entropy(classifier(noisy(x0, tau, generator), tau), train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.half().save(FOLDER)
    report(Classifier.load(FOLDER), codec)


if __name__ == "__main__":
    main()
