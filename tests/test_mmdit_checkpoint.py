"""Names and files of the network: diffusers' folders, the released single files, and what is refused."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdit import checkpoint
from mmdit.model import Condition, MMDiT
from storage.weights import open_file, write_tensors

ROOT = Path(__file__).parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = ["sd3", "sd35_medium", "sd35_large"]


def theirs(kind: str) -> SD3Transformer2DModel:
    """A random transformer of a released kind, as diffusers builds it."""
    torch.manual_seed(0)
    return tiny.frozen(tiny.transformer(kind))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "parameters"), [("sd3-medium", 2028328000), ("sd35-medium", 2243171520), ("sd35-large", 8056627520)]
)
def test_presets_have_the_released_sizes(name: str, parameters: int) -> None:
    config = yaml.safe_load((ROOT / f"configs/network/{name}.yaml").read_text())["network"]
    assert config["class_path"] == "mmdit.model.MMDiT"
    with torch.device("meta"):
        network = MMDiT(**config["init_args"])
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("kind", KINDS)
def test_all_three_formats_are_one_network_to_the_bit(kind: str, tmp_path: Path) -> None:
    """diffusers → ours → single file → diffusers' own converter → ours."""
    opponent = theirs(kind)
    opponent.save_pretrained(tmp_path / "theirs")
    ours = checkpoint.load(tmp_path / "theirs")
    assert same(checkpoint.export(ours, "diffusers"), opponent.state_dict())

    write_tensors(checkpoint.single_file(ours), tmp_path / "one.safetensors")
    converted = convert_sd3_transformer_checkpoint_to_diffusers(load_file(tmp_path / "one.safetensors"))
    converted["pos_embed.pos_embed"] = converted["pos_embed.pos_embed"].clone()
    assert same(converted, opponent.state_dict())
    opponent.load_state_dict(converted)
    opponent.save_pretrained(tmp_path / "again")
    for source in (tmp_path / "one.safetensors", tmp_path / "again"):
        assert same(checkpoint.load(source).state_dict(), ours.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_diffusers_s(kind: str, tmp_path: Path) -> None:
    opponent = theirs(kind)
    opponent.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = checkpoint.load(tmp_path)
    z, t = torch.randn(2, 16, 8, 12), torch.tensor([0.2, 0.9])
    condition = Condition(torch.randn(2, 9, tiny.TOKENS), torch.randn(2, tiny.POOLED))
    for skip in ([], [1]):
        with torch.no_grad():
            expected = opponent(z, condition.text, condition.pooled, 1000 * t, skip_layers=skip or None).sample
            out = ours(z, t, condition, skip_layers=skip)
        assert (out - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_the_config_of_a_single_file_is_read_off_its_shapes(prefix: str, tmp_path: Path) -> None:
    network = MMDiT(3, 4, 3, 48, 3, 20, 10, True, 16, 24, 6, (0, 2))
    state = {prefix + name: tensor for name, tensor in checkpoint.export(network, "original").items()}
    write_tensors(state, tmp_path / "one.safetensors")
    back = checkpoint.load(tmp_path / "one.safetensors")
    names = ("in_channels", "patch_size", "depth", "width", "heads", "text_dim", "pooled_dim", "qk_norm",
             "pos_embed_max_size", "out_channels", "dual_attention_layers")  # fmt: skip
    assert [getattr(back, name) for name in names] == [getattr(network, name) for name in names]
    assert back.sample_size == 96  # not to be seen in the file: as large as the table allows, at most 128


def test_heads_that_a_single_file_cannot_describe_are_refused() -> None:
    with pytest.raises(ValueError, match="without qk_norm whose heads have 16 channels"):
        checkpoint.single_file(MMDiT(3, depth=1, width=48, heads=3, text_dim=20, pooled_dim=10, qk_norm=False))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_come_in_the_type_asked_for(dtype: str, tmp_path: Path) -> None:
    opponent = theirs("sd35_medium").half()
    opponent.save_pretrained(tmp_path, variant="fp16")
    state = checkpoint.load(tmp_path, dtype=dtype).state_dict()
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, dtype)}
    mine = checkpoint.export(checkpoint.load(tmp_path, dtype=dtype), "diffusers")
    assert same(mine, {name: tensor.to(getattr(torch, dtype)) for name, tensor in opponent.state_dict().items()})


def test_a_network_comes_back_from_its_folder_ready_to_train(tmp_path: Path) -> None:
    network = MMDiT(3, depth=2, width=48, heads=3, text_dim=20, pooled_dim=10, sample_size=8, pos_embed_max_size=12)
    checkpoint.save(network, tmp_path)
    back = checkpoint.load(tmp_path)
    assert same(back.state_dict(), network.state_dict())
    assert back.sample_size == 8
    wanted = {name: p.requires_grad for name, p in network.named_parameters()}
    assert {name: p.requires_grad for name, p in back.named_parameters()} == wanted
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o044 == 0o044  # others may read it


