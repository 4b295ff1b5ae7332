"""What training and validation are given at a time."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.sizes import size_features
from data.text.encoder import Text, TextEncoder


class Batch(NamedTuple):
    """One rank's share of a global batch. Ready for the loss once it is `complete`."""

    step: int  # number of global batches before this one
    positions: np.ndarray  # of these samples in the global batch; in validation, of the data set; (b,)
    x0: Tensor  # latents (b, C, H, W)
    noise: Tensor  # what x0 is paired with (b, C, H, W)
    text: Tensor  # (b, N, D)
    pooled: Tensor  # (b, P)
    captions: list[str] | None = None  # to be encoded; text and pooled are then empty
    kept: Tensor | None = None  # (b, encoders) bool, false where an encoder is dropped; none keeps all
    sizes: Tensor | None = None  # (b, 6), as `data.sizes` has them; none tells the network nothing
    mask: Tensor | None = None  # (b, N) bool, the captions' own tokens; none: padding is attended
    picture: Tensor | None = None  # (b, C', H, W), the latents of a picture to work from
    level: Tensor | None = None  # (b,), how much noise the picture or embedding was given
    worse: Tensor | None = None  # (b, C, H, W), latents of pictures to which x0 was preferred
    loss_mask: Tensor | None = None  # (b, 1, H, W), the weight of each place in the loss; none: 1
    prompts: list[str] | None = None  # the captions in words; from a store only if `Data.judged`
    embedding: Tensor | None = None  # (b, D, 1, 1), the latents of an image embedding; zeros are none

    def to(self, device: torch.device) -> "Batch":
        """The batch with all its tensors on a device."""
        moved: dict[str, Any] = {
            name: part.to(device, non_blocking=True) for name, part in self._asdict().items() if torch.is_tensor(part)
        }
        return self._replace(**moved)

    def condition(self) -> dict[str, Any]:
        """The network's inputs besides z and t, under the field names of `mmdit.network.Condition`."""
        return {
            "text": self.text, "pooled": self.pooled, "mask": self.mask, "picture": self.picture, "level": self.level,
        }  # fmt: skip


def complete(batch: Batch, encoder: TextEncoder, null: Text, null_mask: Tensor | None = None) -> Batch:
    """The batch with its captions encoded, dropped encoders replaced, embedding and sizes in the pooled vector.

    Where an encoder is dropped, tokens and pooled vector alike become those of the null condition, so that a caption
    whose encoders are all dropped is the null condition (Esser et al. 2024, appendix B.3, drops to zeros instead).

    Args:
        batch: on any device.
        encoder: of the captions.
        null: the null condition, (N, D) and (P).
        null_mask: (N,) bool, its own tokens; needed for a batch with a mask.
    """
    text, pooled, mask = batch.text, batch.pooled, batch.mask
    if batch.captions is not None:
        text, pooled = (part.to(batch.x0.device) for part in encoder.encode(batch.captions))
    if batch.kept is not None:
        text, pooled = text.clone(), pooled.clone()
        words, vector = null.tokens.to(text), null.pooled.to(pooled)
        mask = None if mask is None else torch.zeros_like(mask)
        for slot, kept in zip(encoder.slots, batch.kept.unbind(1), strict=True):
            part = text[:, slot.rows, slot.columns]
            part.copy_(torch.where(kept[:, None, None], part, words[slot.rows, slot.columns]))
            part = pooled[:, slot.pooled]
            part.copy_(torch.where(kept[:, None], part, vector[slot.pooled]))
            if mask is not None and batch.mask is not None and null_mask is not None:
                mask[:, slot.rows] |= torch.where(kept[:, None], batch.mask[:, slot.rows], null_mask[slot.rows])
    if batch.embedding is not None:
        pooled = torch.cat([pooled.float(), batch.embedding.flatten(1)], dim=1)
    if batch.sizes is not None:
        pooled = torch.cat([pooled.float(), size_features(batch.sizes)], dim=1)
    return batch._replace(text=text, pooled=pooled, mask=mask, captions=None, kept=None, sizes=None, embedding=None)
