"""How much arithmetic a network is, what devices can do, and whether a training's speed is told as it was."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from engine.flops import forward_flops, training_flops
from engine.hardware import DEVICES, find
from engine.log import JSONLinesLogger
from engine.meter import Cost, Meter, peak, peak_memory
from mmdit.model import Condition, MMDiT

# ---- arithmetic


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def mmdit_flops(side: tuple[int, int], tokens: int, batch: int, dual: tuple[int, ...], **sizes: int) -> int:
    """An MMDiT's products, written out: latents of a size in patches, text of so many tokens."""
    width, depth, patch = sizes["width"], sizes["depth"], 4 * sizes["in_channels"]
    image, text = batch * side[0] * side[1], batch * tokens
    joint = side[0] * side[1] + tokens
    flops = linear(image, patch, width) + linear(text, sizes["text_dim"], width) + linear(image, width, patch)
    flops += linear(batch, 256, width) + linear(batch, sizes["pooled_dim"], width) + 2 * linear(batch, width, width)
    flops += linear(batch, width, 2 * width)
    for block in range(depth):
        last = block == depth - 1
        asking = image if last else image + text
        flops += linear(batch, width, ((9 if block in dual else 6) + (2 if last else 6)) * width)
        flops += linear(image + text, width, 3 * width) + linear(asking, width, width)
        flops += 2 * linear(asking, width, 4 * width) + 2 * linear(asking, joint, width)  # QKᵀ and its product with V
        if block in dual:
            flops += linear(image, width, 3 * width) + linear(image, width, width)
            flops += 2 * linear(image, side[0] * side[1], width)
    return flops


def inputs(network: MMDiT, batch: int, height: int, width: int, tokens: int) -> tuple[Tensor, Tensor, Condition]:
    z = torch.zeros(batch, network.in_channels, height, width)
    condition = Condition(torch.zeros(batch, tokens, network.text_dim), torch.zeros(batch, network.pooled_dim))
    return z, torch.zeros(batch), condition


@pytest.mark.parametrize("masked", [False, True])
def test_flops_are_those_of_a_closed_form(masked: bool) -> None:
    sizes = {"in_channels": 4, "depth": 3, "width": 40, "text_dim": 20, "pooled_dim": 12}
    network = MMDiT(**sizes, heads=4, sample_size=16, pos_embed_max_size=16, dual_attention_layers=(1,))
    before = {name: x.clone() for name, x in network.state_dict().items()}
    z, t, condition = inputs(network, 3, 8, 12, 7)
    if masked:
        condition = condition._replace(mask=torch.arange(7).expand(3, 7) < 5)
    assert forward_flops(network, z, t, condition) == mmdit_flops((4, 6), 7, 3, (1,), **sizes)
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


@pytest.mark.parametrize(("side", "told"), [(256, 0.579e12), (512, 1.80e12), (1024, 8.44e12)])
def test_flops_of_sd3_medium(side: int, told: float) -> None:
    """On a device without memory; the figures are those of the released model with 154 tokens of text."""
    with torch.device("meta"):
        network = MMDiT(depth=24, qk_norm=False)
        given = inputs(network, 1, side // 8, side // 8, 154)
    assert forward_flops(network, *given) == pytest.approx(told, rel=0.005)


def test_flops_see_through_compiled_blocks_and_checkpoints_of_activations() -> None:
    block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    block.compile()

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    assert forward_flops(Network(), torch.zeros(5, 8)) == 2 * linear(5, 8, 16)


def test_flops_of_inputs_in_dataclasses_and_of_convolutions() -> None:
    @dataclasses.dataclass(frozen=True)
    class Given:
        x: Tensor
        rest: None = None

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)

        def forward(self, given: Given) -> Tensor:
            assert given.rest is None
            return self.conv(given.x)

    assert forward_flops(Network(), Given(torch.zeros(2, 3, 8, 8))) == 2 * 2 * 64 * 6 * 3 * 9


