"""The cost of a batch: pictures, tokens and FLOPs of a training step."""

import torch
from torch import Tensor

from data.batch import Batch
from engine.flops import forward_flops
from engine.meter import Cost
from flow.objective import Objective
from mmdit.network import Condition, Network
from pipeline.residual import Regressor
from training.chosen import JudgeModel
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
        self.network, self.objective, self.teacher, self.judge = network, objective, teacher, judge
        self.regressor = regressor
        self.passes = (3 if whole else 2) + objective.extra_passes
        self.known: dict[tuple[tuple[int, ...], ...], Cost] = {}  # by the shapes of latents and text

    def __call__(self, batch: Batch) -> Cost:
        shapes = (tuple(batch.x0.shape), tuple(batch.text.shape))
        if shapes not in self.known:
            self.known[shapes] = self._count(batch.x0, Condition(**batch.condition()))
        return self.known[shapes]

    def _count(self, x0: Tensor, condition: Condition) -> Cost:
        count, _, height, width = x0.shape
        number = torch.empty(count)
        given = condition._replace(guidance=number) if self.network.guidance_embeds else condition
        branches = self.judge.learned_branches if self.judge else 1
        flops = round(self.passes * branches * forward_flops(self.network, x0, number, given))
        if self.teacher:
            flops += round(self.teacher.flops(x0, number, condition))
        if self.regressor:
            flops += forward_flops(self.regressor.network, x0, number, condition)
        if self.judge:
            flops += round(self.judge.flops(self.network, x0, number, condition))
        tokens = height * width // self.network.unit**2 + condition.text.shape[1]
        return Cost(count, count * tokens, flops)
