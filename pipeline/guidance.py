"""What guides a walk: classifier-free guidance, skipped blocks, a worse model, gradients; which go together."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from flow.guidance import ALWAYS, NEVER, ClassifierFree, Score, Weak, check_interval, uphill
from flow.objective import Model, Objective
from flow.path import Path
from flow.sampler import Denoiser
from flow.variance import LearnedVariance
from mmdit.network import Condition, Network
from pipeline.sampling import Sampling


class Pull(NamedTuple):
    """A gradient that guides the samples (`flow.guidance.uphill`)."""

    score: Callable[[Sequence[str], Denoiser], Score]  # from the prompts and the denoiser without the gradient
    scale: float
    interval: tuple[float, float] | None = None  # the times (from, to) at which it is used; none as for `uphill`

    def check(self, path: Path) -> None:
        """ValueError, in one line, if the scale is not finite or 0, or the interval has a time without any picture."""
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"a gradient needs a finite scale other than 0, which is none, got {self.scale:g}")
        if self.interval is None:
            return
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError("the interval of a gradient must be two times, 0 <= from <= to <= 1, "
                             f"got {self.interval[0]:g} and {self.interval[1]:g}")  # fmt: skip
        check_interval(path, self.interval)


class Guides(NamedTuple):
    """What guides a pipeline's samples in addition to its `Sampling`."""

    weak: Weak | None = None  # the worse model of autoguidance
    pulls: tuple[Pull, ...] = ()

    def one_branch(self, sampling: Sampling, network: Network) -> bool:
        """Whether guidance 0 leaves nothing of the prompt, so that the null branch is enough."""
        more = sampling.rescale or sampling.skip_layers or self.weak or network.guidance_embeds
        return sampling.guidance == 0 and sampling.interval == ALWAYS and not more

    def check_prompts(self, sampling: Sampling, network: Network, prompts: Sequence[str]) -> None:
        """ValueError if guidance is 0 and there is a prompt: nothing would follow it, or not only the gradients."""
        if not self.pulls:
            sampling.check_prompts(prompts)
        elif sampling.guidance == 0 and any(prompts) and not self.one_branch(sampling, network):
            raise ValueError("guidance 0 with a gradient makes the network unconditional: leave out interval, rescale, "
                             "skip_layers and autoguidance, and take a network without guidance_embeds")  # fmt: skip

    def check(self, sampling: Sampling, network: Network, times: Tensor) -> None:
        """ValueError, in one line, if the guidance of `sampling` does not fit the network, the times or the rest."""
        if not set(sampling.skip_layers) <= set(range(network.skippable)):
            raise ValueError(f"skip_layers must be blocks of an MMDiT, of which this network has "
                             f"{network.skippable}, got {sampling.skip_layers}")  # fmt: skip
        if sampling.skip_layers and self.weak:
            raise ValueError("skip-layer guidance and autoguidance exclude each other: leave one of them out")
        own = sampling.rescale or sampling.skip_layers or sampling.interval != ALWAYS or sampling.guider != "cfg"
        if network.guidance_embeds and own:
            raise ValueError(
                "this network has learned its guidance: leave out guider, rescale, interval and skip_layers"
            )
        if sampling.skip_layers and not sampling.skip_times(times):
            raise ValueError(
                f"skip-layer guidance works in the shares {sampling.skip_interval} of the steps, where none of "
                f"{len(times) - 1} lies: take more steps or another skip_interval"
            )

    def model_at(
        self,
        network: Network,
        objective: Objective,
        sampling: Sampling,
        times: Tensor,
        null: Callable[[], Condition],
    ) -> Callable[[Tensor], Model]:
        """Time () on the host → the network with the guidance that it has there, for one walk.

        Args:
            network: of the pipeline.
            objective: of the pipeline.
            sampling: the guidance.
            times: of the walk.
            null: makes the null condition; called if it is needed.
        """
        free, weak = sampling.guidance != 1 and not network.guidance_embeds, self.weak
        if not free and weak is None:
            return lambda t: network
        if interval := sampling.skip_times(times):
            weak = Weak(partial(network, skip_layers=sampling.skip_layers), sampling.skip_scale, interval)
        return ClassifierFree(
            network,
            null() if free else None,
            sampling.guidance,
            sampling.rescale,
            sampling.interval if free else NEVER,
            network.in_channels if isinstance(objective, LearnedVariance) else None,
            weak,
            sampling.guide(objective, times) if free else None,
        ).at

    def pulled(self, denoise: Denoiser, path: Path, prompts: Sequence[str]) -> Denoiser:
        """The denoiser with the gradients, each of which is taken without the others."""
        guided = denoise
        for score, scale, interval in self.pulls:
            guided = uphill(guided, path, score(prompts, denoise), scale, interval)
        return guided