def test_a_backward_pass_takes_what_the_weights_that_learn_need() -> None:
    """In units of one of three equal layers: each weight that learns is one, and each input behind one that learns."""
    network, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.zeros(5, 8)
    unit = linear(5, 8, 8)
    assert training_flops(network, x) == (3 + 3 + 2) * unit
    with torch.no_grad():
        assert training_flops(network, x) == (3 + 3 + 2) * unit  # wherever it is called
    assert training_flops(network, x.clone().requires_grad_()) == (3 + 3 + 3) * unit
    network[0].requires_grad_(False)
    assert training_flops(network, x) == (3 + 2 + 1) * unit
    network.requires_grad_(False)
    assert training_flops(network, x) == forward_flops(network, x) == 3 * unit
    assert all(weight.grad is None for weight in network.parameters())


# ---- devices


def test_devices_are_found_by_what_the_driver_calls_them() -> None:
    assert find("NVIDIA H200") is DEVICES["h200"]
    assert find("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert find("NVIDIA A100-SXM4-80GB") is find("A100-SXM4-80GB") is DEVICES["a100-80gb"]
    assert find("NVIDIA A100-SXM4-40GB") is DEVICES["a100-40gb"]
    assert find("NVIDIA L40S") is DEVICES["l40s"]
    assert find("NVIDIA GeForce RTX 4090") is DEVICES["rtx4090"]
    assert find("NVIDIA B200") is DEVICES["b200"]


@pytest.mark.parametrize(
    "other",
    ["NVIDIA GH200 480GB", "NVIDIA H200 NVL", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4", ""],
)  # fmt: skip
def test_a_slower_relative_is_not_taken_for_a_known_device(other: str) -> None:
    assert find(other) is None


@pytest.mark.parametrize("key", DEVICES)
def test_figures_of_devices_are_dense_and_in_the_same_units(key: str) -> None:
    d = DEVICES[key]
    assert 2 <= d.bf16 / d.fp32 <= 32
    assert 60 <= d.bf16 / d.bandwidth <= 450  # FLOPs for each byte that is read
    assert d.memory < d.bandwidth < d.bf16
    assert d.network <= d.link < d.bandwidth
    assert d.peak("bf16-mixed") == d.bf16
    assert d.peak("32-true") == d.fp32
    with pytest.raises(ValueError, match="precision must be one of"):
        d.peak("fp4")


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert peak(torch.device("cpu"), "32-true") is None


@pytest.mark.parametrize(("mode", "known"), [("highest", True), ("high", False)])
def test_tf32_has_another_peak_than_float32(monkeypatch: pytest.MonkeyPatch, mode: str, known: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: mode)
    assert peak(torch.device("cuda"), "bf16-mixed") == DEVICES["h200"].bf16
    assert (peak(torch.device("cuda"), "32-true") == DEVICES["h200"].fp32) is known


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells what is resident now, on Linux")
def test_peak_memory_is_of_this_process() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert 0.95 * resident <= peak_memory(torch.device("cpu")) < resident + 4e9


# ---- speed

IMAGES, TOKENS, FLOPS = 4, 70, 3_000_000_000


class Seconds(NamedTuple):
    """What is slept at each place, in seconds."""

    fetch: float = 0.0
    step: float = 0.0
    validation: float = 0.0
    save: float = 0.0
    cost: float = 0.0


class Pictures(Dataset):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> Tensor:
        sleep(self.seconds)
        return torch.ones(IMAGES, 2)


class Late(Sampler):
    """Stands for a loader that takes its time to begin."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        sleep(self.seconds)
        return iter(range(len(self)))


class Tiny(L.LightningModule):
    def __init__(self, sleeps: Seconds, log_every: int) -> None:
        super().__init__()
        self.sleeps, self.log_every, self.linear = sleeps, log_every, nn.Linear(2, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        sleep(self.sleeps.step)
        loss = self.linear(batch).square().mean()
        if (self.global_step + 1) % self.log_every == 0:
            self.log("step", self.global_step + 1.0)
            self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: Tensor) -> None:
        sleep(self.sleeps.validation)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        sleep(self.sleeps.save)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Pictures(self.sleeps.fetch), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Pictures(0.0), batch_size=None, sampler=Late(self.sleeps.validation))


class Save(L.Callback):
    """Saves within a step's last hook, before or after the meter hears of it, and times the training as a whole."""

    def __init__(self, file: Path, every: int) -> None:
        self.file, self.every = file, every

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.began = perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.took = perf_counter() - self.began
        if self.every and trainer.global_step % self.every == 0:
            next(callback for callback in trainer.callbacks if isinstance(callback, Meter)).pause()
            trainer.save_checkpoint(self.file)


def train(
    folder: Path,
    sleeps: Seconds,
    steps: int,
    log_every: int,
    save_every: int = 0,
    save_first: bool = False,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[list[dict[str, float]], L.Trainer, Save]:
    """The lines of the log that tell speed, the trainer, and the callback that saved."""

    def cost(batch: Tensor) -> Cost:
        sleep(sleeps.cost)
        return Cost(len(batch), TOKENS, FLOPS)

    meter, save = Meter(log_every, cost, "32-true"), Save(folder / "last.ckpt", save_every)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=[JSONLinesLogger(folder / "log.jsonl")],
        log_every_n_steps=log_every, callbacks=[save, meter] if save_first else [meter, save], num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        limit_val_batches=1, check_val_every_n_epoch=None, **{"val_check_interval": 1000} | options,
    )  # fmt: skip
    trainer.fit(Tiny(sleeps, log_every), ckpt_path=ckpt_path, weights_only=True)
    return read(folder), trainer, save


def read(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "perf/step_s" in line]


def test_one_line_holds_loss_and_speed(tmp_path: Path) -> None:
    lines, trainer, save = train(tmp_path, Seconds(step=0.02), steps=9, log_every=3)
    assert [line["step"] for line in lines] == [3, 6, 9]
    assert sum(3 * line["perf/step_s"] for line in lines) == pytest.approx(save.took, rel=0.4)
    for line in lines:
        step = line["perf/step_s"]
        assert step >= 0.02
        assert "train/loss" in line
        assert "perf/mfu" not in line
        assert line["perf/images_per_s"] == pytest.approx(IMAGES / step)
        assert line["perf/tokens_per_s"] == pytest.approx(TOKENS / step)
        assert line["perf/tflops_per_s"] == pytest.approx(FLOPS / 1e12 / step)
        assert 0 < line["perf/memory_gb"] <= peak_memory(torch.device("cpu")) / 1e9 + 1e-6
    assert type(trainer.profiler).__name__ == "PassThroughProfiler"  # as it was


@pytest.mark.parametrize(("fetch", "step"), [(0.06, 0.02), (0.02, 0.06)])
def test_waiting_for_data_is_reported(tmp_path: Path, fetch: float, step: float) -> None:
    line = train(tmp_path, Seconds(fetch=fetch, step=step), steps=8, log_every=4)[0][1]
    assert line["perf/data_wait"] == pytest.approx(fetch / (fetch + step), abs=0.15)
    assert fetch + step <= line["perf/step_s"] < 2 * (fetch + step)


@pytest.mark.parametrize("options", [{"val_check_interval": 2}, {"save_every": 2}, {"save_every": 2, "save_first": 1}])
def test_validations_and_saves_are_neither_training_nor_waiting(tmp_path: Path, options: dict) -> None:
    """In the middle of a window, and right after a line."""
    sleeps = Seconds(fetch=0.01, step=0.03, validation=0.25, save=0.4)
    for line in train(tmp_path, sleeps, steps=8, log_every=4, **options)[0]:
        assert 0.04 <= line["perf/step_s"] < 0.12  # with them, it would be at least 0.16 somewhere
        assert 0.08 < line["perf/data_wait"] < 0.5  # with them, 0.05 or 0.8


def test_the_time_of_a_pause_is_left_out(tmp_path: Path) -> None:
    lines, _, save = train(tmp_path, Seconds(step=0.02, save=0.2), steps=4, log_every=4, save_every=2)
    assert 4 * 0.02 <= 4 * lines[0]["perf/step_s"] <= save.took - 0.2  # the save after the end is not there


def test_counting_costs_nothing(tmp_path: Path) -> None:
    line = train(tmp_path, Seconds(step=0.02, cost=0.1), steps=4, log_every=2)[0][1]
    assert line["perf/step_s"] < 0.05


def test_a_window_counts_optimizer_steps(tmp_path: Path) -> None:
    lines = train(tmp_path, Seconds(step=0.01), steps=4, log_every=2, accumulate_grad_batches=3)[0]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["perf/step_s"] >= 0.03
        assert line["perf/images_per_s"] * line["perf/step_s"] == pytest.approx(3 * IMAGES)
        assert line["perf/tflops_per_s"] * line["perf/step_s"] == pytest.approx(3 * FLOPS / 1e12)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_resumed_run_counts_the_steps_that_it_did(tmp_path: Path) -> None:
    train(tmp_path, Seconds(step=0.01), steps=5, log_every=4, save_every=5)
    line = train(tmp_path, Seconds(step=0.01), steps=8, log_every=4, ckpt_path=tmp_path / "last.ckpt")[0][-1]
    assert line["step"] == 8
    assert line["perf/images_per_s"] * line["perf/step_s"] == pytest.approx(IMAGES)  # a step's, of three


def test_steps_between_lines_must_be_some() -> None:
    with pytest.raises(ValueError, match="log_every must be at least 1"):
        Meter(0, lambda batch: Cost(1, 1, 1), "32-true")


TWO = """
import sys
from collections.abc import Iterator
from pathlib import Path
from time import sleep
import lightning as L, torch
from torch.utils.data import DataLoader
from engine import meter
from engine.log import JSONLinesLogger
from engine.meter import Cost, Meter

meter.peak = lambda device, precision: 1e12

class Rank(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
    def on_train_start(self):
        self.held = b"x" * (300_000_000 * self.global_rank)
    def fetch(self, samples):
        sleep(0.1 * self.global_rank)
        return samples[0]
    def train_dataloader(self):
        return DataLoader(torch.ones(100, 2), collate_fn=self.fetch)
    def training_step(self, x):
        return self.linear(x).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def cost(batch):
    rank = torch.distributed.get_rank()
    return Cost(1 + 10 * rank, 100 + 7 * rank, 3_000_000_000)

folder = Path(sys.argv[1])
L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp_fork", max_steps=6, logger=[JSONLinesLogger(folder / "log.jsonl")],
    log_every_n_steps=3, callbacks=[Meter(3, cost, "32-true")], limit_val_batches=0, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False,
).fit(Rank())
"""


def test_two_processes_are_one_job(tmp_path: Path) -> None:
    """Sums of what they do, means of their times, the most of their memory. Only one of them waits, for data."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TWO, tmp_path], env=environment, capture_output=True, text=True)
    assert (tmp_path / "log.jsonl").exists(), done.stderr
    line = read(tmp_path)[1]
    step = line["perf/step_s"]
    assert step >= 0.1
    assert line["perf/images_per_s"] * step == pytest.approx(1 + 11)
    assert line["perf/tokens_per_s"] * step == pytest.approx(100 + 107)
    assert line["perf/tflops_per_s"] * step == pytest.approx(2 * FLOPS / 1e12)
    assert line["perf/mfu"] == pytest.approx(line["perf/tflops_per_s"] / 2)  # of two devices of 1 TFLOP/s
    assert 0.05 <= line["perf/data_wait"] * step < 0.09  # one waits 0.1 seconds a step, the other hardly at all
    assert line["perf/memory_gb"] > 0.6  # the second one's: 0.3 of its own on top of what both have loaded
