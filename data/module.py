"""Batches for training and validation, as a LightningDataModule."""

from typing import Any, Literal, NamedTuple, final

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import digits
from data.latents import Codec
from data.sampler import GlobalBatches, Share, Stripes, Use, normal, stream
from data.text import TextEncoder


class Batch(NamedTuple):
    """One rank's share of a global batch, ready for the loss."""

    step: int  # number of global batches before this one
    positions: np.ndarray  # of these samples in the global batch; in validation, of the data set; (b,)
    x0: Tensor  # latents (b, C, H, W)
    noise: Tensor  # what x0 is paired with (b, C, H, W)
    text: Tensor  # (b, N, D)
    pooled: Tensor  # (b, P)


PIXELS = 2**20  # encoded at once


class CaptionedDigits(Dataset[Batch]):
    """Latents and the encodings of all their captions in memory; an item is a whole share of a batch."""

    def __init__(self, split: Literal["train", "held_out"], side: int, text: TextEncoder, codec: Codec) -> None:
        pixels, labels = digits.load(split)
        templates = digits.TRAIN_TEMPLATES
        batches = tqdm(pixels.split(max(1, PIXELS // side**2)), desc="encoding pictures", disable=codec.factor == 1)
        self.latents = torch.cat(
            [codec.encode(digits.enlarged(part, side, codec.pixel_channels)).cpu() for part in batches]
        )
        self.labels = labels.numpy()
        self.templates = len(templates)
        null, every = [""], [c for label in range(10) for c in digits.captions(label, templates)]
        self.tokens, self.pooled = (part.cpu() for part in text.encode(null + every))  # row 0 is the null condition

    def rows(self, samples: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """The row of each sample's caption number `choice`, in the table of encodings."""
        return 1 + self.labels[samples] * self.templates + choice

    def batch(self, share: Share, rows: np.ndarray, noise: Tensor) -> Batch:
        return Batch(
            share.step, share.positions, self.latents[share.samples], noise, self.tokens[rows], self.pooled[rows]
        )


class TrainingDigits(CaptionedDigits):
    """A share with captions drawn at random and dropped at a rate, and with fresh noise: functions of (seed, step)."""

    def __init__(
        self,
        text: TextEncoder,
        codec: Codec,
        seed: int,
        batch_size: int,
        caption_dropout: float,
        side: int = digits.SIDE,
    ) -> None:
        super().__init__("train", side, text, codec)
        self.seed, self.batch_size, self.caption_dropout = seed, batch_size, caption_dropout

    def __getitem__(self, share: Share) -> Batch:
        drawn = stream(self.seed, Use.CAPTION, share.step).random((self.batch_size, 2))[share.positions]
        rows = self.rows(share.samples, (drawn[:, 0] * self.templates).astype(int))
        rows[drawn[:, 1] < self.caption_dropout] = 0
        noise = normal(self.seed, Use.NOISE, share.step, share.positions, tuple(self.latents.shape[1:]))
        return self.batch(share, rows, noise)


class ValidationDigits(CaptionedDigits):
    """Each held-out sample with one caption and one noise, the same in every run."""

    def __init__(self, text: TextEncoder, codec: Codec, side: int = digits.SIDE) -> None:
        super().__init__("held_out", side, text, codec)

    def __getitem__(self, share: Share) -> Batch:
        rows = self.rows(share.samples, share.samples % self.templates)
        noise = normal(0, Use.VALIDATION, 0, share.samples, tuple(self.latents.shape[1:]))
        return self.batch(share, rows, noise)


def _whole(batch: Any) -> Any:
    return batch


@final
class Digits(L.LightningDataModule):
    """Handwritten digits with captions.

    Args:
        text: encodes the captions.
        codec: encodes the pictures, in grey or in three equal colours.
        seed: of the order, the captions and the noise.
        batch_size: of the global batch, over all processes.
        caption_dropout: share of captions replaced by the empty one, which is the null condition of guidance.
        side: of a picture, in pixels, to which the digits of 8 × 8 are enlarged.
        workers: loader processes; 0 loads in the training process.
    """

    def __init__(
        self,
        text: TextEncoder,
        codec: Codec,
        seed: int = 0,
        batch_size: int = 64,
        caption_dropout: float = 0.1,
        side: int = digits.SIDE,
        workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or workers < 0 or not 0 <= caption_dropout <= 1:
            raise ValueError(
                "data needs batch_size >= 1, workers >= 0 and caption_dropout from 0 to 1, "
                f"got {batch_size}, {workers} and {caption_dropout}"
            )
        if side < digits.SIDE or side % codec.factor:
            raise ValueError(f"data.side must be a multiple of {codec.factor} and at least 8, got {side}")
        self.text, self.codec, self.side = text, codec, side
        self.seed, self.batch_size, self.caption_dropout, self.workers = seed, batch_size, caption_dropout, workers

    def setup(self, stage: str) -> None:
        """Text and pictures are encoded where the training runs."""
        if self.trainer:
            self.codec.to(self.trainer.strategy.root_device)
            self.text.to(self.trainer.strategy.root_device)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader:
        """Batches from the trainer's step on, without end."""
        rank, world = self._place()
        start = self.trainer.global_step if self.trainer else 0
        data = TrainingDigits(self.text, self.codec, self.seed, self.batch_size, self.caption_dropout, self.side)
        batches = GlobalBatches(len(data.latents), self.batch_size, self.seed, start, rank, world)
        return self._loader(data, batches)

    def val_dataloader(self) -> DataLoader:
        """The 500 held-out digits, once each."""
        rank, world = self._place()
        data = ValidationDigits(self.text, self.codec, self.side)
        return self._loader(data, Stripes(len(data.latents), 125, rank, world))

    def _loader(self, data: CaptionedDigits, shares: GlobalBatches | Stripes) -> DataLoader:
        return DataLoader(
            data,
            sampler=shares,
            batch_size=None,
            collate_fn=_whole,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
        )
