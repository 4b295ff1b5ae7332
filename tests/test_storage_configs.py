"""Other people's configs: which keys have an effect, and that wrong values end in one line."""

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from encoders import PROMPTS, SIZES, assert_same
from test_metrics_clip import clip_folder  # noqa: F401  (a fixture)
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig, T5Config

from data.latents import load_codec
from data.text.sd3 import SD3Text
from metrics.features import CLIPFeatures
from mmdit import checkpoint
from pipeline import Pipeline
from pipeline.folder import SCHEDULER, read_process
from storage import configs

STRANGE = {  # each of them acts on something in transformers or diffusers
    "attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel", "experts_implementation": "x",
    "auto_map": {"AutoModel": "someone/code--file.Class", "AutoTokenizer": ["someone/code--file.Class", None]},
    "trust_remote_code": True, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "torch_dtype": "float16", "dtype": "float16", "return_dict": False, "output_hidden_states": False,
    "output_attentions": True, "use_return_dict": False, "gguf_file": "x.gguf", "vocab_file": "/etc/passwd",
    "tokenizer_file": "/etc/passwd", "fast_tokenizer_files": ["/etc/passwd"], "init_inputs": ["x"],
    "tokenizer_object": "x", "tokenizer_class": "SomeTokenizer", "chat_template": "{{ 1 }}", "model_input_names": ["x"],
    "fix_mistral_regex": True, "processor_class": "x", "image_processor_type": "x", "use_fast": False,
    "_name_or_path": "someone/model", "_commit_hash": "x", "_use_default_values": ["shift_factor"],
}  # fmt: skip


def fields(config: type) -> set[str]:
    """The settings of a config's own class, without those that all configs of transformers have."""
    return set(config.__annotations__)


def test_the_keys_are_those_that_describe_a_network() -> None:
    """The rest are of released configs and change nothing; they stay so that hashes of encoders stay the same."""
    assert set(configs.CLIP_TEXT) == fields(CLIPTextConfig) | {"model_type", "dropout"}
    assert set(configs.CLIP_VISION) == fields(CLIPVisionConfig) | {"model_type", "dropout"}
    assert set(configs.T5) - fields(T5Config) == {
        "model_type", "dense_act_fn", "is_gated_act", "output_past", "decoder_start_token_id", "tie_word_embeddings",
        "scale_decoder_outputs",
    }  # fmt: skip
    assert set(configs.VAE) == set(inspect.signature(AutoencoderKL).parameters)
    assert all(hasattr(CLIPImageProcessor(), key) for key in configs.PROCESSOR)
    lists = (configs.CLIP_TEXT, configs.CLIP_VISION, configs.CLIP, configs.T5, configs.VAE, configs.TOKENIZER)
    assert not STRANGE.keys() & {key for keys in (*lists, configs.PROCESSOR) for key in keys}


def plant(folder: Path, more: dict[str, object]) -> None:
    for file in folder.rglob("*config.json"):
        content = json.loads(file.read_text())
        for part in (content, *(content[name] for name in ("text_config", "vision_config") if name in content)):
            part.update({key: value for key, value in more.items() if key not in part})
        file.write_text(json.dumps(content))
        if file.name == "tokenizer_config.json":
            (file.parent / "special_tokens_map.json").write_text(json.dumps(more))


@pytest.fixture
def strange(released: tuple, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(released[1], tmp_path / "strange"))
    plant(folder, STRANGE)
    return folder


def test_other_keys_of_a_model_folder_have_no_effect(released: tuple, strange: Path, tmp_path: Path) -> None:
    ours, plain = Pipeline.load(strange), Pipeline.load(released[1])
    prints = [pipe.text.fingerprint() for pipe in (ours, plain)]
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert prints[0][name]["weights"] == prints[1][name]["weights"]
    assert ours.codec.fingerprint() == plain.codec.fingerprint()
    assert_same(ours.text.encode(PROMPTS), plain.text.encode(PROMPTS))
    assert torch.equal(*(pipe(["a seven"], [0], height=64, width=64) for pipe in (ours, plain)))
    ours.save(tmp_path / "again")
    for file in (tmp_path / "again").rglob("config.json"):  # tokenizers are copied
        assert not (STRANGE.keys() - {"dtype"}) & json.loads(file.read_text()).keys()


