"""DiT and CrossDiT where they are used: built from a config, kept on disk and in a model folder."""

import json
from pathlib import Path

import pytest
import torch
from dits import SIZES, both, small
from jsonargparse import ArgumentParser
from networks import inputs
from safetensors.torch import load_file, save_file
from torch import nn

from baselines.dit import DiffusionTransformer, DiT
from data.text.clip import CLIPText
from data.text.sd3 import SD3Text
from flow.objective import Objective
from pipeline import LoadOptions, Pipeline
from pipeline.export import as_folder
from pipeline.folder import single_file
from pipeline.networks import SAVED
from pipeline.sampling import Sampling
from storage.modules import CONFIG, STEM

WEIGHTS = f"{STEM}.safetensors"


@both
def test_save_and_load_keep_every_bit(kind, tmp_path: Path) -> None:
    network = small(kind, out_channels=6, qk_norm=False, patch_size=4)
    network.save(tmp_path)
    loaded = kind.load(tmp_path)
    assert not loaded.training
    assert loaded.settings == network.settings
    assert torch.equal(loaded(*inputs()), network(*inputs()))
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def change_config(folder: Path, **changes: object) -> None:
    file = folder / CONFIG
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}))


def spoil_shape(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["final.linear.bias"] = state["final.linear.bias"][:-1].clone()
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]), "truncated or no safe"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no weights at"),
        (spoil_shape, r"mis-shaped \(final.linear.bias \(11,\) instead of \(12,\)\)"),
        (lambda folder: (folder / CONFIG).unlink(), "there is no .*config.json"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is no JSON"),
        (lambda folder: change_config(folder, _class_name="CrossDiT"), "describes a CrossDiT, not a DiT"),
        (lambda folder: change_config(folder, _class_name="gone"), "describes something else, not a DiT"),
        (lambda folder: change_config(folder, depth=4), r"the weights do not fit this DiT's config: .* missing"),
        (lambda folder: change_config(folder, depth=2), "do not fit this DiT's config: .* left over"),
        (lambda folder: change_config(folder, depth="3"), "value of the wrong type: depth"),
        (lambda folder: change_config(folder, width=48.0), "value of the wrong type: width"),
        (lambda folder: change_config(folder, qk_norm=1), "value of the wrong type: qk_norm"),
        (lambda folder: change_config(folder, heads="gone"), "and no others; fix heads"),
        (lambda folder: change_config(folder, dual=[1]), "and no others; fix dual"),
        (lambda folder: change_config(folder, heads=5), "multiple of heads"),
    ],
)
def test_damaged_folders_are_named_in_one_line(tmp_path: Path, spoil, message: str) -> None:
    small(DiT).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        DiT.load(tmp_path)
    assert "\n" not in str(caught.value)


def whole(kind: type[DiffusionTransformer], text: CLIPText, pipe: Pipeline) -> Pipeline:
    """A small pipeline of random weights, on the digits' text encoder."""
    sizes = {"in_channels": 1, "depth": 2, "width": 32, "heads": 2, "text_dim": 64, "pooled_dim": 64}
    network = small(kind, **sizes, pos_embed_max_size=8)
    return Pipeline(network, Objective(shift=1.5), pipe.codec, text, Sampling(steps=3, guidance=2.0))


@both
def test_training_builds_it_from_its_class_and_sizes(kind) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(nn.Module, "network", required=True)
    told = {
        "class_path": f"baselines.dit.{kind.__name__}",
        "init_args": {k: v for k, v in SIZES.items() if k != "heads"},
    }
    network = parser.instantiate(parser.parse_object({"network": told})).network
    assert type(network) is kind
    assert network.settings == SIZES | {"heads": 1, "patch_size": 2, "out_channels": 3, "qk_norm": True}


@both
def test_it_is_saved_in_a_model_folder(kind, text: CLIPText, pipe: Pipeline, tmp_path: Path) -> None:
    ours = whole(kind, text, pipe)
    ours.save(tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert (index["_class_name"], index["transformer"]) == ("Pipeline", ["baselines.dit", kind.__name__])
    back = Pipeline.load(tmp_path / "model")
    assert type(back.network) is SAVED[kind.__name__] is kind
    prompts = ["a handwritten seven", ""]
    assert torch.equal(back(prompts, [0, 1], height=10), ours(prompts, [0, 1], height=10))
    half = Pipeline.load(tmp_path / "model", LoadOptions(dtype="bfloat16"))
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    half.save(tmp_path / "half")
    assert (
        next(Pipeline.load(tmp_path / "half", LoadOptions(dtype="stored")).network.parameters()).dtype == torch.bfloat16
    )
    assert next(Pipeline.load(tmp_path / "half").network.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="height must be a multiple of 2"):
        ours(prompts, [0, 1], height=9)

    (tmp_path / "model/checksums.json").unlink()
    change_config(tmp_path / "model/transformer", depth=1)
    with pytest.raises(ValueError, match=f"do not fit this {kind.__name__}'s config") as caught:
        Pipeline.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


@both
def test_features_of_mmdit_alone_are_refused(kind, text: CLIPText, pipe: Pipeline, tmp_path: Path) -> None:
    ours, name = whole(kind, text, pipe), kind.__name__
    ours.save(tmp_path / "model")
    with pytest.raises(ValueError, match=f"is a {name}, and only an MMDiT takes a LoRA"):
        Pipeline.load(tmp_path / "model", LoadOptions(lora=(str(tmp_path / "model/checksums.json"),)))
    with pytest.raises(ValueError, match=f"the single-file format holds an MMDiT, not a {name}"):
        single_file(ours.parts)
    with pytest.raises(ValueError, match="skip_layers"):
        ours(["7"], [0], sampling=Sampling(steps=3, guidance=2.0, skip_layers=(0,)))


@both
def test_an_export_states_the_kind_of_network(kind, text: CLIPText, pipe: Pipeline, tmp_path: Path) -> None:
    ours = whole(kind, text, pipe)
    said = as_folder(ours, tmp_path / "out", tmp_path, "digits")
    assert said == f"is for sample.py: diffusers has no {kind.__name__} of this kind"
    card = (tmp_path / "out/README.md").read_text()
    assert f"model: {kind.__name__}, 2 blocks of width 32," in card
    assert "from_pretrained" not in card
    assert torch.equal(Pipeline.load(tmp_path / "out")(["7"], [0]), ours(["7"], [0]))


def test_only_a_folder_that_names_a_third_encoder_is_read_as_stable_diffusion_3_s(model: Path) -> None:
    (model / "checksums.json").unlink()
    file = model / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}))
    assert isinstance(Pipeline.load(model).text, CLIPText)
    file.write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    assert isinstance(Pipeline.load(model).text, SD3Text)
