"""Distribution matching distillation: a generator of few steps learns the distribution of a teacher, not its paths."""

from typing import Any

import torch
from torch import Tensor

from flow.density import Density, Uniform, shift
from flow.objective import Model, Objective, output
from flow.target import solve


class Matching:
    """Distribution matching (Yin et al. 2024, "One-step Diffusion with Distribution Matching Distillation", §3.2).

    A picture x of the generator is noised to z_t. The teacher estimates the picture in z_t from its own distribution,
    x̂0_real, and a critic, which learns the generator's pictures by the ordinary loss, from theirs, x̂0_fake. Their
    difference is the gradient of the KL divergence of the two distributions at t, but for a factor:
    ∇_x KL = (a/b)²·(x̂0_fake − x̂0_real). It is divided by mean|x − x̂0_real| in the place of that factor (eq. 8).

    Generator and critic learn at the same steps, from the same z_t. There is no other loss: no pairs of the teacher
    and no discriminator.

    Args:
        density: distribution of t, before the teacher's shift; none is uniform.

    Example:
        The critic is right about data of 1, the teacher says 0, and a step against the gradient lowers x:

        >>> x = torch.full((1, 2), 1.0, requires_grad=True)
        >>> zero, one = (lambda z, t, c: z / t[:, None]), (lambda z, t, c: (z - 1) / t[:, None])
        >>> loss, _ = Matching().losses(Objective(), x, torch.ones(1, 2), torch.tensor([0.5]), zero, one)
        >>> loss.sum().backward()
        >>> x.grad
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, density: Density | None = None) -> None:
        self.density = density or Uniform()

    def times(self, u: Tensor, objective: Objective, area: int) -> Tensor:
        """Times (B,) float32 for uniform u, with the shift of the teacher's objective."""
        return objective.path.training_time(shift(self.density(u), objective.alpha(area))).float()

    def losses(
        self,
        objective: Objective,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        teacher: Model,
        critic: Model,
        condition: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """The losses of the generator and of the critic, each (B,) float32. Neither has a gradient for the other.

        Args:
            objective: path and target of all three networks.
            x0: the generator's pictures, (B, …), with their gradient.
            noise: fresh, independent of the pictures, (B, …).
            t: times of the noised pictures, (B,) float32.
            teacher: its output at z_t; with guidance, the guided one.
            critic: learns the output that the pictures ask for.
            condition: passed to both.
        """
        z, y = objective.point_and_target(x0.detach(), noise, t, condition, None)
        with torch.no_grad():
            real, _ = solve(objective.path, objective.target, z, output(teacher, z, t, condition), t)
        found = output(critic, z, t, condition)
        fake, _ = solve(objective.path, objective.target, z, found.detach(), t)
        x0 = x0.float()
        size = (x0.detach() - real).abs().flatten(1).mean(1).clamp(min=1e-5)
        gradient = (fake - real) / size.view(-1, *[1] * (x0.ndim - 1))
        loss = (x0 - (x0 - gradient).detach()).square().flatten(1).mean(1) / 2
        return loss, (found - y).square().flatten(1).mean(1)
