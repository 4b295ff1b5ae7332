"""Learning from choices between two pictures; and what all models that learn from judgement have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import Batch
from engine.strategy import Strategy
from flow.objective import Interval, Model, Objective
from flow.preference import Drawn, Judged, Preference, mean_square
from mmdit.network import Condition, Network
from pipeline import Pipeline
from training.roles import Role
from training.teacher import Lesson, TeacherModel

OF_PAIRS = ("accuracy", "winner_margin", "loser_margin")  # means over the pairs of unequal reward


class JudgeModel(ABC):
    """Judged pictures as lessons, and what there is to watch of them.

    Args:
        reference: a model that does not learn.

    Attributes:
        watched: sums of means over the micro-batches of a step, by name; the training clears them before a step.
    """

    def __init__(self, reference: TeacherModel | None) -> None:
        self.reference = reference
        self.watched: dict[str, Tensor] = {}

    def follow(self, pipe: Pipeline, device: torch.device, strategy: Strategy) -> None:
        """Makes ready for a training: `pipe` is the main average of the weights, which draws pictures."""
        if self.reference:
            self.reference.prepare(device, strategy)

    def twins(self, numbers: Tensor, dim: int = 0) -> Tensor:
        """Numbers for the pictures along `dim`; both pictures of a pair have those of the first."""
        return numbers

    @abstractmethod
    def lesson(self, batch: Batch, fresh: Tensor) -> Lesson:
        """What is learned from a micro-batch; with `fresh` noise (b, C, H, W) where that of the batch has been used."""

    def verdict(self, batch: Batch, condition: Condition) -> dict[str, Tensor]:
        """What a batch of the validation is worth, by name, each (b,) or (b, …)."""
        return {}

    @abstractmethod
    def score(self, values: dict[str, Tensor], count: int) -> float:
        """What the best model has the least of. The means of `verdict` and `compared` become the values to log.

        Args:
            values: means by name, each () or of the shape of one picture's value; changed in place to numbers.
            count: pictures of the validation.
        """

    def watch(self, values: dict[str, Tensor]) -> None:
        """Adds what there is to watch of a micro-batch, each (n,)."""
        for name, value in values.items():
            self.watched[name] = self.watched.get(name, 0.0) + value.detach().double().mean().cpu()

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What there is to watch of the last step, by name.

        Args:
            reduce: adds the sums (n,) of all processes.
        """
        sums = reduce(torch.stack(list(self.watched.values())))
        found = dict(zip(self.watched, sums.tolist(), strict=True))
        parts, unequal = found.pop("micro_batches"), found.pop("unequal", 0.0)
        return {name: total / (max(unequal, 1e-6) if name in OF_PAIRS else parts) for name, total in found.items()}

    @torch.no_grad()
    def compared(
        self, objective: Objective, model: Model, batch: Batch, lesson: Lesson, t: Tensor
    ) -> dict[str, Tensor]:
        """What the model does at points of the data's pictures, by name, each (b,).

        The drift is the mean square of its output less the reference's.
        """
        if not self.reference:
            return {}
        z, _ = objective.point_and_target(lesson.x0, lesson.noise, t, None, None)
        other = self.reference.guided(lesson.condition, torch.ones_like(t))
        moved = model(z, t, lesson.condition).float() - other(z, t, lesson.condition).float()
        return {"drift": mean_square(moved)}

    @abstractmethod
    def roles(self, network: Network) -> list[Role]:
        """What the network that learns and the reference do in a step."""


@dataclass(kw_only=True)
class ChosenLesson(Lesson):
    """Pictures that were preferred, and the others."""

    worse: Tensor  # (b, C, H, W)
    choices: "ChoiceModel"

    def loss(self, objective: Objective, model: Model, t: Tensor, interval: Interval | None = None) -> Tensor:
        found = self.choices.judged(objective, model, self, t)
        self.choices.watch(found.watched | {"micro_batches": torch.ones(1)})
        return found.loss[::2]


class ChoiceModel(JudgeModel):
    """Choices between two pictures of one caption, from a store.

    Args:
        preference: what is learned from them; it compares pairs.
        reference: the model compared with.
    """

    def __init__(self, preference: Preference, reference: TeacherModel) -> None:
        super().__init__(reference)
        self.preference = preference

    def lesson(self, batch: Batch, fresh: Tensor) -> ChosenLesson:
        assert batch.worse is not None
        condition = Condition(**batch.condition())
        return ChosenLesson(condition, batch.x0, batch.noise, worse=batch.worse, choices=self)

    def judged(self, objective: Objective, model: Model, lesson: ChosenLesson, t: Tensor) -> Judged:
        """The losses of both pictures of each choice, (2b,), the preferred one first."""
        assert self.reference
        rows = torch.arange(len(t), device=t.device).repeat_interleave(2)
        condition, times = taken(lesson.condition, rows), t[rows]
        pictures = torch.stack([lesson.x0, lesson.worse], 1).flatten(0, 1)
        drawn = Drawn(pictures, lesson.noise[rows], times, condition, torch.ones_like(times))
        return self.preference.loss(objective, model, self.reference.guided(condition, drawn.worth), drawn)

    @torch.no_grad()
    def compared(
        self, objective: Objective, model: Model, batch: Batch, lesson: Lesson, t: Tensor
    ) -> dict[str, Tensor]:
        judged = self.judged(objective, model, self.lesson(batch, batch.noise), t)
        own = {"preference": judged.loss[::2], "accuracy": judged.watched["accuracy"][::2]}
        return own | super().compared(objective, model, batch, lesson, t)

    def score(self, values: dict[str, Tensor], count: int) -> float:
        return values["preference"].item()

    def roles(self, network: Network) -> list[Role]:
        assert self.reference
        return roles_of_choices(network, self.reference.frozen(network))


def roles_of_choices(network: Network, reference: Network) -> list[Role]:
    """What a network and its reference do in a step that learns choices: two pictures for each of a batch."""
    return [Role("network", network, learned=2), Role("reference", reference, frozen=2)]


def taken(condition: Condition, rows: Tensor) -> Condition:
    """The condition of these rows."""
    return Condition._make(None if part is None else part[rows.to(part.device)] for part in condition)
