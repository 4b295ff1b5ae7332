"""Batches for training and validation, as a LightningDataModule."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from data import digits
from data.batch import Batch, complete
from data.clip import CLIPImage
from data.degrade import Degrade, enlarged, noised
from data.embeddings import EmbeddedPictures, Embeddings
from data.latents import Codec, Pixels
from data.loaders import begin_loader
from data.order import GlobalBatches, Share, Stages, Stripes, Use, normal, stream
from data.store import samples as stored
from data.store.mixture import Mixture, Part
from data.store.mixture import held_out as held_out_ids
from data.store.reader import VERSION
from data.text.encoder import Text, TextEncoder
from data.text.tags import Tags
from storage.models import find_model, fingerprint

PIXELS = 2**20  # encoded in one batch
VALIDATED = 125  # samples in a batch of validation
MOST_SAMPLES, MOST_WORKERS = 2**20, 1024  # of a global batch; of one process


class CaptionedDigits(Dataset[Batch]):
    """Latents and the encodings of all their captions in memory; an item is a whole share of a batch."""

    def __init__(
        self,
        split: digits.Split,
        side: int,
        text: TextEncoder,
        codec: Codec,
        text_mask: bool = False,
        degrade: Degrade | None = None,
    ) -> None:
        pixels, labels = digits.load(split)
        templates = digits.TRAIN_TEMPLATES
        batches = tqdm(pixels.split(max(1, PIXELS // side**2)), desc="encoding pictures", disable=codec.factor == 1)
        self.latents = torch.cat(
            [codec.encode(digits.resized(part, side, codec.pixel_channels)).cpu() for part in batches]
        )
        self.labels = labels.numpy()
        self.templates = len(templates)
        self.captions = ["", *(c for label in range(10) for c in digits.captions(label, templates))]
        self.tokens, self.pooled = (part.cpu() for part in text.encode(self.captions))  # row 0 is the null condition
        self.mask = text.mask(self.captions) if text_mask else None
        self.pictures = None
        if degrade:
            small = degrade.smaller(digits.resized(pixels, side, codec.pixel_channels))
            self.pictures = codec.encode(enlarged(small, side, side)).cpu()

    def rows(self, samples: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """The row of each sample's caption number `choice`, in the table of encodings."""
        return 1 + self.labels[samples] * self.templates + choice

    def batch(self, share: Share, rows: np.ndarray, noise: Tensor) -> Batch:
        return Batch(
            share.step, share.positions, self.latents[share.samples], noise, self.tokens[rows], self.pooled[rows],
            mask=None if self.mask is None else self.mask[rows],
            picture=None if self.pictures is None else self.pictures[share.samples],
            prompts=[self.captions[row] for row in rows],
        )  # fmt: skip


class TrainingDigits(CaptionedDigits):
    """A share with random captions, some of them dropped, and fresh noise: functions of (seed, step)."""

    def __init__(
        self,
        text: TextEncoder,
        codec: Codec,
        seed: int,
        batch_size: int,
        caption_dropout: float,
        side: int = digits.SIDE,
        text_mask: bool = False,
        degrade: Degrade | None = None,
        dequantize: bool = False,
    ) -> None:
        super().__init__("train", side, text, codec, text_mask, degrade)
        self.pixels = codec if dequantize and isinstance(codec, Pixels) else None
        self.seed, self.batch_size, self.caption_dropout = seed, batch_size, caption_dropout
        self.most = degrade.noise if degrade else 0.0  # noise of a picture

    def __getitem__(self, share: Share) -> Batch:
        drawn = stream(self.seed, Use.CAPTION, share.step).random((self.batch_size, 2))[share.positions]
        rows = self.rows(share.samples, (drawn[:, 0] * self.templates).astype(int))
        rows[drawn[:, 1] < self.caption_dropout] = 0
        shape = tuple(self.latents.shape[1:])
        batch = self.batch(share, rows, normal(self.seed, Use.NOISE, share.step, share.positions, shape))
        if self.pixels:
            noise = normal(self.seed, Use.DEQUANTIZE, share.step, share.positions, shape)
            batch = batch._replace(x0=self.pixels.dequantize(batch.x0, noise, digits.LEVELS))
        if not self.most or batch.picture is None:
            return batch
        levels = self.most * stream(self.seed, Use.LEVEL, share.step).random(self.batch_size)[share.positions]
        level = torch.from_numpy(levels).float()
        noise = normal(self.seed, Use.DEGRADE, share.step, share.positions, shape)
        return batch._replace(picture=noised(batch.picture, noise, level), level=level)


