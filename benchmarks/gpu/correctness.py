"""What must be equal on a GPU and on a CPU, and what must not happen: each check gives a number and its bound.

`tests/test_gpu.py` runs the same checks.
"""

import copy
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from data.latents import Pixels
from data.module import Digits
from data.text.clip import CLIPText
from engine.checkpoint import Checkpoints
from engine.ema import EMA, Averages
from engine.guard import Guard
from engine.strategy import Strategy, skeleton
from flow.guidance import ClassifierFree
from flow.meanflow import MeanFlow
from flow.objective import Interval, Objective
from flow.path import EDM, Cosine, LDMLinear, RectifiedFlow
from flow.target import Preconditioned, V, Velocity
from mmdit.model import Condition, MMDiT
from pipeline.sampling import Sampling, random_normals
from training.build import build
from training.generator import Generator, Grid
from training.optimization import Optimization
from training.run_folder import Run

ROOT = Path(__file__).parents[2]
STEPS, STOP = 24, 11  # of the trainings; the step at which one is stopped


class Check(NamedTuple):
    """A number that may be at most a bound, with a word on what it means."""

    what: str
    found: float
    most: float
    note: str = ""


def relative(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖, in float64 on the host."""
    a, b = (x.detach().cpu().double() for x in (one, other))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def network(**more: Any) -> MMDiT:
    """A small network with every weight random, so that nothing is hidden behind a zero gate."""
    sizes: dict[str, Any] = {"in_channels": 4, "depth": 3, "width": 128, "heads": 2, "text_dim": 32, "pooled_dim": 32}
    torch.manual_seed(0)
    built = MMDiT(**sizes, sample_size=16, pos_embed_max_size=16, **more)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.05)
    return built


def inputs(device: torch.device) -> tuple[Tensor, Tensor, Condition]:
    """z, t and a condition of four pictures: the same numbers on every device."""
    draw = torch.Generator().manual_seed(1)
    z, text, pooled = (torch.randn(shape, generator=draw) for shape in ((4, 4, 16, 16), (4, 7, 32), (4, 32)))
    t = torch.tensor([0.1, 0.4, 0.7, 0.95])
    return z.to(device), t.to(device), Condition(text.to(device), pooled.to(device))


def passes(model: nn.Module, device: torch.device, mixed: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a network and the gradients of its mean square."""
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        y = model(*inputs(device))
    y.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y, {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in gradients.items()}


def compared(
    name: str, found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]],
    most: float, most_gradient: float,
) -> list[Check]:  # fmt: skip
    """The output's error, and the largest error of a gradient."""
    worst = max(wanted[1], key=lambda key: relative(found[1][key], wanted[1][key]))
    error = relative(found[1][worst], wanted[1][worst])
    return [
        Check(f"{name}: output", relative(found[0], wanted[0]), most),
        Check(f"{name}: every gradient", error, most_gradient, f"the largest is that of {worst}"),
    ]


def forward_and_gradients(device: torch.device) -> list[Check]:
    """The network in float32 and under bfloat16 autocast against itself in float32 on the CPU."""
    checks = []
    for name, more in (("MMDiT", {}), ("MMDiT-X", {"dual_attention_layers": (0,)})):
        wanted = passes(network(**more), torch.device("cpu"))
        there = network(**more).to(device)
        checks += compared(f"{name}, float32", passes(there, device), wanted, 1e-5, 1e-4)
        checks += compared(f"{name}, bfloat16", passes(there, device, mixed=True), wanted, 3e-2, 1e-1)
    return checks


def rewritten(device: torch.device) -> list[Check]:
    """Activation checkpointing and compilation against plain execution, on the device."""
    wanted = passes(network().to(device), device)
    ways: dict[str, dict[str, Any]] = {
        "checkpointing full": {"activation_checkpointing": "full"},
        "checkpointing selective": {"activation_checkpointing": "selective"},
        "compiled": {"compile": True},
        "compiled, checkpointing selective": {"compile": True, "activation_checkpointing": "selective"},
    }
    checks = []
    for name, way in ways.items():
        if device.type == "cpu" and "compile" in way:
            continue  # takes minutes there
        there = network().to(device)
        Strategy(**way).prepare(there)
        checks += compared(name, passes(there, device), wanted, 1e-5, 1e-4)
    return checks


