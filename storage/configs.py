"""What is taken from other people's configs: the keys that describe a network or a tokenizer, and no others.

transformers and diffusers act on more keys than these. Some name code on a hub (`attn_implementation`, `auto_map`),
files elsewhere (`vocab_file`, `gguf_file`), or another form of the results (`return_dict`). None of them has an effect
here.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from storage.text import TEXT_LIMIT, read_json
from storage.weights import foreign

TRANSFORMER = (
    "model_type", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "hidden_act", "layer_norm_eps", "attention_dropout", "dropout", "initializer_range", "initializer_factor",
)  # fmt: skip
CLIP_TEXT = (
    *TRANSFORMER, "vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
CLIP_VISION = (*TRANSFORMER, "num_channels", "image_size", "patch_size")
CLIP = ("projection_dim", "logit_scale_init_value", "initializer_factor")  # beside the two towers
T5 = (
    "model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
    "relative_attention_num_buckets", "relative_attention_max_distance", "dropout_rate", "classifier_dropout",
    "layer_norm_epsilon", "initializer_factor", "feed_forward_proj", "dense_act_fn", "is_gated_act",
    "is_encoder_decoder", "is_decoder", "use_cache", "output_past", "pad_token_id", "eos_token_id",
    "decoder_start_token_id", "tie_word_embeddings", "scale_decoder_outputs",
)  # fmt: skip
VAE = (
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "down_block_types",
    "up_block_types", "mid_block_add_attention", "act_fn", "norm_num_groups", "sample_size", "scaling_factor",
    "shift_factor", "latents_mean", "latents_std", "force_upcast", "use_quant_conv", "use_post_quant_conv",
)  # fmt: skip
TOKENIZER = (
    "model_max_length", "bos_token", "eos_token", "unk_token", "pad_token", "added_tokens_decoder",
    "additional_special_tokens", "extra_special_tokens", "extra_ids", "padding_side", "truncation_side",
    "add_prefix_space", "do_lower_case", "clean_up_tokenization_spaces", "errors", "legacy",
)  # fmt: skip
PROCESSOR = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_convert_rgb",
)  # fmt: skip


MOST = {"num_hidden_layers": 1000, "num_layers": 1000, "layers_per_block": 1000, "extra_ids": 10_000}


def described(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The entries of a config that are among the keys. ValueError for more layers than can be built in a minute."""
    for key, most in MOST.items():
        if isinstance(value := config.get(key), int) and value > most:
            raise ValueError(f"{key} must be at most {most:,}, got {value}")
    return {key: config[key] for key in keys if key in config}


@contextmanager
def tokenizer_files(folder: Path, vocabulary: Iterable[str]) -> Iterator[Path]:
    """A temporary folder with a tokenizer's vocabulary and, of its settings, the keys of TOKENIZER.

    Args:
        folder: the tokenizer's folder.
        vocabulary: the names of its other files, of which some may be absent.

    Raises:
        ValueError: a file holds something else, or is too large.
        OSError: the temporary folder cannot be written.
    """
    with TemporaryDirectory() as place:
        for name in (*vocabulary, "added_tokens.json"):
            file = folder / name
            if not file.is_file():
                continue
            if kind := foreign(file):
                raise ValueError(f"{file} is {kind}")
            if file.stat().st_size > TEXT_LIMIT:
                raise ValueError(f"{file} has more than {TEXT_LIMIT:,} bytes, too many for a tokenizer")
            (Path(place) / name).symlink_to(file.resolve())
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                settings = described(read_json(folder / name), TOKENIZER)
                (Path(place) / name).write_text(json.dumps(settings), encoding="utf-8")
        yield Path(place)