class ValidationDigits(CaptionedDigits):
    """Each held-out sample with one caption and one noise, the same in every run, and its picture without noise."""

    def __init__(
        self,
        text: TextEncoder,
        codec: Codec,
        side: int = digits.SIDE,
        text_mask: bool = False,
        degrade: Degrade | None = None,
    ) -> None:
        super().__init__("held_out", side, text, codec, text_mask, degrade)
        self.leveled = bool(degrade and degrade.noise)

    def __getitem__(self, share: Share) -> Batch:
        rows = self.rows(share.samples, share.samples % self.templates)
        noise = normal(0, Use.VALIDATION, 0, share.samples, tuple(self.latents.shape[1:]))
        level = torch.zeros(len(rows)) if self.leveled else None
        return self.batch(share, rows, noise)._replace(level=level)


class Examples(NamedTuple):
    """Held-out pictures to make samples of, one a caption."""

    captions: list[str]
    pictures: Tensor  # to work from, (n, C, h, w) in [0, 1]
    real: Tensor  # what they come from, (n, C, H, W)

    def enlarged(self) -> Tensor:
        """The pictures to work from in the size of the real ones, pixel by pixel."""
        return F.interpolate(self.pictures, size=self.real.shape[-2:], mode="nearest")


def _whole(batch: Any) -> Any:
    return batch