MEASURE = """
import os, sys
from pathlib import Path
from mmdit import checkpoint
def peak(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
import torch
torch.zeros(8) @ torch.zeros(8)
small, *places = sys.argv[1:]
for place in places:
    for dtype in ("float32", "bfloat16"):
        if os.fork():
            os.wait()
            continue
        checkpoint.load(small, dtype=dtype)  # so that the code is in memory
        before = peak("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        network = checkpoint.load(place, dtype=dtype)
        size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
        print(place, dtype, (peak("VmHWM") - before) / size, flush=True)
        os._exit(0)
"""


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], float]:
    """The memory that loading took at most, as a multiple of the network's, from each source and in each type."""
    folder = tmp_path_factory.mktemp("memory")
    with torch.device("meta"):
        network = MMDiT(16, depth=4, width=768, text_dim=512, pooled_dim=256, pos_embed_max_size=64, sample_size=64)
    network = network.to_empty(device="cpu")
    checkpoint.save(network, folder / "folder")
    write_tensors(checkpoint.single_file(network), folder / "one.safetensors")
    checkpoint.save(MMDiT(3, depth=1, width=16, text_dim=8, pooled_dim=8, sample_size=8), folder / "small")
    places = [folder / "small", folder / "folder", folder / "one.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *places], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    return {("folder" if Path(place).name == "folder" else "single-file", dtype): float(x) for place, dtype, x in rows}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("source", ["folder", "single-file"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_no_more_memory_than_the_network(
    source: str, dtype: str, memory: dict[tuple[str, str], float]
) -> None:
    assert 0.9 < memory[source, dtype] < 1.1


def test_an_index_without_its_files_does_not_hide_the_variant_that_is_there(tmp_path: Path) -> None:
    opponent = theirs("sd3").half()
    opponent.save_pretrained(tmp_path, variant="fp16")
    table = dict.fromkeys(opponent.state_dict(), "diffusion_pytorch_model-00001-of-00002.safetensors")
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": table}))
    assert same(checkpoint.export(checkpoint.load(tmp_path, "float16"), "diffusers"), opponent.state_dict())
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002"):
        checkpoint.load(tmp_path)


def spoil_truncate(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil_rename(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    for i in (0, 1):
        state[f"double_blocks.{i}.img_attn.qkv.weight"] = state.pop(f"transformer_blocks.{i}.attn.to_q.weight")
    save_file(state, folder / WEIGHTS)


def spoil_shape(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["proj_out.bias"] = state["proj_out.bias"][:-1].clone()
    save_file(state, folder / WEIGHTS)


def spoil_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))


def change(**values: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / checkpoint.CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


def spoil_shards(folder: Path) -> None:
    table = dict.fromkeys(load_file(folder / WEIGHTS), "shard-1.safetensors") | {"more": "shard-1.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / WEIGHTS).rename(folder / "shard-1.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncate, "truncated or no safetensors"),
        (
            spoil_rename,
            r"2 missing \(transformer_blocks\.\{0,1\}\.attn\.to_q\.weight\), 2 left over \(double_blocks\.\{0,1\}\.img",
        ),
        (spoil_shape, r"mis-shaped \(proj_out.bias \(11,\) instead of \(12,\)\)"),
        (spoil_pickle, "holds only diffusion_pytorch_model.bin, a pickle"),
        (spoil_shards, r"promises 1 tensors that its files lack \(more\)"),
        (change(_class_name="FluxTransformer2DModel"), "FluxTransformer2DModel, not an SD3"),
        (change(qk_norm="layer_norm"), "qk_norm 'layer_norm'"),
        (change(caption_projection_dim=7), "caption_projection_dim must be"),
        (change(num_layers="two"), "wrong type"),
        (change(dual_attention_layers=[0]), r"missing \(transformer_blocks.0.attn2"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no weights at"),
        (lambda folder: (folder / checkpoint.CONFIG).write_text("{"), "is no JSON"),
        (lambda folder: (folder / checkpoint.CONFIG).unlink(), "there is no .*config.json"),
    ],
)
def test_damaged_folders_are_named_in_one_line(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    checkpoint.save(MMDiT(3, depth=2, width=48, heads=3, text_dim=20, pooled_dim=10, sample_size=8), tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "it seems to be Flux"),
        (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"], "1, 2 or XL"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "give it as --lora"),
        (["a.b"], r"its tensors are a\.b"),
        ([], "it is empty"),
    ],
)
def test_files_of_other_formats_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "x.safetensors")


def test_pickles_and_missing_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "sd3.ckpt")
    with pytest.raises(ValueError, match="is a pickle"):
        checkpoint.load(tmp_path / "sd3.ckpt")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        checkpoint.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("weights, honestly")
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        open_file(tmp_path / "text.safetensors")


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x4B50])
def test_a_header_as_long_as_a_pickle_s_first_bytes_is_no_pickle(length: int, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert open_file(tmp_path / "a.safetensors")["a"].tolist() == [0.0]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    shared = torch.zeros(3)
    with pytest.raises((OSError, RuntimeError)):
        write_tensors({"a": shared, "b": shared}, tmp_path / "a.safetensors")
    assert open_file(tmp_path / "a.safetensors").shape("a") == (3,)