def test_other_keys_of_a_clip_have_no_effect(clip_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    plant(folder, STRANGE)
    pictures = torch.rand(2, 3, 20, 24)
    ours, plain = CLIPFeatures(folder), CLIPFeatures(clip_folder)
    assert ours.preprocessing == plain.preprocessing
    assert torch.equal(ours(pictures).pooled, plain(pictures).pooled)
    assert torch.equal(ours.text(["a seven"]), plain.text(["a seven"]))


def test_a_clip_s_old_config_is_read(clip_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """One number for a size, and the towers under two names, as in OpenAI's files."""
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    old = {f"{name}_dict": config[name] for name in ("text_config", "vision_config")} | {"text_config": None}
    (folder / "config.json").write_text(json.dumps(config | old))
    sizes = json.loads((folder / "preprocessor_config.json").read_text()) | {"size": 16, "crop_size": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    ours, plain = CLIPFeatures(folder), CLIPFeatures(clip_folder)
    pictures = torch.rand(2, 3, 20, 24)
    assert ours.preprocessing == plain.preprocessing
    assert torch.equal(ours(pictures).pooled, plain(pictures).pooled)


LOADERS: dict[str, Callable[[Path], object]] = {
    "transformer/config.json": checkpoint.load,
    "vae/config.json": lambda folder: load_codec(folder / "vae"),
    SCHEDULER.as_posix(): lambda folder: read_process(folder / SCHEDULER),
    "text_encoder/config.json": lambda folder: SD3Text(folder, **SIZES),
    "text_encoder_3/config.json": lambda folder: SD3Text(folder, **SIZES),
    "tokenizer/tokenizer_config.json": lambda folder: SD3Text(folder, **SIZES),
    "tokenizer/tokenizer.json": lambda folder: SD3Text(folder, **SIZES),
    "tokenizer_3/tokenizer_config.json": lambda folder: SD3Text(folder, **SIZES),
    "tokenizer_3/tokenizer.json": lambda folder: SD3Text(folder, **SIZES),
    "model_index.json": Pipeline.load,
}
NESTED = "[" * 100_000, '{"model_max_length":' * 900 + "1" + "}" * 900, "[]"
WRONG: dict[str, dict[str, list[Any]]] = {
    "vae/config.json": {
        "shift_factor": ["x", [], 1e999], "scaling_factor": ["x", 0, None, True], "sample_size": ["x", -1, {}],
        "norm_num_groups": [-1, True], "layers_per_block": [10**12, 1.5], "block_out_channels": [3, "x"],
    },
    SCHEDULER.as_posix(): {"shift": ["x", None, [], -1, 1e999], "num_train_timesteps": ["x", 7]},
    "transformer/config.json": {
        "num_layers": ["x", 10**12, 10**400, 2.0, True], "patch_size": [0, -1, None], "sample_size": [[16, 16]],
        "dual_attention_layers": ["x", [10**12], 1, [[0]]], "num_attention_heads": [10**12], "time_scale": ["x", 1e999],
    },
    "text_encoder/config.json": {
        "num_attention_heads": [-1, 0, "x"], "num_hidden_layers": [10**12], "layer_norm_eps": [None, "x"],
        "eos_token_id": [None, [], 10**400], "hidden_act": ["x", {}],
    },
    "text_encoder_3/config.json": {"num_layers": [10**12, None], "d_kv": [-1], "feed_forward_proj": ["x-y-z"]},
    "tokenizer_3/tokenizer_config.json": {"extra_ids": [10**12, "x"], "pad_token": [5]},
}  # fmt: skip


def faults() -> Iterator[tuple[str, str, object]]:
    for name in LOADERS:
        yield from ((name, "", text) for text in NESTED)
    for name, keys in WRONG.items():
        yield from ((name, key, value) for key, values in keys.items() for value in values)


@pytest.fixture(scope="module")
def spare(released: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(released[1], tmp_path_factory.mktemp("spare") / "model"))


@pytest.mark.parametrize(("name", "key", "value"), faults(), ids=lambda x: str(x)[:30])
def test_a_wrong_value_is_one_line(spare: Path, name: str, key: str, value: object) -> None:
    file = spare / name
    good = file.read_text()
    file.write_text(json.dumps(json.loads(good) | {key: value}) if key else str(value))
    try:
        with pytest.raises((ValueError, FileNotFoundError), match=r"^[^\n]+$"):
            LOADERS[name](spare)
    finally:
        file.write_text(good)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"), (b"<html>", "web page")],
)
def test_a_tokenizer_s_file_of_another_kind_is_named(spare: Path, content: bytes, message: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(spare, tmp_path / "model"))
    (folder / "tokenizer_3/tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.json is a {message}"):
        SD3Text(folder, **SIZES)
