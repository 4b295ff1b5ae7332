"""The planner: its closed forms against autograd's own books, its rules of sharing out, its presets and its faults."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import footprint_check as check
from benchmarks.footprint import Job, activation_bytes, collective, communication, fastest_fit, flops, memory, step
from benchmarks.plan import arguments, job_of, main, shape_of
from engine.hardware import DEVICES
from engine.strategy import Strategy
from mmdit.lora import LoRA
from mmdit.model import MMDiT

ROOT = Path(__file__).parents[1]
H200 = DEVICES["h200"]
SIZE = (4, 16, 24)  # pictures, side of the latent, text tokens
DUAL = {"dual_attention_layers": (0, 1)}


def meta(**arguments_: object) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(**arguments_)  # type: ignore[arg-type]


def planned(network: MMDiT, gpus: int = 8, batch: int = 512, mixed: bool = True, **strategy: object) -> Job:
    return Job(network, H200, gpus, 8, batch, (32, 32), 154, Strategy(**strategy), mixed, averages=1)  # type: ignore[arg-type]


def preset(depth: int, *flags: str) -> Job:
    return job_of(arguments().parse_args(["--config", str(ROOT / f"configs/sd3/d{depth}.yaml"), *flags]))


@pytest.fixture(scope="module")
def medium() -> MMDiT:
    return meta(depth=24, qk_norm=False)


@pytest.fixture(scope="module")
def forward(medium: MMDiT) -> list[int]:
    return flops(planned(medium))


# ---- memory


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("keep", ["none", "full"])
@pytest.mark.parametrize("shape", [{}, {"qk_norm": False}, DUAL], ids=["norms", "bare", "dual"])
def test_activations_are_what_autograd_keeps(shape: dict, keep: str, mixed: bool) -> None:
    network = MMDiT(depth=3, width=128, text_dim=64, pooled_dim=64, sample_size=16, pos_embed_max_size=8, **shape)
    wanted = SIZE[0] * sum(activation_bytes(check.job(network, *SIZE, mixed, keep, H200, cuda=False)))
    Strategy(activation_checkpointing=keep).prepare(network)
    assert wanted == pytest.approx(check.kept_bytes(network, *SIZE, mixed), rel=0.03)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch does not know CUDA's rules")
@pytest.mark.parametrize("shape", [{}, {"dual_attention_layers": tuple(range(3))}], ids=["d6", "dual"])
def test_activations_are_what_autograd_would_keep_on_cuda(shape: dict) -> None:
    network = meta(depth=6, **shape)
    wanted = 4 * sum(activation_bytes(check.job(network, 4, 32, 154, True, "none", H200, cuda=True)))
    found = check.kept_on_cuda(lambda: MMDiT(depth=6, **shape), 4, 32, 154, True, "none")
    assert wanted == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("keep", ["none", "selective", "full"])
def test_peak_of_a_step(keep: str, mixed: bool) -> None:
    network = check.small(3, 128)
    wanted = check.predicted_peak(network, 4, 32, 40, mixed, keep)
    Strategy(activation_checkpointing=keep).prepare(network)  # type: ignore[arg-type]
    assert wanted == pytest.approx(check.peak_bytes(network, 4, 32, 40, mixed), rel=0.1)


@pytest.mark.parametrize(("kind", "most"), [("none", 2.3), ("int8", 1.3), ("nf4", 0.9)])
def test_a_lora_training_holds_the_frozen_weights_once(kind: str, most: float) -> None:
    """Beside 28 bytes for each of its own: weight, gradient, two moments, average."""
    network = MMDiT(depth=3, width=256, text_dim=64, pooled_dim=64, sample_size=16, pos_embed_max_size=8)
    updates = LoRA(rank=4, quantize=kind)  # type: ignore[arg-type]
    count, needed = sum(p.numel() for p in network.parameters()), memory(check.lora_job(network, updates, *SIZE))
    held, peak = check.lora_bytes(network, updates, *SIZE)
    wanted = needed.parameters + needed.positions + needed.gradients + needed.optimizer + needed.averages
    assert held == pytest.approx(wanted, rel=0.02)
    assert held / count < most
    beyond = needed.copies + needed.activations + needed.recomputed + needed.workspace + needed.decoded
    assert peak < beyond < 2.5 * peak  # an upper bound


def test_flags_of_a_lora_training_reach_the_plan() -> None:
    files = ("sd3/finetune", "sd3/lora-24gb", "network/sd3-medium")
    flags = [word for file in files for word in ("--config", str(ROOT / f"configs/{file}.yaml"))]
    job = job_of(arguments().parse_args([*flags, "--lora.rank", "8", "--frozen", "float32"]))
    assert job.lora == LoRA(rank=8, quantize="int8")
    assert (job.frozen, job.batch, job.trained) == (4, 1, 8 * 24 * 2 * (4 + 2) * 1536 - 8 * 2 * 1536)
    small = memory(job_of(arguments().parse_args(flags)))
    assert small.total < memory(job_of(arguments().parse_args([*flags, "--lora.quantize", "none"]))).total
    assert small.total < 8e9


def test_weights_of_one_gpu(medium: MMDiT) -> None:
    """16 bytes a parameter and 4 for the average, whole or divided, and autocast's copies only where they are whole."""
    count = sum(p.numel() for p in medium.parameters())
    whole, parts = memory(planned(medium)), memory(planned(medium, kind="fsdp2"))
    held = [m.parameters + m.gradients + m.optimizer + m.averages for m in (whole, parts)]
    assert held == [20 * count, 20 * count / 8]
    assert (whole.copies, parts.copies) == (2 * count, 0)
    assert whole.gathered == 0 < parts.gathered < 2 * count
    replicas = memory(planned(medium, gpus=64, batch=4096, kind="fsdp2", replicas=8))
    assert replicas.parameters == parts.parameters


