"""Image embeddings of a store's pictures, as a part of the pooled vector (Ramesh et al. 2022, §2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from data.clip import CLIPImage
from data.degrade import noised
from data.order import Share, Use, normal, stream
from data.store.mixture import Mixture
from data.store.reader import VERSION, Store


@dataclass(frozen=True)
class Embeddings:
    """Shows the network the image embedding of each picture, besides its caption.

    Args:
        store: a folder or a URL: the same pictures, encoded with the codec `data.clip.CLIPImage`.
        encoder: folder of that codec. The model's folder holds it, too.
        dropout: share of embeddings that are left out, as zeros; independent of the captions.
        noise: largest noise level, 0 to 1. Each embedding gets a level drawn uniformly from 0 to this, and the network
            gets the level as an input. A prior's embeddings need it; 0 adds no noise.
    """

    store: str
    encoder: Path
    dropout: float = 0.1
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.dropout <= 1 and 0 <= self.noise <= 1):
            raise ValueError(
                f"data.embeddings needs dropout and noise from 0 to 1, got {self.dropout} and {self.noise}"
            )


class EmbeddedPictures:
    """The embeddings of the pictures of stores, found by the ids of these.

    Args:
        settings: where they are.
        stores: the pictures; one mixture for each stage.

    Attributes:
        codec: made the embeddings.
        store: holds them.

    Raises:
        ValueError: the store was written with another codec, or lacks a picture.
        FileNotFoundError: there is no store or codec.
    """

    def __init__(self, settings: Embeddings, stores: Sequence[Mixture]) -> None:
        self.settings, self.codec, self.store = settings, CLIPImage(settings.encoder), Store(settings.store)
        self.store.expect(version=VERSION, codec=self.codec.fingerprint())
        self.rows = [self._rows(pictures) for pictures in stores]

    def _rows(self, pictures: Mixture) -> np.ndarray:
        """For each sample of a mixture the number of the same picture in the store of embeddings."""
        ids = pa.chunked_array([chunk for store in pictures.stores for chunk in store.ids().chunks])
        found = pc.index_in(ids, value_set=self.store.ids())
        if found.null_count:
            absent = ids.filter(pc.is_null(found))
            raise ValueError(f"{self.store.source} lacks {len(absent)} pictures of {pictures.source}, such as "
                             f"{absent[0].as_py()}: encode it from the same pictures")  # fmt: skip
        return found.to_numpy()

    def of(self, share: Share) -> Tensor:
        """The embeddings of a share's samples as latents, (b, D, 1, 1)."""
        return self.store.latents(self.rows[share.stage][share.samples]).float()

    def drawn(self, share: Share, seed: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """As `of`, some of them left out, and with noise of these levels (b,): functions of (seed, step)."""
        latents = self.of(share)
        numbers = stream(seed, Use.EMBEDDING, share.step).random((batch_size, 2))[share.positions]
        kept = torch.from_numpy(numbers[:, 0] >= self.settings.dropout)[:, None, None, None]
        level = torch.from_numpy(self.settings.noise * numbers[:, 1]).float()
        noise = normal(seed, Use.DEGRADE, share.step, share.positions, tuple(latents.shape[1:]))
        return noised(latents, noise, level) * kept, level
