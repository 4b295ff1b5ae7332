"""Steps whose loss or gradient is not finite are skipped; gradients that are unusually large are counted."""

import torch
from torch import Tensor, nn

SPIKE = 5.0  # a gradient is a spike above this multiple of the usual norm
MEMORY = 0.99  # decay of the usual norm: about the last 100 steps


class Guard(nn.Module):
    """Checks every step by the norm of its gradient, on the device, without synchronising with it.

    Attributes:
        counts: non-finite steps in a row; the longest such row since the last `skipped_steps`; non-finite steps of the
            whole run; spikes since the last `spikes`; (4,).
        usual: moving mean of the norm, 0 before the first step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(4))
        self.register_buffer("usual", torch.zeros(()))

    counts: Tensor
    usual: Tensor

    @torch.no_grad()
    def check(self, norm: Tensor) -> Tensor:
        """1 if the norm is not finite and the step must be skipped, else 0: a scalar on the device."""
        fine = norm.isfinite().float()
        bad = 1 - fine
        spike = fine * (norm > SPIKE * self.usual) * (self.usual > 0)
        row, longest, total, spikes = self.counts.unbind()
        row = bad * (row + 1)
        self.counts.copy_(torch.stack([row, torch.maximum(longest, row), total + bad, spikes + spike]))
        share = torch.where(self.usual > 0, 1 - MEMORY, 1.0)
        self.usual.copy_(torch.where(fine > 0, self.usual.lerp(norm, share), self.usual))
        return bad

    def skipped_steps(self) -> tuple[int, int]:
        """The most skipped steps in a row since the last call, and all of the run. Synchronises with the device."""
        row, longest, total, _ = self.counts.tolist()
        self.counts[1] = row
        return int(longest), int(total)

    def spikes(self) -> int:
        """The number of spikes since the last call."""
        spikes = int(self.counts[3])
        self.counts[3] = 0
        return spikes

    def reset(self, limit: int) -> None:
        """Sets the count of steps in a row to 0 if it exceeds the limit, so that a resumed run does not end at once."""
        if self.counts[1] > limit:
            self.counts[:2] = 0


def spread_nonfinite(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite, all its gradients are NaN, so that every process sees it in their sum."""
    return loss * (1 + 0 * loss.detach())
