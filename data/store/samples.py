"""Samples of stores as batches: latents, one caption each, dropped encoders, noise."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from data.batch import Batch
from data.embeddings import EmbeddedPictures
from data.order import Share, Use, normal, stream
from data.store.mixture import Mixture
from data.store.reader import Store
from data.text.tags import Tags

Mask = Callable[[Sequence[str]], torch.Tensor]
# The plan's words for latents of twice the channels.
PAIR = "pair"  # a picture and the noise that it was made from
CHOICE = "choice"  # a picture and another one to which it was preferred
HINT = "hint"  # a picture and one to work from


class StoredSamples(Dataset[Batch]):
    """An item is a whole share of a batch, from the store of the share's stage.

    Args:
        stores: one mixture for each stage.
        encoders: number of text encoders.
        sized: batches have sizes and crops.
        mask: captions → (b, N) bool, their own tokens; none: there is no mask.
        judged: batches have the captions in words.
        mask_floor: weight in the loss of places that a store's masks leave out.
        embeddings: image embeddings of the pictures; none: batches have none.
    """

    def __init__(
        self,
        stores: Sequence[Store | Mixture],
        encoders: int,
        sized: bool,
        mask: Mask | None,
        judged: bool = False,
        mask_floor: float = 0.0,
        embeddings: EmbeddedPictures | None = None,
    ) -> None:
        self.stores, self.encoders, self.sized, self.mask, self.judged = stores, encoders, sized, mask, judged
        self.mask_floor, self.embeddings = mask_floor, embeddings

    def batch(
        self, share: Share, choice: np.ndarray, kept: np.ndarray | None, draw: int | None, use: Use, seed: int
    ) -> Batch:
        """The samples of a share as a batch, with the noise of the stream (seed, use), or of the store if it has pairs.

        Args:
            share: which samples.
            choice: the number of each sample's caption, (b,).
            kept: which encoders are kept, (b, encoders); None keeps all.
            draw: seed of the draw from the posterior, if the store has one; None takes its mean.
            use: purpose of the noise.
            seed: of the noise.
        """
        store, rows = self.stores[share.stage], share.samples
        x0, shown = store.latents_and_masks(rows)
        shown = shown.float()
        loss_mask = shown + self.mask_floor * (1 - shown) if store.has_masks else None
        numbers = share.positions
        second: dict[str, torch.Tensor | None] = dict.fromkeys((PAIR, CHOICE, HINT, "posterior"))
        if (kind := store.plan["latents"]) in second:
            x0, second[kind] = x0.float().chunk(2, dim=1)
        if draw is not None and (logvar := second["posterior"]) is not None:
            x0 = x0 + (logvar / 2).exp() * normal(draw, Use.POSTERIOR, share.step, numbers, tuple(x0.shape[1:]))
        captions, mask, text, pooled = None, None, torch.empty(0), torch.empty(0)
        if self.mask or self.judged or not store.has_tokens:
            captions = self.worded([store.captions(int(row))[i] for row, i in zip(rows, choice, strict=True)], share)
        if self.mask and captions:
            mask = self.mask(captions)
        prompts = captions if self.judged else None
        if store.has_tokens:
            (text, pooled), captions = store.text(rows, choice), None
        sizes = None
        if self.sized:
            after = np.broadcast_to(store.buckets[share.bucket], (len(rows), 2))
            sizes = torch.from_numpy(np.concatenate([store.sizes(rows), after], axis=1).astype(np.int64))
        own = second[PAIR]
        noise = normal(seed, use, share.step, numbers, tuple(x0.shape[1:])) if own is None else own
        kept_here = None if kept is None else torch.from_numpy(kept)
        return Batch(
            share.step, numbers, x0, noise, text, pooled, captions, kept_here, sizes, mask,
            picture=second[HINT], worse=second[CHOICE], loss_mask=loss_mask, prompts=prompts,
        )  # fmt: skip

    def worded(self, captions: list[str], share: Share) -> list[str]:
        """The captions in words, as they are given to the text encoders."""
        return captions


class TrainingSamples(StoredSamples):
    """Random captions by weight, dropped captions and encoders, tags, fresh noise: functions of (seed, step)."""

    def __init__(
        self,
        stores: Sequence[Store | Mixture],
        encoders: int,
        sized: bool,
        mask: Mask | None,
        seed: int,
        batch_size: int,
        caption_dropout: float,
        encoder_dropout: float,
        judged: bool = False,
        mask_floor: float = 0.0,
        embeddings: EmbeddedPictures | None = None,
        tags: Tags | None = None,
    ) -> None:
        super().__init__(stores, encoders, sized, mask, judged, mask_floor, embeddings)
        self.seed, self.batch_size, self.tags = seed, batch_size, tags
        self.caption_dropout, self.encoder_dropout = caption_dropout, encoder_dropout

    def __getitem__(self, share: Share) -> Batch:
        numbers = stream(self.seed, Use.CAPTION, share.step).random((self.batch_size, 2 + self.encoders))
        drawn = numbers[share.positions]
        store = self.stores[share.stage]
        choice = np.array(
            [chosen(store.weights(int(row)), u) for row, u in zip(share.samples, drawn[:, 0], strict=True)]
        )
        kept = (drawn[:, 1:2] >= self.caption_dropout) & (drawn[:, 2:] >= self.encoder_dropout)
        batch = self.batch(share, choice, kept, self.seed, Use.NOISE, self.seed)
        if self.embeddings:
            embedding, level = self.embeddings.drawn(share, self.seed, self.batch_size)
            batch = batch._replace(embedding=embedding, level=level if self.embeddings.settings.noise else None)
        return batch

    def worded(self, captions: list[str], share: Share) -> list[str]:
        if not self.tags:
            return captions
        draws = (stream(self.seed, Use.TAGS, share.step, place) for place in share.positions.tolist())
        return [self.tags(caption, draw) for caption, draw in zip(captions, draws, strict=True)]


class ValidationSamples(StoredSamples):
    """Each sample with one caption and one noise, the same in every run."""

    def __getitem__(self, share: Share) -> Batch:
        store = self.stores[share.stage]
        choice = np.array([int(row) % len(store.weights(int(row))) for row in share.samples])
        found = self.batch(share._replace(step=0), choice, None, None, Use.VALIDATION, 0)
        if self.embeddings:
            level = torch.zeros(len(choice)) if self.embeddings.settings.noise else None
            found = found._replace(embedding=self.embeddings.of(share), level=level)
        return found._replace(step=share.step)  # which may be NOT_COUNTED


def chosen(weights: Sequence[float], u: float) -> int:
    """An index, with probabilities proportional to the weights, for uniform u in [0, 1)."""
    ends = np.cumsum(weights)
    return min(int(np.searchsorted(ends, u * ends[-1], side="right")), len(ends) - 1)
