"""Steps that must not be taken, and gradients that are worth a look."""

import torch
from torch import Tensor, nn

SPIKE = 5.0  # times the usual norm
MEMORY = 0.99  # of the usual norm: about the last 100 steps


class Guard(nn.Module):
    """Judges every step by the norm of its gradient, on the device, without waiting for it.

    Attributes:
        counts: non-finite steps in a row; the most of these since they were asked for; non-finite steps of the whole
            run; spikes since they were asked for; (4,).
        usual: a moving mean of the norm, 0 before the first step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(4))
        self.register_buffer("usual", torch.zeros(()))

    counts: Tensor
    usual: Tensor

    @torch.no_grad()
    def judge(self, norm: Tensor) -> Tensor:
        """1 where the norm is not finite and the step must be left out, else 0: a scalar on the device."""
        fine = norm.isfinite().float()
        bad = 1 - fine
        spike = fine * (norm > SPIKE * self.usual) * (self.usual > 0)
        row, longest, total, spikes = self.counts.unbind()
        row = bad * (row + 1)
        self.counts.copy_(torch.stack([row, torch.maximum(longest, row), total + bad, spikes + spike]))
        share = torch.where(self.usual > 0, 1 - MEMORY, 1.0)
        self.usual.copy_(torch.where(fine > 0, self.usual.lerp(norm, share), self.usual))
        return bad

    def told(self) -> tuple[int, int]:
        """The most non-finite steps in a row since the last call, and all of the run. The device is waited for."""
        row, longest, total, _ = self.counts.tolist()
        self.counts[1] = row
        return int(longest), int(total)

    def spiked(self) -> int:
        """The spikes since the last call."""
        spikes = int(self.counts[3])
        self.counts[3] = 0
        return spikes

    def forgive(self, most: int) -> None:
        """Lets a run go on that was saved within more non-finite steps in a row than it may have."""
        if self.counts[1] > most:
            self.counts[:2] = 0


def poisoned(loss: Tensor) -> Tensor:
    """The loss, but one that is not finite makes all gradients NaN, so that all processes see it after their sum."""
    return loss * (1 + 0 * loss.detach())
