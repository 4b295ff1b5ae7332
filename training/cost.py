"""The cost of a batch: pictures, tokens and FLOPs of a training step."""

from collections.abc import Collection

import torch
from torch import Tensor

from data.batch import Batch
from engine.meter import Cost
from engine.strategy import skeleton
from flow.objective import Objective
from mmdit.network import Condition, Network
from pipeline.residual import Regressor
from training.chosen import JudgeModel
from training.roles import Role
from training.teacher import TeacherModel


class StepCost:
    """cost(batch) → Cost: forward passes, and backward passes to the weights that learn. Without text encoders.

    Args:
        network: the network, on the meta device.
        objective: what the network learns.
        teacher: the model that it learns from.
        learning: names of the network's weights that learn; None: all of them.
        judge: judges the pictures that it draws.
        regressor: gives the mean, of which the network learns the residual.
        reads: whether text encoders learn, so that gradients lead on to the text.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        teacher: TeacherModel | None,
        learning: Collection[str] | None = None,
        judge: JudgeModel | None = None,
        regressor: Regressor | None = None,
        reads: bool = False,
    ) -> None:
        self.network, self.reads = network, reads
        roles = [
            *(judge.roles(network) if judge else [Role("network", network, learned=1)]),
            *(teacher.roles(network) if teacher else []),
            *common_roles(network, objective, regressor.network if regressor else None),
        ]
        self.roles = []
        for role in roles:
            own = skeleton(role.network)  # before weights are sharded
            for name, weight in own.named_parameters() if role.learned else ():
                weight.requires_grad_(role.network is not network or learning is None or name in learning)
            self.roles.append(role._replace(network=own))
        self.known: dict[tuple[tuple[int, ...], ...], Cost] = {}  # by the shapes of latents and text

    def __call__(self, batch: Batch) -> Cost:
        shapes = (tuple(batch.x0.shape), tuple(batch.text.shape))
        if shapes not in self.known:
            self.known[shapes] = self._count(batch.x0, Condition(**batch.condition()))
        return self.known[shapes]

    def _count(self, x0: Tensor, condition: Condition) -> Cost:
        count, _, height, width = x0.shape
        number = torch.empty(count)
        condition = condition._replace(text=condition.text.detach().requires_grad_(self.reads))
        flops = sum(role.flops(x0, number, condition) for role in self.roles)
        tokens = height * width // self.network.unit**2 + condition.text.shape[1]
        return Cost(count, count * tokens, round(flops))


def common_roles(network: Network, objective: Objective, regressor: Network | None) -> list[Role]:
    """What networks do in a step for the objective and for a regressor's residual, with any teacher or judge."""
    more = [Role("network", network, frozen=objective.extra_passes)] if objective.extra_passes else []
    return more + ([Role("regressor", regressor, frozen=1, float32=True)] if regressor else [])
