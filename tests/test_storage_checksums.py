"""A model folder of ours that is damaged or edited is refused before it is used."""

import random
import shutil
from pathlib import Path

import pytest

from mmdit import lora
from pipeline import Pipeline
from pipeline.folder import LoadOptions, read, read_network
from storage.checksums import FILE, verify


def test_a_flipped_bit_in_any_file_is_seen(model: Path) -> None:
    """Twenty flips in each file; the check reads all bytes alike."""
    draw = random.Random(0)
    files = sorted(file for file in model.rglob("*") if file.is_file())
    assert {"checksums.json", "config.json", "scheduler_config.json", "tokenizer.json"} <= {f.name for f in files}
    for file in files:
        good = file.read_bytes()
        for _ in range(20):
            bad = bytearray(good)
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=r"^[^\n]+$"):
                read(model)
        file.write_bytes(good)
    read(model)


@pytest.mark.parametrize("name", ["transformer/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("change", ["edited", "removed", "renamed"])
def test_a_change_is_named_and_can_be_accepted(model: Path, name: str, change: str) -> None:
    file = model / name
    if change == "edited":
        file.write_bytes(file.read_bytes() + b" ")
    elif change == "renamed":
        file.rename(file.with_suffix(".fp16.safetensors"))
    else:
        file.unlink()
    words = "is not as it was written" if change == "edited" else "is missing"
    for act in (lambda: read(model), lambda: read_network(model, LoadOptions())):
        with pytest.raises(ValueError, match=f"{file} {words}.* delete {model / FILE}"):
            act()
    (model / FILE).unlink()
    if name.endswith("json") and change == "edited":
        read(model)


def test_what_changes_nothing_is_free(model: Path, tmp_path: Path) -> None:
    """Another name or place of the folder, and files that are added to it."""
    moved = Path(shutil.move(model, tmp_path / "moved"))
    (moved / "README.md").write_text("mine")
    Pipeline.load(moved)


def test_a_lora_is_checked_too(pipe: Pipeline, model: Path, tmp_path: Path) -> None:
    from mmdit.checkpoint import load

    network = load(model)
    lora.add(network, lora.LoRA(2))
    lora.save(lora.export(network), tmp_path / "lora", str(model))
    verify(tmp_path / "lora")
    file = tmp_path / "lora" / lora.FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for act in (lambda: read(tmp_path / "lora"), lambda: read(model, LoadOptions(lora=(str(tmp_path / "lora"),)))):
        with pytest.raises(ValueError, match="is not as it was written"):
            act()
