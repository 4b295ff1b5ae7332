"""Pictures one code after the other: the objective and the sampler of DALL·E 1 (Ramesh et al. 2021)."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flow.objective import Estimate, Field, Interval, Model, Objective, mean_of_places, output_at
from flow.path import Path
from flow.sampler import Callback, Denoiser
from flow.target import X0


class NextCode(Objective):
    """Learns the next code from all before it, and the next token of the caption: (L_text + 7·L_picture)/8 (§2.2).

    Each L is the mean over its own tokens, those of the text with their padding. Time says how much of a picture is
    written: at t the first 1 − t of its codes are known, and noise stands in the place of the others. A causal network
    answers for all these times in one pass over a whole picture, so training needs no times.

    Args:
        vocabulary: number of codes.
        text_weight: of L_text, from 0 to below 1; the rest is L_picture's.

    Attributes:
        outputs: channels of the network's output per code: the logits of all codes that could stand there.
    """

    discrete = True

    def __init__(self, vocabulary: int, text_weight: float = 0.125) -> None:
        super().__init__(target=X0())
        if type(vocabulary) is not int or vocabulary < 2 or not 0 <= text_weight < 1:
            raise ValueError("NextCode needs a vocabulary of at least 2 and a text_weight from 0 to below 1, got "
                             f"{vocabulary} and {text_weight}")  # fmt: skip
        self.outputs = vocabulary  # type: ignore[misc]  # the other objectives have it as a class
        self.text_weight = text_weight

    def times(self, u: Tensor, area: int) -> tuple[Tensor, None]:
        """The time of whole pictures, 0, (B,), and none, since this objective has no intervals."""
        return torch.zeros_like(u[0], dtype=torch.float32), None

    def validation_time(self, t: Tensor, area: int) -> Tensor:
        """0, as in training."""
        return torch.zeros_like(t)

    def loss(
        self,
        model: Model,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        condition: Any,
        interval: Interval | None = None,
        field: Field | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """The weighted mean of −ln p of a caption's tokens and of a picture's codes, in nats, (B,) float32.

        Args:
            model: the network.
            x0: codes, (B, stack, H, W).
            noise: has no effect.
            t: 0, (B,).
            condition: whose `text` (B, N, 1) holds the caption's token numbers.
            interval: has no effect.
            field: none; a teacher has no codes.
            loss_mask: as for `Objective.loss`, the weight of all codes of a place; none means 1.
        """
        if field:
            raise ValueError("a model of codes learns from no teacher: leave the teacher out")
        if not self.text_weight:
            return mean_of_places(self.nats(model(x0, t, condition), x0), loss_mask)
        logits, text = model(x0, t, condition, True)
        words = condition.text[:, 1:, 0].long()
        spoken = F.cross_entropy(text.float().transpose(1, 2), words, reduction="none").mean(1)
        written = mean_of_places(self.nats(logits, x0), loss_mask)
        return self.text_weight * spoken + (1 - self.text_weight) * written

    def nats(self, logits: Tensor, x0: Tensor) -> Tensor:
        """−ln p of each code x0 (B, stack, H, W), given all before it, of the same shape, float32.

        Args:
            logits: (B, stack·vocabulary, H, W), the codes of a place following each other.
            x0: the codes.
        """
        return F.cross_entropy(by_code(logits, x0).float(), x0.long(), reduction="none")

    def denoise(self, model: Model, z: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Estimate:
        """The estimate of the picture at z (B, stack, H, W) and t () on the host: the logits of the next code."""
        return Estimate(output_at(model, z, t, condition), z)

    def describe(self) -> dict[str, Any]:
        """The settings that sampling needs, as the JSON object that a model folder stores."""
        return super().describe() | {"vocabulary": self.outputs}


def by_code(logits: Tensor, codes: Tensor) -> Tensor:
    """Logits (B, stack·K, …) as (B, K, stack, …), for codes (B, stack, …)."""
    return logits.unflatten(1, (codes.shape[1], -1)).transpose(1, 2)


def autoregressive(
    denoise: Denoiser,
    path: Path,
    z: Tensor,
    times: Tensor,
    callback: Callback | None = None,
    *,
    top_p: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Writes one code after the other: place by place in rows, and in each place its stack.

    A code is the quantile of its distribution at u = Φ(ε), with ε the noise that stood in its place. So a picture is a
    function of its noise, as with the samplers of an ODE.

    Args:
        denoise: gives the logits of the next code as the estimate of the picture.
        path: of the model.
        z: noise, (B, stack, H, W).
        times: (steps + 1,) on the host; between two of them all codes are written that are due.
        callback: called after each step with (steps done, z, the codes so far and 0 for the others).
        top_p: draws among the most likely codes that make up this share (Holtzman et al. 2020, §3.1); 1 means all.
        temperature: divides the logits.

    Raises:
        ValueError: an option is out of range, or the times do not run from 1 to 0.
    """
    if not 0 < top_p <= 1 or not temperature > 0:
        raise ValueError(f"top_p must be above 0 and at most 1, and temperature above 0, got {top_p:g} and "
                         f"{temperature:g}")  # fmt: skip
    if times[0] != 1 or times[-1] != 0:
        raise ValueError("codes are written from t = 1 to t = 0: take spacing trailing")
    z, written = z.clone(), torch.zeros_like(z)
    stack = z.shape[1]
    flat, shown = (one.reshape(len(z), stack, -1) for one in (z, written))  # views
    count = flat[0].numel()
    due = [round((1 - float(t)) * count) for t in times]
    for i, (first, last) in enumerate(pairwise(due), start=1):
        for number in range(first, last):
            logits = denoise(z, torch.tensor(1 - number / count, dtype=times.dtype)).x0
            place, depth = divmod(number, stack)
            here = by_code(logits.reshape(len(z), -1, flat.shape[2]), flat)[:, :, depth, place]
            u = torch.special.ndtr(flat[:, depth, place].double())
            code = quantile(nucleus((here.double() / temperature).softmax(1), top_p), u)
            flat[:, depth, place] = shown[:, depth, place] = code.to(z.dtype)
        if callback:
            callback(i, z, written.clone())
    return z


def nucleus(probabilities: Tensor, share: float) -> Tensor:
    """Probabilities (B, K) of the most likely codes that make up this share together, renormalised."""
    if share == 1:
        return probabilities
    ordered, places = probabilities.sort(1, descending=True)
    kept = ordered.cumsum(1) - ordered < share  # what comes before a code does not make up the share yet
    most = torch.where(kept, ordered, 0.0)
    return torch.zeros_like(probabilities).scatter(1, places, most / most.sum(1, keepdim=True))


def quantile(probabilities: Tensor, u: Tensor) -> Tensor:
    """The code (B,) long at which the sum of probabilities (B, K) passes u (B,) in [0, 1)."""
    sums = probabilities.cumsum(1)
    codes = torch.searchsorted(sums, (u * sums[:, -1])[:, None], right=True)[:, 0]
    return codes.clamp(max=probabilities.shape[1] - 1)
