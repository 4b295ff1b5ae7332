"""Learning from judgement: the model draws pictures, rewards judge them, and the flow learns from the verdict.

Or a store has the verdict, as choices between two pictures that were made before (`training.chosen`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from data.batch import Batch
from data.latents import Codec
from data.module import Data
from data.text.encoder import TextEncoder
from engine.strategy import Strategy
from flow.objective import Interval, Model, Objective
from flow.preference import NFT, Drawn, Preference
from metrics.distribution import Sums, frechet_of_sums
from metrics.features import load_features
from mmdit.network import Condition, Network
from pipeline import Pipeline
from training.chosen import ChoiceModel, JudgeModel, roles_of_choices, taken
from training.rewards import Reward, total
from training.roles import Role
from training.teacher import Lesson, Pairs, Teacher, TeacherModel

DRAWING = ("group", "guidance", "pairs", "features")  # what is of no use for choices


@dataclass(frozen=True)
class Judgement:
    """Rewards of pictures that the main average of the weights draws at every step, from captions of the data.

    The pictures of the data set take no part in the training; the validation loss is still theirs and shows how far
    the model has moved from them. Without rewards nothing is drawn: the data are a store of choices.

    Args:
        rewards: what the pictures are worth; they are added. None means the choices of the data's store.
        loss: what is learned from the rewards; none is NFT.
        reference: a model folder or a run's folder, which DPO compares with and the validation measures the drift
            from. For a LoRA none means its base: the network itself without its updates.
        group: pictures of one caption, whose rewards are compared.
        guidance: scale of the guidance with which pictures are drawn, and which is part of the model that NFT trains.
        pairs: how pictures are drawn, and at how many t each is learned.
        features: shapes:FOLDER, judge:FOLDER, inception:FILE or clip:FOLDER, on whose features each validation measures
            how far the pictures have moved from the reference's, and how varied they are.
    """

    rewards: list[Reward] = field(default_factory=list)
    loss: Preference | None = None
    reference: Path | None = None
    group: int = 8
    guidance: float = 1.0
    pairs: Pairs = field(default_factory=lambda: Pairs(steps=10))
    features: str | None = None

    @property
    def preference(self) -> Preference:
        """What is learned from the rewards."""
        return self.loss or NFT()

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"judgement.group must be at least 2, since its rewards are compared, got {self.group}")
        if self.preference.paired and self.group % 2:
            raise ValueError(f"judgement.group must be even, since {type(self.preference).__name__} compares pairs, "
                             f"got {self.group}")  # fmt: skip
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"judgement.guidance must be at least 0, got {self.guidance}")

    def roles(self, network: Network, reference: Network | None, choices: bool) -> list[Role]:
        """What networks do in a step.

        Args:
            network: learns. Its average draws the pictures, which NFT also compares with.
            reference: does not learn.
            choices: the data are choices, and nothing is drawn.
        """
        if choices:
            assert reference
            return roles_of_choices(network, reference)
        branches = 1 if self.guidance == 1 else 2
        drawing = branches * self.pairs.evaluations(Objective()) / self.pairs.uses
        compared, learned = (0, 1) if self.preference.paired else (branches, branches)
        found = [Role("network", network, learned=learned, frozen=drawing + compared)]
        return found + ([Role("reference", reference, frozen=int(self.preference.paired))] if reference else [])

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
        if data.choices and self.rewards:
            raise ValueError("judgement.rewards are for pictures that the model draws, and the data are choices: leave "
                             "the rewards out")  # fmt: skip
        if not data.choices and not self.rewards:
            raise ValueError("judgement.rewards are missing: name at least one, or train on a store of choices")
        if data.choices and not self.preference.paired:
            raise ValueError(f"{type(self.preference).__name__} learns from the model's own pictures and not from "
                             "choices: set judgement.loss DPO")  # fmt: skip
        if data.choices and any(getattr(self, name) != getattr(Judgement(), name) for name in DRAWING):
            raise ValueError(f"judgement.{', '.join(DRAWING)} are for pictures that the model draws, and the data are "
                             "choices: leave them out")  # fmt: skip
        rows = data.batch_size // shares
        if self.rewards and rows % (self.group * self.pairs.uses):
            raise ValueError(f"judgement.group × pairs.uses = {self.group * self.pairs.uses} must divide the {rows} "
                             "pictures of each micro-batch")  # fmt: skip
        reference = None
        if self.reference or base:
            reference = Teacher(self.reference).load(objective, codec, text, network, data, base)
        elif self.preference.paired:
            raise ValueError(f"{type(self.preference).__name__} compares with a model that does not learn: set "
                             "judgement.reference, the model to begin from")  # fmt: skip
        if self.features and not reference:
            raise ValueError("judgement.features compare with the reference's pictures: set judgement.reference")
        if reference and data.choices:
            return ChoiceModel(self.preference, reference)
        data.judged = True
        return DrawingModel(self, codec, reference)


@dataclass(kw_only=True)
class JudgedLesson(Lesson):
    """Judged pictures, with the noise to learn them with."""

    worth: Tensor  # (b,)
    judge: "DrawingModel"

    def loss(self, objective: Objective, model: Model, t: Tensor, interval: Interval | None = None) -> Tensor:
        judge, scale = self.judge, torch.ones_like(t)
        if judge.paired:
            assert judge.reference
            other = judge.reference.guided(self.condition, scale)
        else:
            model = judge.policy.guided(self.condition, judge.judgement.guidance * scale, model)
            other = judge.policy.guided(self.condition, judge.judgement.guidance * scale)
        preference, drawn = judge.judgement.preference, Drawn(self.x0, self.noise, t, self.condition, self.worth)
        found = preference.loss(objective, model, other, drawn)
        judge.watch(found.watched)
        return found.loss


class DrawingModel(JudgeModel):
    """A judgement of pictures that the model which is trained draws.

    Args:
        judgement: its settings.
        codec: decodes the pictures.
        reference: a model that does not learn.

    Attributes:
        paired: pictures are compared in pairs.
    """

    def __init__(self, judgement: Judgement, codec: Codec, reference: TeacherModel | None) -> None:
        super().__init__(reference)
        self.judgement, self.codec = judgement, codec
        self.paired = judgement.preference.paired
        self.features = load_features(judgement.features) if judgement.features else None
        self.theirs: dict[bytes, Tensor] = {}  # features of the reference's pictures of the validation, by batch

    def follow(self, pipe: Pipeline, device: torch.device, strategy: Strategy) -> None:
        super().follow(pipe, device, strategy)
        drawing = Teacher(None, self.judgement.guidance, self.judgement.pairs)
        self.policy = TeacherModel(drawing, pipe)
        if self.reference:
            self.first = TeacherModel(drawing, self.reference.pipe, self.reference.bare)
        if self.features:
            self.features.network.to(device)

    def twins(self, numbers: Tensor, dim: int = 0) -> Tensor:
        if not self.paired:
            return numbers
        first = numbers.index_select(dim, torch.arange(0, numbers.shape[dim], 2, device=numbers.device))
        return first.repeat_interleave(2, dim)

    def lesson(self, batch: Batch, fresh: Tensor) -> JudgedLesson:
        """Draws and judges pictures of the first caption of every group."""
        assert batch.prompts
        condition, captions, noise = Condition(**batch.condition()), batch.prompts, batch.noise
        group, uses = self.judgement.group, self.judgement.pairs.uses
        rows = rearrange(torch.arange(len(noise)), "(g u n) -> g u n", u=uses, n=group)
        drawn_from = rows[:, 0].flatten()
        first = rows[:, :1, :1].expand(rows.shape)
        asked = first[:, 0].flatten()
        x0 = self.drawn(self.policy, taken(condition, asked), noise[drawn_from])
        found = total(self.judgement.rewards, self.codec.decode(x0), [captions[i] for i in asked])
        rewards = rearrange(found, "(g n) -> g n", n=group)
        advice = self.judgement.preference.advice(rewards)
        offset = group * torch.arange(len(rewards))[:, None]
        order = (advice.order + offset)[:, None].expand(rows.shape).flatten()
        worth = advice.worth[:, None].expand(rows.shape).flatten()
        self.watch({"micro_batches": torch.ones(1), "reward": rewards, "reward_spread": rewards.std(1)})
        return JudgedLesson(
            taken(condition, first.flatten()), x0[order.to(x0.device)], self.twins(fresh),
            worth=worth.to(x0.device), judge=self,
        )  # fmt: skip

    @torch.no_grad()
    def drawn(self, model: TeacherModel, condition: Condition, noise: Tensor) -> Tensor:
        """Latents (b, C, H, W) that a model draws from noise."""
        return model.draw(noise, condition, torch.full((len(noise),), self.judgement.guidance, device=noise.device))

    @torch.no_grad()
    def verdict(self, batch: Batch, condition: Condition) -> dict[str, Tensor]:
        assert batch.prompts
        pictures = self.codec.decode(self.drawn(self.policy, condition, batch.noise))
        rewards = total(self.judgement.rewards, pictures, batch.prompts)
        values = {"reward": rewards, "reward_square": rewards.square()}
        if not self.features:
            return values
        key = batch.positions.tobytes()
        if key not in self.theirs:  # the same at every validation
            first = self.codec.decode(self.drawn(self.first, condition, batch.noise))
            self.theirs[key] = self.features(first.float()).pooled
        for name, found in (("own", self.features(pictures.float()).pooled), ("first", self.theirs[key])):
            values |= {f"{name}_features": found, f"{name}_products": found[:, :, None] * found[:, None]}
        return values

    def score(self, values: dict[str, Tensor], count: int) -> float:
        reward = values["reward"]
        values["reward_std"] = (values.pop("reward_square") - reward**2).clamp(min=0).sqrt()
        if self.features:
            own, first = (
                Sums(count, *(count * values.pop(f"{name}_{part}") for part in ("features", "products")))
                for name in ("own", "first")
            )
            values["fd"] = torch.tensor(frechet_of_sums(own, first))
            values["variety"] = own.covariance().trace() / first.covariance().trace()
        return -reward.item()

    def roles(self, network: Network) -> list[Role]:
        reference = self.reference.frozen(network) if self.reference else None
        return self.judgement.roles(network, reference, choices=False)
