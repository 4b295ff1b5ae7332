"""Which samples of stores are trained on: several stores as one, and what is held out."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import inf
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from data.order import Lane, Mixed
from data.raw.base import original
from data.store.reader import Store
from data.text.encoder import Text


@dataclass(frozen=True)
class Part:
    """One of several stores.

    Args:
        store: a folder or a URL.
        repeats: how often each of its samples comes in an epoch; none means once.
        weight: the store's share of all draws, next to the weights of the others, whatever the sizes. In a list of
            stores all have weights, or none.
    """

    store: str
    repeats: int | None = None
    weight: float | None = None


class Mixture:
    """The samples of stores under one numbering, each store's after those of the stores before it.

    Args:
        parts: the stores.

    Attributes:
        stores: in order.
        plan: of the first store.
        buckets: height and width of each bucket, in pixels.
        has_tokens: whether the stores have tokens.
        has_masks: whether any has masks of the loss.

    Raises:
        ValueError: there are no stores, they hold latents or texts of different kinds, or one is damaged.
        FileNotFoundError: one does not exist.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise ValueError("data.store is an empty list: name at least one store")
        for part in parts:
            if part.repeats is not None and part.repeats < 1:
                raise ValueError(f"the repeats of {part.store} must be at least 1, got {part.repeats}")
            if part.weight is not None and not 0 <= part.weight < inf:
                raise ValueError(f"the weight of {part.store} must be at least 0, and finite, got {part.weight}")
        weights = [part.weight for part in parts if part.weight is not None]
        if weights and (len(weights) < len(parts) or any(part.repeats is not None for part in parts)):
            raise ValueError("give each store of data.store a weight and none repeats, or none a weight")
        if weights and not any(weights):
            raise ValueError("the weights of data.store are all 0: give one store a weight above 0")
        self.shares = [Fraction(weight) for weight in weights]
        self.stores, self.repeats = [Store(part.store) for part in parts], [part.repeats or 1 for part in parts]
        first = self.stores[0]
        self.plan, self.has_tokens = first.plan, first.has_tokens
        self.has_masks = any(store.has_masks for store in self.stores)
        for other in self.stores[1:]:
            for what, own, theirs in (
                ("latents", first.plan.get("latents"), other.plan.get("latents")),
                ("tokens", first.has_tokens, other.has_tokens),
            ):
                if own != theirs:
                    raise ValueError(f"{first.source} and {other.source} cannot be mixed: {what} {own} and {theirs}")
        self.buckets = tuple(dict.fromkeys(size for store in self.stores for size in store.buckets))
        self.starts = np.array([0, *accumulate(map(len, self.stores))])

    @property
    def source(self) -> str:
        """The paths."""
        return ", ".join(store.source for store in self.stores)

    @property
    def null(self) -> Text | None:
        """The null condition of the first store."""
        return self.stores[0].null

    def expect(self, **sections: Any) -> None:
        """As `Store.expect`, of every store."""
        for store in self.stores:
            store.expect(**sections)

    def pools(self, apart: Collection[str], within: bool) -> list[np.ndarray]:
        """The samples of each bucket, as often as they come in an epoch; those of the first store without `apart`.

        With `within` the samples of the first store whose ids are in `apart`, once each.
        """
        found: dict[tuple[int, int], list[np.ndarray]] = {size: [] for size in self.buckets}
        for i, store in enumerate(self.stores):
            for size, rows in zip(store.buckets, divided(store, () if i else apart, within), strict=True):
                found[size].append(np.tile(self.starts[i] + rows, 1 if within else self.repeats[i]))
        return [np.concatenate(rows or [np.zeros(0, dtype=np.int64)]) for rows in found.values()]

    def lanes(self, pools: Sequence[np.ndarray], seed: int) -> Sequence[np.ndarray | Lane]:
        """The buckets of `pools` as `GlobalBatches` takes them: with weights, as sequences that keep these.

        A store's samples come equally often, whatever their buckets. An epoch has as many draws as there are samples.

        Raises:
            ValueError: a store with a weight has no sample in the pools.
        """
        if not self.shares:
            return pools
        parts = range(len(self.stores))
        split = [[pool[self._parts(pool) == part] for part in parts] for pool in pools]
        counts = [sum(len(rows[part]) for rows in split) for part in parts]
        for store, weight, count in zip(self.stores, self.shares, counts, strict=True):
            if weight and not count:
                raise ValueError(f"no sample of {store.source} is left to train on: lower data.held_out")
        draws = sum(counts) / sum(self.shares, Fraction())  # in an epoch, for a weight of 1
        often = [draws * weight / max(count, 1) for weight, count in zip(self.shares, counts, strict=True)]
        return [
            Mixed([(own, often[part] * len(own)) for part, own in enumerate(rows)], seed, bucket)
            for bucket, rows in enumerate(split)
        ]

    def members(self, bucket: int) -> np.ndarray:
        """The numbers of the samples in a bucket, ascending."""
        size = self.buckets[bucket]
        return np.concatenate(
            [
                start + store.members(store.buckets.index(size))
                for start, store in zip(self.starts, self.stores, strict=False)
                if size in store.buckets
            ]
        )

    def latents(self, rows: np.ndarray) -> Tensor:
        """As `Store.latents`."""
        return self.latents_and_masks(rows)[0]

    def latents_and_masks(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """As `Store.latents_and_masks`."""
        latents, masks = self._gathered(rows, lambda store, own, _: store.latents_and_masks(own))
        return latents, masks

    def text(self, rows: np.ndarray, choice: np.ndarray) -> Text:
        """As `Store.text`."""
        return Text(*self._gathered(rows, lambda store, own, where: tuple(store.text(own, choice[where]))))

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """As `Store.sizes`."""
        return self._gathered(rows, lambda store, own, _: (torch.from_numpy(store.sizes(own)),))[0].numpy()

    def captions(self, row: int) -> list[str]:
        """As `Store.captions`."""
        part = int(self._parts(np.array([row]))[0])
        return self.stores[part].captions(row - int(self.starts[part]))

    def weights(self, row: int) -> list[float]:
        """As `Store.weights`."""
        part = int(self._parts(np.array([row]))[0])
        return self.stores[part].weights(row - int(self.starts[part]))

    def _parts(self, rows: np.ndarray) -> np.ndarray:
        """The number of each sample's store."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def _gathered(
        self, rows: np.ndarray, read: Callable[[Store, np.ndarray, np.ndarray], tuple[Tensor, ...]]
    ) -> list[Tensor]:
        """What `read` gives for samples of one store, their own numbers there and their places in `rows`, in order."""
        rows, parts = np.asarray(rows), self._parts(np.asarray(rows))
        places = [np.flatnonzero(parts == part) for part in np.unique(parts)]
        found = [
            read(self.stores[part], rows[where] - self.starts[part], where)
            for part, where in zip(np.unique(parts), places, strict=True)
        ]
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        return [torch.cat(tensors)[back] for tensors in zip(*found, strict=True)] if len(found) > 1 else [*found[0]]


def held_out(store: Store, count: int) -> set[str]:
    """The ids of the `count` samples whose ids have the lowest hashes; depends only on the ids. None is mirrored."""
    ids = [name for name in store.ids().to_pylist() if original(name) == name]
    return set(sorted(ids, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode()), name))[:count])


def divided(store: Store, apart: Collection[str], within: bool) -> list[np.ndarray]:
    """The numbers of a store's samples in each bucket.

    Those with ids in `apart` if `within`, else all others but the mirrored twins of these.
    """
    ids = store.ids().to_pylist()
    chosen = np.array([(name in apart) if within else (original(name) not in apart) for name in ids], dtype=bool)
    return [rows[chosen[rows]] for rows in map(store.members, range(len(store.buckets)))]
