"""Training and sampling do not wait for the device: nothing that they do needs a number from it.

Tensors on "meta" stand for those on a GPU. They have no values, so reading one fails: `item`, `if`, `nonzero`. So does
mixing them with a tensor on the host that is not a single number. What else would wait is refused by `NoWait`.
"""

from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import lightning as L
import pytest
import torch
from networks import inputs, linear, plain
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trials import small
from walks import name

import train
from flow.density import Mode
from flow.guidance import ClassifierFree, Weak, inpaint
from flow.meanflow import MeanFlow
from flow.objective import Interval, Objective, TimeBins
from flow.path import EDM, Cosine, DDPMLinear, ImprovedCosine, LDMLinear, RectifiedFlow, ZeroTerminalSNR
from flow.penalty import Penalty
from flow.sampler import Denoiser
from flow.stepmap import StepMap
from flow.target import X0, Epsilon, Preconditioned, V, Velocity
from flow.variance import LearnedVariance
from flow.weight import DensityWeight, MinSNR, SechWeight
from mmdit.network import Condition
from pipeline.sampling import SAMPLERS, Sampling, random_normals, sent
from training import experiment

META = torch.device("meta")


class NoWait(TorchDispatchMode):
    """Refuses to copy between host and device where the host would wait, and indices on the host for a device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor) and x.ndim]
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            tensors = [] if args[2:] == (True,) or (kwargs or {}).get("non_blocking") else tensors
        assert len({x.device for x in tensors}) < 2, f"{function} waits for the device"
        return result


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [sent(x, META) for x in tensors]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x, host: x.item(),
        lambda x, host: x.sum() > 0 or None,
        lambda x, host: x.nonzero(),
        lambda x, host: x[x > 0],
        lambda x, host: x[x.sum().long()],
        lambda x, host: x[host.long()],
        lambda x, host: x * host,
        lambda x, host: host.to(META),
        lambda x, host: x.copy_(host),
        lambda x, host: x.cpu(),
        lambda x, host: x.tolist(),
    ],
)
def test_what_waits_is_refused(wait: Callable[[Tensor, Tensor], object]) -> None:
    with NoWait(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        wait(*on_device(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dual_attention_layers": (0,), "qk_norm": False},
        {"two_times": True, "guidance_embeds": True},
        {"picture_channels": 2, "level_embeds": True, "text_mask": True},
    ],
    ids=lambda x: "+".join(x) or "plain",
)
def test_a_network_built_on_the_device(options: dict[str, Any]) -> None:
    with META:
        network = plain(**options)
    z, t, condition = inputs()
    more = {
        "guidance": torch.ones(4) if network.guidance_embeds else None,
        "picture": torch.ones(4, 2, 8, 8) if network.picture_channels else None,
        "level": torch.ones(4) if network.level_embeds else None,
        "mask": torch.ones(4, 5, dtype=torch.bool) if network.text_mask else None,
    }
    condition = Condition(*(x if x is None else sent(x, META) for x in condition._replace(**more)))
    z, t = on_device(z, t)
    with NoWait():
        y = network(z, t, condition, t / 2) if network.two_times else network(z, t, condition)
        y.sum().backward()
    assert y.is_meta


OBJECTIVES = [
    lambda: Objective(),
    lambda: Objective(Cosine(), V(), weight=SechWeight(), penalty=Penalty(0.5, 0.1, decay=True)),
    lambda: Objective(EDM(), Preconditioned(), Mode(), shift=3.0),
    lambda: Objective(LDMLinear(), Epsilon(), weight=MinSNR()),
    lambda: Objective(ZeroTerminalSNR(DDPMLinear()), V(), weight=DensityWeight(Mode())),
    lambda: LearnedVariance(ImprovedCosine(), X0()),
    lambda: MeanFlow(share=0.5),
    lambda: MeanFlow(share=0.5, step=0.1),
    lambda: StepMap(k=4),
]


@pytest.mark.parametrize("made", OBJECTIVES)
def test_the_loss_of_an_objective_built_on_the_device(made: Callable[[], Objective]) -> None:
    with META:
        objective = made()
        network = plain(out_channels=3 * objective.outputs, two_times=objective.two_times)
    z, _, condition = inputs()
    bins = TimeBins()
    with NoWait():
        times, interval = objective.times(torch.rand(3, 4, dtype=torch.float64), 64)
        x0, noise, t, *told = on_device(z, z, times, condition.text, condition.pooled)
        interval = interval and Interval(*on_device(*interval))
        loss = objective.loss(network, x0, noise, t, Condition(*told), interval)
        bins.add(t, loss)
        loss.mean().backward()
    assert loss.is_meta
    assert bins.sums.is_meta
    assert objective.path(torch.tensor(0.5))[0].device.type == "cpu"  # a sampler's times stay on the host


WALKS = [
    *((Objective(path, target), word) for path, target in ((RectifiedFlow(), Velocity()), (Cosine(), V()))
      for word in ("euler", "heun", "midpoint", "dpmpp_2m", "ddim:eta=1", "sde:w=sbdm", "pc")),
    *((Objective(LDMLinear(), V()), word) for word in ("euler", "heun", "dpmpp_2m", "ddim:eta=1", "ddpm", "edm")),
    (LearnedVariance(ImprovedCosine(), Epsilon()), "ddpm:variance=learned"),
    *((Objective(EDM(), Preconditioned()), word) for word in ("edm", "edm:churn=5", "langevin:repeats=2")),
    (MeanFlow(), "meanflow"),
]  # fmt: skip


def test_every_sampler_is_tried() -> None:
    waiting = {"reference", "autoregressive"}  # once a step
    assert {word.partition(":")[0] for _, word in WALKS} == SAMPLERS.keys() - waiting


@pytest.mark.parametrize(("objective", "word"), WALKS, ids=name)
def test_a_walk_with_guidance_in_an_interval_and_known_pixels(objective: Objective, word: str) -> None:
    spacing = "karras" if isinstance(objective.path, EDM) else "trailing"
    walk, _ = Sampling(steps=6, sampler=word, spacing=spacing).walk(objective)

    def model(z: Tensor, t: Tensor, condition: Condition, *end: Tensor) -> Tensor:
        return torch.cat([linear(z, t, condition, *end)] * objective.outputs, 1)

    z, _, condition = inputs()
    z, *told = on_device(z, condition.text, condition.pooled)
    condition, null = Condition(*told), Condition(*(x[:1] for x in told))
    channels = 3 if objective.outputs == 2 else None
    guidance = ClassifierFree(model, null, 3.0, 0.7, (0.2, 0.8), channels, Weak(model, 2.0, (0.5, 0.9)))

    def denoise(z: Tensor, t: Tensor, end: Tensor | None = None) -> Any:
        return objective.denoise(guidance.at(t), z, t, condition, end)

    known: Denoiser = inpaint(denoise, z, z, z)
    reports = []
    with NoWait():
        drawn = walk(known, z, random_normals(range(4), (3, 8, 8), META), lambda *step: reports.append(step))
    assert drawn.is_meta
    assert len(reports) == 6


@pytest.mark.parametrize("objective", ["MeanFlow", "Objective"])
def test_a_training_step(tmp_path: File, objective: str) -> None:
    flags = ["--objective", f"flow.{objective.lower()}.{objective}"]
    flags += ["--network.init_args.two_times", str(objective == "MeanFlow").lower()]
    parser = experiment.parser("")
    config = parser.parse_args(["--config", str(small(tmp_path)), *flags])
    _, generator, data = train.build(parser.instantiate(config), None)
    generator.to(META)
    generator.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    batch = next(iter(data.train_dataloader())).to(META)
    with NoWait():
        generator.training_step(data.on_after_batch_transfer(batch, 0)).backward()
    assert generator.losses.is_meta