def sharded(device: torch.device) -> list[Check]:
    """FSDP2 in a world of one process, under NCCL on a GPU, against the plain network."""
    wanted = passes(network().to(device), device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        strategy, there = Strategy("fsdp2"), network().to(device)
        strategy.shard(there, strategy.mesh(device, 1), torch.float32)
        return compared(f"FSDP2 under {backend}, one process", passes(there, device), wanted, 1e-5, 1e-4)
    finally:
        dist.destroy_process_group()


def samplers(device: torch.device) -> list[Check]:
    """Every sampler with guidance, on the device against the CPU: same noise, same model."""
    walks = [
        *((Objective(RectifiedFlow(), Velocity()), word) for word in ("euler", "heun", "midpoint", "dpmpp_2m")),
        *((Objective(Cosine(), V()), word) for word in ("euler", "dpmpp_2m", "ddim:eta=1")),
        *((Objective(LDMLinear(), V()), word) for word in ("ddpm", "ddim:eta=1", "edm")),
        (Objective(RectifiedFlow(), Velocity()), "reference"),
        (Objective(EDM(), Preconditioned()), "edm:churn=5"),
        (Objective(EDM(), Preconditioned()), "langevin:repeats=2"),
        (MeanFlow(), "meanflow"),
    ]
    return [
        Check(
            f"sampler {word}, {type(objective.path).__name__}",
            relative(walked(objective, word, device), walked(objective, word, torch.device("cpu"))),
            1e-3 if word.startswith("langevin") else 1e-4,
        )
        for objective, word in walks
    ]


def walked(objective: Objective, word: str, device: torch.device) -> Tensor:
    """Pictures of a small smooth model, by a sampler with guidance in an interval."""
    z, _, condition = inputs(device)
    spacing = "karras" if isinstance(objective.path, EDM) else "trailing"
    walk, times = Sampling(steps=6, sampler=word, spacing=spacing).walk(objective)

    def model(z: Tensor, t: Tensor, condition: Condition, *end: Tensor) -> Tensor:
        bias = condition.pooled.mean(1) + t
        return 0.5 * torch.tanh(z + bias[:, None, None, None])

    null = Condition(*(torch.zeros_like(x[:1]) for x in (condition.text, condition.pooled)))
    guidance = ClassifierFree(model, null, 2.0, 0.5, (0.2, 0.8))

    def denoise(z: Tensor, t: Tensor, end: Tensor | None = None) -> Any:
        return objective.denoise(guidance.at(t), z, t, condition, end)

    scale = (objective.path(times[0])[1]).float().to(device)
    return walk(denoise, scale * z, random_normals(range(4), (4, 16, 16), device), None)


def average_velocity(device: torch.device) -> list[Check]:
    """MeanFlow's loss and gradients, which need a forward-mode derivative of the network."""

    def losses(device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        there = network(two_times=True).to(device)
        z, t, condition = inputs(device)
        interval = Interval(*(x.to(device) for x in Interval.between((t * torch.tensor([1, 0.5, 0, 0.2]).to(t)), t)))
        loss = MeanFlow(share=0.5).loss(there, z, z.flip(0), t, condition, interval)
        loss.mean().backward()
        return loss, {name: p.grad for name, p in there.named_parameters() if p.grad is not None}

    return compared("MeanFlow", losses(device), losses(torch.device("cpu")), 1e-4, 1e-3)


def skipped_step(device: torch.device) -> list[Check]:
    """The guard lets the fused AdamW skip a step whose gradient is not finite, without asking the device."""
    there, guard = network().to(device), Guard().to(device)
    optimizer = torch.optim.AdamW(there.parameters(), lr=1e-2, fused=True)
    before, moved = copy.deepcopy(there.state_dict()), []
    for spoiled in (True, False):
        passes(there, device)
        gradient = there.patch.weight.grad
        assert gradient is not None
        if spoiled:
            gradient[0, 0] = float("nan")
        norm = nn.utils.clip_grad_norm_(there.parameters(), 1.0)
        optimizer.found_inf = guard.check(norm)  # type: ignore[attr-defined]
        optimizer.step()
        state = there.state_dict()
        moved.append(max(float((state[name] - before[name]).abs().max()) for name, _ in there.named_parameters()))
    return [
        Check("a step with a NaN gradient: largest change of a weight", moved[0], 0.0),
        Check("the next step: changes no weight", float(not moved[1] > 0), 0.0),
        Check("skipped steps, off by", abs(guard.skipped_steps()[1] - 1), 0.0),
    ]


def averages(device: torch.device) -> list[Check]:
    """Three updates of two averages against the CPU's."""

    def updated(device: torch.device) -> dict[str, Tensor]:
        there = network().to(device)
        copies = [skeleton(there).to_empty(device=device) for _ in range(2)]
        ema = EMA(Averages(0.9, (0.5,)), copies, there)
        for step in range(1, 4):
            with torch.no_grad():
                for parameter in there.parameters():
                    parameter.mul_(1.1)
            ema.update(there, step)
        return ema.named()

    found, wanted = updated(device), updated(torch.device("cpu"))
    return [Check("averages after three updates", max(relative(found[name], wanted[name]) for name in wanted), 1e-6)]


def saved(device: torch.device) -> list[Check]:
    """A checkpoint of tensors on the device, written and read back."""
    state = {name: x.clone() for name, x in network().to(device).state_dict().items()}
    state["counter"] = torch.tensor(3.0, device=device)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(1, state, {"best": 1.0})
        wanted = {name: x.clone() for name, x in state.items()}
        for tensor in state.values():
            tensor.zero_()  # the save holds a copy of its own
        checkpoints.wait()
        found = checkpoints.find()
        assert found
        found.restore(state)
    unequal = sum(not torch.equal(state[name], wanted[name]) for name in state)
    return [Check("tensors of a checkpoint that come back otherwise", unequal, 0)]


# Trainings of the digits, by the trainer of `train.py fit`


def experiment(folder: Path, device: torch.device, workers: int = 0) -> tuple[L.Trainer, Generator, Digits]:
    """A short training on the digits, without a config file."""
    L.seed_everything(0, verbose=False)
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = {"in_channels": 1, "depth": 2, "width": 64, "heads": 2, "text_dim": 64, "pooled_dim": 64}
    sections = SimpleNamespace(
        run=Run(folder, 0, STEPS, STEPS, STEPS, 8, accelerator="gpu" if device.type == "cuda" else "cpu"),
        network=MMDiT(**sizes, sample_size=8, pos_embed_max_size=8),
        text=CLIPText(ROOT / "assets/digits/text"),
        codec=Pixels(1, 0.3, 2.66),
        objective=Objective(),
        data=lambda text, codec, seed: Digits(text, codec, seed, batch_size=16, workers=workers),
        strategy=Strategy(),
        sampling=Sampling(steps=2, guidance=1.0),
        optimization=Optimization(lr=1e-3, warmup=4),
        ema=Averages(0.9),
        grid=Grid(),
        lora=None,
        new_words=None,
        teacher=None,
        judgement=None,
        residual=None,
        terms=(),
    )
    trainer, generator, data = build(sections, None)  # type: ignore[arg-type]
    return trainer, generator, data  # type: ignore[return-value]


class At(Callback):
    """Calls a function at the start of some steps."""

    def __init__(self, what: dict[int, Callable[[], None]]) -> None:
        self.what = what

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.what.get(trainer.global_step, lambda: None)()


def fitted(folder: Path, device: torch.device, at: dict[int, Callable[[], None]], workers: int = 0) -> Generator:
    trainer, generator, data = experiment(folder, device, workers)
    trainer.callbacks.insert(0, At(at))  # type: ignore[attr-defined]
    trainer.fit(generator, data)
    return generator


def stopped_and_resumed(device: torch.device) -> list[Check]:
    """SIGTERM in the middle of a training, and the rest of it, against one that was not stopped."""
    with tempfile.TemporaryDirectory() as place:
        straight, halves = (Path(place) / name for name in ("straight", "halves"))
        wanted = fitted(straight, device, {}).network.state_dict()
        status = 0
        try:
            fitted(halves, device, {STOP: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        except SystemExit as end:
            status = int(end.code or 0)
        newest = Checkpoints(halves / "checkpoints").newest()
        found = fitted(halves, device, {}).network.state_dict()
    error = max(relative(found[name], wanted[name]) for name in wanted)
    equal = all(torch.equal(found[name], wanted[name]) for name in wanted)
    return [
        Check("a training that gets SIGTERM: exit status, off 143 by", abs(status - 143), 0),
        Check("its checkpoint: steps after the signal", abs((newest.step if newest else 0) - STOP), 1),
        Check("the resumed training's weights", error, 1e-5, "equal to the bit" if equal else "not equal to the bit"),
    ]


def hidden_waits(device: torch.device) -> list[Check]:
    """The places where the host waits for the device between two lines of the log. There should be none."""
    places: dict[str, int] = {}

    def note(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)]
        own = [f for f in frames if Path(__file__).parent not in Path(f.filename).parents]
        place = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else f"{filename}:{lineno}"
        places[place] = places.get(place, 0) + 1

    def watch(mode: str) -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        fitted(Path(place), device, {10: lambda: watch("warn"), 15: lambda: watch("default")})
    listed = ", ".join(f"{place}, {count} times" for place, count in places.items())
    return [Check("places that wait for the device, in five steps", len(places), 0, listed)]


def pinned_loading(device: torch.device) -> list[Check]:
    """Batches from two loader processes, in pinned memory, arrive as they were sent."""
    with tempfile.TemporaryDirectory() as place:
        batches = []
        for workers in (0, 2):
            data = experiment(Path(place) / str(workers), device, workers)[2]
            batches.append([batch for batch, _ in zip(data.train_dataloader(), range(3), strict=False)])
        moved = [batch.to(device) for batch in batches[1]]
        unequal = sum(
            not torch.equal(sent.cpu(), kept)
            for one, other in zip(moved, batches[0], strict=True)
            for sent, kept in zip(one[2:6], other[2:6], strict=True)
        )
        loose = sum(not batch.x0.is_pinned() for batch in batches[1]) if device.type == "cuda" else 0
    return [Check("tensors that arrive otherwise", unequal, 0), Check("batches that are not pinned", loose, 0)]


CHECKS: dict[str, Callable[[torch.device], list[Check]]] = {
    f.__name__: f
    for f in (
        forward_and_gradients, samplers, average_velocity, skipped_step, averages, saved, sharded, stopped_and_resumed,
        hidden_waits, pinned_loading, rewritten,
    )
}  # fmt: skip
