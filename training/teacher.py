"""Distillation: a student learns the output of a teacher, or the pictures that the teacher makes from its noise."""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.latents import Codec
from data.module import Data
from data.sizes import SIZE_FEATURES
from data.text.clip import CLIPText
from data.text.encoder import TextEncoder
from engine.strategy import Strategy
from flow.guidance import ClassifierFree
from flow.matching import Matching
from flow.objective import Estimate, Field, Interval, Model, Objective
from flow.stepmap import StepMap
from mmdit import lora
from mmdit.network import Condition, Network
from pipeline import LoadOptions, Pipeline
from pipeline.folder import process_of, read_network
from pipeline.sampling import Sampling
from storage.models import find_model
from training.roles import Role


@dataclass(frozen=True)
class Pairs:
    """Pairs of noise and the picture that a teacher makes from it (Liu et al. 2022, algorithm 1), made at every step.

    The pictures of the data set take no part, only their captions and the noise, so the pairs are a function of
    (seed, step) and never come twice.

    Args:
        steps: steps of the teacher's sampler.
        sampler: a deterministic one: euler, heun, midpoint, dpmpp_2m, reference, or meanflow.
        spacing: its time grid.
        uses: samples of a batch that learn the same pair, each at its own t; divides each share of a batch. Since
            making a pair costs more than learning it, several uses teach more in the same time.
    """

    steps: int = 20
    sampler: str = "euler"
    spacing: str = "trailing"
    uses: int = 1

    def __post_init__(self) -> None:
        if self.uses < 1:
            raise ValueError(f"pairs.uses must be at least 1, got {self.uses}")
        self.sampling.refuse_noise()

    @property
    def sampling(self) -> Sampling:
        """How the teacher is sampled, but for its guidance."""
        return Sampling(self.steps, 1.0, self.sampler, self.spacing)

    def evaluations(self, objective: Objective) -> int:
        """How often the walk of a pair evaluates its model."""
        walk, _ = self.sampling.walk(objective)
        calls = []

        def denoise(z: Tensor, t: Tensor, end: Tensor | None = None) -> Estimate:
            calls.append(t)
            return Estimate(z, z)

        z = torch.zeros(1, 1, dtype=torch.float64)
        walk(denoise, z, lambda: z, None)
        return len(calls)

    def check(self, batch_size: int, shares: int) -> None:
        """ValueError if a batch of this size in so many shares (processes × micro-batches) has no place for `uses`."""
        if batch_size // shares % self.uses:
            raise ValueError(f"teacher.pairs.uses must divide the {batch_size // shares} pictures of each micro-batch, "
                             f"got {self.uses}")  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """A model whose output is learned, in place of the target of picture and noise.

    Args:
        model: a model folder or a run's folder. For a LoRA none means its base: the network itself without its updates.
        guidance: scale of the teacher's guidance, which the student learns with one call of its network. Two numbers
            are the ends of a range: each picture draws a scale, and the student needs guidance_embeds, which receive
            the scale.
        pairs: learn the teacher's pictures of the noise, in place of its output at points between the data and noise.
        matching: learn the distribution of the teacher's pictures, in the steps of a `StepMap`. A critic, at first a
            copy of the teacher, learns the student's pictures meanwhile; its weights' names begin with `critic.`.
    """

    model: Path | None = None
    guidance: float | tuple[float, float] = 1.0
    pairs: Pairs | None = None
    matching: Matching | None = None

    def __post_init__(self) -> None:
        low, high = self.range
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"teacher.guidance must be a number of at least 0, or two that rise, got {self.guidance}")
        if self.matching and self.pairs:
            raise ValueError("teacher.matching and teacher.pairs exclude each other: leave one of them out")
        if self.matching and low < high:
            raise ValueError(f"teacher.matching needs one teacher.guidance, got the range {self.guidance}")

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest guidance scale."""
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)

    def walked(self, objective: Objective) -> int:
        """Steps that a student walks, without learning, before the one that it learns."""
        return objective.k - 1 if self.matching and isinstance(objective, StepMap) else 0

    def roles(
        self, network: Network, process: Objective, critic: Network | None, student: Network, walked: int
    ) -> list[Role]:
        """What networks do in a step beside the student's learning pass.

        Args:
            network: the teacher's.
            process: the teacher's.
            critic: for matching, the network that learns the student's pictures.
            student: learns.
            walked: steps that the student walks without learning.
        """
        calls = 1.0 if self.range == (1, 1) or network.guidance_embeds else 2.0
        if self.pairs:
            calls *= self.pairs.evaluations(process) / self.pairs.uses
        found = [Role("teacher", network, frozen=calls)]
        if critic:
            found += [Role("critic", critic, learned=1), Role("network", student, frozen=walked)]
        return found

    def load(
        self,
        objective: Objective,
        codec: Codec,
        text: TextEncoder,
        student: Network,
        data: Data,
        base: str | None = None,
    ) -> "TeacherModel":
        """Loads the model, with the training's codec and text encoders.

        Args:
            objective: what the student learns.
            codec: of the training.
            text: of the training.
            student: the network.
            data: what it is shown besides captions.
            base: the model that the student is a LoRA of.

        Raises:
            ValueError: the student cannot learn the model's output.
            FileNotFoundError: there is no model.
        """
        if self.model:
            network, process = read_frozen(f"teacher.model {self.model}", self.model, codec, text)
        elif base:
            network, process = student, process_of(Path(base))[0]
        else:
            raise ValueError("teacher.model is missing: only a LoRA can learn without one, from its own base")
        named = f"teacher.model {self.model or base}"
        for name in ("path", "target"):
            theirs, ours = (each.describe()[name] for each in (process, objective))
            if theirs != ours:
                raise ValueError(
                    f"{named} learned another {name}: {theirs['class']}, not {ours['class']}: "
                    f"set objective.{name} to the teacher's"
                )
        if process.discrete:
            raise ValueError(f"{named} writes codes, from which nothing here learns: choose a flow")
        if process.outputs > 1:
            raise ValueError(f"{named} has learned a variance: choose a teacher without")
        for name in ("picture_channels", "level_embeds", "text_mask"):
            if getattr(network, name) != getattr(student, name):
                raise ValueError(f"{named} has another {name} than its student: make them equal")
        pipe = Pipeline(network, process, codec, text, image_encoder=data.image_encoder)
        if pipe.sized != data.sized:
            raise ValueError(f"{named} and data.size_conditioning {data.sized} do not fit together: change one of them")
        if self.pairs:
            pipe.plan(self.pairs.sampling)
        if self.matching and student.guidance_embeds:
            raise ValueError("teacher.matching takes no student that is told its guidance: begin from another network")
        if self.matching and (base or not self.model):
            raise ValueError("teacher.matching trains whole networks and no LoRA: leave lora out")
        if self.matching and not isinstance(objective, StepMap):
            raise ValueError("teacher.matching needs objective.class_path StepMap, which says in how many steps the "
                             f"student draws, and it is {type(objective).__name__}")  # fmt: skip
        return TeacherModel(self, pipe, bare=self.model is None, walked=self.walked(objective))


def read_frozen(named: str, model: Path, codec: Codec, text: TextEncoder) -> tuple[Network, Objective]:
    """Network and objective of a model that takes part in a training but does not learn.

    Args:
        named: what errors call it.
        model: a model folder or a run's folder.
        codec: of the training, which must be the model's.
        text: of the training, likewise.

    Raises:
        ValueError: codec or text encoders are others.
        FileNotFoundError: there is no model.
    """
    folder = find_model(model)
    network, process, own = read_network(folder, LoadOptions(dtype="stored"))
    codecs = [{name: value for name, value in c.fingerprint().items() if name != "dtype"} for c in (own, codec)]
    if codecs[0] != codecs[1]:
        raise ValueError(f"{named} has another codec than the training: use its codec")
    if isinstance(text, CLIPText) and CLIPText(folder).fingerprint() != text.fingerprint():
        raise ValueError(f"{named} has other text encoders than the training: use its encoders")
    return network, process


def prepare_frozen(network: Network, device: torch.device, strategy: Strategy) -> None:
    """Moves a network that does not learn to a device and compiles its blocks if the strategy says so."""
    # A CPU computes in float32 or bfloat16, and would convert weights of float16 at every call.
    network.to(device, torch.float32 if device.type == "cpu" else None).requires_grad_(False)
    strategy.prepare(network)


@dataclass
class Lesson:
    """What a student learns from: its condition, picture and noise, and a field in place of their target."""

    condition: Condition
    x0: Tensor  # (b, C, H, W)
    noise: Tensor  # (b, C, H, W)
    field: Field | None = None
    loss_mask: Tensor | None = None  # weights of the places, (b, 1, H, W)

    def loss(self, objective: Objective, model: Model, t: Tensor, interval: Interval | None = None) -> Tensor:
        """The loss of each picture, (b,)."""
        return objective.loss(model, self.x0, self.noise, t, self.condition, interval, self.field, self.loss_mask)


@dataclass(kw_only=True)
class MatchedLesson(Lesson):
    """Noise and captions whose pictures the student draws. Its loss is also the critic's."""

    teacher: "TeacherModel"
    times: Tensor  # of the noised pictures, (b,)
    fresh: Tensor  # their noise, (b, C, H, W)

    def loss(self, objective: Objective, model: Model, t: Tensor, interval: Interval | None = None) -> Tensor:
        teacher, scale = self.teacher, torch.full_like(t, self.teacher.teacher.range[0])
        assert isinstance(objective, StepMap)
        assert teacher.teacher.matching
        assert teacher.critic
        drawn = objective.picture(model, self.noise, t, self.condition)
        shown = self.condition._replace(guidance=scale) if teacher.pipe.network.guidance_embeds else self.condition
        student, critic = teacher.teacher.matching.losses(
            teacher.pipe.objective, drawn, self.fresh, self.times,
            teacher.guided(self.condition, scale), teacher.critic, shown,
        )  # fmt: skip
        return student + critic