def test_checkpointing_keeps_less_and_takes_longer(medium: MMDiT, forward: list[int]) -> None:
    kept, times = [], []
    for keep, every in (("none", 1), ("selective", 1), ("full", 2), ("full", 1)):
        job = planned(medium, activation_checkpointing=keep, activation_checkpointing_every=every)
        kept.append(memory(job).total)
        times.append(step(job, forward))
    assert kept[0] > kept[1] > kept[3]
    assert kept[0] > kept[2] > kept[3]
    assert times[0].total < times[1].total < times[3].total
    assert times[2].recomputation == pytest.approx(times[3].recomputation / 2)
    assert times[3].mfu * times[3].total == pytest.approx(times[0].mfu * times[0].total)  # recomputing is no use


# ---- arithmetic and communication


@pytest.mark.parametrize(("side", "tera"), [(256, 0.579), (512, 1.80), (1024, 8.44)])
def test_flops_of_sd3_medium(medium: MMDiT, side: int, tera: float) -> None:
    job = replace(planned(medium), latent=(side // 8, side // 8))
    assert flops(job)[0].forward / 1e12 == pytest.approx(tera, rel=0.005)


def test_what_is_sent(medium: MMDiT) -> None:
    """All-gathers of bfloat16 and a reduction of float32: (2 + 2 + 4)·P·(n − 1)/n; DDP's all-reduce 2·4·P·(n − 1)/n."""
    count = sum(p.numel() for p in medium.parameters())
    sent = {
        name: sum(t.bytes for t in communication(planned(medium, 64, 4096, **strategy)).values())
        for name, strategy in {
            "ddp": {},
            "fsdp2": {"kind": "fsdp2"},
            "twice": {"kind": "fsdp2", "accumulate_grad_batches": 2},
            "hsdp": {"kind": "fsdp2", "replicas": 8},
        }.items()
    }
    assert sent["ddp"] == pytest.approx(8 * count * 63 / 64)
    assert sent["fsdp2"] == pytest.approx(8 * count * 63 / 64)
    assert sent["twice"] == pytest.approx(2 * sent["fsdp2"])
    assert sent["hsdp"] == pytest.approx(8 * count * 7 / 8 + 8 * count / 8 * 7 / 8)
    assert communication(planned(medium, 1)) == {}


def test_links_between_machines_are_shared(medium: MMDiT) -> None:
    """What a machine needs comes in once, over the network cards of all its members; inside it, over faster links."""
    job = planned(medium, 64, 4096)
    size = 64e9
    one = collective(job, size, 8, 8).seconds
    many = collective(job, size, 64, 8).seconds
    alone = collective(job, size, 8, 1).seconds
    assert one == pytest.approx(size * 7 / 8 / (0.8 * H200.link), rel=0.01)
    assert many == pytest.approx(size * 7 / 8 / (8 * 0.8 * H200.network), rel=0.01)
    assert alone == pytest.approx(8 * many, rel=0.01)


def test_time_is_bounded_by_its_parts(medium: MMDiT, forward: list[int]) -> None:
    for gpus in (1, 8, 1024):
        taken = step(planned(medium, gpus, 4096, kind="fsdp2"), forward)
        busy = sum(t.seconds for t in taken.communication.values())
        assert 0 <= taken.exposed <= busy
        assert taken.total >= 3 * taken.flops * 4096 / gpus / (H200.bf16 / 2)
        assert 0 < taken.mfu < 0.5
        assert taken.images_per_second == pytest.approx(4096 / taken.total)
    assert step(planned(medium, compile=True), forward).total < step(planned(medium), forward).total


def test_cure(medium: MMDiT, forward: list[int]) -> None:
    """What does not fit is told the fastest strategy with which it does; a GPU that is too small has none."""
    job = planned(medium, 8, 4096)
    assert memory(job).total > H200.memory
    found = fastest_fit(job)
    assert found is not None
    assert memory(replace(job, strategy=found)).total <= H200.memory
    slower = replace(found, activation_checkpointing="full")
    assert step(replace(job, strategy=found), forward).total <= step(replace(job, strategy=slower), forward).total
    assert fastest_fit(replace(job, gpus=1, device=DEVICES["rtx4090"])) is None


# ---- presets and the command


def parameters(depth: int, norms: bool) -> int:
    """Of SD3's network, from its drawing: linear layers with biases; both streams' gains of q and k."""
    w = 64 * depth

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    ends = linear(64, w) + linear(4096, w) + linear(256, w) + linear(2048, w) + 2 * linear(w, w)
    ends += linear(w, 2 * w) + linear(w, 64)
    behind = linear(w, w) + linear(w, 4 * w) + linear(4 * w, w)  # projection and MLP, which the last text lacks
    blocks = depth * (linear(w, 12 * w) + 2 * (linear(w, 3 * w) + behind) + 4 * 64 * norms)
    return ends + blocks - behind - 4 * (w + 1) * w


def test_closed_form_of_parameters() -> None:
    assert parameters(24, False) == 2_028_328_000  # as released: Stable Diffusion 3 medium
    assert parameters(38, True) == 8_056_627_520  # and 3.5 large


@pytest.mark.parametrize("depth", [12, 18, 24, 38])
def test_presets(depth: int) -> None:
    job = preset(depth)
    network = job.network
    assert next(network.parameters()).device.type == "meta"
    assert sum(p.numel() for p in network.parameters()) == parameters(depth, True)
    assert f"{parameters(depth, True):,}" in (ROOT / f"configs/sd3/d{depth}.yaml").read_text()
    assert (network.depth, network.width, network.heads) == (depth, 64 * depth, depth)
    assert memory(job).total <= H200.memory
    assert memory(replace(job, device=DEVICES["h100"])).total <= DEVICES["h100"].memory or depth == 18


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    main(["--config", str(ROOT / "configs/sd3/d24.yaml"), *flags])
    return capsys.readouterr().out


def test_table_and_json_agree(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(run(capsys, "--gpus", "256", "--price", "2.5", "--json"))
    text = run(capsys, "--gpus", "256", "--price", "2.5")
    whole = told["training"][0]
    assert len(told["training"]) == 1  # the preset sees the paper's pictures
    assert whole["pictures"] == 500_000 * 4096
    assert whole["gpu_hours"] == pytest.approx(24 * 256 * whole["days"])
    assert whole["price"] == pytest.approx(2.5 * whole["gpu_hours"])
    assert f"{whole['gpu_hours']:,.0f}" in text
    assert f"{told['memory']['total'] / 1e9:.2f} fits" in text
    assert told["memory"]["total"] == pytest.approx(sum(v for k, v in told["memory"].items() if k != "total"))


def test_a_lora_is_not_billed_for_the_paper_s_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    files = ("sd3/finetune", "sd3/lora-24gb", "network/sd3-medium")
    main([*(word for file in files for word in ("--config", str(ROOT / f"configs/{file}.yaml"))), "--json"])
    assert [whole["steps"] for whole in json.loads(capsys.readouterr().out)["training"]] == [2000]


def test_flags_reach_the_plan() -> None:
    job = preset(24, "--batch_size", "512", "--ema.more", "[0.99]", "--side", "512", "--run.precision", "32-true")
    assert (job.batch, job.averages, job.latent, job.mixed, job.gpus) == (512, 2, (64, 64), False, 64)
    assert preset(24, "--gpus", "8", "--data.batch_size", "64").micro == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpu", "h9000"), "gpu must be one of h200, h100"),
        (("--gpus", "48"), "multiple of 48 gpus × 1 accumulate_grad_batches, got 4096"),
        (("--strategy.replicas", "3"), "replicas must divide the 64 gpus"),
        (("--gpus", "12", "--batch_size", "12"), "multiple of the 8 gpus_per_node"),
        (("--config", str(ROOT / "configs/network/dit.yaml")), "only an MMDiT"),
        (("--config", str(ROOT / "configs/sd3/finetune.yaml")), "read from disk"),
        (("--config", str(ROOT / "configs/network/conv.yaml")), "leave out network.conv_mlp"),
        (("--side", "100"), "side must be a multiple of 16"),
        (("--network.depth", "0"), "at least 1"),
    ],
)
def test_faults_are_one_line(flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(capsys, *flags)
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in told
    assert told.startswith("error:")
    assert told.count("\n") == 1


def test_shape_needs_no_numbers() -> None:
    config = arguments().parse_args(["--config", str(ROOT / "configs/sd3/d38.yaml")])
    assert all(x.is_meta for x in (*shape_of(config).parameters(), *shape_of(config).buffers()))
