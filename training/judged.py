"""Learning from judgement: the model draws pictures, rewards judge them, and the flow learns from the verdict."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from data.latents import Codec
from data.module import Data
from data.text.encoder import TextEncoder
from engine.flops import forward_flops
from flow.objective import Interval, Model, Objective
from flow.preference import NFT, Drawn, Preference, mean_square
from mmdit.network import Condition, Network
from pipeline import Pipeline
from training.rewards import Reward, total
from training.teacher import Lesson, Pairs, Teacher, TeacherModel

OF_PAIRS = ("accuracy", "winner_margin", "loser_margin")


@dataclass(frozen=True)
class Judgement:
    """Rewards of pictures that the main average of the weights draws at every step, from captions of the data.

    The pictures of the data set take no part in the training; the validation loss is still theirs and shows how far
    the model has moved from them.

    Args:
        rewards: what the pictures are worth; they are added.
        loss: what is learned from the rewards.
        reference: a model folder or a run's folder, which DPO compares with and the validation measures the drift
            from. For a LoRA none means its base: the network itself without its updates.
        group: pictures of one caption, whose rewards are compared.
        guidance: scale of the guidance with which pictures are drawn, and which is part of the model that NFT trains.
        pairs: how pictures are drawn, and at how many t each is learned.
    """

    rewards: list[Reward]
    loss: Preference = field(default_factory=NFT)
    reference: Path | None = None
    group: int = 8
    guidance: float = 1.0
    pairs: Pairs = field(default_factory=lambda: Pairs(steps=10))

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("judgement.rewards is empty: name at least one")
        if self.group < 2:
            raise ValueError(f"judgement.group must be at least 2, since its rewards are compared, got {self.group}")
        if self.loss.paired and self.group % 2:
            raise ValueError(f"judgement.group must be even, since {type(self.loss).__name__} compares pairs, "
                             f"got {self.group}")  # fmt: skip
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"judgement.guidance must be at least 0, got {self.guidance}")

    def load(
        self,
        objective: Objective,
        codec: Codec,
        text: TextEncoder,
        network: Network,
        data: Data,
        shares: int,
        base: str | None,
    ) -> "JudgeModel":
        """Loads the reference and checks that all fits together.

        Args:
            objective: of the training.
            codec: of the training.
            text: of the training.
            network: learns.
            data: give the captions.
            shares: number of micro-batches in a global batch, over all processes.
            base: the model that the network is a LoRA of.

        Raises:
            ValueError: the parts do not fit together.
            FileNotFoundError: there is no reference.
        """
        if type(objective) is not Objective:
            raise ValueError(f"judgement needs objective.class_path Objective: {type(objective).__name__} learns no "
                             "output at a point that two models could be compared by")  # fmt: skip
        if network.guidance_embeds:
            raise ValueError("judgement does not go with network.guidance_embeds: set judgement.guidance")
        if data.dropout:
            raise ValueError(f"judgement needs all captions, and {data.dropout:.0%} are dropped: set the dropouts of "
                             "data to 0")  # fmt: skip
        if data.paired:
            raise ValueError("judgement draws its own pictures: give a store of pictures and not of pairs")
        rows = data.batch_size // shares
        if rows % (self.group * self.pairs.uses):
            raise ValueError(f"judgement.group × pairs.uses = {self.group * self.pairs.uses} must divide the {rows} "
                             "pictures of each micro-batch")  # fmt: skip
        reference = None
        if self.reference or base:
            reference = Teacher(self.reference).load(objective, codec, text, network, data.sized, base)
        elif self.loss.paired:
            raise ValueError(f"{type(self.loss).__name__} compares with a model that does not learn: set "
                             "judgement.reference, the model to begin from")  # fmt: skip
        data.judged = True
        return JudgeModel(self, codec, reference)


@dataclass(kw_only=True)
class JudgedLesson(Lesson):
    """Judged pictures, with the noise to learn them with."""

    worth: Tensor  # (b,)
    judge: "JudgeModel"

    def loss(self, objective: Objective, model: Model, t: Tensor, interval: Interval | None = None) -> Tensor:
        judge, scale = self.judge, torch.ones_like(t)
        if judge.paired:
            assert judge.reference
            other = judge.reference.guided(self.condition, scale)
        else:
            model = judge.policy.guided(self.condition, judge.judgement.guidance * scale, model)
            other = judge.policy.guided(self.condition, judge.judgement.guidance * scale)
        preference, drawn = judge.judgement.loss, Drawn(self.x0, self.noise, t, self.condition, self.worth)
        found = preference.loss(objective, model, other, drawn)
        judge.watch(found.watched)
        return found.loss


class JudgeModel:
    """A judgement with its reference and, once the training begins, the model whose pictures are judged.

    Args:
        judgement: its settings.
        codec: decodes the pictures.
        reference: a model that does not learn.

    Attributes:
        paired: pictures are compared in pairs.
        branches: passes of the network for one output of the drawing model: two with guidance.
        learned_branches: the same for an output that is learned.
        watched: sums of means over the micro-batches of a step, by name; the training clears them before a step.
    """

    def __init__(self, judgement: Judgement, codec: Codec, reference: TeacherModel | None) -> None:
        self.judgement, self.codec, self.reference = judgement, codec, reference
        self.paired = judgement.loss.paired
        self.branches = 1 if judgement.guidance == 1 else 2
        self.learned_branches = 1 if self.paired else self.branches
        self.watched: dict[str, Tensor] = {}

    def follow(self, pipe: Pipeline, device: torch.device) -> None:
        """Draws with this model from now on."""
        self.policy = TeacherModel(Teacher(None, self.judgement.guidance, self.judgement.pairs), pipe)
        if self.reference:
            self.reference.to(device)

    def twins(self, numbers: Tensor, dim: int = 0) -> Tensor:
        """Numbers for the pictures along `dim`; both pictures of a pair have those of the first."""
        if not self.paired:
            return numbers
        first = numbers.index_select(dim, torch.arange(0, numbers.shape[dim], 2, device=numbers.device))
        return first.repeat_interleave(2, dim)

    def lesson(self, condition: Condition, captions: list[str], noise: Tensor, fresh: Tensor) -> JudgedLesson:
        """Draws and judges pictures of the first caption of every group.

        Args:
            condition: of the captions.
            captions: in words, b of them.
            noise: to draw from, (b, C, H, W).
            fresh: noise to learn with, (b, C, H, W).
        """
        group, uses = self.judgement.group, self.judgement.pairs.uses
        rows = rearrange(torch.arange(len(noise)), "(g u n) -> g u n", u=uses, n=group)
        drawn_from = rows[:, 0].flatten()
        first = rows[:, :1, :1].expand(rows.shape)
        asked = first[:, 0].flatten()
        x0, rewards = self.drawn(taken(condition, asked), [captions[i] for i in asked], noise[drawn_from])
        rewards = rearrange(rewards, "(g n) -> g n", n=group)
        advice = self.judgement.loss.advice(rewards)
        offset = group * torch.arange(len(rewards))[:, None]
        order = (advice.order + offset)[:, None].expand(rows.shape).flatten()
        worth = advice.worth[:, None].expand(rows.shape).flatten()
        self.watch({"micro_batches": torch.ones(1), "reward": rewards, "reward_spread": rewards.std(1)})
        return JudgedLesson(
            taken(condition, first.flatten()), x0[order.to(x0.device)], self.twins(fresh),
            worth=worth.to(x0.device), judge=self,
        )  # fmt: skip

    @torch.no_grad()
    def drawn(self, condition: Condition, captions: list[str], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (b, C, H, W) drawn from noise, and the rewards of their pictures, (b,) on the host."""
        scale = torch.full((len(noise),), self.judgement.guidance, device=noise.device)
        x0 = self.policy.draw(noise, condition, scale)
        return x0, total(self.judgement.rewards, self.codec.decode(x0), captions)

    def watch(self, values: dict[str, Tensor]) -> None:
        """Adds what there is to watch of a micro-batch, each (n,)."""
        for name, value in values.items():
            self.watched[name] = self.watched.get(name, 0.0) + value.detach().double().mean().cpu()

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What there is to watch of the last step, by name. OF_PAIRS are means over the pairs of unequal reward.

        Args:
            reduce: adds the sums (n,) of all processes.
        """
        sums = reduce(torch.stack(list(self.watched.values())))
        found = dict(zip(self.watched, sums.tolist(), strict=True))
        parts, unequal = found.pop("micro_batches"), found.pop("unequal", 0.0)
        return {name: total / (max(unequal, 1e-6) if name in OF_PAIRS else parts) for name, total in found.items()}

    @torch.no_grad()
    def drift(self, objective: Objective, model: Model, lesson: Lesson, t: Tensor) -> Tensor:
        """The mean square of the model's output less the reference's, at points of pictures of the data, (b,)."""
        assert self.reference
        z, _ = objective.point_and_target(lesson.x0, lesson.noise, t, None, None)
        other = self.reference.guided(lesson.condition, torch.ones_like(t))
        return mean_square(model(z, t, lesson.condition).float() - other(z, t, lesson.condition).float())

    def flops(self, network: Network, z: Tensor, t: Tensor, condition: Condition) -> float:
        """FLOPs of drawing the pictures and of the model compared with."""
        calls = self.branches * self.judgement.pairs.evaluations(Objective()) / self.judgement.pairs.uses
        return (calls + self.learned_branches) * forward_flops(network, z, t, condition)


def taken(condition: Condition, rows: Tensor) -> Condition:
    """The condition of these rows."""
    return Condition._make(None if part is None else part[rows.to(part.device)] for part in condition)
