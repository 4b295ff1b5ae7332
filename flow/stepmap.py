"""The k-step map: distillation into a sampler of k equal steps (Liu et al. 2022, §2.2)."""

from typing import Any

import torch
from torch import Tensor

from flow.density import Steps, shift
from flow.grid import trailing
from flow.objective import Estimate, Model, Objective, output
from flow.path import Path
from flow.penalty import Penalty
from flow.sampler import euler
from flow.target import Target, solve


class StepMap(Objective):
    """Learns only at the times of a sampler of k equal steps: 1/k … 1 with equal probability, then shifted.

    With pairs of noise and the picture made from it, k = 1 learns the one-step map from noise to picture.

    Args:
        path: how picture and noise mix at t.
        target: what the network predicts.
        shift: α of the resolution shift.
        shift_area: height × width of the latents that `shift` is for; none means one α for all.
        penalty: applied to each picture's mean square error; none means no penalty.
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

    def training_time(self, u: Tensor, area: int) -> Tensor:
        """The times of `flow.grid.trailing` without the last, for uniform u, (B,) float32."""
        return self.path.snap(shift(self.density(u), self.alpha(area))).float()

    def validation_time(self, t: Tensor, area: int) -> Tensor:
        """The training time for u = t."""
        return self.training_time(t, area)

    def picture(self, model: Model, noise: Tensor, t: Tensor, condition: Any) -> Tensor:
        """The pictures (B, …) float32 that the model sees at the steps from t (B,) on of its own walks of k steps.

        The gradient is that of this step alone: the model that walks there does not learn from it.

        Args:
            model: the network or a wrapper around it.
            noise: standard normal, (B, …).
            t: training times, (B,).
            condition: passed to the model.
        """
        noise = noise.float()
        grid = trailing(self.path, self.k, self.alpha(noise[0, 0].numel()))[:-1]
        a, b = self.path(grid[0])
        points = [(a**2 + b**2).sqrt().to(noise.dtype) * noise]

        def denoise(z: Tensor, s: Tensor) -> Estimate:
            return self.denoise(model, z, s, condition)

        with torch.no_grad():
            euler(denoise, self.path, points[0], grid, lambda i, z, x0: points.append(z))
        step = torch.zeros_like(t, dtype=torch.long)
        for later in grid[1:]:
            step += t <= later.item() + 1e-5
        z = torch.stack(points)[step, torch.arange(len(t), device=t.device)]
        return solve(self.path, self.target, z, output(model, z, t, condition), t)[0]
