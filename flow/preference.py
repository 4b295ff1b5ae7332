"""Losses of judged pictures: what a model has drawn comes back with rewards, and the flow learns from them.

Both losses compare the model with another one at the same points z_t: DiffusionNFT with the policy that drew the
pictures, DPO with a reference that does not learn. They hold for any path and any target.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flow.objective import Model, Objective, output
from flow.target import solve


class Advice(NamedTuple):
    """What the rewards of a group of pictures say, in the order in which the loss takes the pictures."""

    order: Tensor  # (G, n) numbers within each group
    worth: Tensor  # (G, n)


class Drawn(NamedTuple):
    """Judged pictures, and the noise and times at which they are learned."""

    x0: Tensor  # pictures or latents, (B, …)
    noise: Tensor  # standard normal, (B, …)
    t: Tensor  # in [0, 1], (B,) float32
    condition: Any  # passed to the models unchanged
    worth: Tensor  # what the rewards say of each picture, as `Preference.advice` gives it, (B,)


class Judged(NamedTuple):
    """The losses of judged pictures, and what there is to watch beside them, each (B,) float32."""

    loss: Tensor
    watched: dict[str, Tensor]


class Preference(ABC):
    """What is learned from judged pictures.

    Attributes:
        paired: pictures 2i and 2i + 1 are compared: they have one noise and one t.
    """

    paired: bool = False

    @abstractmethod
    def advice(self, rewards: Tensor) -> Advice:
        """What rewards (G, n) say of G groups of n pictures, each drawn from one caption."""

    @abstractmethod
    def loss(self, objective: Objective, model: Model, other: Model, drawn: Drawn) -> Judged:
        """The loss of each picture.

        Args:
            objective: path and target.
            model: learns.
            other: the model that it is compared with, without a gradient.
            drawn: judged pictures.
        """


def outputs(objective: Objective, model: Model, other: Model, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The points z_t, the targets y there, and the outputs of both models, each (B, …) float32."""
    x0, noise, t, condition, _ = drawn
    z, y = objective.point_and_target(x0, noise, t, condition, None)
    with torch.no_grad():
        theirs = output(other, z, t, condition)
    return z, y, output(model, z, t, condition), theirs


def mean_square(difference: Tensor) -> Tensor:
    """The mean of squares of each picture, (B,)."""
    return difference.square().flatten(1).mean(1)


class NFT(Preference):
    """DiffusionNFT (K. Zheng et al. 2025, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process").

    r·d(x̂0⁺) + (1 − r)·d(x̂0⁻), where x̂0⁺ and x̂0⁻ follow from the outputs y⁺ = (1 − β)·y_old + β·y and
    y⁻ = (1 + β)·y_old − β·y. Pictures that the judge likes pull y toward their target and the others push it away, as
    far from the old policy as β says. d(x̂0) = mean((x̂0 − x0)²) / sg(mean|x̂0 − x0|), the authors' weight.

    The rewards of a group give r = ½ + ½·clip(A / clip, −1, 1) with the advantage A = (reward − mean) / std of the
    group. Where all of a group are alike, r is ½, and the loss holds the model to the old policy.

    Args:
        beta: β, how strongly the model differs from the old policy in y⁺ and y⁻.
        clip: the advantage from which on r is 0 or 1.

    Example:
        At the old policy y⁺ = y⁻ = y_old, so r only turns the gradient's sign:

        >>> NFT(clip=1.0).advice(torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])).worth
        tensor([[1.0000, 1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.5000, 0.5000]])
    """

    def __init__(self, beta: float = 1.0, clip: float = 5.0) -> None:
        for name, value in (("beta", beta), ("clip", clip)):
            if not 0 < value < math.inf:
                raise ValueError(f"NFT.{name} must be > 0, got {value}")
        self.beta, self.clip = beta, clip

    def advice(self, rewards: Tensor) -> Advice:
        centred = rewards - rewards.mean(1, keepdim=True)
        advantage = centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
        order = torch.arange(rewards.shape[1], device=rewards.device).expand(rewards.shape)
        return Advice(order, 0.5 + 0.5 * (advantage / self.clip).clamp(-1, 1))

    def loss(self, objective: Objective, model: Model, other: Model, drawn: Drawn) -> Judged:
        z, _, ours, old = outputs(objective, model, other, drawn)

        def distance(estimate: Tensor) -> Tensor:
            off = solve(objective.path, objective.target, z, estimate, drawn.t)[0] - drawn.x0.float()
            return mean_square(off) / off.detach().abs().flatten(1).mean(1).clamp(min=1e-5)

        liked = distance((1 - self.beta) * old + self.beta * ours)
        disliked = distance((1 + self.beta) * old - self.beta * ours)
        moved = mean_square(ours.detach() - old)
        return Judged(drawn.worth * liked + (1 - drawn.worth) * disliked, {"moved": moved})


class DPO(Preference):
    """Diffusion-DPO (Wallace et al. 2023): −ln σ(−β/2·[(m_w − m_w^ref) − (m_l − m_l^ref)]).

    m = mean((output − y)²) is a picture's loss, w the preferred picture of a pair and l the other, ref the reference.
    Both have one noise and one t, so that what they share cancels. A group is paired from its ends: the best with the
    worst, the second best with the second worst. Pairs of equal reward teach nothing.

    β is that of the paper's code, with the factor ½ and the mean over pixels. diffusers' script has no ½: its β is half
    of this one. A sum over pixels in place of the mean makes β smaller by C·H·W.

    Args:
        beta: β.

    Example:
        >>> DPO().advice(torch.tensor([[0.1, 0.9, 0.5, 0.5]]))  # picture 1 before 0; 2 and 3 are equally good
        Advice(order=tensor([[1, 0, 2, 3]]), worth=tensor([[1., 1., 0., 0.]]))
    """

    paired = True

    def __init__(self, beta: float = 5000.0) -> None:
        if not 0 < beta < math.inf:
            raise ValueError(f"DPO.beta must be > 0, got {beta}")
        self.beta = beta

    def advice(self, rewards: Tensor) -> Advice:
        best = rewards.sort(dim=1, descending=True, stable=True).indices
        half = rewards.shape[1] // 2
        order = torch.stack([best[:, :half], best.flip(1)[:, :half]], 2).flatten(1)  # (G, n): winner, loser, winner, …
        winner, loser = rewards.gather(1, order).unflatten(1, (half, 2)).unbind(2)
        return Advice(order, (winner > loser).to(rewards.dtype).repeat_interleave(2, 1))

    def loss(self, objective: Objective, model: Model, other: Model, drawn: Drawn) -> Judged:
        _, y, ours, theirs = outputs(objective, model, other, drawn)
        winner, loser = (mean_square(ours - y) - mean_square(theirs - y)).view(-1, 2).unbind(1)
        margin = -self.beta / 2 * (winner - loser)
        unequal = drawn.worth[::2]  # 1 for a pair of unequal reward
        parts = {
            "accuracy": unequal * (margin > 0),
            "winner_margin": unequal * winner.detach(),
            "loser_margin": unequal * loser.detach(),
            "unequal": unequal,
        }
        watched = {name: part.repeat_interleave(2) for name, part in parts.items()}
        watched["moved"] = mean_square(ours.detach() - theirs)
        return Judged((unequal * -F.logsigmoid(margin)).repeat_interleave(2), watched)