class TeacherModel:
    """A loaded teacher.

    Args:
        teacher: its settings.
        pipe: the model.
        bare: its network is the student, whose updates are left out for the teacher.
        walked: steps that a student walks, without learning, before the one that it learns.

    Attributes:
        uses: samples in a row that learn one pair in training.
        critic: learns the student's pictures, if their distribution is matched.
    """

    def __init__(self, teacher: Teacher, pipe: Pipeline, bare: bool = False, walked: int = 0) -> None:
        self.teacher, self.pipe, self.bare, self.walked = teacher, pipe, bare, walked
        self.uses = teacher.pairs.uses if teacher.pairs else 1
        self.critic = copy.deepcopy(pipe.network).float() if teacher.matching else None
        self.null: Condition | None = None

    def prepare(self, device: torch.device, strategy: Strategy) -> None:
        """Moves a network of its own to a device, freezes it and compiles its blocks if the strategy says so."""
        if not self.bare:
            prepare_frozen(self.pipe.network, device, strategy)

    def lesson(
        self,
        condition: Condition,
        x0: Tensor,
        noise: Tensor,
        u: Tensor,
        uses: int = 1,
        fresh: Tensor | None = None,
    ) -> Lesson:
        """What a student learns in place of the target of data and noise.

        That is the teacher's output, its pairs or its distribution.

        Args:
            condition: the condition of the teacher.
            x0: pictures of the data, (b, C, H, W).
            noise: (b, C, H, W).
            u: uniform numbers (b,) that draw the guidance scale of each picture, or the times of matching.
            uses: with pairs, so many samples in a row learn the pair of the first of them.
            fresh: for matching, more noise (b, C, H, W).
        """
        if self.teacher.matching:
            assert fresh is not None
            times = self.teacher.matching.times(u, self.pipe.objective, noise[0, 0].numel())
            return MatchedLesson(condition, x0, noise, teacher=self, times=times, fresh=fresh)
        low, high = self.teacher.range
        scale = low + (high - low) * u
        told = condition._replace(guidance=scale) if low < high else condition
        if not self.teacher.pairs:
            model = self.guided(condition, scale)
            return Lesson(told, x0, noise, lambda z, t, _, y: model(z, t, None))
        first = Condition._make(None if part is None else part[::uses] for part in condition)
        drawn = self.draw(noise[::uses], first, scale[::uses])
        rows = torch.arange(len(noise), device=noise.device) // uses
        firsts = rows * uses
        told = Condition._make(None if part is None else part[firsts] for part in told)
        return Lesson(told, drawn[rows], noise[firsts])

    @torch.no_grad()
    def draw(self, noise: Tensor, condition: Condition, scale: Tensor) -> Tensor:
        """The latents that the teacher makes from noise (b, C, H, W), with the guidance scales (b,)."""
        assert self.teacher.pairs
        objective, model = self.pipe.objective, self.guided(condition, scale)
        walk, times = self.teacher.pairs.sampling.walk(objective, objective.alpha(noise[0, 0].numel()))

        def denoise(z: Tensor, t: Tensor, end: Tensor | None = None) -> Estimate:
            return objective.denoise(model, z, t, None, end)

        return self.pipe.walked(walk, times, denoise, noise)

    def guided(self, condition: Condition, scale: Tensor, network: Model | None = None) -> Model:
        """The teacher with guidance of these scales (b,) and this condition, whatever condition it is given.

        Args:
            condition: of the teacher.
            scale: of its guidance, (b,).
            network: another network in its place, with the same guidance.
        """
        model = network or self.pipe.network
        if self.pipe.network.guidance_embeds:
            condition = condition._replace(guidance=scale)
        elif self.teacher.range != (1, 1):
            model = ClassifierFree(model, condition.null(self._null(condition)), scale[:, None, None, None])

        def guided(z: Tensor, t: Tensor, _: object, *end: Tensor) -> Tensor:
            with lora.off(self.pipe.network) if self.bare else nullcontext():
                return model(z, t, condition, *end)

        return guided

    def _null(self, condition: Condition) -> Condition:
        if self.null is None:
            self.null = self.pipe.condition([""])
        if not self.pipe.sized:
            return self.null
        pooled = self.null.pooled[:, :-SIZE_FEATURES].expand(len(condition.pooled), -1)  # both halves have equal sizes
        return self.null._replace(pooled=torch.cat([pooled, condition.pooled[:, -SIZE_FEATURES:]], 1))

    def frozen(self, student: Network) -> Network:
        """The network that does not learn; that of the student, if the teacher is its base."""
        return student if self.bare else self.pipe.network

    def roles(self, student: Network) -> list[Role]:
        """What networks do in a step beside the student's learning pass."""
        return self.teacher.roles(self.frozen(student), self.pipe.objective, self.critic, student, self.walked)
