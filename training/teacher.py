"""Distillation: a student learns the output of a teacher in place of the target of picture and noise."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.latents import Codec
from data.sizes import SIZE_FEATURES
from data.text.clip import CLIPText
from data.text.encoder import TextEncoder
from engine.flops import forward_flops
from engine.strategy import skeleton
from flow.guidance import ClassifierFree
from flow.objective import Field, Model, Objective
from mmdit.network import Condition, Network
from pipeline import LoadOptions, Pipeline
from pipeline.folder import read_network
from storage.models import find_model


@dataclass(frozen=True)
class Teacher:
    """A model whose output is learned, in place of the target of picture and noise.

    Args:
        model: a model folder or a run's folder.
        guidance: scale of the teacher's classifier-free guidance, which the student learns with one call of its
            network. Two numbers are the ends of a range: each picture draws a scale, and the student needs
            guidance_embeds, which receive the scale.
    """

    model: Path
    guidance: float | tuple[float, float] = 1.0

    def __post_init__(self) -> None:
        low, high = self.range
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"teacher.guidance must be a number of at least 0, or two that rise, got {self.guidance}")

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest guidance scale."""
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)

    def load(
        self, objective: Objective, codec: Codec, text: TextEncoder, student: Network, sized: bool
    ) -> "TeacherModel":
        """Loads the model, with the training's codec and text encoders.

        Raises:
            ValueError: the student cannot learn the model's output.
            FileNotFoundError: there is no model.
        """
        folder = find_model(self.model)
        network, process, own = read_network(folder, LoadOptions(dtype="stored"))
        codecs = [{name: value for name, value in c.fingerprint().items() if name != "dtype"} for c in (own, codec)]
        if codecs[0] != codecs[1]:
            raise ValueError(f"teacher.model {self.model} has another codec than the training: use its codec")
        if isinstance(text, CLIPText) and CLIPText(folder).fingerprint() != text.fingerprint():
            raise ValueError(f"teacher.model {self.model} has other text encoders than the training: use its encoders")
        for name in ("path", "target"):
            theirs, ours = (each.describe()[name] for each in (process, objective))
            if theirs != ours:
                raise ValueError(
                    f"teacher.model {self.model} learned another {name}: {theirs['class']}, not {ours['class']}: "
                    f"set objective.{name} to the teacher's"
                )
        if process.outputs > 1 or network.guidance_embeds:
            raise ValueError(
                f"teacher.model {self.model} has learned a variance or its guidance: choose a teacher without these"
            )
        for name in ("picture_channels", "level_embeds", "text_mask"):
            if getattr(network, name) != getattr(student, name):
                raise ValueError(f"teacher.model {self.model} has another {name} than its student: make them equal")
        pipe = Pipeline(network, process, codec, text)
        if pipe.sized != sized:
            raise ValueError(
                f"teacher.model {self.model} and data.size_conditioning {sized} do not fit together: change one of them"
            )
        return TeacherModel(self, pipe)


class TeacherModel:
    """A loaded teacher.

    Args:
        teacher: its settings.
        pipe: the model.
    """

    def __init__(self, teacher: Teacher, pipe: Pipeline) -> None:
        self.teacher, self.pipe = teacher, pipe
        self.null: Condition | None = None

    def to(self, device: torch.device) -> None:
        """Moves the network to a device and freezes it."""
        self.pipe.network.to(device).requires_grad_(False)

    def guided_field(self, condition: Condition, u: Tensor) -> tuple[Condition, Field]:
        """The condition of the student, and the guided output of the teacher as the field to learn.

        Args:
            condition: the condition of the teacher.
            u: uniform numbers (b,) that draw the guidance scale of each picture.
        """
        low, high = self.teacher.range
        scale = low + (high - low) * u
        model: Model = self.pipe.network
        if self.teacher.range != (1, 1):
            model = ClassifierFree(model, condition.null(self._null(condition)), scale[:, None, None, None])

        def field(z: Tensor, t: Tensor, _: Condition, y: Tensor) -> Tensor:
            return model(z, t, condition)

        return condition._replace(guidance=scale) if low < high else condition, field

    def _null(self, condition: Condition) -> Condition:
        if self.null is None:
            self.null = self.pipe.condition([""])
        if not self.pipe.sized:
            return self.null
        pooled = self.null.pooled[:, :-SIZE_FEATURES].expand(len(condition.pooled), -1)  # both halves have equal sizes
        return self.null._replace(pooled=torch.cat([pooled, condition.pooled[:, -SIZE_FEATURES:]], 1))

    def flops(self, z: Tensor, t: Tensor, condition: Condition) -> int:
        """FLOPs of one guided output."""
        passes = 1 if self.teacher.range == (1, 1) else 2
        return passes * forward_flops(skeleton(self.pipe.network), z, t, condition)
