"""The cost of a batch: pictures, tokens and FLOPs of a training step."""

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
    """cost(batch) → Cost, without text encoders. The backward pass counts as two forward passes, for a LoRA as one.

    Args:
        network: the network, on the meta device.
        objective: what the network learns.
        teacher: the model that it learns from.
        whole: whether all weights are trained, and not only a LoRA.
        judge: judges the pictures that it draws.
        regressor: gives the mean, of which the network learns the residual.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        teacher: TeacherModel | None,
        whole: bool,
        judge: JudgeModel | None = None,
        regressor: Regressor | None = None,
    ) -> None:
        self.network, self.whole = network, whole
        roles = [
            *(judge.roles(network) if judge else [Role("network", network, learned=1)]),
            *(teacher.roles(network) if teacher else []),
            *common_roles(network, objective, regressor.network if regressor else None),
        ]
        self.roles = [role._replace(network=skeleton(role.network)) for role in roles]  # before weights are sharded
        self.known: dict[tuple[tuple[int, ...], ...], Cost] = {}  # by the shapes of latents and text

    def __call__(self, batch: Batch) -> Cost:
        shapes = (tuple(batch.x0.shape), tuple(batch.text.shape))
        if shapes not in self.known:
            self.known[shapes] = self._count(batch.x0, Condition(**batch.condition()))
        return self.known[shapes]

    def _count(self, x0: Tensor, condition: Condition) -> Cost:
        count, _, height, width = x0.shape
        number = torch.empty(count)
        flops = sum(
            passes * role.forward_flops(x0, number, condition)
            for role in self.roles
            if (passes := role.passes(self.whole))
        )
        tokens = height * width // self.network.unit**2 + condition.text.shape[1]
        return Cost(count, count * tokens, round(flops))


def common_roles(network: Network, objective: Objective, regressor: Network | None) -> list[Role]:
    """What networks do in a step for the objective and for a regressor's residual, with any teacher or judge."""
    more = [Role("network", network, frozen=objective.extra_passes)] if objective.extra_passes else []
    return more + ([Role("regressor", regressor, frozen=1, float32=True)] if regressor else [])
