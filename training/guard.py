"""Steps that must not be taken, and gradients that are worth a look."""

import torch
from torch import Tensor, nn

SPIKE = 5.0  # times the usual norm
MEMORY = 0.99  # of the usual norm: about the last 100 steps


class Guard(nn.Module):
    """Judges every step by the norm of its gradient, on the device, without waiting for it.

    Attributes:
        counts: non-finite steps in a row, and of the whole run; spikes since they were last asked for; (3,).
        usual: a moving mean of the norm, 0 before the first step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(3))
        self.register_buffer("usual", torch.zeros(()))

    counts: Tensor
    usual: Tensor

    @torch.no_grad()
    def judge(self, norm: Tensor) -> Tensor:
        """1 where the norm is not finite and the step must be left out, else 0: a scalar on the device."""
        fine = norm.isfinite().float()
        bad = 1 - fine
        spike = fine * (norm > SPIKE * self.usual) * (self.usual > 0)
        row, total, spikes = self.counts.unbind()
        self.counts.copy_(torch.stack([bad * (row + 1), total + bad, spikes + spike]))
        share = torch.where(self.usual > 0, 1 - MEMORY, 1.0)
        self.usual.copy_(torch.where(fine > 0, self.usual.lerp(norm, share), self.usual))
        return bad

    def told(self) -> tuple[int, int, int]:
        """The counts, which the device is waited for. Those of the spikes start afresh."""
        row, total, spikes = (int(count) for count in self.counts.tolist())
        self.counts[2] = 0
        return row, total, spikes


def poisoned(loss: Tensor) -> Tensor:
    """The loss, but one that is not finite makes all gradients NaN, so that all processes see it after their sum."""
    return loss * (1 + 0 * loss.detach())
