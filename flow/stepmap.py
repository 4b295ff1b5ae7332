"""The k-step map: what a walk of k equal steps does, distilled into them (Liu et al. 2022, §2.2)."""

from torch import Tensor

from flow.density import Steps, shift
from flow.objective import Objective
from flow.path import Path
from flow.penalty import Penalty
from flow.target import Target


class StepMap(Objective):
    """Learns only at the times at which a sampler of k equal steps looks: 1/k … 1, each as often, then shifted.

    With the pairs of a coupling as noise and picture, k = 1 learns the one-step map from noise to picture.

    Args:
        path: how picture and noise mix at t.
        target: what the network predicts.
        shift: α of the resolution shift.
        shift_area: height × width of the latents that `shift` is for; none: one α for all.
        penalty: of each picture's error; none is its mean square.
        k: number of steps.

    Example:
        >>> import torch
        >>> t, _ = StepMap(k=2).times(torch.tensor([[0.2, 0.7]] * 3), area=64)
        >>> t
        tensor([0.5000, 1.0000])
    """

    def __init__(
        self,
        path: Path | None = None,
        target: Target | None = None,
        shift: float = 1.0,
        shift_area: int | None = None,
        penalty: Penalty | None = None,
        k: int = 1,
    ) -> None:
        super().__init__(path, target, Steps(k), None, shift, shift_area, penalty)
        self.k = k

    def time(self, u: Tensor, area: int) -> Tensor:
        """The times of `flow.grid.trailing` but its last, for uniform u, (B,) float32."""
        return self.path.snap(shift(self.density(u), self.alpha(area))).float()

    def cell(self, t: Tensor, area: int) -> Tensor:
        """The time of the step in which t lies, as uniform t would draw it."""
        return self.time(t, area)