class Data(L.LightningDataModule):
    """Endless batches for training, from the trainer's step on, and batches for validation.

    Args:
        text: encodes captions.
        codec: encodes pictures.
        seed: of the order, the captions and the noise.
        batch_size: of the global batch, over all processes.
        side: of a square picture, in pixels.
        workers: loader processes; 0 loads in the training process.
        sized: sizes and crops are part of the pooled vector.
        text_mask: padding of the captions is masked.

    Attributes:
        sizes: (height, width) of all pictures that may occur, in pixels.
        picture_channels: of the pictures to work from, in latents; 0 is none.
        level_embeds: these, or the image embeddings, have noise of different levels.
        image_encoder: made the image embeddings that are a part of the pooled vector; none: there are none.
        paired: each picture was made from its noise.
        choices: each picture was preferred to another one.
        masked: some pictures have masks of the loss.
        judged: set it to have the captions in words in all batches.
        dropout: the largest share of captions that are dropped, for any encoder.
    """

    picture_channels: int = 0
    level_embeds: bool = False
    image_encoder: CLIPImage | None = None
    paired: bool = False
    choices: bool = False
    masked: bool = False
    judged: bool = False
    dropout: float = 0.0

    def __init__(
        self,
        text: TextEncoder,
        codec: Codec,
        seed: int,
        batch_size: int,
        side: int,
        workers: int,
        sized: bool = False,
        text_mask: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= batch_size <= MOST_SAMPLES or not 0 <= workers <= MOST_WORKERS:
            raise ValueError(
                f"data needs batch_size from 1 to {MOST_SAMPLES:,} and workers from 0 to {MOST_WORKERS:,}, got "
                f"{batch_size} and {workers}"
            )
        self.text, self.codec, self.seed = text, codec, seed
        self.batch_size, self.side, self.workers, self.sized, self.text_mask = (
            batch_size, side, workers, sized, text_mask,
        )  # fmt: skip
        self.sizes: tuple[tuple[int, int], ...] = ((side, side),)

    def setup(self, stage: str) -> None:
        """Moves the encoders of text and pictures to the device of the training."""
        if self.trainer:
            self.codec.to(self.trainer.strategy.root_device)
            self.text.to(self.trainer.strategy.root_device)

    def identity(self) -> dict[str, str]:
        """Path of the data → hash of their content. Empty for data that cannot change."""
        return {}

    def check(self, world: int) -> None:
        """ValueError if so many processes cannot share the data."""

    def examples(self, count: int) -> Examples | None:
        """Pictures for samples to be made of; none for networks that work from noise alone."""
        return None

    def mentions(self, word: str) -> bool:
        """Whether a caption has a word in it."""
        return False

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _start(self) -> tuple[int, int]:
        """The first step, and the micro-batches of each share."""
        return (self.trainer.global_step, self.trainer.accumulate_grad_batches) if self.trainer else (0, 1)

    def _loader(self, data: Dataset[Batch], shares: Sampler[Share]) -> DataLoader:
        return DataLoader(
            data,
            sampler=shares,
            batch_size=None,
            collate_fn=_whole,
            num_workers=self.workers,
            worker_init_fn=begin_loader,
            pin_memory=torch.cuda.is_available(),
        )


@final
class Digits(Data):
    """Handwritten digits with captions.

    Args:
        text: encodes the captions.
        codec: encodes the pictures, as grey or as RGB with three equal channels.
        seed: of the order, the captions and the noise.
        batch_size: of the global batch, over all processes.
        caption_dropout: share of captions replaced by the empty caption, the null condition of guidance.
        side: of a picture, in pixels; the digits of 8 × 8 are enlarged to it, or for 4 or 2 made smaller.
        workers: loader processes; 0 loads in the training process.
        text_mask: padding of the captions is masked, in training as in sampling.
        degrade: also gives the network a smaller picture of each digit, to be enlarged (super-resolution).
        dequantize: in training each number gets uniform noise of the width of a level, fresh at every step, so that a
            likelihood can be asked for (`evaluate.py --likelihood`).
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
        text_mask: bool = False,
        degrade: Degrade | None = None,
        dequantize: bool = False,
    ) -> None:
        super().__init__(text, codec, seed, batch_size, side, workers, text_mask=text_mask)
        if dequantize and (not isinstance(codec, Pixels) or side != digits.SIDE):
            raise ValueError(f"data.dequantize needs the codec Pixels and data.side {digits.SIDE}: leave it out")
        self.dequantize = dequantize
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"data.caption_dropout must be from 0 to 1, got {caption_dropout}")
        if side % codec.factor or (side < digits.SIDE and side not in (4, 2)):
            raise ValueError(f"data.side must be a multiple of {codec.factor} and at least 8, or 4 or 2, got {side}")
        self.caption_dropout, self.degrade = caption_dropout, degrade
        self.dropout = caption_dropout
        if degrade:
            degrade.smaller(torch.empty(1, 1, side, side))  # a factor that does not fit should fail now
            self.picture_channels, self.level_embeds = codec.channels, degrade.noise > 0

    def examples(self, count: int) -> Examples | None:
        """The first held-out digits, made smaller."""
        if not self.degrade:
            return None
        pixels, labels = (part[:count] for part in digits.load("held_out"))
        real = digits.resized(pixels, self.side, self.codec.pixel_channels)
        captions = [digits.captions(int(label), digits.TRAIN_TEMPLATES[:1])[0] for label in labels]
        return Examples(captions, self.degrade.smaller(real), real)

    def train_dataloader(self) -> DataLoader:
        rank, world = self._place()
        data = TrainingDigits(
            self.text, self.codec, self.seed, self.batch_size, self.caption_dropout, self.side, self.text_mask,
            self.degrade, self.dequantize,
        )  # fmt: skip
        start, parts = self._start()
        pool = [np.arange(len(data.latents))]
        return self._loader(data, GlobalBatches(pool, self.batch_size, self.seed, start, rank, world, parts))

    def val_dataloader(self) -> DataLoader:
        """The 500 held-out digits, once each."""
        rank, world = self._place()
        data = ValidationDigits(self.text, self.codec, self.side, self.text_mask, self.degrade)
        return self._loader(data, Stripes([np.arange(len(data.latents))], VALIDATED, rank, world))


@dataclass(frozen=True)
class Stage:
    """A store that training uses before the main one.

    Args:
        store: a folder or a URL; or several, as in `Stored`.
        steps: number of steps.
    """

    store: tuple[Part, ...] | str
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a stage must have at least 1 step, got {self.steps}")


@final
class Stored(Data):
    """Pictures and captions from a store that `encode.py` wrote.

    Args:
        text: the text encoders that the store was written with.
        codec: the codec that it was written with.
        seed: of the order, the captions and the noise.
        store: a folder, or a URL whose files are fetched as they are needed. Or several, whose samples are mixed, by
            weights or repeats.
        batch_size: of the global batch, over all processes.
        caption_dropout: share of captions replaced by the null condition, for all encoders together.
        encoder_dropout: share of captions replaced by the null condition for one encoder, independently for each; SD3
            uses 0.464 and no caption_dropout.
        held_out: number of samples that only validation uses, the same in every stage; of several stores the first
            gives them.
        before: stores that training uses first, such as one of smaller pictures.
        teacher: the model folder that made the pairs in the main store; None if it holds no pairs.
        size_conditioning: original size and crop are part of the pooled vector (SDXL, §2.2), whose pooled_dim in the
            network is then larger by 1,536.
        workers: loader processes; 0 loads in the training process.
        text_mask: padding of the captions is masked, in training as in sampling.
        mask_floor: for stores with masks of the loss: the weight, 0 to 1, of places that a mask leaves out. A place
            counts mask + mask_floor·(1 − mask) times, in training and in validation.
        tags: for captions that are lists of tags, in stores without encoded text: shuffles and drops tags in training.
        embeddings: also gives the network the image embedding of each picture, in the pooled vector, whose pooled_dim
            in the network is then larger by their numbers.

    Raises:
        ValueError: a store is damaged, or was written with another codec or text encoder.
        FileNotFoundError: there is no store.
    """

    def __init__(
        self,
        text: TextEncoder,
        codec: Codec,
        seed: int,
        store: tuple[Part, ...] | str,
        batch_size: int = 64,
        caption_dropout: float = 0.1,
        encoder_dropout: float = 0.0,
        held_out: int = 500,
        before: tuple[Stage, ...] = (),
        teacher: str | None = None,
        size_conditioning: bool = False,
        workers: int = 0,
        text_mask: bool = False,
        mask_floor: float = 0.0,
        tags: Tags | None = None,
        embeddings: Embeddings | None = None,
    ) -> None:
        if not 0 <= mask_floor <= 1:
            raise ValueError(f"data.mask_floor must be from 0 to 1, got {mask_floor}")
        if not (0 <= caption_dropout <= 1 and 0 <= encoder_dropout <= 1):
            raise ValueError(f"dropouts must be from 0 to 1, got {caption_dropout} and {encoder_dropout}")
        self.stores = [mixture(given) for given in (*(stage.store for stage in before), store)]
        for opened in self.stores:
            if text.unread and opened.has_tokens:
                raise ValueError(f"text encoders learn, and {opened.source} holds encoded text: encode it anew with "
                                 "--encode.text captions")  # fmt: skip
            sections = {"text": text.fingerprint()} if opened.has_tokens else {}
            opened.expect(version=VERSION, codec=codec.fingerprint(), **sections)
        main = self.stores[-1]
        if teacher is not None:
            main.expect(latents=stored.PAIR, teacher=fingerprint(find_model(Path(teacher))))
            self.paired = True
        elif main.plan.get("latents") == stored.PAIR:
            raise ValueError(f"{main.source} holds pairs: set data.teacher to the model folder that made them")
        latents = [opened.plan.get("latents") for opened in self.stores]
        kinds = {kind if kind in (stored.CHOICE, stored.HINT) else None for kind in latents}
        if len(kinds) > 1:
            raise ValueError("some of the stores hold choices or hints and others not: train on one kind")
        self.choices = kinds == {stored.CHOICE}
        self.picture_channels = codec.channels if kinds == {stored.HINT} else 0
        self.masked, self.mask_floor = any(opened.has_masks for opened in self.stores), mask_floor
        self.tags = tags
        if tags and (encoded := [opened.source for opened in self.stores if opened.has_tokens]):
            raise ValueError("data.tags needs captions that training encodes (encode.text: captions), and "
                             f"{encoded[0]} holds encoded text: leave it out")  # fmt: skip
        if mask_floor and not self.masked:
            raise ValueError("data.mask_floor needs a store with masks (encode.masks): leave it out")
        side = main.plan["buckets"]["side"]
        super().__init__(text, codec, seed, batch_size, side, workers, size_conditioning, text_mask)
        first = main.stores[0]
        if not 1 <= held_out < len(first):
            raise ValueError(f"data.held_out must be from 1 to below the store's {len(first)} samples, got {held_out}")
        self.caption_dropout, self.encoder_dropout, self.before = caption_dropout, encoder_dropout, before
        self.dropout = max(caption_dropout, encoder_dropout)
        self.apart = held_out_ids(first, held_out)
        self.pools = [opened.pools(self.apart, False) for opened in self.stores]
        for opened, pool in zip(self.stores, self.pools, strict=True):
            if not any(map(len, pool)):
                raise ValueError(
                    f"no sample of {opened.source} is left to train on: all are held out; lower data.held_out"
                )
        self.lanes = [opened.lanes(pool, seed) for opened, pool in zip(self.stores, self.pools, strict=True)]
        self.sizes = tuple(
            size for opened in self.stores for bucket, size in enumerate(opened.buckets) if len(opened.members(bucket))
        )
        self.embedded: EmbeddedPictures | None = None
        if embeddings:
            if self.picture_channels:
                raise ValueError("a network is shown a hint or an embedding: leave data.embeddings out")
            self.embedded = EmbeddedPictures(embeddings, self.stores)
            self.image_encoder, self.level_embeds = self.embedded.codec, embeddings.noise > 0
        self.null: Text | None = None
        self.null_mask: Tensor | None = None

    def check(self, world: int) -> None:
        if len(self.apart) < world:
            raise ValueError(f"data.held_out must be at least the {world} processes, got {len(self.apart)}")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.text.keep(not all(opened.has_tokens for opened in self.stores))

    def examples(self, count: int) -> Examples | None:
        """Held-out hints, or pictures to embed, of the size with the most, with their pictures."""
        if not (self.picture_channels or self.embedded):
            return None
        main = self.stores[-1]
        rows = max(main.pools(self.apart, True), key=len)[:count]
        captions = [main.captions(int(row))[0] for row in rows]
        if not self.picture_channels:
            real = self.codec.decode(main.latents(rows).float()[:, : self.codec.channels]).cpu()
            return Examples(captions, real, real)
        real, hints = main.latents(rows).float().chunk(2, dim=1)
        return Examples(captions, self.codec.decode(hints).cpu(), self.codec.decode(real).cpu())

    def identity(self) -> dict[str, str]:
        stores = [store for opened in self.stores for store in opened.stores]
        stores += [self.embedded.store] if self.embedded else []
        return {store.source: store.report["index"] for store in stores}

    def mentions(self, word: str) -> bool:
        stores = [store for opened in self.stores for store in opened.stores]
        return any(word in caption for store in stores for row in range(len(store)) for caption in store.captions(row))

    def train_dataloader(self) -> DataLoader:
        rank, world = self._place()
        data = stored.TrainingSamples(
            self.stores, len(self.text.slots), self.sized, self._mask(), self.seed, self.batch_size,
            self.caption_dropout, self.encoder_dropout, self.judged, self.mask_floor, self.embedded,
            self.tags,
        )  # fmt: skip
        lengths = [*(stage.steps for stage in self.before), None]
        batches = [GlobalBatches(own, self.batch_size, self.seed, 0, rank, world) for own in self.lanes]
        return self._loader(data, Stages(list(zip(lengths, batches, strict=True)), *self._start()))

    def val_dataloader(self) -> DataLoader:
        """The held-out samples of the main store, once each."""
        rank, world = self._place()
        data = stored.ValidationSamples(
            self.stores[-1:], len(self.text.slots), self.sized, self._mask(), self.judged, self.mask_floor,
            self.embedded,
        )  # fmt: skip
        return self._loader(data, Stripes(self.stores[-1].pools(self.apart, True), VALIDATED, rank, world))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Encodes captions if the store has no tokens, and completes the condition."""
        if self.null is None:
            kept = self.stores[-1].null
            if kept is None:
                tokens, pooled = self.text.encode([""])
                kept = Text(tokens[0], pooled[0])
            self.null = Text(*(part.to(batch.x0.device) for part in kept))
            self.null_mask = self.text.mask([""])[0].to(batch.x0.device) if self.text_mask else None
        return complete(batch, self.text, self.null, self.null_mask)

    def _mask(self) -> stored.Mask | None:
        return self.text.mask if self.text_mask else None


def mixture(given: str | tuple[Part, ...]) -> Mixture:
    """The store or stores that a config names."""
    return Mixture([Part(given)] if isinstance(given, str) else given)
